"""Frames (binary descriptors), submission and completion queues, doorbells, and the two lanes made of them."""
