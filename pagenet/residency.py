"""The destination's map of pages: which pages are missing, asked for, in place. All progress is
counted from it.

It has one byte a page in a memfd, changed only by compare-and-swap (``native/residency.c``), so
that lanes in C threads and in other processes share it with Python. A page goes from MISSING to
COMING (asked for in the background) or REQUESTED (asked for because a thread waits), to PLACING, in
shared memory to READY, and to RESIDENT. Only the lane that moved a page to PLACING may write it.
While the source's owner still runs, pages become COPIED instead: no thread sees those, and they are
MISSING again once they have changed. No other page goes backwards: one that its owner gave up is
REMOVED for good.
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
    #: asked for in the background; asked for again, on the demand lane, if a thread waits for it
    COMING = _native.STATES["coming"]
    REQUESTED = _native.STATES["requested"]
    PLACING = _native.STATES["placing"]
    RESIDENT = _native.STATES["resident"]
    #: its owner gave it up while it was PLACING: the lane that places it leaves it REMOVED
    REMOVING = _native.STATES["removing"]
    #: its owner gave it up: it reads as zero, and never again as the source's bytes
    REMOVED = _native.STATES["removed"]
    #: the owner does not map it
    OUTSIDE = _native.STATES["outside"]
    POISONED = _native.STATES["poisoned"]
    #: shared memory has its bytes; the page is being made visible, or has just been made so
    READY = _native.STATES["ready"]
    #: shared memory has its bytes, and nobody sees them: the source's owner may still change it
    COPIED = _native.STATES["copied"]


_DONE_WITH = (State.RESIDENT, State.REMOVED, State.POISONED)
_WROTE = "the owner has written to the map of its pages"


class Residency:
    """Page states and transfer counters of ``pages`` pages, all MISSING at first. Memory: one byte
    a page.

    ``file``, ``note``, ``recover``, ``published``: as of :class:`~pagenet._native.SharedMap`, which
    documents what it raises. In a map that was recovered, READY and REMOVING pages are as its
    previous users left them. The counters go on from theirs, which may lack what they did last.
    """

    def __init__(
        self,
        pages: int,
        *,
        note: bytes = b"",
        file: int | None = None,
        recover: bool = False,
        published: bool = True,
    ) -> None:
        self.pages = pages
        #: the map itself, for lanes in C
        self.shared = _native.SharedMap(pages, note, file, recover=recover, published=published)
        self.is_recovered = recover
        self._scope: Sequence[Run] = (Run(0, pages),)

    def close(self) -> None:
        self.shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def confine(self, scope: Sequence[Run]) -> None:
        """Limit what is to become resident to ``scope``: all other pages become OUTSIDE. A map
        that was not published is published now. In a map that was recovered they must be OUTSIDE
        already, and those of the scope must not.

        :exc:`HandshakeError` if a recovered map has another scope.
        """
        self._scope = sorted(scope, key=lambda run: run.first)
        self.shared.scope = sum(run.count for run in scope)
        for run in _between(self._scope, self.pages):
            if not self.is_recovered:
                self.set(run, State.OUTSIDE)
            elif self.span(run, State.OUTSIDE) < run.count:
                raise HandshakeError(f"{_WROTE}: it is not that of its mappings")
        if not self.is_recovered:
            self.shared.publish()
        elif any(self.find(State.OUTSIDE, run.first, run.end) is not None for run in scope):
            raise HandshakeError(f"{_WROTE}: it is not that of its mappings")

    @property
    def scope(self) -> int:
        """The number of pages that are to become resident: all but those OUTSIDE. It is kept in
        this process, not in the map."""
        return self.shared.scope

    @property
    def done(self) -> int:
        """The number of pages of the scope that are RESIDENT, REMOVED or POISONED, if the
        map's counter is right."""
        return min(self.shared.done, self.scope)

    @property
    def complete(self) -> bool:
        return self.done == self.scope

    def check_complete(self) -> None:
        """Check a map that is :attr:`complete` by its counter. :exc:`HandshakeError` if a page of
        the scope is not RESIDENT, REMOVED or POISONED. It looks at each page: call it once, at the
        end."""
        for run in self._scope:
            if (page := self.shared.unsettled(run.first, run.end)) < run.end:
                raise HandshakeError(
                    f"{_WROTE}: it counts all of them as in place, and page {page} is not"
                )

    def finish(self) -> None:
        """Note that the source knows that every page is in place: a process that finds the map
        later has nothing left to do."""
        self.shared.finish()

    def state(self, page: int) -> State:
        try:
            return State(self.shared.state(page))
        except ValueError:
            what = f"page {page} is in no state that it can be in"
            raise HandshakeError(f"{_WROTE}: {what}") from None

    def claim(self, run: Run, from_: State, to: State) -> int:
        """Move pages of ``run`` from state ``from_`` to ``to``, and stop at the first that is not
        in ``from_``. Returns how many."""
        return self.shared.claim(run.first, run.count, from_, to)

    def replace(self, run: Run, from_: State, to: State) -> int:
        """Move those pages of ``run`` that are in state ``from_`` to ``to``. Returns how many."""
        return self.shared.replace(run.first, run.count, from_, to)

    def set(self, run: Run, to: State) -> None:
        self.shared.set(run.first, run.count, to)

    def is_in_flight(self) -> bool:
        """Whether any page is asked for, or being placed."""
        flying = (State.COMING, State.REQUESTED, State.PLACING, State.READY)
        return any(self.find(state, 0) is not None for state in flying)

    def find(self, state: State, first: int, end: int | None = None) -> int | None:
        """The first page from ``first`` on, before ``end``, that is in ``state``; None if there is
        none."""
        end = self.pages if end is None else end
        found = self.shared.find(first, end, state) if first < end else end
        return found if found < end else None

    def span(self, run: Run, state: State) -> int:
        """How many pages at the start of ``run`` are in ``state``, one after the other."""
        return self.shared.span(run.first, run.end, state)

    def missing(self) -> list[Run]:
        """The pages of the scope that are neither in place nor given up, as runs. Each lies within
        one run of the scope."""
        return [run for part in self._scope for run in self._missing_of(part)]

    def _missing_of(self, part: Run) -> Iterator[Run]:
        first = part.first
        while first < part.end:
            # To read an untouched part of the map would allocate memory for it, and a region may be
            # far larger than what has come of it.
            start, end = (min(page, part.end) for page in self.shared.touched(first))
            if first < start:
                yield Run(first, start - first)
            yield from self._missing_between(start, end)
            first = end

    def _missing_between(self, first: int, end: int) -> Iterator[Run]:
        while first < end:
            state = self.shared.state(first)
            count = self.shared.span(first, end, state)
            count = count or 1  # 0 if another writer has changed it since
            if state not in _DONE_WITH:
                yield Run(first, count)
            first += count

    def missing_count(self, first: int, end: int) -> int:
        """The number of MISSING pages in [first, end)."""
        count, page = 0, self.find(State.MISSING, first, end)
        while page is not None:
            span = self.span(Run(page, end - page), State.MISSING)
            count, page = count + span, self.find(State.MISSING, page + max(span, 1), end)
        return count

    def add(self, class_: int, counter: str, amount: int = 1) -> None:
        self.shared.add(class_, _native.COUNTERS[counter], amount)

    def add_latency(self, class_: int, nanoseconds: int) -> None:
        self.shared.add_latency(class_, nanoseconds)

    def statistics(self, class_: int) -> ClassStatistics:
        counters = self.shared.counters(class_)
        values = {name: counters[index] for name, index in _native.COUNTERS.items()}
        return ClassStatistics(**values, latency=Histogram(tuple(self.shared.latencies(class_))))


def _between(scope: Sequence[Run], pages: int) -> Iterator[Run]:
    """The runs that ``scope``, in order, leaves out. A stranger decides how large the region is,
    and so the map is not touched where it need not be."""
    end = 0
    for run in scope:
        if end < run.first:
            yield Run(end, run.first - end)
        end = max(end, run.end)
    if end < pages:
        yield Run(end, pages - end)
