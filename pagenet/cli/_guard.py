"""The guard of the commands that fill memory, or serve what only they have."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..guard import Guard, guarding
from ._command import Report

__all__ = ["GUARD_WORDS", "add_guard_option", "guarded"]

GUARD_WORDS = {
    "restarted": "started again, as process {pid}: an earlier one was killed",
    "guarded": "its guard was killed: process {pid} has taken its place",
}


def add_guard_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-guard",
        dest="guard",
        action="store_false",
        help=(
            "do without the guard: a small process that starts this one again if it is killed, and"
            " keeps what it needs to go on"
        ),
    )


@asynccontextmanager
async def guarded(options: argparse.Namespace, report: Report) -> AsyncIterator[Guard | None]:
    """A guard, unless the options say that there is none."""
    if not options.guard:
        yield None
        return
    async with guarding() as guard:
        if guard.has_restarted:
            report("restarted", pid=os.getpid())
        guard.on_replaced = lambda pid: report("guarded", pid=pid)
        yield guard
