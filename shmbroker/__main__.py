"""``python -m shmbroker``: the same as the console script."""

from shmbroker.cli import main

main()
