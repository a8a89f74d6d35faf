"""Where tensors lie: a ring allocator over a segment or a device, and the leases of its blocks."""
