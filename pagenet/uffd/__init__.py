"""Everything that touches userfaultfd: the descriptor, its events, owners and their handshake, placement."""

from ._abandoned import AbandonedOwner
from ._handshake import Mapping, parse_mappings
from ._owners import OwnMemory, UffdSocket
from ._target import UffdTarget
from ._userfaultfd import (
    Event,
    Fault,
    Feature,
    Forked,
    Mode,
    Remapped,
    Removed,
    Unmapped,
    Userfaultfd,
    probe,
)

__all__ = [
    "AbandonedOwner",
    "Event",
    "Fault",
    "Feature",
    "Forked",
    "Mapping",
    "Mode",
    "OwnMemory",
    "Remapped",
    "Removed",
    "UffdSocket",
    "UffdTarget",
    "Unmapped",
    "Userfaultfd",
    "parse_mappings",
    "probe",
]
