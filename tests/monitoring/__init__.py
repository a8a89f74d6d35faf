"""Tests of what looks at an instance: metrics, top, map."""
