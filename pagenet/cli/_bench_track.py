"""pagenet-bench track: what write tracking costs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..bench import TrackOptions, TrackResult, measure_tracking
from ._command import Report
from ._tables import make_console, make_table, shown

__all__ = ["bench_track"]

Fields = dict[str, Any]


async def bench_track(options: argparse.Namespace, report: Report) -> Fields:
    wanted = TrackOptions(
        sizes=options.sizes, dirty=options.dirty, fill=options.fill, rounds=options.rounds
    )
    results = await measure_tracking(
        wanted, lambda size, needed: report("too_large", bytes=size, needed=needed)
    )
    rows = [_fields_of(result, wanted) for result in results]
    for row in rows:
        report("result", suite="track", **row)
    if rows and not report.as_json:
        _print(rows, wanted)
    return {"sizes": rows}


def _fields_of(result: TrackResult, options: TrackOptions) -> Fields:
    names = ("arm", "clean", "dirty", "close", "clean_floor", "dirty_floor")
    return {
        "bytes": result.size,
        "filled": options.fill,
        "written_pages": result.pages,
        **{f"{name}_ms": round(result.seconds(name) * 1e3, 3) for name in names},
        "arm_to_floor": round(result.ratio("arm", "clean_floor"), 2),
        "clean_to_floor": round(result.ratio("clean", "clean_floor"), 2),
        "dirty_to_floor": round(result.ratio("dirty", "dirty_floor"), 2),
        "page_us": round(result.page_seconds() * 1e6, 3),
        "write_us": round(result.write_seconds() * 1e6, 3),
        "write_floor_us": round(result.seconds("write_floor") / result.pages * 1e6, 3),
    }


def _print(rows: Sequence[Fields], options: TrackOptions) -> None:
    console = make_console()
    kind = "filled" if options.fill else "sparse"
    console.print(
        f"\n[bold]Write tracking, {kind} memory[/bold]  (ms; medians of {options.rounds} rounds)"
    )
    table = make_table(
        *("MiB", "arm", "is", "look, clean", "is", "look, written", "is", "close"),
        *("µs a page", "µs a write", "without"),
    )
    for row in rows:
        figures = []
        for name in ("arm", "clean", "dirty"):
            figures += [shown(row[f"{name}_ms"]), shown(row[f"{name}_to_floor"], "x scan")]
        each = [f"{row[name]:.2f}" for name in ("page_us", "write_us", "write_floor_us")]
        table.add_row(str(row["bytes"] >> 20), *figures, shown(row["close_ms"]), *each)
    console.print(table)
    pages = rows[0]["written_pages"]
    console.print(
        f"The floor is PAGEMAP_SCAN alone at the same moment. {pages:,} pages were written: µs a"
        " page are what a look costs more for each, µs a write what its first write costs more.",
        style="dim",
    )
