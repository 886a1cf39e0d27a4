"""How far a transfer has come: a line that is redrawn on a terminal, a line a second elsewhere, an event for machines."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from ..pulling import Transfer
from ..statistics import TransferStatistics
from ._command import Report

__all__ = ["complete_fields", "make_progress", "print_summary", "show_until_complete"]

_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 1.0
_EVENT_SECONDS = 0.25
# Weight of the newest second in the rate shown: steadier than the last moment, quicker than the average since the start.
_RATE_WEIGHT = 0.3
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class _Moment:
    """One look at a transfer."""

    share: float
    mib_done: float
    mib: float
    mib_per_s: float
    faults: int
    p50_us: float | None
    p99_us: float | None
    seconds_left: float | None
    wire_bytes: int
    compressed: dict[str, object]

    def words(self) -> str:
        left = "" if self.seconds_left is None else f", {self.seconds_left:.0f} s left"
        packed = f", {self.compressed['share']:.0%} compressed" if self.compressed["bytes"] else ""
        return (
            f"{self.share:6.1%} resident, {self.mib_done:.0f} of {self.mib:.0f} MiB, {self.mib_per_s:.0f} MiB/s, "
            f"{self.faults} faults (p50 {_us(self.p50_us)}, p99 {_us(self.p99_us)}){packed}{left}"
        )


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} us" if value < 10_000 else f"{value / 1000:.0f} ms"


class _Watch:
    """Turns successive statistics into moments: it remembers what the rate is made of."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._rate: float | None = None
        self._last = transfer.statistics()

    def look(self) -> _Moment:
        now = self._transfer.statistics()
        page = now.size / now.pages if now.pages else 0.0
        seconds = now.seconds - self._last.seconds
        if seconds > 0:
            rate = (now.done - self._last.done) * page / seconds
            weight = min(1.0, _RATE_WEIGHT * seconds / _LINE_SECONDS)
            self._rate = rate if self._rate is None else self._rate + weight * (rate - self._rate)
        self._last = now
        rate = self._rate or 0.0
        rest = (now.pages - now.done) * page
        return _Moment(
            share=now.done / now.pages if now.pages else 1.0,
            mib_done=now.done * page / _MIB,
            mib=now.size / _MIB,
            mib_per_s=rate / _MIB,
            faults=now.demand.faults,
            p50_us=now.fault_latency.microseconds(0.5),
            p99_us=now.fault_latency.microseconds(0.99),
            seconds_left=rest / rate if rate > 0 else None,
            wire_bytes=now.wire_bytes,
            compressed=_compressed(now),
        )


def make_progress(report: Report) -> Callable[[Transfer], Awaitable[None]]:
    """The task that shows a transfer's progress until it is cancelled."""
    if report.as_json:
        return lambda transfer: _tell(transfer, report)
    return _redraw if sys.stdout.isatty() else _print


async def _tell(transfer: Transfer, report: Report) -> None:
    watch = _Watch(transfer)
    while True:
        await trio.sleep(_EVENT_SECONDS)
        moment = watch.look()
        report(
            "progress",
            share=round(moment.share, 4),
            bytes=int(moment.mib_done * _MIB),
            bytes_per_s=int(moment.mib_per_s * _MIB),
            bytes_wire=moment.wire_bytes,
            compressed=moment.compressed,
            faults=moment.faults,
            fault_us={"p50": moment.p50_us, "p99": moment.p99_us},
            seconds_left=None if moment.seconds_left is None else round(moment.seconds_left, 1),
        )


async def _print(transfer: Transfer) -> None:
    watch = _Watch(transfer)
    while True:
        await trio.sleep(_LINE_SECONDS)
        print(watch.look().words(), flush=True)


async def _redraw(transfer: Transfer) -> None:
    watch = _Watch(transfer)
    # Transient: the summary says it all when the transfer is over. Refreshed by us, so rich needs no thread.
    with Live(console=Console(), auto_refresh=False, transient=True) as live:
        while True:
            moment = watch.look()
            line = Table.grid(padding=(0, 1))
            line.add_row(ProgressBar(total=1.0, completed=moment.share, width=24), moment.words())
            live.update(line, refresh=True)
            await trio.sleep(_REDRAW_SECONDS)


def _compressed(statistics: TransferStatistics) -> dict[str, object]:
    """Bytes of pages that came compressed, their share of all that came as bytes, and how many times smaller they were."""
    ratio = statistics.lz4_ratio
    return {
        "bytes": statistics.lz4_bytes,
        "share": round(statistics.lz4_share, 4),
        "ratio": None if ratio is None else round(ratio, 2),
    }


async def show_until_complete(transfer: Transfer, report: Report) -> None:
    """The progress of ``transfer``, and in the end the ``complete`` event, for people with a summary."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_progress(report), transfer)
        await transfer.wait_complete()
        nursery.cancel_scope.cancel()
    statistics = transfer.statistics()
    report("complete", **complete_fields(statistics))
    if not report.as_json:
        print_summary(statistics)


def complete_fields(statistics: TransferStatistics) -> dict[str, object]:
    """The fields of the ``complete`` event."""
    classes = {"demand": statistics.demand, "prefetch": statistics.prefetch, "background": statistics.background}
    latency = statistics.fault_latency
    return {
        "pages": statistics.pages,
        **{name: class_.pages for name, class_ in classes.items()},
        "removed": statistics.pages - sum(class_.pages for class_ in classes.values()),
        "zero": statistics.zero_pages,
        "bytes_wire": statistics.wire_bytes,
        "compressed": _compressed(statistics),
        "seconds": round(statistics.seconds, 3),
        "faults": statistics.demand.faults,
        "fault_us": {"p50": latency.microseconds(0.5), "p99": latency.microseconds(0.99)},
        "placement": statistics.placement,
    }


def print_summary(statistics: TransferStatistics) -> None:
    console = Console(highlight=False)
    rate = statistics.size / _MIB / statistics.seconds if statistics.seconds else 0.0
    console.print(
        f"complete: {statistics.size / _MIB:.1f} MiB in {statistics.seconds:.2f} s ({rate:.0f} MiB/s), "
        f"placement {statistics.placement}"
    )
    table = Table("class", box=None, pad_edge=False)
    for heading in ("pages", "of them zero", "MiB on the wire", "requests", "already there", "not wanted"):
        table.add_column(heading, justify="right")
    for name in ("demand", "prefetch", "background"):
        row = getattr(statistics, name)
        wire = f"{row.wire_bytes / _MIB:.1f}"
        table.add_row(name, *map(str, (row.pages, row.zero_pages, wire, row.requests, row.existed, row.dropped)))
    console.print(table)
    if statistics.lz4_ratio is not None:
        console.print(f"compressed: {statistics.lz4_share:.0%} of what came, to 1/{statistics.lz4_ratio:.1f} of its size")
    latency = statistics.fault_latency
    shares = (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
    quantiles = ", ".join(f"{name} {_us(latency.microseconds(share))}" for name, share in shares)
    console.print(f"faults: {statistics.demand.faults} ({quantiles})")
