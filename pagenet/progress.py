"""The progress of a transfer, from one look at its statistics to the next, and the events that
report it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import trio

from .events import EventHandler, ignore_events
from .nurseries import running_beside
from .statistics import Histogram, ServingStatistics, TransferStatistics

__all__ = [
    "Moment",
    "Watch",
    "complete_fields",
    "rounded_share",
    "tell_faults",
    "tell_progress",
    "tell_serving",
    "telling",
]

EVENT_SECONDS = 0.25
# Shorter, because the first faults are over soon.
FAULT_SECONDS = 0.05
# Weight of the last second in the rate: steadier than the rate of the last interval, quicker than
# the average since the start.
_RATE_WEIGHT = 0.3

Fields = dict[str, object]


class Counted(Protocol):
    """Statistics of ``pages`` pages, ``size`` bytes in all, of which ``here`` pages have come after
    ``seconds``."""

    @property
    def pages(self) -> int: ...
    @property
    def here(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def seconds(self) -> float: ...


class Filled(Protocol):
    """The part of a transfer that its progress needs."""

    def statistics(self) -> TransferStatistics: ...


class Serving(Protocol):
    """The part of a source that its progress needs."""

    def statistics(self) -> ServingStatistics: ...


S = TypeVar("S", bound=Counted)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Moment(Generic[S]):
    """One look at a transfer. ``share`` is 0 to 1. ``seconds_left``: at the present rate; None if
    the rate is not known yet, or is 0."""

    statistics: S
    share: float
    bytes_done: int
    bytes_per_s: float
    seconds_left: float | None

    def fields(self) -> Fields:
        return {
            "share": round(self.share, 4),
            "bytes": self.bytes_done,
            "bytes_per_s": int(self.bytes_per_s),
            "seconds_left": None if self.seconds_left is None else round(self.seconds_left, 1),
        }


class Watch(Generic[S]):
    """Turns successive statistics into moments. Keeps the last statistics and the smoothed rate."""

    def __init__(self, statistics: Callable[[], S]) -> None:
        self._statistics = statistics
        self._rate: float | None = None
        self._last = statistics()

    def look(self) -> Moment[S]:
        now = self._statistics()
        page = now.size / now.pages if now.pages else 0.0
        seconds = now.seconds - self._last.seconds
        if seconds > 0:
            rate = max(0, now.here - self._last.here) * page / seconds
            weight = min(1.0, _RATE_WEIGHT * seconds)
            self._rate = rate if self._rate is None else self._rate + weight * (rate - self._rate)
        self._last = now
        rate = self._rate or 0.0
        return Moment(
            statistics=now,
            share=now.here / now.pages if now.pages else 1.0,
            bytes_done=int(now.here * page),
            bytes_per_s=rate,
            seconds_left=(now.pages - now.here) * page / rate if rate > 0 else None,
        )


async def tell_progress(transfer: Filled, on_event: EventHandler) -> None:
    """Send ``progress`` events at intervals, until cancelled."""
    watch = Watch(transfer.statistics)
    while True:
        await trio.sleep(EVENT_SECONDS)
        moment = watch.look()
        now = moment.statistics
        on_event(
            "progress",
            **moment.fields(),
            bytes_wire=now.wire_bytes,
            compressed=_compressed(now),
            faults=now.demand.faults,
            fault_us=_quantiles(now.fault_latency),
        )


async def tell_faults(transfer: Filled, on_event: EventHandler) -> None:
    """Send one ``fault`` event for all faults of an interval, if there were any, until cancelled.
    An event for each fault would cost more than answering it does."""
    before = transfer.statistics()
    while True:
        await trio.sleep(FAULT_SECONDS)
        now = transfer.statistics()
        if count := now.demand.faults - before.demand.faults:
            on_event(
                "fault",
                count=count,
                fault_us=_quantiles(now.fault_latency.since(before.fault_latency)),
            )
        before = now


async def tell_serving(server: Serving, on_event: EventHandler) -> None:
    """Send ``progress`` events of a source that has one destination, which gets every page from it,
    until cancelled."""
    watch: Watch[ServingStatistics] = Watch(server.statistics)
    while True:
        await trio.sleep(EVENT_SECONDS)
        moment = watch.look()
        on_event("progress", **moment.fields(), demanded=moment.statistics.demanded)


@asynccontextmanager
async def telling(
    tell: Callable[[T, EventHandler], Awaitable[None]], about: T, on_event: EventHandler
) -> AsyncIterator[None]:
    """Run one of the functions above for as long as the block runs."""
    async with (
        nullcontext() if on_event is ignore_events else running_beside(tell, about, on_event)
    ):
        yield


def complete_fields(statistics: TransferStatistics) -> Fields:
    """The fields of the ``complete`` event."""
    classes = {
        "demand": statistics.demand,
        "prefetch": statistics.prefetch,
        "background": statistics.background,
    }
    return {
        "pages": statistics.pages,
        **{name: class_.pages for name, class_ in classes.items()},
        "removed": statistics.pages - sum(class_.pages for class_ in classes.values()),
        "zero": statistics.zero_pages,
        "bytes_wire": statistics.wire_bytes,
        "compressed": _compressed(statistics),
        "prefetch_unused": rounded_share(statistics.prefetch_unused),
        "seconds": round(statistics.seconds, 3),
        "faults": statistics.demand.faults,
        "fault_us": _quantiles(statistics.fault_latency),
        "placement": statistics.placement,
    }


def rounded_share(share: float | None) -> float | None:
    """``share``, rounded for JSON."""
    return None if share is None else round(share, 3)


def _quantiles(latency: Histogram) -> Fields:
    return {"p50": latency.microseconds(0.5), "p99": latency.microseconds(0.99)}


def _compressed(statistics: TransferStatistics) -> Fields:
    """Of the pages that came compressed: their uncompressed bytes, their share (0 to 1) of all
    pages that came as bytes, and the ratio of their uncompressed size to that on the wire."""
    ratio = statistics.lz4_ratio
    return {
        "bytes": statistics.lz4_bytes,
        "share": round(statistics.lz4_share, 4),
        "ratio": None if ratio is None else round(ratio, 2),
    }
