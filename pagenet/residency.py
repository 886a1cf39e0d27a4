"""The destination's map of pages: what is missing, asked for, in place. The only truth about progress.

One byte a page in a memfd, changed by compare-and-swap alone (``native/residency.c``), so that lanes in C threads and in
other processes share it with Python. A page goes from MISSING to COMING (asked for in the background) or REQUESTED (asked for
because somebody waits), to PLACING, in shared memory to READY, to RESIDENT; whoever moved it to PLACING, and nobody else, may
write it. Never backwards: a page that its owner gave up is REMOVED for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Self

from . import _native
from .errors import HandshakeError
from .region import Run
from .statistics import ClassStatistics, Histogram

__all__ = ["Residency", "State"]


class State(IntEnum):
    MISSING = _native.STATES["missing"]
    #: asked for in the background: asked for again, ahead of it, if somebody waits for it
    COMING = _native.STATES["coming"]
    REQUESTED = _native.STATES["requested"]
    PLACING = _native.STATES["placing"]
    RESIDENT = _native.STATES["resident"]
    #: its owner gave it up while it was PLACING: whoever places it is to leave it REMOVED
    REMOVING = _native.STATES["removing"]
    #: its owner gave it up: reads as zero, never again as what the source has
    REMOVED = _native.STATES["removed"]
    #: the owner does not map it
    OUTSIDE = _native.STATES["outside"]
    POISONED = _native.STATES["poisoned"]
    #: shared memory has its bytes, and it is being made visible, or was just now
    READY = _native.STATES["ready"]


_DONE_WITH = (State.RESIDENT, State.REMOVED, State.OUTSIDE, State.POISONED)


class Residency:
    """Page states and transfer counters of ``pages`` pages, all MISSING at first. Memory: one byte a page.

    ``file``, ``note``, ``recover``: as of :class:`~pagenet._native.SharedMap`, which says what it raises. Of a map that was
    recovered the READY and REMOVING pages are still as their users have left them, and the counters go on: what those had done
    last may not be counted.
    """

    def __init__(self, pages: int, *, note: bytes = b"", file: int | None = None, recover: bool = False) -> None:
        self.pages = pages
        #: for lanes in C
        self.shared = _native.SharedMap(pages, note, file, recover=recover)
        self.is_recovered = recover

    def close(self) -> None:
        self.shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def scope(self) -> int:
        """Pages that are to become resident: all but those OUTSIDE."""
        return self.shared.scope

    @property
    def done(self) -> int:
        """Pages of the scope that are RESIDENT, REMOVED or POISONED."""
        return self.shared.done

    @property
    def complete(self) -> bool:
        return self.done == self.scope

    def finish(self) -> None:
        """The source knows that everything is in place: whoever finds the map has nothing left to do."""
        self.shared.finish()

    def state(self, page: int) -> State:
        try:
            return State(self.shared.state(page))
        except ValueError:
            what = f"page {page} is in no state that it can be in"
            raise HandshakeError(f"the owner has written to the map of its pages: {what}") from None

    def claim(self, run: Run, from_: State, to: State) -> int:
        """Move pages of ``run`` from one state to another, and stop at the first that is in neither: how many."""
        return self.shared.claim(run.first, run.count, from_, to)

    def replace(self, run: Run, from_: State, to: State) -> int:
        """Move those pages of ``run`` that are in state ``from_``: how many."""
        return self.shared.replace(run.first, run.count, from_, to)

    def set(self, run: Run, to: State) -> None:
        self.shared.set(run.first, run.count, to)

    def find(self, state: State, first: int, end: int | None = None) -> int | None:
        """The first page from ``first`` on, before ``end``, that is in ``state``."""
        end = self.pages if end is None else end
        found = self.shared.find(first, end, state) if first < end else end
        return found if found < end else None

    def span(self, run: Run, state: State) -> int:
        """How many pages from the start of ``run`` are in ``state``."""
        return self.shared.span(run.first, run.end, state)

    def missing(self) -> list[Run]:
        """The pages that are neither in place nor given up, as runs."""
        runs: list[Run] = []
        first = 0
        while first < self.pages:
            # Looking at what was never touched would cost memory, and a region may be far larger than what came of it.
            start, end = self.shared.touched(first)
            if first < start:
                runs.append(Run(first, start - first))
            runs += self._missing_between(start, end)
            first = end
        return runs

    def _missing_between(self, first: int, end: int) -> Iterator[Run]:
        while first < end:
            state = self.shared.state(first)
            count = self.shared.span(first, end, state)
            if state not in _DONE_WITH:
                yield Run(first, count)
            first += count or 1  # whoever else writes to the map may have changed it since

    def add(self, class_: int, counter: str, amount: int = 1) -> None:
        self.shared.add(class_, _native.COUNTERS[counter], amount)

    def add_latency(self, class_: int, nanoseconds: int) -> None:
        self.shared.add_latency(class_, nanoseconds)

    def statistics(self, class_: int) -> ClassStatistics:
        counters = self.shared.counters(class_)
        values = {name: counters[index] for name, index in _native.COUNTERS.items()}
        return ClassStatistics(**values, latency=Histogram(tuple(self.shared.latencies(class_))))
