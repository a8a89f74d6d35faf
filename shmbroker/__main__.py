"""``python -m shmbroker``: the same as the console script."""

from shmbroker.commands.cli import main

main()
