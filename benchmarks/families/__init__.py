"""Which families of transformers' decoders give the same numbers at which split: ``python -m benchmarks.families``."""
