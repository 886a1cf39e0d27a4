"""The same touches with every order of the background, over a link of a given rate.

A program touches the pages of a trace, with some work before each touch, while the pages come.
Source and program are processes of their own in network namespaces, joined by a link.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from ...background.recording import Recorder
from ...background.schedule import RECORDED
from ...errors import UsageError
from ...region import Block, Region
from ...transport import LaneKind
from .._environment import available_memory
from .._peers import Source, served_at
from .._site import inside, open_link
from .._task import worked
from ._least import Least, least_stall
from ._traces import TRACES, Trace, alike, make_trace

__all__ = [
    "ORDERS",
    "USUAL_WORK_US",
    "WorkloadOptions",
    "WorkloadResult",
    "WorkloadTarget",
    "least_possible",
    "measure_workload",
    "workload_targets",
]

#: us of work before each touch, if the trace does not have it
USUAL_WORK_US = 50.0
# The name of the memory's only block at the source: a recording has blocks by their names.
_BLOCK = "memory"


class _Order(NamedTuple):
    """``background`` and ``prefetch`` as pull() has them; a background that ends in ``=`` is given
    its file."""

    background: str
    prefetch: tuple[int, int] | None


#: the orders that are compared, by name. A run of ``off`` makes the recording that ``recorded``
#: replays; ``clairvoyant`` replays the trace itself.
ORDERS: dict[str, _Order] = {
    "off": _Order("off", (0, 0)),
    "linear 8/8": _Order("linear", (8, 8)),
    "linear": _Order("linear", None),
    "follow 8/8": _Order("follow", (8, 8)),
    "hot": _Order("hot", None),
    "recorded": _Order(RECORDED, (0, 0)),
    "clairvoyant": _Order(RECORDED, (0, 0)),
}


#: kinds of :class:`~pagenet.uffd.OwnMemory`
Memory = Literal["anonymous", "memfd"]


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """``touches`` None: as many as the trace usually has. ``work_us``: us of work before each
    touch; None: the program's own if the trace has that, else :data:`USUAL_WORK_US`. ``memory``:
    private, or shared, of which a sample tells what was prefetched in vain. ``rate``: of the link,
    in Mbit/s; None: loopback. ``bandwidth``: limit of the background, in bytes a second; None: no
    limit."""

    lane: LaneKind = "native"
    traces: Sequence[str] = tuple(TRACES)
    orders: Sequence[str] = tuple(ORDERS)
    size: int = 1 << 30
    touches: int | None = None
    work_us: float | None = None
    memory: Memory = "anonymous"
    rate: int | None = 1000
    bandwidth: int | None = 60_000_000
    rounds: int = 1


@dataclass(slots=True)
class WorkloadResult:
    """One trace with one order. ``rounds``: the player's figures of each round (:mod:`.player`)."""

    trace: str
    order: str
    touches: int
    pages: int
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def figure(self, name: str) -> float | None:
        """The median of the rounds; None if a round does not have the figure."""
        figures = [told[name] for told in self.rounds]
        return None if None in figures else float(median(figures))

    @property
    def blocked(self) -> int:
        return round(self.figure("blocked") or 0)

    @property
    def stall(self) -> float:
        """Seconds."""
        return self.figure("stall") or 0.0


class WorkloadTarget(NamedTuple):
    """``figure`` of one order, which is ``value``, is to be at most ``limit``. ``other``: the
    figure of another order that the limit comes from, or ``seconds``."""

    trace: str
    order: str
    figure: str
    other: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit


async def measure_workload(
    options: WorkloadOptions, on_result: Callable[[WorkloadResult], None]
) -> list[WorkloadResult]:
    """Each trace with each order, in turn. :exc:`~pagenet.errors.Unsupported` if there can be no
    such link; :exc:`UsageError` if there is too little memory."""
    if (needed := 2 * options.size + (256 << 20)) > available_memory():
        raise UsageError(
            f"this takes {needed >> 20} MiB of memory, and {available_memory() >> 20} are available"
        )
    traces = {name: make_trace(name, options.size, options.touches) for name in options.traces}
    results = []
    with Source(options.size) as source:
        async with _served(source, options) as (uri, destination):
            for name, trace in traces.items():
                results += await _measure(name, trace, uri, destination, options, on_result)
    return results


# The share of bytes on an Ethernet with packets of 1500 bytes that TCP carries.
_PAYLOAD = 1448 / 1514


