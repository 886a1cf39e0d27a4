"""The control socket of long-running commands."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Awaitable, Callable

from ..admission import raise_descriptor_limit
from ..control import Control, serve_control
from ._command import Parser, Report, run_command
from ._tls import add_tls_options, reloading, tls_of

__all__ = ["Work", "add_common_options", "run_controlled"]

Work = Callable[[argparse.Namespace, Report, Control], Awaitable[int | None]]


def add_common_options(parser: Parser) -> None:
    """Add the options of every long-running command."""
    add_tls_options(parser)
    parser.add_argument(
        "--control",
        metavar="PATH",
        help=(
            "unix socket on which pagenet-ctl shows the running transfer, and changes it (for this"
            " user and root)"
        ),
    )


def run_controlled(work: Work, options: argparse.Namespace, report: Report) -> int:
    """As :func:`run_command`, with a control socket if ``options`` name one. ``work`` sets the
    subject of its :class:`Control` once there is a transfer."""
    raise_descriptor_limit()
    return run_command(lambda: _with_control(work, options, report), report)


async def _with_control(work: Work, options: argparse.Namespace, report: Report) -> int | None:
    options.tls = tls_of(options)
    async with reloading(options.tls, report):
        if options.control is None:
            return await work(options, report, Control(report.prog, None))
        async with serve_control(
            None, options.control, program=report.prog, stop=_terminate, on_event=report
        ) as control:
            return await work(options, report, control)


def _terminate() -> None:
    """Stop as SIGTERM does, with the exit code of that."""
    os.kill(os.getpid(), signal.SIGTERM)
