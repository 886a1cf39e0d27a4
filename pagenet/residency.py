"""The destination's map of pages: what is missing, asked for, in place. The only truth about
progress.

One byte a page in a memfd, changed by compare-and-swap alone (``native/residency.c``), so that
lanes in C threads and in other processes share it with Python. A page goes from MISSING to COMING
(asked for in the background) or REQUESTED (asked for because somebody waits), to PLACING, in shared
memory to READY, to RESIDENT; whoever moved it to PLACING, and nobody else, may write it. Never
backwards: a page that its owner gave up is REMOVED for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


_DONE_WITH = (State.RESIDENT, State.REMOVED, State.POISONED)
_WROTE = "the owner has written to the map of its pages"


class Residency:
    """Page states and transfer counters of ``pages`` pages, all MISSING at first. Memory: one byte
    a page.

    ``file``, ``note``, ``recover``: as of :class:`~pagenet._native.SharedMap`, which says what it
    raises. Of a map that was recovered the READY and REMOVING pages are still as their users have
    left them, and the counters go on: what those had done last may not be counted.
    """

    def __init__(
        self, pages: int, *, note: bytes = b"", file: int | None = None, recover: bool = False
    ) -> None:
        self.pages = pages
        #: for lanes in C
        self.shared = _native.SharedMap(pages, note, file, recover=recover)
        self.is_recovered = recover
        self._scope: Sequence[Run] = (Run(0, pages),)

    def close(self) -> None:
        self.shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def confine(self, scope: Sequence[Run]) -> None:
        """Nothing is to become resident but ``scope``: all else is OUTSIDE. Of a map that was
        recovered, it is so.

        :exc:`HandshakeError` if it is not.
        """
        self._scope = sorted(scope, key=lambda run: run.first)
        self.shared.scope = sum(run.count for run in scope)
        for run in _between(self._scope, self.pages):
            if not self.is_recovered:
                self.set(run, State.OUTSIDE)
            elif self.span(run, State.OUTSIDE) < run.count:
                raise HandshakeError(f"{_WROTE}: it is not that of its mappings")
        if self.is_recovered and any(
            self.find(State.OUTSIDE, run.first, run.end) is not None for run in scope
        ):
            raise HandshakeError(f"{_WROTE}: it is not that of its mappings")

    @property
    def scope(self) -> int:
        """Pages that are to become resident: all but those OUTSIDE. Kept in this process alone."""
        return self.shared.scope

    @property
    def done(self) -> int:
        """Pages of the scope that are RESIDENT, REMOVED or POISONED, as far as the map's counter is
        right."""
        return min(self.shared.done, self.scope)

    @property
    def complete(self) -> bool:
        return self.done == self.scope

    def check_complete(self) -> None:
        """It is :attr:`complete`. :exc:`HandshakeError` if not every page of the scope is RESIDENT,
        REMOVED or POISONED. Looks at each: once, at the end."""
        for run in self._scope:
            if (page := self.shared.unsettled(run.first, run.end)) < run.end:
                raise HandshakeError(
                    f"{_WROTE}: it counts all of them as in place, and page {page} is not"
                )

    def finish(self) -> None:
        """The source knows that everything is in place: whoever finds the map has nothing left to
        do."""
        self.shared.finish()

    def state(self, page: int) -> State:
        try:
            return State(self.shared.state(page))
        except ValueError:
            what = f"page {page} is in no state that it can be in"
            raise HandshakeError(f"{_WROTE}: {what}") from None

    def claim(self, run: Run, from_: State, to: State) -> int:
        """Move pages of ``run`` from one state to another, and stop at the first that is in
        neither: how many."""
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
        """The pages of the scope that are neither in place nor given up, as runs of which each lies
        within one of its own."""
        return [run for part in self._scope for run in self._missing_of(part)]

    def _missing_of(self, part: Run) -> Iterator[Run]:
        first = part.first
        while first < part.end:
            # Looking at what was never touched would cost memory, and a region may be far larger
            # than what came of it.
            start, end = (min(page, part.end) for page in self.shared.touched(first))
            if first < start:
                yield Run(first, start - first)
            yield from self._missing_between(start, end)
            first = end

    def _missing_between(self, first: int, end: int) -> Iterator[Run]:
        while first < end:
            state = self.shared.state(first)
            count = self.shared.span(first, end, state)
            count = count or 1  # whoever else writes to the map has changed it since
            if state not in _DONE_WITH:
                yield Run(first, count)
            first += count

    def add(self, class_: int, counter: str, amount: int = 1) -> None:
        self.shared.add(class_, _native.COUNTERS[counter], amount)

    def add_latency(self, class_: int, nanoseconds: int) -> None:
        self.shared.add_latency(class_, nanoseconds)

    def statistics(self, class_: int) -> ClassStatistics:
        counters = self.shared.counters(class_)
        values = {name: counters[index] for name, index in _native.COUNTERS.items()}
        return ClassStatistics(**values, latency=Histogram(tuple(self.shared.latencies(class_))))


def _between(scope: Sequence[Run], pages: int) -> Iterator[Run]:
    """What ``scope``, in order, leaves out. The map is not touched where it need not be: a stranger
    says how large the region is."""
    end = 0
    for run in scope:
        if end < run.first:
            yield Run(end, run.first - end)
        end = max(end, run.end)
    if end < pages:
        yield Run(end, pages - end)
