"""Moving a model's heavy modules to a GPU worker."""
