"""What ``pagenet-bench restore`` is asked for, and what it finds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import UsageError
from .._figures import Sample
from ._arrival import Arrival, Touched

__all__ = [
    "PAGE",
    "RESTORE_ROWS",
    "TOUCHED_ONLY",
    "Curve",
    "Figure",
    "GuestKind",
    "RestoreOptions",
    "beside",
    "curve_of",
    "pieces_of",
]

PAGE = 4096
#: of pagenet-pull: nothing comes that no guest has touched, but for the pages around it
TOUCHED_ONLY = ("--fill", "touched", "--background", "off")
RESTORE_ROWS = ("warm", "store", "clones", "recorded", "chain", "many", "start")
#: what the memory of a guest is: its own, or a private mapping of the daemon's cache
GuestKind = Literal["anonymous", "shared"]
# ns. A touch that takes as long is drawn as a stall.
_STALL = 1_000_000


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """``guests`` at once in ``warm`` and ``store``; ``clones`` of ``size`` bytes, each of which
    touches ``working_set`` bytes of it; ``recorded`` bytes of a memory of ``memory`` bytes; both in
    pieces of ``piece`` bytes. ``layers`` of the chain. ``in_turn`` and ``at_once``: guests of
    ``many``, with a ``hostile`` one among them."""

    rows: Sequence[str] = RESTORE_ROWS
    kind: GuestKind = "anonymous"
    rounds: int = 3
    guests: int = 64
    clones: int = 32
    size: int = 1 << 30
    working_set: int = 16 << 20
    recorded: int = 24 << 20
    memory: int = 1 << 30
    piece: int = 64 << 10
    layers: int = 1000
    in_turn: int = 1000
    at_once: int = 256
    hostile: bool = False

    @property
    def shared(self) -> bool:
        return self.kind == "shared"

    def check(self) -> None:
        """:exc:`UsageError` if sizes make no sense."""
        for size in (self.size, self.working_set, self.recorded, self.memory):
            if size % self.piece or self.piece % PAGE:
                raise UsageError(f"{size} bytes are not whole pieces of {self.piece}")
        if self.working_set > self.size or self.recorded > self.memory:
            raise UsageError("there is more to touch than there is memory")


@dataclass(frozen=True, slots=True)
class Figure:
    """``value`` beside its ``floor``, in ``unit``. The ``limit`` is of the ratio, or of the value
    where there is no floor; None: there is none. ``at_least``: it is the lowest that is allowed."""

    row: str
    name: str
    value: float
    unit: str = ""
    floor: float | None = None
    limit: float | None = None
    at_least: bool = False
    #: of several rounds; None: value / floor
    measured_ratio: float | None = None

    @property
    def ratio(self) -> float | None:
        if self.measured_ratio is not None:
            return self.measured_ratio
        return round(self.value / self.floor, 3) if self.floor else None

    @property
    def met(self) -> bool | None:
        """None: there is no limit."""
        if self.limit is None:
            return None
        held = self.value if self.floor is None else self.ratio
        return held is not None and (held >= self.limit if self.at_least else held <= self.limit)


def beside(
    row: str,
    name: str,
    sample: Sample,
    floor: Sample,
    share: float,
    limit: float | None = None,
) -> Figure:
    """Latencies beside their floor: the quantile at ``share``, in us."""
    value, least = sample.microseconds(share), floor.microseconds(share)
    assert value is not None
    ratio = sample.ratio(floor, share)
    return Figure(row, name, value, "us", least, limit, measured_ratio=ratio)


@dataclass(frozen=True, slots=True)
class Curve:
    """How one arrival went: the share of the guests' memory that was ``resident``, and the
    ``stalls``: when each was over, and how long it was. All in seconds since the first guest began
    to connect."""

    row: str
    name: str
    resident: Sequence[tuple[float, float]]
    stalls: Sequence[tuple[float, float]]


def curve_of(row: str, name: str, arrival: Arrival, touched: Sequence[Touched], size: int) -> Curve:
    began = min(guest.connected for guest in touched)
    resident = [((at - began) / 1e9, held / (size * len(touched))) for at, held in arrival.samples]
    stalls = [
        ((ended - began) / 1e9, took / 1e9)
        for guest in touched
        for ended, took in zip(guest.ended, guest.took, strict=True)
        if took >= _STALL
    ]
    return Curve(row, name, resident, stalls)


def pieces_of(size: int, wanted: int, piece: int, seed: int = 0) -> list[int]:
    """The pages of ``wanted`` bytes of a memory of ``size`` bytes: aligned pieces of ``piece``
    bytes, in a random order, each from its first page to its last."""
    each = piece // PAGE
    chosen = random.Random(seed).sample(range(size // piece), wanted // piece)
    return [number * each + page for number in chosen for page in range(each)]
