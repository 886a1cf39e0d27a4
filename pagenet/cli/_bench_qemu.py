"""``pagenet-bench qemu``: its options, and its figures for people and for machines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench import (
    QEMU_METHODS,
    USUAL_QEMU_METHODS,
    Migration,
    QemuOptions,
    QemuResult,
    Target,
    find_guest,
    measure_qemu,
    plot_work,
    targets_of,
)
from ._command import Parser, Report, count, count_or_none, names, sizes
from ._tables import make_console, make_table, shown

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_qemu_options", "bench_qemu"]

_METHODS = {
    "precopy": "QEMU precopy",
    "postcopy": "QEMU postcopy",
    "preempt": "QEMU postcopy-preempt",
    "qemu-hybrid": "QEMU hybrid",
    "qemu-hybrid-preempt": "QEMU hybrid, preempt",
    "pagenet": "pagenet",
    "attach": "pagenet, attached",
    "hybrid": "pagenet hybrid",
    "hybrid-attach": "pagenet hybrid, attached",
    "preempt-tls": "QEMU postcopy-preempt, TLS",
    "pagenet-tls": "pagenet, TLS",
    "hybrid-tls": "pagenet hybrid, TLS",
}
_FIGURES = {
    "downtime_ms": Migration.downtime_ms,
    "longest_gap_ms": Migration.longest_gap_ms,
    "lost_ms": Migration.lost_ms,
    "least_lost_ms": Migration.least_lost_ms,
    "precopy_work": Migration.precopy_work,
    "total_s": Migration.total_s,
    "command_s": Migration.command_s,
    "wire_bytes": Migration.wire_bytes,
    "writes_per_s": Migration.writes_per_s,
}
_MIN_RAM, _MAX_RAM = 128, 1 << 20

Fields = dict[str, Any]


def add_qemu_options(parser: Parser) -> None:
    parser.add_argument(
        "--ram", type=_rams, default=(512,), metavar="MIB,...", help="RAM of the guest (512)"
    )
    parser.add_argument(
        "--rate",
        type=count_or_none,
        default=1000,
        metavar="MBIT",
        help="rate of the link; none: loopback (%(default)s)",
    )
    parser.add_argument(
        "--methods",
        type=names(QEMU_METHODS),
        default=USUAL_QEMU_METHODS,
        metavar="NAME,...",
        help=f"methods to compare: {', '.join(QEMU_METHODS)} (all but those with TLS)",
    )
    parser.add_argument(
        "--window",
        type=sizes,
        default=(),
        metavar="SIZE,...",
        help="add the method pagenet with this much of the background in flight, for each SIZE",
    )
    parser.add_argument(
        "--workload",
        type=_workload,
        default=(60, 12),
        metavar="WORK,HOT",
        help="percent of the RAM that the guest works on, and percent that it writes to (60,12)",
    )
    parser.add_argument(
        "--cpus", type=count, default=1, metavar="N", help="CPUs of the guest (%(default)s)"
    )
    parser.add_argument(
        "--accel", choices=["tcg", "kvm"], default="tcg", help="QEMU's accelerator (%(default)s)"
    )
    parser.add_argument(
        "--kernel",
        type=Path,
        metavar="FILE",
        help="kernel of the guest (the one that the checkout's tools/guest/build.py has made)",
    )
    parser.add_argument(
        "--initrd",
        type=Path,
        metavar="FILE",
        help="initrd of the guest, if the kernel of --kernel needs one",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="plot the guest's work over time: FILE.svg or FILE.png",
    )


def _rams(text: str) -> tuple[int, ...]:
    rams = tuple(count(part) for part in text.split(","))
    for ram in rams:
        if not _MIN_RAM <= ram <= _MAX_RAM:
            raise argparse.ArgumentTypeError(f"a guest of {ram} MiB: from {_MIN_RAM} to {_MAX_RAM}")
    return rams


def _workload(text: str) -> tuple[int, int]:
    work, comma, hot = text.partition(",")
    if not (comma and work.isdecimal() and hot.isdecimal() and 0 < int(hot) <= int(work) <= 70):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not WORK,HOT in percent of the RAM, HOT <= WORK <= 70"
        )
    return int(work), int(hot)


async def bench_qemu(options: argparse.Namespace, report: Report) -> Fields:
    """Measure and report. Returns the fields of the last event; ``wrong``: the migrations after
    which the guest had bad pages, or heartbeats were missing."""
    work, hot = options.workload
    wanted = QemuOptions(
        files=find_guest(options.kernel, options.initrd, options.accel),
        rams=[ram << 20 for ram in options.ram],
        rate=options.rate,
        rounds=options.rounds,
        methods=options.methods,
        windows=options.window,
        work=work,
        hot=hot,
        cpus=options.cpus,
        accel=options.accel,
    )
    results = await measure_qemu(
        wanted, lambda migration: report("run", words=_words(migration), **_one(migration))
    )
    targets = targets_of(results, wanted)
    summaries = [_summary(result) for result in results]
    for summary in summaries:
        report("result", suite="qemu", **summary)
    if not report.as_json:
        _print_results(summaries, targets, wanted)
    if options.plot is not None:
        plot_work(options.plot, results, _METHODS, _title(wanted))
        report("plotted", file=str(options.plot))
    wrong = [
        _one(migration)
        for result in results
        for migration in result.migrations
        if not migration.is_right
    ]
    for one in wrong:
        where = f"round {one['round']}: {one['method']}, {one['ram_mib']} MiB"
        print(
            f"pagenet-bench: {where}: the guest did not arrive intact: {_wrong_words(one)}",
            file=sys.stderr,
            flush=True,
        )
    return {
        "rate_mbit": wanted.rate,
        "accel": wanted.accel,
        "cpus": wanted.cpus,
        "workload_percent": [work, hot],
        "rounds": wanted.rounds,
        "results": summaries,
        "targets": [
            {
                "what": target.words,
                "figure": round(target.figure, 3),
                "limit": target.limit,
                "met": target.is_met,
            }
            for target in targets
        ],
        "wrong": wrong,
    }


def _one(migration: Migration) -> Fields:
    outcome = migration.outcome
    return {
        "round": migration.round + 1,
        "method": migration.method,
        "ram_mib": migration.ram >> 20,
        "converged": migration.converged,
        **{name: _rounded(figure(migration)) for name, figure in _FIGURES.items()},
        "faults": outcome.faults,
        "fault_us": {"p50": outcome.p50_us, "p99": outcome.p99_us},
        "blocked_ms": outcome.blocked_ms,
        "precopy_rounds": outcome.rounds,
        "failure": migration.failure,
        "bad": migration.story.bad,
        "unbroken": migration.story.unbroken,
        "broken": migration.story.broken,
    }


def _summary(result: QemuResult) -> Fields:
    return {
        "method": result.method,
        "ram_mib": result.ram >> 20,
        "rounds": len(result.migrations),
        "converged": sum(migration.converged for migration in result.migrations),
        **{name: _rounded(result.median(figure)) for name, figure in _FIGURES.items()},
        "faults": result.median(lambda one: one.outcome.faults),
        "fault_us": {
            "p50": result.median(lambda one: one.outcome.p50_us),
            "p99": result.median(lambda one: one.outcome.p99_us),
        },
        "blocked_ms": result.median(lambda one: one.outcome.blocked_ms),
        "precopy_rounds": result.median(lambda one: one.outcome.rounds),
        "failures": sum(one.failure is not None for one in result.migrations),
        "bad": max(migration.story.bad for migration in result.migrations),
        "unbroken": all(migration.story.unbroken for migration in result.migrations),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


# ---- for people ----


def _words(migration: Migration) -> str:
    if migration.failure:
        return f"FAILED: {migration.failure}"
    if not migration.converged:
        sent = f"did not converge; {migration.wire_bytes() >> 20} MiB sent"
        return sent + _precopy_words(migration)
    figures = (
        f"downtime {shown(migration.downtime_ms())} ms, longest gap"
        f" {shown(migration.longest_gap_ms())} ms, {shown(migration.lost_ms())} ms of work lost,"
        f" {migration.total_s():.2f} s in all{_precopy_words(migration)}"
    )
    return figures if migration.is_right else f"{figures}; WRONG"


def _precopy_words(migration: Migration) -> str:
    rounds, work = migration.outcome.rounds, migration.precopy_work()
    if rounds is None or work is None:
        return ""
    return f"; rounds of precopy: {rounds}, at {work:.0%} of the guest's rate before"


def _wrong_words(one: Fields) -> str:
    if one["failure"]:
        return str(one["failure"])
    if one["bad"]:
        return f"{one['bad']} bad pages"
    return f"a heartbeat is missing or garbled: {one['broken']!r}"


def _bad_words(one: Fields) -> str:
    missing = [] if one["unbroken"] else ["heartbeats missing"]
    lost = [f"{one['failures']} guests lost"] if one["failures"] else []
    return ", and ".join([str(one["bad"]), *missing, *lost])


def _label(method: str) -> str:
    return _METHODS.get(method, method)


def _title(options: QemuOptions) -> str:
    link = "a loopback" if options.rate is None else f"{options.rate} Mbit/s"
    cpus = "1 CPU" if options.cpus == 1 else f"{options.cpus} CPUs"
    return f"A guest moves ({options.accel}, {cpus}) over {link}"


def _print_precopy(console: Console, summaries: Sequence[Fields]) -> None:
    if summaries:
        table = make_table("precopy", "MiB", "rounds", "guest's work meanwhile, of undisturbed")
        for one in summaries:
            rounds, work = one["precopy_rounds"], one["precopy_work"]
            table.add_row(_label(one["method"]), str(one["ram_mib"]), f"{rounds:g}", f"{work:.0%}")
        console.print()
        console.print(table)


def _print_results(
    summaries: Sequence[Fields], targets: Sequence[Target], options: QemuOptions
) -> None:
    console = make_console()
    console.print(f"\n[bold]{_title(options)}[/bold]  (medians of {options.rounds} rounds)")
    columns = (
        "MiB\n",
        "downtime\nms",
        "longest\ngap ms",
        "work\nlost ms",
        "at least\nlost ms",
        "faults\n",
        "p50 µs\n",
        "p99 µs\n",
        "blocked\nms",
        "total s\n",
        "MiB on\nthe wire",
    )
    table = make_table("", *columns, "bad\npages")
    for one in summaries:
        total = "-" if one["total_s"] is None else f"{one['total_s']:.2f}"
        if one["converged"] < one["rounds"]:
            total += f" ({one['converged']} of {one['rounds']})"
        table.add_row(
            _label(one["method"]),
            str(one["ram_mib"]),
            *(
                shown(one[name])
                for name in ("downtime_ms", "longest_gap_ms", "lost_ms", "least_lost_ms")
            ),
            "-" if one["faults"] is None else f"{one['faults']:,.0f}",
            *(shown(one["fault_us"][share]) for share in ("p50", "p99")),
            shown(one["blocked_ms"]),
            total,
            shown(one["wire_bytes"] / (1 << 20)),
            _bad_words(one),
        )
    console.print(table)
    _print_precopy(console, [one for one in summaries if one["precopy_work"] is not None])
    capped = (
        "Nothing is capped"
        if options.rate is None
        else "Only the link is capped, in both directions, for all methods alike"
    )
    limits = "QEMU's max-bandwidth and max-postcopy-bandwidth are off, and so are pagenet's limits"
    console.print(f"{capped}: {limits}.", style="dim")
    if targets:
        table = make_table("target", "is", "at most", "")
        for target in targets:
            met = "met" if target.is_met else "[bold]not met[/bold]"
            table.add_row(target.words, f"{target.figure:.2f}", f"{target.limit:.2f}", met)
        console.print()
        console.print(table)
