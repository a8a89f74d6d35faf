"""The ``shmbroker`` command: one file for each subcommand. What a subcommand alone needs is imported inside of it: the broker daemon starts here too."""
