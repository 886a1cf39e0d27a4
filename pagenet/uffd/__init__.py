"""Everything that uses userfaultfd: the descriptor and its events, owners and their handshake, and
placement."""

from ..target import Event, Fault, Forked, Remapped, Removed, Unmapped
from ._abandoned import AbandonedOwner
from ._attached import AttachedOwner
from ._cache_memory import CacheMemory
from ._handshake import Mapping, parse_mappings
from ._owners import (
    ConnectedOwner,
    Keeper,
    Naming,
    OwnMemory,
    SharedFile,
    UffdListener,
    UffdSocket,
)
from ._process import Mapped, MappedPages, OtherProcess
from ._target import UffdTarget
from ._tracking import WriteTracker
from ._userfaultfd import Feature, Mode, Userfaultfd, check_poison, probe

__all__ = [
    "AbandonedOwner",
    "AttachedOwner",
    "CacheMemory",
    "ConnectedOwner",
    "Event",
    "Fault",
    "Feature",
    "Forked",
    "Keeper",
    "Mapped",
    "MappedPages",
    "Mapping",
    "Mode",
    "Naming",
    "OtherProcess",
    "OwnMemory",
    "Remapped",
    "Removed",
    "SharedFile",
    "UffdListener",
    "UffdSocket",
    "UffdTarget",
    "Unmapped",
    "Userfaultfd",
    "WriteTracker",
    "check_poison",
    "parse_mappings",
    "probe",
]
