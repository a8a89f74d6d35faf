"""Settings: what there is, and where each value comes from. Programs import what they need of it from here."""

from shmbroker.settings.kinds import DOORBELL_WORDS, LANE_WORDS, TRUST_WORDS, listed
from shmbroker.settings.load import current
from shmbroker.settings.schema import DEFAULTS, OWN_DEFAULTS, default_for
from shmbroker.settings.sizes import MIB, mib, parse_bytes

__all__ = [
    "DEFAULTS",
    "DOORBELL_WORDS",
    "LANE_WORDS",
    "MIB",
    "OWN_DEFAULTS",
    "TRUST_WORDS",
    "current",
    "default_for",
    "listed",
    "mib",
    "parse_bytes",
]
