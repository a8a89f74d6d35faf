"""``python -m gpu_worker``: the same as the console script."""

from gpu_worker.cli import main

main()
