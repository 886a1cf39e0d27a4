"""``pagenet-bench workload``: its options, and its output."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..background.schedule import RECORDED
from ..bench import (
    ORDERS,
    TRACES,
    USUAL_WORK_US,
    Least,
    WorkloadOptions,
    WorkloadResult,
    WorkloadTarget,
    least_possible,
    measure_workload,
    plot_workload,
    workload_targets,
)
from ..picture import check_plot
from ..sizes import parse_size
from ._command import Parser, Report, count, count_or_none, names
from ._tables import make_console, make_table, shown

__all__ = ["add_workload_options", "bench_workload"]

Fields = dict[str, Any]

_MIB = 1 << 20


def add_workload_options(parser: Parser) -> None:
    parser.add_argument(
        "--trace",
        type=_traces,
        default=tuple(TRACES),
        metavar="NAME,...",
        help=f"traces of touches: {', '.join(TRACES)}, {RECORDED}FILE (all but {RECORDED}FILE)",
    )
    parser.add_argument(
        "--order",
        type=names(ORDERS),
        default=tuple(ORDERS),
        metavar="NAME,...",
        help=f"orders of the background to compare: {', '.join(ORDERS)} (all)",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        default=1 << 30,
        help="size of the memory, in bytes or with K, M, G (1G)",
    )
    parser.add_argument(
        "--memory",
        choices=["anonymous", "memfd"],
        default="anonymous",
        help="private (anonymous) or shared (memfd) memory to touch (%(default)s)",
    )
    parser.add_argument(
        "--touches", type=count, metavar="N", help="touches in each trace (its usual number)"
    )
    parser.add_argument(
        "--work",
        type=count,
        metavar="US",
        help=(
            "work before each touch, in us (as recorded in the trace, or"
            f" {USUAL_WORK_US:g} where none was)"
        ),
    )
    parser.add_argument(
        "--rate",
        type=count_or_none,
        default=1000,
        metavar="MBIT",
        help="rate of the link; none: loopback (%(default)s)",
    )
    held = "limit of the background, in MB/s; none: no limit (%(default)s)"
    parser.add_argument("--bandwidth", type=count_or_none, default=60, metavar="MB", help=held)
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="plot how the working set fills: FILE.svg or FILE.png",
    )


def _traces(text: str) -> tuple[str, ...]:
    """For argparse: names of traces, or one recording. The name of a recording may have a comma in
    it, so no other trace can stand beside it."""
    if text.startswith(RECORDED):
        return (text,)
    return names(TRACES)(text)


async def bench_workload(options: argparse.Namespace, report: Report) -> Fields:
    if options.plot is not None:
        check_plot(options.plot)
    wanted = WorkloadOptions(
        lane=options.lane,
        traces=options.trace,
        orders=options.order,
        size=options.size,
        touches=options.touches,
        memory=options.memory,
        work_us=options.work,
        rate=options.rate,
        bandwidth=None if options.bandwidth is None else options.bandwidth * 1_000_000,
        rounds=options.rounds,
    )
    results = await measure_workload(
        wanted, lambda result: report("result", suite="workload", **_fields(result))
    )
    targets, least = workload_targets(results), least_possible(wanted, results)
    for trace, (blocked, stall) in least.items():
        report(
            "least",
            suite="workload",
            trace=trace,
            blocked=round(blocked),
            stall_seconds=round(stall, 4),
        )
    for target in targets:
        report("target", suite="workload", **target._asdict(), met=target.met)
    if not report.as_json:
        _print_results(results, targets, least, wanted)
    if options.plot is not None:
        plot_workload(options.plot, results, _title(wanted))
        report("plotted", file=str(options.plot))
    return {
        "results": [_fields(result) for result in results],
        "least": {
            trace: {"blocked": round(blocked), "stall_seconds": round(stall, 4)}
            for trace, (blocked, stall) in least.items()
        },
        "targets": [{**target._asdict(), "met": target.met} for target in targets],
    }


def _fields(result: WorkloadResult) -> Fields:
    figures = ("seconds", "to_50", "to_90", "to_99", "followed", "prefetch_unused")
    return {
        "trace": result.trace,
        "order": result.order,
        "touches": result.touches,
        "pages": result.pages,
        "blocked": result.blocked,
        "stall_seconds": round(result.stall, 4),
        "wasted_bytes": round(result.figure("wasted") or 0),
        **{
            name: None if (value := result.figure(name)) is None else round(value, 4)
            for name in figures
        },
        "came": {
            name: round(result.figure(name) or 0) for name in ("demand", "prefetch", "background")
        },
    }


def _title(options: WorkloadOptions) -> str:
    link = "loopback" if options.rate is None else f"{options.rate} Mbit/s"
    held = (
        ""
        if options.bandwidth is None
        else f", background limited to {options.bandwidth / 1e6:g} MB/s"
    )
    work = f"{options.work_us or USUAL_WORK_US:g} µs of work between"
    if options.work_us is None and any(trace.startswith(RECORDED) for trace in options.traces):
        work = "work between as recorded"
    return f"Touches of {options.size >> 20} MiB, {work}, {options.lane} lanes, {link}{held}"


def _print_results(
    results: Sequence[WorkloadResult],
    targets: Sequence[WorkloadTarget],
    least: dict[str, Least],
    options: WorkloadOptions,
) -> None:
    console = make_console()
    console.print(f"\n[bold]{_title(options)}[/bold]  (medians of {options.rounds} rounds)")
    headings = (
        "blocked",
        "stall, ms",
        "took, s",
        "50 % there, s",
        "90 %",
        "99 %",
        "wasted, MiB",
        "unused, %",
        "followed, ms",
    )
    table = make_table("trace", "order", *headings)
    table.columns[1].justify = "left"
    for number, result in enumerate(results):
        first = not number or results[number - 1].trace != result.trace
        if first and number:
            table.add_section()
        followed, unused = result.figure("followed"), result.figure("prefetch_unused")
        table.add_row(
            f"{result.trace} ({result.pages:,} pages)" if first else "",
            result.order,
            f"{result.blocked:,}",
            shown(result.stall * 1000),
            *(_seconds(result.figure(name)) for name in ("seconds", "to_50", "to_90", "to_99")),
            shown((result.figure("wasted") or 0) / _MIB),
            "" if unused is None else f"{100 * unused:.0f}",
            "" if followed is None else shown(followed * 1000),
        )
    console.print(table)
    console.print(
        "Wasted: pages that came before the trace ended, and that the trace does not touch.",
        style="dim",
    )
    if options.memory == "memfd":
        console.print(
            "Unused: of prefetched pages, those not touched by the end of the trace (a sample).",
            style="dim",
        )
    for trace, (blocked, stall) in least.items():
        console.print(
            f"{trace}: an order that does not know the trace stalls for at least {stall:.3f} s, in"
            f" {blocked:,.0f} touches"
        )
    for target in targets:
        met = "met" if target.met else "[bold]not met[/bold]"
        value, limit = (
            f"{number:,.3f}".rstrip("0").rstrip(".") for number in (target.value, target.limit)
        )
        console.print(
            f"{target.trace}, {target.order}: {target.figure} {value}, at most {limit}"
            f" ({target.other}): {met}"
        )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
