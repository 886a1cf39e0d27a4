"""The progress of a transfer: a line that is redrawn on a terminal, a line a second elsewhere, an
event for machines."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import trio

from ..destination.pulling import Transfer
from ..progress import Moment, Watch
from ..source.serving import Server
from ..statistics import ServingStatistics, TransferStatistics
from ._command import Report

__all__ = ["make_progress", "print_summary", "show_until_complete"]

_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 1.0
_MIB = 1 << 20

# rich is imported where something is drawn: with --json it never is.


class _Looked(NamedTuple):
    share: float
    words: str


def _look_at(of: Transfer | Server) -> Callable[[], _Looked]:
    """A function that returns the progress of ``of`` each time it is called."""
    return _look_at_transfer(of) if isinstance(of, Transfer) else _look_at_server(of)


def _look_at_transfer(transfer: Transfer) -> Callable[[], _Looked]:
    watch = Watch(transfer.statistics)

    def look() -> _Looked:
        moment = watch.look()
        now = moment.statistics
        packed = f", {now.lz4_share:.0%} compressed" if now.lz4_bytes else ""
        p50, p99 = (_us(now.fault_latency.microseconds(share)) for share in (0.5, 0.99))
        faults = f"{now.demand.faults} faults (p50 {p50}, p99 {p99})"
        return _Looked(
            moment.share,
            f"{moment.share:6.1%} resident, {_rate(moment)}, {faults}{packed}{_left(moment)}",
        )

    return look


def _look_at_server(server: Server) -> Callable[[], _Looked]:
    watch = Watch(server.statistics)

    def look() -> _Looked:
        moment = watch.look()
        demanded = f"{moment.statistics.demanded} of them were waited for"
        words = (
            f"{moment.share:6.1%} of the pages asked for, {_rate(moment)},"
            f" {demanded}{_left(moment)}"
        )
        return _Looked(moment.share, words)

    return look


def _rate(moment: Moment[TransferStatistics] | Moment[ServingStatistics]) -> str:
    size = moment.statistics.size / _MIB
    return (
        f"{moment.bytes_done / _MIB:.0f} of {size:.0f} MiB, {moment.bytes_per_s / _MIB:.0f} MiB/s"
    )


def _left(moment: Moment[TransferStatistics] | Moment[ServingStatistics]) -> str:
    return "" if moment.seconds_left is None else f", {moment.seconds_left:.0f} s left"


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} us" if value < 10_000 else f"{value / 1000:.0f} ms"


def make_progress(report: Report) -> Callable[[Transfer | Server], Awaitable[None]]:
    """The task that shows, until it is cancelled, the progress of a transfer, or of a source that
    has one destination. With JSON it shows nothing: there the progress is in events. A service
    shows it as its status."""
    say = None if report.service is None else report.service.say
    if say is None and not report.as_json and sys.stdout.isatty():
        return _redraw

    async def show(of: Transfer | Server) -> None:
        look = _look_at(of)
        while say is not None or not report.as_json:
            await trio.sleep(_LINE_SECONDS)
            words = look().words
            if say is not None:
                say(words.strip())
            if not report.as_json:
                print(words, flush=True)

    return show


async def _redraw(of: Transfer | Server) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    look = _look_at(of)
    # Transient: a summary follows when the transfer is over. This task refreshes it, so rich needs
    # no thread.
    with Live(console=Console(), auto_refresh=False, transient=True) as live:
        while True:
            looked = look()
            line = Table.grid(padding=(0, 1))
            line.add_row(ProgressBar(total=1.0, completed=looked.share, width=24), looked.words)
            live.update(line, refresh=True)
            await trio.sleep(_REDRAW_SECONDS)


async def show_until_complete(transfer: Transfer, report: Report) -> None:
    """Show the progress of ``transfer`` until it is complete, and then a summary. With JSON it
    shows nothing: there both are in events."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_progress(report), transfer)
        await transfer.wait_complete()
        nursery.cancel_scope.cancel()
    if report.service is not None:
        report.service.say("complete: every page is in place")
    if not report.as_json:
        print_summary(transfer.statistics())


def print_summary(statistics: TransferStatistics) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    rate = statistics.size / _MIB / statistics.seconds if statistics.seconds else 0.0
    console.print(
        f"complete: {statistics.size / _MIB:.1f} MiB in {statistics.seconds:.2f} s ({rate:.0f}"
        f" MiB/s), placement {statistics.placement}"
    )
    table = Table("class", box=None, pad_edge=False)
    for heading in (
        "pages",
        "of them zero",
        "MiB on the wire",
        "requests",
        "already there",
        "not wanted",
    ):
        table.add_column(heading, justify="right")
    for name in ("demand", "prefetch", "background"):
        row = getattr(statistics, name)
        wire = f"{row.wire_bytes / _MIB:.1f}"
        table.add_row(
            name,
            *map(str, (row.pages, row.zero_pages, wire, row.requests, row.existed, row.dropped)),
        )
    console.print(table)
    if statistics.lz4_ratio is not None:
        console.print(
            f"compressed: {statistics.lz4_share:.0%} of what came, to 1/{statistics.lz4_ratio:.1f}"
            " of its size"
        )
    if statistics.prefetch_unused is not None:
        sampled = f"by a sample of {statistics.prefetch.sampled} pages"
        console.print(
            f"prefetched, and not touched meanwhile: {statistics.prefetch_unused:.0%} ({sampled})"
        )
    latency = statistics.fault_latency
    shares = (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
    quantiles = ", ".join(f"{name} {_us(latency.microseconds(share))}" for name, share in shares)
    console.print(f"faults: {statistics.demand.faults} ({quantiles})")
