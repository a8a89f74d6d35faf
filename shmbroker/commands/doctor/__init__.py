"""``shmbroker doctor``: what is wrong here, and what to do about it. One file for each family of checks."""
