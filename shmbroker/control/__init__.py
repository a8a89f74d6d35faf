"""Typed ZeroMQ control messages and the sockets that carry them. Imports nothing of ours but ``shmbroker.errors``."""
