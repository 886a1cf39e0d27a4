"""``pagenet-bench pace``: its options, and its figures for people and for machines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..bench import (
    AS_GOOD,
    PACE_FIGURES,
    PACE_WINDOWS,
    TRACES,
    Cell,
    CellResult,
    PaceOptions,
    measure_pace,
)
from ..sizes import parse_size, size_text
from ._command import Parser, Report, counts, link_rates, names, sizes
from ._tables import make_console, make_table

__all__ = ["add_pace_options", "bench_pace"]

Fields = dict[str, Any]

_MAX_THREADS = 64


def add_pace_options(parser: Parser) -> None:
    usual = {field.name: field.default for field in fields(PaceOptions)}
    parser.add_argument(
        "--rate",
        type=link_rates,
        default=usual["rates"],
        metavar="MBIT,...",
        help="rates of the links; none: loopback (100,1000,2500,10000,none)",
    )
    parser.add_argument(
        "--delay",
        type=_delays,
        default=usual["trips"],
        metavar="MS,...",
        help="added to the round trip by a relay (0,1,20)",
    )
    parser.add_argument(
        "--threads",
        type=counts(_MAX_THREADS),
        default=usual["threads"],
        metavar="N,...",
        help=f"threads of the owner, {_MAX_THREADS} at most (1)",
    )
    parser.add_argument(
        "--trace",
        type=names(TRACES),
        default=usual["traces"],
        metavar="NAME,...",
        help=f"touches: {', '.join(TRACES)} (random,zipf,sequential)",
    )
    parser.add_argument(
        "--work",
        type=_delays,
        default=usual["works_us"],
        metavar="US,...",
        help="work before each touch, in us (0,50)",
    )
    parser.add_argument(
        "--window",
        type=sizes,
        default=PACE_WINDOWS,
        metavar="SIZE,...",
        help="fixed windows to compare with (16K,64K,256K,1M,4M,16M)",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        help="of the memory (what the link carries in a second, 16M to 512M)",
    )


def _delays(text: str) -> tuple[float, ...]:
    delays = tuple(float(part) for part in text.split(","))
    if not all(0 <= delay <= 1000 for delay in delays):
        raise argparse.ArgumentTypeError(f"{text}: each is 0 to 1000")
    return delays


async def bench_pace(options: argparse.Namespace, report: Report) -> Fields:
    wanted = PaceOptions(
        lane=options.lane,
        rates=options.rate,
        trips=options.delay,
        threads=options.threads,
        traces=options.trace,
        works_us=options.work,
        windows=options.window,
        size=options.size,
        rounds=options.rounds,
    )
    console = make_console()

    def tell(result: CellResult) -> None:
        report("result", suite="pace", **_about(result))
        if not report.as_json:
            ratios = ", ".join(f"{name} {result.ratio(name):.2f}x" for name in PACE_FIGURES)
            console.print(f"{_name(result.cell)}: auto / best: {ratios}")

    results = await measure_pace(wanted, tell)
    if not report.as_json:
        _print(results, wanted)
    return {
        "results": [_about(result) for result in results],
        "wrong": sum(result.wrong for result in results),
        "worse": [_name(result.cell) for result in results if not result.is_as_good()],
        "beaten": [_name(result.cell) for result in results if result.better() is not None],
    }


def _about(result: CellResult) -> Fields:
    return {
        **result.cell._asdict(),
        "size": result.size,
        "wrong": result.wrong,
        "ratio": {name: round(result.ratio(name), 3) for name in PACE_FIGURES},
        "noise": {name: round(result.noise(name), 3) for name in PACE_FIGURES},
        "better": None if (better := result.better()) is None else _size(better),
        "best": {name: _size(result.best(name)) for name in PACE_FIGURES},
        "windows": {
            _size(window): {
                name: round(result.figure(window, name), 6) for name in result.rounds[window][0]
            }
            for window in result.rounds
        },
        "stopped": [_size(window) for window in sorted(result.stopped)],
    }


def _size(window: int | None) -> str:
    return "auto" if window is None else size_text(window)


def _name(cell: Cell) -> str:
    link = "loopback" if cell.rate is None else f"{cell.rate} Mbit/s"
    delay = f" + {cell.trip:g} ms" if cell.trip else ""
    threads = f", {cell.threads} threads" if cell.threads > 1 else ""
    return f"{link}{delay}, {cell.trace}, {cell.work_us:g} us{threads}"


def _value(result: CellResult, window: int | None, figure: str) -> str:
    return "stopped" if window in result.stopped else f"{result.figure(window, figure):.3f}"


def _print(results: Sequence[CellResult], options: PaceOptions) -> None:
    console = make_console()
    ladder = [_size(window) for window in options.windows]
    for figure, words in (("stall", "each thread waits"), ("complete", "until the last page")):
        console.print(f"\n[bold]{words}[/bold]  (s; medians of {options.rounds} rounds)")
        table = make_table("", "auto", *ladder, "auto / best", "noise")
        for result in results:
            values = [_value(result, window, figure) for window in (None, *options.windows)]
            table.add_row(
                _name(result.cell),
                *values,
                f"{result.ratio(figure):.2f}x",
                f"{result.noise(figure):.0%}",
            )
        console.print(table)
    worse = [_name(result.cell) for result in results if not result.is_as_good()]
    console.print(
        f"\n{len(results) - len(worse)} of {len(results)} cells are within {AS_GOOD - 1:.0%} of"
        " the best fixed window in each figure, or within the noise"
    )
    for name in worse:
        console.print(f"worse: {name}")
    beaten = {_name(result.cell): result.better() for result in results}
    for name, window in beaten.items():
        if window is not None:
            console.print(f"{_size(window)} would have been a better choice: {name}")
    if wrong := sum(result.wrong for result in results):
        console.print(f"[bold]{wrong} pages are wrong[/bold]")
