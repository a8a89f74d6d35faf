"""Whether the compiled parts are wanted: ``SHMBROKER_PURE_PYTHON=1`` in the environment asks for Python everywhere."""

from __future__ import annotations

import os

WANTED = os.environ.get("SHMBROKER_PURE_PYTHON", "") in ("", "0")
