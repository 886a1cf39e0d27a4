"""Owners of memory that run while a snapshot of it is made: processes, and guests of QEMU."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, closing
from typing import TYPE_CHECKING, NamedTuple

import trio

from ..errors import UsageError
from ..snapshot.running import Owner, RunningProcess
from ..source.memory import Source, open_source
from ..source.tracked import SourceOwner
from ..uffd import WriteTracker

if TYPE_CHECKING:
    from ..qemu._guard import Guard
    from ..qemu.qmp import Qmp

__all__ = ["QMP", "Running", "open_running"]

#: in front of the path of a QEMU's monitor
QMP = "qmp:"


class Running(NamedTuple):
    """Memory, who writes to it, and what names the pages that were written."""

    source: Source
    owner: Owner
    tracker: WriteTracker


@asynccontextmanager
async def open_running(spec: str) -> AsyncIterator[Running]:
    """The memory ``pid:PID:START+SIZE`` or ``/proc/PID/fd/N`` of a process, or ``qmp:PATH``, the
    RAM of a guest. Raises what :class:`SourceOwner` and :class:`~pagenet.WriteTracker` do, and
    :exc:`~pagenet.errors.UsageError` for a guest whose RAM cannot be tracked."""
    opened = _guest(spec.removeprefix(QMP)) if spec.startswith(QMP) else _process(spec)
    async with opened as running:
        yield running


@asynccontextmanager
async def _process(spec: str) -> AsyncIterator[Running]:
    with ExitStack() as stack:
        source = stack.enter_context(open_source(spec))
        owner = stack.enter_context(closing(SourceOwner(source)))
        tracker = await trio.to_thread.run_sync(owner.track, source.region)
        stack.callback(tracker.close)
        yield Running(source, RunningProcess(owner), tracker)


class _Guest:
    """:class:`Owner`: a guest of QEMU. One that is paused already stays so."""

    def __init__(self, qmp: Qmp, guard: Guard) -> None:
        self.qmp, self._guard = qmp, guard
        self._is_stopped = False

    async def stop(self) -> None:
        if (await self.qmp.command("query-status"))["running"]:
            await self._guard.should_we_die("run")
            self._is_stopped = True
            await self.qmp.command("stop")

    async def go_on(self) -> None:
        if self._is_stopped:
            await self.qmp.command("cont")
            self._is_stopped = False
            await self._guard.should_we_die("nothing")


@asynccontextmanager
async def _guest(path: str) -> AsyncIterator[Running]:
    from ..qemu._guard import guarding  # not where no guest is: it takes a while
    from ..qemu.machine import describe, ram_of, source_specs
    from ..qemu.precopy import tracking
    from ..qemu.qmp import connect_qmp

    async with connect_qmp(path) as qmp:
        machine = await describe(qmp)
        if len(machine.backends) != 1:
            raise UsageError("the guest's RAM is in several memory backends, a snapshot of one")
        with ExitStack() as stack:
            rams = stack.enter_context(ram_of(qmp.pid, machine))
            source = stack.enter_context(open_source(*source_specs(qmp.pid, machine, rams)))
            tracker = await tracking(qmp, [ram.mapping for ram in rams], source.region)
            stack.callback(tracker.close)
            async with guarding(path, qmp.pid) as guard:
                yield Running(source, _Guest(qmp, guard), tracker)
