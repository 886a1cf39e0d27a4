"""``pagenet-bench trace``: its options, and its output."""

from __future__ import annotations

import argparse
import sys

from ..bench import DATA, trace_program
from ..errors import UsageError
from ._command import Parser, Report

__all__ = ["add_trace_options", "bench_trace", "trace_report"]

_WORDS = {
    "progress": "{touched} of {pages} pages touched",
    "unwatched": "{mappings} mappings of the data could not be watched: {reason}",
    "traced": "{touched} of {pages} pages touched, after {work_seconds:.3f} s of work: {file}",
}


def add_trace_options(parser: Parser) -> None:
    parser.add_argument(
        "--data",
        metavar="FILE",
        required=True,
        help="file that the program maps; the program gets a copy of it in memory",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        help="file for the recorded touches, for workload --trace recorded=FILE",
    )
    words = f"after --: the program's command line, in which {DATA} stands for the copy's name"
    parser.add_argument("program", nargs="*", metavar="PROGRAM", help=words)


def trace_report(prog: str, as_json: bool) -> Report:
    """A report on stderr: stdout is for the program."""
    return Report(
        prog, as_json, {event: f"{prog}: {words}" for event, words in _WORDS.items()}, to=sys.stderr
    )


async def bench_trace(options: argparse.Namespace, report: Report) -> int:
    """Trace the program. Returns its exit status. :exc:`UsageError` if no program was named."""
    if not options.program:
        raise UsageError("say which program is to be traced: its command line after --")
    return await trace_program(options.program, options.data, options.output, report)
