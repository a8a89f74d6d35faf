"""Segment (a POSIX shared-memory object), its layout (the ABI), ring allocator, arena (blocks as tensors).

Imports nothing of ours but ``shmbroker.errors``. ``arena`` and ``spec`` need torch; ``layout``, ``segment`` and ``ring`` do not,
so the broker imports those alone.
"""
