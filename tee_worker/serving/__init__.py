"""An OpenAI-compatible endpoint over a split model."""
