"""The tests of lane and arena on compiled parts built with sanitizers: ``python -m tests.sanitize``, or ``make sanitize``."""
