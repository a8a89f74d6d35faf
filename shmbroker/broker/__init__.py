"""The broker daemon: makes segments, introduces peers, watches processes, reaps. Imports neither torch nor NumPy."""
