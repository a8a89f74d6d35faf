"""A call's way from an op to a frame and back: plans, queue pairs, completions, futures."""
