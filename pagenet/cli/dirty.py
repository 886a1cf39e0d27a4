"""pagenet-dirty: how fast a process, or a QEMU guest, writes to its memory, and what that means for
moving it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from ..dirty import (
    WINDOWS,
    DirtyRecorder,
    Figures,
    Forecast,
    History,
    Second,
    WatchedMemory,
    ask_forever,
    dirty_file,
    forecast,
    memory_of,
    memory_of_qemu,
    parse_range,
    plot_figures,
    watch,
    write_dirty,
)
from ..errors import UsageError
from ..nurseries import open_failing_nursery
from ..picture import check_plot
from ..qemu import Qmp, connect_qmp, describe
from ..whole_file import WholeFile
from ._command import Parser, Report, count, run_command
from ._rates import rate_words

__all__ = ["main", "make_parser"]

_MIB = 1 << 20
_EXIT_CODES = """\
exit codes:
  0    done: it was watched for --seconds
  1    failed in a way that has no code of its own
  2    bad usage: arguments or memory cannot be used, or the process has mapped something else there
  5    owner gone: the process has ended
  7    not possible here: a permission or a kernel feature is missing (Linux 6.7)
  130  stopped by Ctrl-C (SIGINT)
  143  stopped by SIGTERM
"""
_WORDS = {
    "watching": "watching {bytes} bytes of process {pid}, in {blocks} blocks",
    "second": "{words}",
    "qemu": "QEMU itself: {words}",
    "complete": "{words}",
    "recorded": "recorded {seconds} s in {file}",
    "plotted": "plotted {file}",
    "full": "the recording is as long as one can be",
}


def make_parser() -> Parser:
    parser = Parser(
        "pagenet-dirty",
        "Show how fast a running process writes to its memory, and how much of it it works on. The"
        " process is not stopped, but for a moment at the beginning.",
    )
    parser.epilog = _EXIT_CODES
    parser.add_argument(
        "pid",
        nargs="?",
        type=count,
        metavar="PID",
        help="process to watch: all memory that it has mapped shared and writable",
    )
    parser.add_argument(
        "--qmp", metavar="SOCKET", help="instead of PID, a QEMU's monitor: watch the guest's RAM"
    )
    parser.add_argument(
        "--range",
        type=_range,
        action="append",
        default=[],
        metavar="START-END|START+SIZE",
        help="addresses of process PID to watch instead, private memory too; may be repeated",
    )
    parser.add_argument(
        "--seconds",
        type=count,
        metavar="N",
        help="end after N seconds (default: when it is stopped)",
    )
    parser.add_argument(
        "--record", metavar="FILE", help="write a bitmap of the written pages of each second"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot what was written: FILE.svg or FILE.png"
    )
    parser.add_argument(
        "--link",
        type=_link,
        metavar="MBIT",
        help=(
            "forecast a migration over a link of MBIT million bits a second: rounds of precopy,"
            " time of postcopy, what hybrid leaves for the switch"
        ),
    )
    parser.add_argument(
        "--downtime",
        type=count,
        default=300,
        metavar="MS",
        help="for which precopy may stop the guest, in ms (default: %(default)s, as QEMU has it)",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="with --qmp: show QEMU's own estimate (calc-dirty-rate) of the same seconds too",
    )
    return parser


def _range(text: str) -> tuple[int, int]:
    try:
        return parse_range(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _link(text: str) -> float:
    """For argparse: million bits a second, as bytes a second."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not (math.isfinite(rate) and 0.001 <= rate <= 1e9):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of Mbit/s from 0.001 on")
    return rate * 1e6 / 8


# ---- what is watched ----


@asynccontextmanager
async def _memory(options: argparse.Namespace) -> AsyncIterator[tuple[WatchedMemory, Qmp | None]]:
    """The memory, and the monitor if QEMU is to be asked too: only then is it kept."""
    if not options.qmp:
        yield await trio.to_thread.run_sync(memory_of, options.pid, options.range), None
        return
    async with AsyncExitStack() as stack:
        qmp = await stack.enter_async_context(connect_qmp(options.qmp))
        machine, pid = await describe(qmp), qmp.pid
        if not pid:
            raise UsageError(
                f"the process that listens on {options.qmp} is in another pid namespace: run"
                " pagenet there"
            )
        if not options.compare:
            await stack.aclose()
        memory = await trio.to_thread.run_sync(memory_of_qemu, pid, machine)
        yield memory, qmp if options.compare else None


