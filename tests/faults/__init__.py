"""Faults: processes that are killed at a chosen step of the protocol, and what must hold for those that live on."""
