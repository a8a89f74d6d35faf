"""Whether the compiled parts are wanted: ``SHMBROKER_PURE_PYTHON=1`` in the environment asks for Python everywhere."""

from __future__ import annotations

from shmbroker.settings.load import current

WANTED = not current().pure_python
