"""The prototype's prefill: its calls, a worker that answers them, and the readings in which they are measured."""
