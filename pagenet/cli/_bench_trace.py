"""``pagenet-bench trace``: its options and its output."""

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
        help="the file that the program maps; it is given a copy, in memory",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        help="where its touches go, for workload --trace recorded=FILE",
    )
    words = f"after --: its command line, in which {DATA} stands for the name of the copy"
    parser.add_argument("program", nargs="*", metavar="PROGRAM", help=words)


def trace_report(prog: str, as_json: bool) -> Report:
    """A report on stderr: stdout is the program's."""
    return Report(
        prog, as_json, {event: f"{prog}: {words}" for event, words in _WORDS.items()}, to=sys.stderr
    )


async def bench_trace(options: argparse.Namespace, report: Report) -> int:
    """The program's exit status."""
    if not options.program:
        raise UsageError("say which program is to be traced: its command line after --")
    return await trace_program(options.program, options.data, options.output, report)
