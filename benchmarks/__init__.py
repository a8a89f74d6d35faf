"""Benchmarks: ``python -m benchmarks [name ...]``. Every comparison pairs both sides in one run, alternating. Nothing here is asserted by tests."""
