"""A worker's side of a service: ops, the loop that runs frames, control requests."""
