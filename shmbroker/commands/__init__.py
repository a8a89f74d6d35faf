"""The ``shmbroker`` command: one file for each subcommand."""
