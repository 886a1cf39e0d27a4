"""How much of the background is in flight: pagenet's choice beside fixed windows, over links of
several rates and round trips.

Each cell is a link, a number of threads and a trace of touches. In each round every window of the
ladder has its turn, after pagenet's own. A window that takes more than three times as long as
pagenet's own is stopped there, and left out from then on: on a long path a small one takes a
minute, and cannot be the best.
"""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import trio

from ...errors import UsageError
from ...transport import LaneKind
from .._environment import available_memory
from .._peers import Source, relayed, served_at
from .._site import Link, inside, open_link
from .._task import worked
from ..workload._traces import make_trace

__all__ = [
    "AS_GOOD",
    "AUTO",
    "FIGURES",
    "WINDOWS",
    "Cell",
    "CellResult",
    "PaceOptions",
    "measure_pace",
]

#: pagenet's own choice, among the windows
AUTO = None
WINDOWS = (16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
#: what is compared: less is better
FIGURES = ("stall", "complete")
#: how much worse than another window is as good
AS_GOOD = 1.05
# A transfer takes about this long where the link is the limit: the choice is to be learnt in 50 ms.
_SECONDS = 1.2
_LEAST, _MOST = 16 << 20, 512 << 20
# How much longer than pagenet's own a window may take, and how long a player takes to start and to
# check every page, in s.
_MOST_TIMES = 3
_START_SECONDS = 2.0
# More touches than a run has time for: it ends with the last page.
_TOUCHES_A_PAGE = 4


@dataclass(frozen=True, slots=True)
class PaceOptions:
    """``rates``: of the links, in Mbit/s, None: loopback; ``trips``: round trips that a relay adds,
    in ms; ``works_us``: before each touch; ``windows``: of the ladder, in bytes."""

    lane: LaneKind = "native"
    rates: Sequence[int | None] = (100, 1000, 2500, 10000, None)
    trips: Sequence[float] = (0, 1, 20)
    threads: Sequence[int] = (1,)
    traces: Sequence[str] = ("random", "zipf", "sequential")
    works_us: Sequence[float] = (0, 50)
    windows: Sequence[int] = WINDOWS
    size: int | None = None
    rounds: int = 3


class Cell(NamedTuple):
    rate: int | None
    trip: float
    threads: int
    trace: str
    work_us: float


@dataclass(slots=True)
class CellResult:
    """Of each window, what the players said (:mod:`.player`), round by round. ``stopped``: windows
    that took too long to be the best."""

    cell: Cell
    size: int
    rounds: dict[int | None, list[dict[str, Any]]] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)

    def figure(self, window: int | None, name: str) -> float:
        """The median of the rounds."""
        return float(median(told[name] for told in self.rounds[window]))

    def best(self, name: str) -> int | None:
        """The window of the ladder that is best in this figure; pagenet's own if every other one
        was stopped."""
        ladder = [window for window in self.rounds if window is not AUTO]
        return min(ladder, key=lambda window: self.figure(window, name), default=AUTO)

    def ratio(self, name: str) -> float:
        """Of pagenet's choice to the best of the ladder."""
        return self._ratio_to(self.best(name), name)

    def noise(self, name: str) -> float:
        """How far apart the rounds of one window are: the largest deviation from the median, as a
        share of it, of pagenet's choice or of the best of the ladder."""
        found = 0.0
        for window in (AUTO, self.best(name)):
            middle = max(self.figure(window, name), 1e-9)
            found = max(found, *(abs(told[name] / middle - 1) for told in self.rounds[window]))
        return found

    def better(self) -> int | None:
        """A fixed window that would have been a better choice: better than pagenet's by more than
        5 % and by more than the noise in one figure, and no worse in the other; None: there is no
        such window. The window with the least stall is mostly not the one that completes first."""
        for window in self.rounds:
            ratios = {name: self._ratio_to(window, name) for name in FIGURES}
            gains = any(ratios[name] > self._as_good(name) for name in FIGURES)
            if window is not AUTO and gains and all(ratio >= 1 for ratio in ratios.values()):
                return window
        return None

    def is_as_good(self) -> bool:
        """In each figure as good as the window that is best in it, or as far from it as the rounds
        are from each other."""
        return all(self.ratio(name) <= self._as_good(name) for name in FIGURES)

    def _as_good(self, name: str) -> float:
        return max(AS_GOOD, 1 + self.noise(name))

    def _ratio_to(self, window: int | None, name: str) -> float:
        return self.figure(AUTO, name) / max(self.figure(window, name), 1e-9)

    @property
    def wrong(self) -> int:
        """Pages that are not what they should be."""
        return sum(told["wrong"] for rounds in self.rounds.values() for told in rounds)


