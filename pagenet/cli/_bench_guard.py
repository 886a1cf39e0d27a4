"""``pagenet-bench guard``: what the guard costs, and how soon it is there."""

from __future__ import annotations

import argparse
from typing import Any

from ..bench import GuardOptions, GuardResult, measure_guard, median
from ._command import Report
from ._tables import make_console, make_table, shown

__all__ = ["bench_guard"]

Fields = dict[str, Any]

# The targets: a fault with a guard, of one without; a restart, of a start; the guard's memory.
_FAULT, _RESTART, _MEMORY = 1.02, 1.5, 1 << 20


async def bench_guard(options: argparse.Namespace, report: Report) -> Fields:
    result = await measure_guard(GuardOptions(rounds=options.rounds))
    figures = _figures(result)
    report("result", suite="guard", **figures)
    targets = [
        {"target": name, "is": value, "limit": limit, "met": value <= limit}
        for name, value, limit in (
            ("fault p50 with a guard, of that without", figures["fault_ratio"], _FAULT),
            ("restart by the guard, of a start by hand", figures["restart_ratio"], _RESTART),
            ("memory of the guard in bytes", result.memory, _MEMORY),
        )
    ]
    for target in targets:
        report("target", suite="guard", **target)
    if not report.as_json:
        _print(figures, targets)
    return {**figures, "targets": targets}


def _figures(result: GuardResult) -> Fields:
    return {
        "fault_p50_us": result.plain.microseconds(0.5),
        "guarded_p50_us": result.guarded.microseconds(0.5),
        "fault_ratio": result.guarded.ratio(result.plain, 0.5),
        "started_ms": round(median(result.started) * 1e3, 1),
        "restarted_ms": round(median(result.restarted) * 1e3, 1),
        "restart_ratio": round(result.restart_ratio, 2),
        "guard_bytes": result.memory,
    }


def _print(figures: Fields, targets: list[Fields]) -> None:
    console = make_console()
    table = make_table(*(name.replace("_", " ") for name in figures))
    table.add_row(*(shown(value) for value in figures.values()))
    console.print(table)
    table = make_table("target", "is", "limit", "")
    for target in targets:
        words = "met" if target["met"] else "not met"
        table.add_row(str(target["target"]), str(target["is"]), str(target["limit"]), words)
    console.print(table)
