"""The destination's side: a QEMU that waits for a guest, and the guest that comes. ``migration.py`` draws the steps."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import trio

from ..errors import OwnerGone, PagenetError, UsageError
from ..events import EventHandler, ignore_events
from ..lane import LaneKind
from ..nurseries import open_failing_nursery
from ..progress import tell_faults, telling
from ..protocol import Compress
from ..pulling import Transfer, pull
from ..transport import Connection
from ..uffd import UffdSocket
from ._guard import Guard, guarding
from ._talk import DEVICES, TALK, Talk, relay
from .command_line import Incoming, prepare_incoming
from .machine import CAPABILITIES, Machine, describe
from .qmp import Qmp, connect_qmp

__all__ = ["Arrival", "receive"]

# QEMU opens its monitor before it has made the machine, and answers when it has.
_START_TIMEOUT = 30.0
_STEP_TIMEOUT = 60.0
_CANNOT_LOAD = "QEMU cannot load the guest's devices: does the command line name the source's, in the same order?"
# QEMU maps its RAM, and hands it over, before its monitor answers.
_HANDSHAKE_TIMEOUT = 5.0
# From the end of its monitor to its own.
_END_TIMEOUT = 5.0


class Arrival:
    """A guest that runs here while its pages come. Made by :func:`receive`."""

    def __init__(self, process: trio.Process, transfer: Transfer) -> None:
        #: the QEMU that was started; it outlives the transfer, and this program
        self.process = process
        self.transfer = transfer

    async def wait_complete(self) -> None:
        """Return when every page is here: from then on nothing ties the guest to its source."""
        await self.transfer.wait_complete()


@asynccontextmanager
async def receive(
    command: Sequence[str],
    *,
    listen: str,
    plaintext: bool = False,
    background: str = "hot",
    background_lanes: int = 1,
    lane: LaneKind = "auto",
    prefetch: tuple[int, int] | None = None,
    max_bandwidth: int | None = None,
    start_background: str | None = None,
    record: str | os.PathLike[str] | None = None,
    compress: Compress = "auto",
    allocate: bool = False,
    on_event: EventHandler = ignore_events,
) -> AsyncIterator[Arrival]:
    """Start the QEMU of ``command`` (see :func:`~pagenet.qemu.prepare_incoming`), and take one guest from the
    ``pagenet-qemu migrate`` that dials ``listen``. The options are those of :func:`pagenet.pull` and
    :class:`~pagenet.UffdSocket`.

    The block begins when the guest runs here; leave it after :meth:`Arrival.wait_complete`. Whatever fails before the guest
    was handed over ends the QEMU that was started; whatever fails later leaves it alone: a guest whose source is lost stands
    still at the first page that it misses. :exc:`~pagenet.errors.UsageError` for a command line that cannot receive a guest,
    or a source that is another machine; :exc:`~pagenet.errors.OwnerGone` if QEMU ends; and what :func:`pagenet.pull` raises.
    Events: ``qemu``, ``listening``, ``connected``, ``owner``, ``serving``, ``loaded``, ``resumed``; ``fault``
    (all of 50 ms together) and ``progress``; ``complete``.
    """
    with tempfile.TemporaryDirectory(prefix="pagenet-qemu-") as directory:
        owner = UffdSocket(Path(directory) / "uffd", allocate=allocate)
        await owner.listen()
        prepared = prepare_incoming(command, Path(directory) / "monitor", owner.path)
        try:
            process = await _start(prepared)
        except BaseException:
            prepared.undo()
            raise
        arriving: _Arriving | None = None
        try:
            on_event("qemu", pid=process.pid, ram=str(prepared.ram), added=" ".join(prepared.added))
            monitor = Path(directory) / "monitor"
            async with (
                _watched(process, lambda: arriving is not None and arriving.is_loading),
                guarding(monitor, process.pid) as guard,
            ):
                await guard.should_we_die("kill")
                async with connect_qmp(monitor, wait=_START_TIMEOUT) as qmp:
                    machine = await describe(qmp)
                    await _wait_handed_over(owner)
                    async with pull(
                        listen,
                        owner,
                        listen=True,
                        plaintext=plaintext,
                        background=background,
                        background_lanes=background_lanes,
                        lane=lane,
                        prefetch=prefetch,
                        max_bandwidth=max_bandwidth,
                        start_background=start_background,
                        record=record,
                        compress=compress,
                        streams=2,
                        held=True,
                        on_event=partial(_check_size, machine, on_event),
                    ) as transfer:
                        arriving = _Arriving(process, qmp, machine, transfer, guard, on_event)
                        await arriving.take_over(Path(directory) / "devices")
                        async with telling(tell_faults, transfer, on_event):
                            yield Arrival(process, transfer)
        finally:
            owner.close()
            if arriving is None or not arriving.runs_here:
                with trio.CancelScope(shield=True):
                    process.kill()
                    await process.wait()
                prepared.undo()


async def _start(prepared: Incoming) -> trio.Process:
    try:
        return await trio.lowlevel.open_process(prepared.command, env=prepared.environment)
    except OSError as error:
        raise UsageError(f"cannot start {prepared.command[0]}: {error.strerror}") from None


async def _wait_handed_over(owner: UffdSocket) -> None:
    """The dynamic loader goes on without a library that it cannot load, and the guest would run on zeros."""
    with trio.move_on_after(_HANDSHAKE_TIMEOUT):
        await owner.wait_owner()
        return
    why = "is it setuid, statically linked, or of another architecture?"
    raise UsageError(f"QEMU has not handed over its RAM: pagenet's preload library is not in it ({why})")


def _check_size(machine: Machine, on_event: EventHandler, event: str, /, **fields: object) -> None:
    """Before the RAM is handed over: mappings that do not fit the region would be turned away one by one."""
    on_event(event, **fields)
    if event == "connected" and fields["bytes"] != machine.ram:
        raise UsageError(f"the RAM size differs: {fields['bytes']} bytes at the source, {machine.ram} at the destination")


@asynccontextmanager
async def _watched(process: trio.Process, is_loading: Callable[[], bool]) -> AsyncIterator[None]:
    """The block ends with QEMU, whose end explains what else fails then: its monitor closes first."""

    async def watch() -> None:
        await process.wait()
        raise _end_of(process, is_loading())

    async with open_failing_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            yield
        except OwnerGone:
            with trio.move_on_after(_END_TIMEOUT):
                await watch()
            raise
        nursery.cancel_scope.cancel()


def _end_of(process: trio.Process, is_loading: bool) -> OwnerGone:
    return OwnerGone(_CANNOT_LOAD if is_loading else f"QEMU has ended with exit status {process.returncode}")


class _Arriving:
    """The steps from a QEMU that waits to a guest that runs in it."""

    def __init__(
        self,
        process: trio.Process,
        qmp: Qmp,
        machine: Machine,
        transfer: Transfer,
        guard: Guard,
        on_event: EventHandler,
    ) -> None:
        self._process = process
        self._qmp = qmp
        self._machine = machine
        self._transfer = transfer
        self._guard = guard
        self._on_event = on_event
        #: the source has given the guest up for good: it is to live here, or nowhere
        self.runs_here = False
        self.is_loading = False

    async def take_over(self, path: Path) -> None:
        talk_connection, devices = self._transfer.streams
        await talk_connection.send(TALK)
        await devices.send(DEVICES)
        talk = Talk(talk_connection)
        try:
            await self._agree(talk)
            async with open_failing_nursery() as nursery:
                await self._let_qemu_listen(path)
                nursery.start_soon(_relay_to, path, devices)
                await talk.say("ready")
                await talk.hear("stopped")
                self.is_loading = True
                if self._transfer.background_begun:  # the link is the devices' until the guest runs
                    self._transfer.pause_background()
                self._transfer.release()
                self._on_event("serving")
                await talk.say("serving")
                await self._wait_loaded()
                await talk.say("loaded")
                self._on_event("loaded")
                await talk.hear("run")
                with trio.CancelScope(shield=True):  # said, and done
                    # Not from "kill" to "run" in one step. Killed before we say it, we leave a guest that stands still here and
                    # runs at the source; killed after it, one that stands still here and nowhere runs, but is not lost.
                    await self._guard.should_we_die("nothing")
                    await talk.say("taking")
                    self.runs_here = True
                    await self._guard.should_we_die("run")
                nursery.cancel_scope.cancel()
        except BaseException as error:
            with trio.move_on_after(1, shield=True), suppress(PagenetError):
                await talk.say("refuse", reason=self._reason(error))
            raise
        since = len(self._qmp.events)
        await self._qmp.command("cont")
        resumed = await self._qmp.wait_event("RESUME", since=since, patience=_STEP_TIMEOUT)
        if self._transfer.background_paused:
            self._transfer.resume_background()
        await self._guard.should_we_die("nothing")
        await talk.say("running", time=resumed.time)
        self._on_event("resumed")

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, PagenetError):
            return str(error)
        # Cancelled: because QEMU has ended, or by a signal.
        ended = self._process.returncode is not None
        return str(_end_of(self._process, self.is_loading)) if ended else "the destination was stopped"

    async def _agree(self, talk: Talk) -> None:
        source = await talk.hear("machine")
        if difference := self._machine.difference(source):
            raise UsageError(difference)

    async def _let_qemu_listen(self, path: Path) -> None:
        on = [{"capability": name, "state": True} for name in CAPABILITIES]
        await self._qmp.command("migrate-set-capabilities", capabilities=on)
        await self._qmp.command("migrate-incoming", uri=f"unix:{path}")

    async def _wait_loaded(self) -> None:
        event = await self._qmp.wait_event(
            "MIGRATION", where=lambda data: data["status"] in ("completed", "failed"), patience=_STEP_TIMEOUT
        )
        if event.data["status"] != "completed":
            raise PagenetError(_CANNOT_LOAD)
        self.is_loading = False


async def _relay_to(path: Path, devices: Connection) -> None:
    async with await trio.open_unix_socket(str(path)) as local:
        await relay(devices, local)
