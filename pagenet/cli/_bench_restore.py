"""``pagenet-bench restore``: its options, and its figures for people and for machines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from ..bench import RESTORE_ROWS, Figure, GuestKind, RestoreOptions, measure_restore, plot_restore
from ..sizes import parse_size, size_text
from ._command import Parser, Report, count, names
from ._tables import make_console, make_table, shown

__all__ = ["add_restore_options", "bench_restore"]

Fields = dict[str, Any]

# Options with a number, and what it is.
_COUNTS = {
    "guests": "guests at once in warm and store",
    "clones": "guests of clones",
    "layers": "layers of chain",
    "in_turn": "guests one after the other in many",
    "at_once": "guests at once in many",
}
# The same with a size.
_SIZES = {
    "size": "memory of a clone",
    "working_set": "what each clone touches",
    "recorded": "what the guest of recorded touches",
    "memory": "memory of the guest of recorded",
    "piece": "size of the pieces, here and there, in which clones and recorded touch memory",
}


def add_restore_options(parser: Parser) -> None:
    usual: Fields = {field.name: field.default for field in fields(RestoreOptions)}
    parser.add_argument(
        "--rows",
        type=names(RESTORE_ROWS),
        default=RESTORE_ROWS,
        metavar="NAME,...",
        help=f"what is measured: {', '.join(RESTORE_ROWS)} (all of them)",
    )
    parser.add_argument(
        "--kind",
        choices=get_args(GuestKind),
        default=usual["kind"],
        help=(
            "memory of the guests: anonymous, or a private mapping of the daemon's cache"
            " (%(default)s)"
        ),
    )
    for name, words in _COUNTS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=count,
            default=usual[name],
            metavar="N",
            help=f"{words} (%(default)s)",
        )
    for name, words in _SIZES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=parse_size,
            default=usual[name],
            metavar="SIZE",
            help=f"{words} ({size_text(usual[name])})",
        )
    parser.add_argument(
        "--hostile", action="store_true", help="measure many beside a hostile guest too"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help=(
            "plot what is resident, and which touches wait, over time, in clones and recorded:"
            " FILE.svg or FILE.png"
        ),
    )


async def bench_restore(options: argparse.Namespace, report: Report) -> Fields:
    chosen = {field.name: getattr(options, field.name) for field in fields(RestoreOptions)}
    wanted = RestoreOptions(**chosen)
    result = await measure_restore(
        wanted, lambda figure: report("result", suite="restore", **_about(figure))
    )
    if not report.as_json:
        _print(result.figures, wanted)
    if options.plot is not None and result.curves:
        plot_restore(options.plot, result.curves, _title(wanted))
        report("plotted", file=str(options.plot))
    return {
        "figures": [_about(figure) for figure in result.figures],
        "missed": [f"{f.row}: {f.name}" for f in result.figures if f.met is False],
    }


def _about(figure: Figure) -> Fields:
    about = asdict(figure)
    del about["measured_ratio"]
    return {**about, "ratio": figure.ratio, "met": figure.met}


def _title(options: RestoreOptions) -> str:
    return f"Restores, guests with {options.kind} memory"


def _print(figures: Sequence[Figure], options: RestoreOptions) -> None:
    console = make_console()
    console.print(f"\n[bold]{_title(options)}[/bold]  (medians of {options.rounds} rounds)")
    table = make_table("", "", "pagenet", "floor", "", "ratio", "limit", "")
    table.columns[1].justify = table.columns[4].justify = table.columns[7].justify = "left"
    row = ""
    for figure in figures:
        if row and row != figure.row:
            table.add_section()
        table.add_row(
            "" if row == figure.row else figure.row,
            figure.name,
            _number(figure.value),
            _number(figure.floor),
            figure.unit,
            "-" if figure.ratio is None else f"{figure.ratio:.2f}x",
            _limit(figure),
            {True: "met", False: "[bold]missed[/bold]", None: ""}[figure.met],
        )
        row = figure.row
    console.print(table)


def _number(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else shown(value)


def _limit(figure: Figure) -> str:
    if figure.limit is None:
        return "-"
    words = "at least" if figure.at_least else "at most"
    return f"{words} {figure.limit:g}{'' if figure.floor is None else 'x'}"