def _size(options: PaceOptions, rate: int | None) -> int:
    """What a link carries in about a second, as a power of two."""
    if options.size is not None:
        return options.size
    if rate is None:
        return _MOST
    return min(max(1 << round(math.log2(rate * 1e6 / 8 * _SECONDS)), _LEAST), _MOST)


async def measure_pace(
    options: PaceOptions, on_result: Callable[[CellResult], None]
) -> list[CellResult]:
    """Each cell in turn. :exc:`~pagenet.errors.Unsupported` where there can be no such link."""
    largest = max(_size(options, rate) for rate in options.rates)
    if (needed := 2 * largest + (256 << 20)) > available_memory():
        raise UsageError(
            f"this takes {needed >> 20} MiB of memory, and {available_memory() >> 20} are available"
        )
    results = []
    for rate in options.rates:
        with Source(_size(options, rate)) as source:
            async with open_link(rate) as link:
                for trip in options.trips:
                    async with _served(source, link, trip, options.lane) as uri:
                        for threads, trace, work in product(
                            options.threads, options.traces, options.works_us
                        ):
                            cell = Cell(rate, trip, threads, trace, work)
                            result = await _measure(cell, source, uri, link, options)
                            on_result(result)
                            results.append(result)
    return results


@asynccontextmanager
async def _served(source: Source, link: Link, trip: float, lane: LaneKind) -> AsyncIterator[str]:
    """What a player in the link's other namespace dials."""
    where = f"tcp://{link.address}:0"
    async with served_at(
        where, source.spec, "--plaintext", "--lane", lane, inside=inside(link.destination)
    ) as server:
        if not trip:
            yield server.uri
            return
        async with relayed(server.uri, trip / 2000, inside=inside(link.source)) as relay:
            yield f"tcp://127.0.0.1:{relay.port}"


async def _measure(
    cell: Cell, source: Source, uri: str, link: Link, options: PaceOptions
) -> CellResult:
    pages = source.size // 4096
    result = CellResult(cell, source.size)
    fd = os.memfd_create("pagenet-trace", os.MFD_CLOEXEC)
    try:
        trace = make_trace(cell.trace, source.size, _TOUCHES_A_PAGE * pages).pages
        os.write(fd, trace.tobytes())
        task = {
            "uri": uri,
            "lane": options.lane,
            "threads": cell.threads,
            "trace": fd,
            "work_us": cell.work_us,
        }
        for _ in range(options.rounds):
            for window in (AUTO, *options.windows):
                if window not in result.stopped:
                    await _play(result, window, task, fd, inside(link.source))
    finally:
        os.close(fd)
    return result


async def _play(
    result: CellResult, window: int | None, task: dict[str, Any], fd: int, inside: Sequence[str]
) -> None:
    limit = math.inf
    if window is not AUTO:
        limit = _START_SECONDS + _MOST_TIMES * result.figure(AUTO, "complete")
    with trio.move_on_after(limit):
        told = await worked(
            "pagenet.bench.pace.player", {**task, "window": window}, fd, inside=inside
        )
        result.rounds.setdefault(window, []).append(told)
        return
    assert window is not AUTO
    result.rounds.pop(window, None)
    result.stopped.add(window)
