"""The program that holds a model's weights and computes for TEE workers. Imports :mod:`shmbroker`, never :mod:`tee_worker`."""
