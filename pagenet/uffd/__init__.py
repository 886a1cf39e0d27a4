"""Everything that touches userfaultfd: the descriptor, its events, owners and their handshake, placement."""

from ._abandoned import AbandonedOwner, Mapped, file_behind, mapped_at
from ._attached import AttachedOwner
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
    "AttachedOwner",
    "Event",
    "Fault",
    "Feature",
    "Forked",
    "Mapped",
    "Mapping",
    "Mode",
    "OwnMemory",
    "Remapped",
    "Removed",
    "UffdSocket",
    "UffdTarget",
    "Unmapped",
    "Userfaultfd",
    "file_behind",
    "mapped_at",
    "parse_mappings",
    "probe",
]
