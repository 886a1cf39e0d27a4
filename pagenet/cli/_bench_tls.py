"""``pagenet-bench tls``: what encryption costs."""

from __future__ import annotations

import argparse
from typing import Any

from ..bench import Sample, TlsOptions, TlsResult, measure_tls
from ._command import Report
from ._tables import make_console, make_table, shown

__all__ = ["bench_tls"]

Fields = dict[str, Any]

# The targets: a page, of what it takes without TLS and what a bare ping takes more; the worst pages
# under load, of the worst without; a byte, of the slower of bare TLS and pagenet without.
_FAULT, _LOADED, _STREAM = 1.1, 4.0, 0.9


async def bench_tls(options: argparse.Namespace, report: Report) -> Fields:
    plain, encrypted = await measure_tls(TlsOptions(rounds=options.rounds))
    rows = {"plain": _fields(plain), "tls": _fields(encrypted)}
    for name, row in rows.items():
        report("result", suite="tls", name=name, **row)
    targets = _targets(plain, encrypted)
    for target in targets:
        report("target", suite="tls", **target)
    if not report.as_json:
        _print(rows, targets)
    return {**rows, "targets": targets}


def _fields(result: TlsResult) -> Fields:
    return {
        "ping_p50_us": result.ping.microseconds(0.5),
        "fault_p50_us": result.idle.microseconds(0.5),
        "fault_p99_us": result.idle.microseconds(0.99),
        "loaded_p99_us": result.loaded.microseconds(0.99),
        "floor_gbps": round(result.floor_rate / 1e9, 2),
        **{
            f"background_{lanes}_gbps": round(result.rate(lanes) / 1e9, 2)
            for lanes in result.background
        },
    }


def _targets(plain: TlsResult, encrypted: TlsResult) -> list[Fields]:
    def us(sample: Sample, share: float) -> float:
        return sample.microseconds(share) or 0.0

    more = us(encrypted.ping, 0.5) - us(plain.ping, 0.5)
    slower = min(encrypted.floor_rate, plain.rate(1))
    found = [
        ("fault p50, to that without TLS and what a ping takes more",
         us(encrypted.idle, 0.5) / (us(plain.idle, 0.5) + more), _FAULT, True),
        ("fault p99 under load, to idle",
         us(encrypted.loaded, 0.99) / us(encrypted.idle, 0.99), _LOADED, True),
        ("background, to the slower of bare TLS and none",
         encrypted.rate(1) / slower, _STREAM, False),
    ]  # fmt: skip
    return [
        {
            "target": name,
            "is": round(value, 2),
            "limit": limit,
            "met": value <= limit if at_most else value >= limit,
        }
        for name, value, limit, at_most in found
    ]


def _print(rows: dict[str, Fields], targets: list[Fields]) -> None:
    names = list(rows["plain"])
    table = make_table("", *(name.replace("_", " ") for name in names))
    for name, row in rows.items():
        table.add_row(name, *(shown(row[figure]) for figure in names))
    console = make_console()
    console.print(table)
    table = make_table("target", "is", "limit", "")
    for target in targets:
        words = "met" if target["met"] else "not met"
        table.add_row(str(target["target"]), shown(target["is"]), shown(target["limit"]), words)
    console.print(table)
