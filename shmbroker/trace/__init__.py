"""Traces of calls, for Perfetto."""
