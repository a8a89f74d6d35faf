"""``python -m tee_worker``: the same as the console script."""

from tee_worker.cli import main

main()
