"""The control channel: typed messages, the sockets that carry them, and how a process joins a broker. Imports neither torch nor NumPy."""
