"""The programs of ``examples/``, against a real broker and real workers."""
