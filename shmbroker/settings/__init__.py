"""Settings: what there is, and where each value comes from."""

from shmbroker.settings.schema import DEFAULTS
from shmbroker.settings.sizes import mib

__all__ = ["DEFAULTS", "mib"]
