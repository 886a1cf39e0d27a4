"""The order in which the background fills what nobody has touched yet. Policy alone: no I/O, nothing a fault waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .errors import UsageError
from .region import Region, Run
from .residency import Residency, State

__all__ = ["SCHEDULES", "Linear", "Schedule", "make_schedule"]


class Schedule(Protocol):
    def next_run(self, max_bytes: int) -> Run | None:
        """MISSING pages to ask for next: within a block, at most ``max_bytes`` but at least a page. None: there are none."""
        ...


class Linear:
    """From the first page to the last."""

    def __init__(self, region: Region, residency: Residency) -> None:
        self._region = region
        self._residency = residency
        self._cursor = 0

    def next_run(self, max_bytes: int) -> Run | None:
        # Pages never become MISSING again, and what was handed out is asked for: nothing is to be done behind the cursor.
        first = self._residency.find(State.MISSING, self._cursor)
        if first is None:
            return None
        most = next(self._region.split(Run(first, self._region.pages - first), max_bytes))
        run = Run(first, self._residency.span(most, State.MISSING))
        self._cursor = run.end
        return run


SCHEDULES: dict[str, Callable[[Region, Residency], Schedule]] = {"linear": Linear}


def make_schedule(name: str, region: Region, residency: Residency) -> Schedule | None:
    """The schedule of that name; None for ``off``."""
    if name == "off":
        return None
    if name not in SCHEDULES:
        raise UsageError(f"no background order {name!r}: there are {', '.join(['off', *sorted(SCHEDULES)])}")
    return SCHEDULES[name](region, residency)
