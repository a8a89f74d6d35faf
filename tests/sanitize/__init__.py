"""The tests of lane, arena and the trust modes' loops on compiled parts built with sanitizers: ``python -m tests.sanitize``, or ``make sanitize``."""
