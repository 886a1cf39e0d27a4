"""The guard: a process that outlives ours if ours is killed in the middle of a switchover, so that
the guest is not left standing still.

Each line on its stdin sets its duty. When stdin ends, it performs the last one: ``resume`` the
guest at a QEMU that the guest was about to leave, ``kill`` a QEMU that waits for a guest, have a
QEMU ``run`` the guest that it was given for good, or do ``nothing``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

import trio

from ..errors import PagenetError
from .qmp import Qmp, QmpError, connect_qmp

__all__ = ["Guard", "go_on", "guarding"]

Duty = Literal["resume", "kill", "run", "nothing"]

_PATIENCE = 10.0
_PROGRAM = (
    "import sys; from pagenet.qemu._guard import main; sys.exit(main(sys.argv[1],"
    " int(sys.argv[2])))"
)


class Guard:
    """Made by :func:`guarding`."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process

    async def should_we_die(self, duty: Duty) -> None:
        """Set what the guard does if this process dies from now on. When this returns the duty is
        set, whatever happens to this process.

        If the guard itself has died, this does nothing: the switchover goes on without a guard.
        """
        assert self._process.stdin is not None
        with suppress(trio.BrokenResourceError):
            await self._process.stdin.send_all(f"{duty}\n".encode())


@asynccontextmanager
async def guarding(monitor: str | Path, pid: int) -> AsyncIterator[Guard]:
    """A guard over the QEMU ``pid`` with the QMP socket ``monitor``. When the block ends, its duty
    becomes ``nothing``, and it exits.

    :exc:`~pagenet.errors.PagenetError` if it does not start.
    """
    process = await trio.lowlevel.open_process(
        [sys.executable, "-P", "-c", _PROGRAM, str(monitor), str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # the guard must not get a Ctrl-C
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if await process.stdout.receive_some(1) != b"R":
            raise PagenetError("the process that is to guard the switchover ended at once")
        guard = Guard(process)
        yield guard
    finally:
        with trio.CancelScope(shield=True):
            await Guard(process).should_we_die("nothing")
            await process.stdin.aclose()
            await process.wait()
            await process.stdout.aclose()


async def go_on(qmp: Qmp) -> None:
    """Resume a guest that was about to leave its QEMU. :exc:`~pagenet.errors.PagenetError` if it
    does not run after 10 s.

    QEMU resumes the guest by itself when its migration is cancelled. After a completed migration it
    waits for ``cont``, and refuses even that for a moment.
    """
    deadline = trio.current_time() + _PATIENCE
    await qmp.command("migrate_cancel")
    while (status := (await qmp.command("query-status"))["status"]) != "running":
        if trio.current_time() > deadline:
            raise PagenetError(
                f"the guest does not go on here: it is {status}; send cont to this QEMU"
            )
        if status in ("postmigrate", "paused"):
            with suppress(QmpError):
                await qmp.command("cont")
        await trio.sleep(0.01)


async def _act(duty: str, monitor: str, pidfd: int) -> None:
    if duty == "kill":
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    elif duty in ("resume", "run"):
        async with connect_qmp(monitor, wait=_PATIENCE) as qmp:
            await (go_on(qmp) if duty == "resume" else qmp.command("cont"))


def main(monitor: str, pid: int) -> int:
    """The guard's own program. Reads duties from stdin; returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return 1
    os.write(1, b"R")
    duty = "nothing"
    for line in sys.stdin:
        duty = line.strip()
    try:
        trio.run(_act, duty, monitor, pidfd)
    except PagenetError as error:
        print(
            f"pagenet-qemu was killed, and its guard could not have the guest {duty}: {error}",
            file=sys.stderr,
        )
        return 1
    return 0
