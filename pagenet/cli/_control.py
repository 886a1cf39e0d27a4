"""The control socket of long-running commands."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from ..admission import raise_descriptor_limit
from ..control import Control, default_socket, serve_control
from ..errors import UsageError
from ._command import Parser, Report, run_command
from ._tls import TLS_WORDS, add_tls_options, reloading, tls_of

__all__ = ["COMMON_WORDS", "Work", "add_common_options", "run_controlled"]

#: what the events mean that every long-running command reports
COMMON_WORDS = {**TLS_WORDS, "metrics": "metrics at {address}"}

Work = Callable[[argparse.Namespace, Report, Control], Awaitable[int | None]]


def add_common_options(parser: Parser) -> None:
    """Add the options of every long-running command."""
    add_tls_options(parser)
    parser.add_argument(
        "--control",
        metavar="PATH",
        help=(
            "unix socket on which pagenet-ctl shows the running transfer, and changes it (for this"
            " user and root); none: do without (default: where pagenet-ctl list finds it,"
            " /run/pagenet or $XDG_RUNTIME_DIR/pagenet)"
        ),
    )

    parser.add_argument(
        "--metrics",
        metavar="HOST:PORT|unix:PATH",
        help=(
            "serve metrics for Prometheus there, at /metrics (docs/metrics.md); for this host only,"
            " or this user and root"
        ),
    )
    parser.add_argument(
        "--metrics-open",
        action="store_true",
        help="--metrics may name an address that other hosts can reach",
    )


def run_controlled(work: Work, options: argparse.Namespace, report: Report) -> int:
    """As :func:`run_command`, with a control socket if ``options`` name one. ``work`` sets the
    subject of its :class:`Control` once there is a transfer."""
    raise_descriptor_limit()
    return run_command(lambda: _with_control(work, options, report), report)


async def _with_control(work: Work, options: argparse.Namespace, report: Report) -> int | None:
    options.tls = tls_of(options)
    async with (
        reloading(options.tls, report),
        _control(options, report) as control,
        _metrics(options, report, control),
    ):
        return await work(options, report, control)


@asynccontextmanager
async def _control(options: argparse.Namespace, report: Report) -> AsyncIterator[Control]:
    path = options.control if options.control is not None else default_socket(report.prog)
    if path is None or path == "none":
        yield Control(report.prog, None)
        return
    async with serve_control(
        None, path, program=report.prog, stop=_terminate, on_event=report
    ) as control:
        yield control


@asynccontextmanager
async def _metrics(
    options: argparse.Namespace, report: Report, control: Control
) -> AsyncIterator[None]:
    if options.metrics is None:
        if options.metrics_open:
            raise UsageError("--metrics-open goes with --metrics")
        yield
        return
    from ..metrics import parse_address, serve_metrics

    address = parse_address(options.metrics, is_open=options.metrics_open)
    async with serve_metrics(address, report.prog, lambda: control.subject) as there:
        report("metrics", address=str(there))
        yield


def _terminate() -> None:
    """Stop as SIGTERM does, with the exit code of that."""
    os.kill(os.getpid(), signal.SIGTERM)
