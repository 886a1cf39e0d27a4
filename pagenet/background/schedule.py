"""The order in which the background fills what nobody has touched yet: faults in, runs out.

Policy alone: no I/O, no clock, and nothing that a fault waits for. Faults come in batches, a little
late, and some may be missing; a schedule that hears of none goes from the first page to the last.
What it remembers is bounded, whatever the size of the region and the number of faults; what one
decision costs is bounded too, but for the search through pages that are there already, a byte each,
in C.
"""

from __future__ import annotations

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
    "Recorded",
    "Schedule",
    "check_schedule",
    "make_schedule",
]

#: by name, in the order in which people should read of them
SCHEDULES = ("hot", "follow", "linear", "off")
#: what the name of a recording's file follows
RECORDED = "recorded="


def check_schedule(name: str) -> None:
    """:exc:`UsageError` if there is no schedule of that name, or its recording cannot be read."""
    if name.startswith(RECORDED):
        load_recording(name.removeprefix(RECORDED))
    elif name not in SCHEDULES:
        raise UsageError(
            f"no background order {name!r}: there are {', '.join(SCHEDULES)}, {RECORDED}FILE"
        )


def make_schedule(name: str, region: Region, residency: Residency) -> Schedule | None:
    """The schedule of that name; None for ``off``. :exc:`UsageError` as :func:`check_schedule`."""
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
