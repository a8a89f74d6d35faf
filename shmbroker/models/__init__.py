"""Hugging Face checkpoints as both workers need them: loading, shapes of their ops, random weights."""
