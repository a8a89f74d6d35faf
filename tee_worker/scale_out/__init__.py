"""Replicas of a split model on several hosts, placed and supervised by Ray. Each has its own broker and GPU worker; shared memory never spans hosts."""
