"""A client's side of a service: connecting, channels, failover."""