def least_possible(options: WorkloadOptions, results: Sequence[WorkloadResult]) -> dict[str, Least]:
    """By trace, the lower bound for orders that do not know it (:func:`~._least.least_stall`), as
    far as it can be told. It needs a run of ``off``, whose touches tell how long a page takes when
    nothing is in its way."""
    found = {}
    for off in results:
        same = alike(off.trace, options.size // 4096)
        if off.order == "off" and same is not None and options.rate is not None:
            trace = make_trace(off.trace, options.size, options.touches).pages
            work, rate = (options.work_us or USUAL_WORK_US) / 1e6, options.rate * 1e6 / 8 * _PAYLOAD
            each = off.stall / max(off.blocked, 1)
            found[off.trace] = least_stall(trace, options.size // 4096, same, work, each, rate)
    return found


@asynccontextmanager
async def _served(source: Source, options: WorkloadOptions) -> AsyncIterator[tuple[str, list[str]]]:
    """Where the source listens, and the prefix of a destination's command."""
    async with open_link(options.rate) as link:
        where, there = f"tcp://{link.address}:0", inside(link.destination)
        spec = f"{_BLOCK}={source.spec}"
        async with served_at(
            where, spec, "--plaintext", "--lane", options.lane, inside=there
        ) as server:
            yield server.uri, inside(link.source)


async def _measure(
    name: str,
    trace: Trace,
    uri: str,
    destination: list[str],
    options: WorkloadOptions,
    on_result: Callable[[WorkloadResult], None],
) -> list[WorkloadResult]:
    orders = [order for order in ORDERS if order in options.orders]
    own_work = options.work_us is None and trace.work_ns is not None
    results = {
        order: WorkloadResult(name, order, len(trace.pages), len(set(trace.pages)))
        for order in orders
    }
    with (
        tempfile.TemporaryDirectory(prefix="pagenet-bench-") as directory,
        _Shared(trace, own_work) as fd,
    ):
        files = {order: str(Path(directory) / order) for order in ("recorded", "clairvoyant")}
        recorder = Recorder(Region([Block(_BLOCK, options.size)]))
        recorder.note(trace.pages)
        recorder.recording().save(files["clairvoyant"])
        if "recorded" in orders and "off" not in orders:
            files["recorded"] = files["clairvoyant"]
        for number in range(options.rounds):
            for order, result in results.items():
                background, prefetch = ORDERS[order]
                told = {
                    "uri": uri,
                    "memory": options.memory,
                    "lane": options.lane,
                    "background": (
                        background + files[order] if background == RECORDED else background
                    ),
                    "prefetch": prefetch,
                    "max_bandwidth": options.bandwidth,
                    "record": files["recorded"] if order == "off" and not number else None,
                    "work_us": None if own_work else options.work_us or USUAL_WORK_US,
                    "trace": fd,
                    "change": len(trace.pages) // 2 if name == "phases" else 0,
                }
                result.rounds.append(
                    await worked("pagenet.bench.workload.player", told, fd, inside=destination)
                )
                if number == options.rounds - 1:
                    on_result(result)
    return list(results.values())


class _Shared:
    """A trace in a memfd, with its own work behind it if that is wanted."""

    def __init__(self, trace: Trace, own_work: bool) -> None:
        self._fd = os.memfd_create("pagenet-trace", os.MFD_CLOEXEC)
        os.write(self._fd, trace.pages.tobytes())
        if own_work and trace.work_ns is not None:
            os.write(self._fd, trace.work_ns.tobytes())

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


# ---- targets ----

#: trace, order, at most how many times, the other order, of which figures
_BOTH = ("blocked", "stall")
_TARGETS: list[tuple[str, str, float, str, Sequence[str]]] = [
    ("zipf", "hot", 0.1, "off", _BOTH),
    ("zipf", "hot", 0.5, "linear 8/8", _BOTH),
    ("zipf", "recorded", 0.1, "linear 8/8", _BOTH),
    ("zipf", "recorded", 2.0, "clairvoyant", _BOTH),
    # Where all pages are equally likely to be touched, longer waits mean fewer touches that block,
    # because pages come meanwhile. So counts compare only orders with the same window, and stall
    # compares all orders.
    ("random", "hot", 1.05, "linear", _BOTH),
    ("random", "hot", 1.05, "linear 8/8", ["stall"]),
]
# In any order the first touches come before the first page: a connection's first reply takes time,
# and so do threads that begin to run. clairvoyant may be near zero, so a multiple of it gets this
# much more.
_START_UP = {"blocked": 50, "stall": 0.01}
_FOLLOWED_WITHIN = 0.2


def workload_targets(results: Sequence[WorkloadResult]) -> list[WorkloadTarget]:
    """The targets for which figures were measured: blocked touches and stall of one order compared
    with another's."""
    found = []
    by_name = {(result.trace, result.order): result for result in results}
    for trace, order, factor, other, figures in _TARGETS:
        ours, theirs = by_name.get((trace, order)), by_name.get((trace, other))
        if ours is not None and theirs is not None:
            for figure in figures:
                value, base = ours.figure(figure) or 0, theirs.figure(figure) or 0
                more = _START_UP[figure] if other == "clairvoyant" else 0
                name = f"{factor:g} x {other}" + (f" + {more:g}" if more else "")
                found.append(
                    WorkloadTarget(trace, order, figure, name, value, factor * base + more)
                )
    if (phases := by_name.get(("phases", "hot"))) is not None:
        followed = phases.figure("followed")
        seconds = float("inf") if followed is None else followed
        found.append(
            WorkloadTarget("phases", "hot", "followed", "seconds", seconds, _FOLLOWED_WITHIN)
        )
    return found