class _Session:
    """What was seen so far, and what becomes of it at the end, however that comes."""

    def __init__(self, options: argparse.Namespace, report: Report, memory: WatchedMemory) -> None:
        self._options = options
        self._report = report
        self._memory = memory
        self._history = History(memory.region)
        self._figures: list[Figures] = []
        self._recorder = DirtyRecorder(memory.region) if options.record else None
        self._theirs: list[int] = []

    def add(self, second: Second) -> None:
        figures = self._history.add(second)
        self._figures.append(figures)
        if self._recorder:
            self._recorder.add(second)
        windows = dict(zip(map(str, WINDOWS), figures.windows, strict=True))
        self._say(
            "second",
            _second_words(figures),
            seconds=round(figures.at, 3),
            bytes_per_s=round(figures.rate),
            working_set=windows,
        )

    def _say(self, event: str, words: str, **fields: object) -> None:
        """Machines get the fields, people the words."""
        if not self._report.as_json:
            fields["words"] = words
        self._report(event, **fields)

    def hear(self, rate: int) -> None:
        """QEMU's own figure."""
        self._theirs.append(rate)
        self._say("qemu", rate_words(rate), bytes_per_s=rate)

    @property
    def is_over(self) -> bool:
        if self._recorder and self._recorder.is_full:
            self._report("full")
            return True
        wanted: int | None = self._options.seconds
        return len(self._figures) == wanted

    def finish(self, file: WholeFile | None) -> None:
        """Nothing, if not even a second is over."""
        if not self._figures:
            return
        if file and self._recorder:
            write_dirty(self._recorder.recording(), file)
            self._report("recorded", seconds=len(self._figures), file=self._options.record)
        if self._options.plot is not None:
            title = f"Memory written by process {self._memory.pid}"
            plot_figures(self._options.plot, self._figures, title)
            self._report("plotted", file=str(self._options.plot))
        self._tell()

    def _tell(self) -> None:
        link, downtime = self._options.link, self._options.downtime / 1000
        expected = forecast(self._history, link, downtime) if link else None
        fields: dict[str, Any] = {"bytes_per_s": round(self._history.mean_rate)}
        words = f"mean: {rate_words(self._history.mean_rate)}"
        if self._options.compare:
            theirs = sum(self._theirs) / len(self._theirs) if self._theirs else None
            fields["qemu_bytes_per_s"] = theirs and round(theirs)
            words += f"; QEMU's: {'none' if theirs is None else rate_words(theirs)}"
        if expected:
            fields["forecast"] = asdict(expected)
            words = "\n".join([words, *_forecast_words(expected)])
        self._say("complete", words, seconds=len(self._figures), **fields)


def _mib(size: float | None) -> str:
    return "-" if size is None else f"{size / _MIB:.1f}"


def _second_words(figures: Figures) -> str:
    sets = ", ".join(
        f"{window} s {_mib(size)}" for window, size in zip(WINDOWS, figures.windows, strict=True)
    )
    return f"{figures.at:6.0f} s  {figures.rate / 1e6:9.1f} MB/s  working set, MiB: {sets}"


def _forecast_words(expected: Forecast) -> list[str]:
    link = f"over {expected.bytes_per_second * 8 / 1e6:g} Mbit/s"
    if expected.precopy_rounds is None:
        precopy = "never converges"
    else:
        rounds = f"{expected.precopy_rounds} round{'s' * (expected.precopy_rounds != 1)}"
        precopy = f"converges after {rounds}, {expected.precopy_seconds:.1f} s"
    rest = f"{_mib(expected.hybrid_rest)} MiB ({expected.hybrid_rest_seconds:.2f} s)"
    rounds = f"{expected.hybrid_rounds} round{'s' * (expected.hybrid_rounds != 1)}"
    lines = [
        f"{link}, precopy: {precopy}",
        f"{link}, postcopy: every page is there after {expected.postcopy_seconds:.1f} s",
        f"{link}, hybrid: {rounds}, {expected.hybrid_seconds:.1f} s, then {rest} after the switch",
    ]
    if expected.is_extrapolated:
        lines.append("that takes longer than what was seen: watch for longer to know more")
    return lines


# ---- the command ----


async def _dirty(options: argparse.Namespace, report: Report) -> None:
    if options.plot is not None:
        check_plot(options.plot)
    async with AsyncExitStack() as stack:
        file = stack.enter_context(dirty_file(options.record)) if options.record else None
        memory, qmp = await stack.enter_async_context(_memory(options))
        session = _Session(options, report, memory)
        region = memory.region
        stack.callback(session.finish, file)
        async with watch(memory) as watched, open_failing_nursery() as nursery:
            report("watching", pid=memory.pid, bytes=region.size, blocks=len(region.blocks))
            if qmp is not None:
                nursery.start_soon(ask_forever, qmp, session.hear)
            while not session.is_over:
                session.add(await watched.next_second())
            nursery.cancel_scope.cancel()


def _check_target(parser: Parser, options: argparse.Namespace) -> None:
    if (options.pid is None) == (options.qmp is None):
        parser.error("name either the PID of a process, or a QEMU's monitor with --qmp")
    if options.qmp and options.range:
        parser.error("--range is for a process, not for --qmp")
    if options.compare and not options.qmp:
        parser.error("--compare asks QEMU: it needs --qmp")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    _check_target(parser, options)
    report = Report("pagenet-dirty", options.json, _WORDS)
    return run_command(lambda: _dirty(options, report), report)


if __name__ == "__main__":
    sys.exit(main())
