"""The order in which the background fetches untouched pages: faults in, runs out.

Policy alone: no I/O, no clock, and nothing that a fault waits for. Faults come in batches, a little
late, and some may be missing. A schedule that is told of no faults goes from the first page to the
last. What it remembers is bounded, whatever the size of the region and the number of faults. The
cost of one decision is bounded too, except for the search past pages that are there already: one
byte for each page, in C.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UsageError
from ..region import Region
from ..residency import Residency
from ._follow import Follow
from ._hot import Hot
from ._linear import Linear
from ._recorded import Recorded
from ._schedule import Schedule
from .recording import load_recording

__all__ = [
    "RECORDED",
    "SCHEDULES",
    "Follow",
    "Hot",
    "Linear",
    "Order",
    "Recorded",
    "Schedule",
    "check_schedule",
    "make_schedule",
]

#: names, in the order in which people should read about them
SCHEDULES = ("hot", "follow", "linear", "off")
#: begins the name of a schedule that replays a recording; the recording's path follows
RECORDED = "recorded="


#: a schedule's name, or what makes one of one's own
Order = str | Callable[[Region, Residency], Schedule]


def check_schedule(name: Order) -> None:
    """Raise :exc:`UsageError` if no schedule has that name, or its recording cannot be read."""
    if not isinstance(name, str):
        return
    if name.startswith(RECORDED):
        load_recording(name.removeprefix(RECORDED))
    elif name not in SCHEDULES:
        raise UsageError(
            f"no background order {name!r}: there are {', '.join(SCHEDULES)}, {RECORDED}FILE"
        )


def make_schedule(name: Order, region: Region, residency: Residency) -> Schedule | None:
    """The schedule of that name; None for ``off``. Raises :exc:`UsageError` as
    :func:`check_schedule` does."""
    if not isinstance(name, str):
        return name(region, residency)
    if name.startswith(RECORDED):
        return Recorded(
            region, residency, load_recording(name.removeprefix(RECORDED)).pages_in(region)
        )
    check_schedule(name)
    match name:
        case "hot":
            return Hot(region, residency)
        case "follow":
            return Follow(region, residency)
        case "linear":
            return Linear(region, residency)
    return None
