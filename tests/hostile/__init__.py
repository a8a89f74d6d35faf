"""Peers that keep no rule: whatever they send, nobody else is disturbed."""
