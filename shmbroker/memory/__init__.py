"""Shared memory as bytes: segments and their layout (the ABI), where they lie, who holds them, the reaper. Imports neither torch nor NumPy."""
