"""The destination's side of a reclaim: the guest goes back to its source before all of its pages
have come. ``reclaiming.py`` lists the steps."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import trio

from ..destination.pulling import Transfer
from ..errors import ConnectionBroken, GuestReclaimed, PagenetError, UsageError
from ..events import EventHandler
from ..nurseries import open_failing_nursery
from ..transport import Buffer, Connection
from ._guard import go_on, guarding
from ._half import send_half
from ._offer import Given, Offer
from ._talk import ANSWER_TIMEOUT, MigrationRefused, Talk
from .devices import STEP_TIMEOUT, Migration, Saved, Way, check_way
from .machine import Machine, describe, files_of, ram_of
from .qmp import Qmp, QmpEvent, connect_qmp

__all__ = ["MAX_STATE_BYTES", "Returning", "ending_when_reclaimed"]

#: Limit of the state of the devices, their memory included.
MAX_STATE_BYTES = 1 << 30
# In seconds: for the source's QEMU to load the devices' state.
_LOAD_TIMEOUT = 60.0
# In seconds: for the guest to run there, before QEMU is ended here.
_RUN_TIMEOUT = 10.0

_NO_MONITOR = (
    "that guest's pagenet-qemu does not know QEMU's monitor: start it with incoming --resume --qmp"
    " SOCKET"
)


class Returning:
    """Gives the guest of the QEMU ``pid`` back to its source when that asks for it. ``monitor``:
    the path of its QMP socket, if that is known."""

    def __init__(self, monitor: Path | None, pid: int, on_event: EventHandler) -> None:
        self._monitor = monitor
        self._pid = pid
        self._on_event = on_event
        self._transfer: Transfer | None = None
        self._arrived = trio.Event()
        self._returning = trio.Lock()
        # When the guest stopped, and the state of its devices, if it stands still since then,
        # because it may be the source's. QEMU does not tell that twice.
        self._told: tuple[QmpEvent, bytearray] | None = None

    def arrive(self, transfer: Transfer) -> None:
        """The guest runs here from now on, and ``transfer`` fills its memory."""
        self._transfer = transfer
        self._arrived.set()

    async def meet(self, connection: Connection) -> None:
        """Answer a source that has opened ``connection``. A guest that does not go back goes on
        here. :exc:`~pagenet.errors.GuestReclaimed` once it is the source's: end QEMU then."""
        talk = Talk(connection)
        try:
            await talk.hear("reclaim", ANSWER_TIMEOUT)
            async with self._turn() as transfer:
                if self._monitor is None:
                    raise UsageError(_NO_MONITOR)
                await self._return(talk, connection, transfer, self._monitor)
        except GuestReclaimed:
            raise
        except PagenetError as error:
            if not isinstance(error, MigrationRefused | ConnectionBroken):
                with trio.move_on_after(1, shield=True), suppress(PagenetError):
                    await talk.say("refuse", reason=str(error))
            self._on_event("not_reclaimed", reason=str(error))

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[Transfer]:
        """The source may be quicker than our owner. And an earlier attempt that has failed may not
        be over: QEMU stops the guest, and lets it go on, only once each of its threads has the page
        that it waits for, and that comes over the session of this attempt."""
        with trio.move_on_after(ANSWER_TIMEOUT) as waiting:
            await self._arrived.wait()
            await self._returning.acquire()
        if waiting.cancelled_caught or self._transfer is None:
            raise UsageError("the guest has not arrived yet, or is leaving already")
        try:
            yield self._transfer
        finally:
            self._returning.release()

    async def _return(
        self, talk: Talk, connection: Connection, transfer: Transfer, monitor: Path
    ) -> None:
        async with connect_qmp(monitor) as qmp, guarding(monitor, self._pid) as guard:
            if qmp.pid != self._pid:
                raise UsageError(f"{monitor} is the monitor of another QEMU (pid {qmp.pid})")
            machine = await describe(qmp)
            await check_way(qmp, machine)
            with ram_of(self._pid, machine) as rams:
                files = files_of(rams)
                await talk.say("machine", **machine.as_message())
                await talk.hear("leave", ANSWER_TIMEOUT)
                self._on_event("returning", peer=connection.peer)
                was_paused = transfer.background_paused
                transfer.pause_background()
                offer = Offer()
                try:
                    await guard.should_we_die("resume")
                    if machine.status == "running" or self._told is None:
                        self._told = await _stop(qmp, machine)
                    stop, state = self._told
                    await talk.say("stopped", time=stop.time, state=len(state))
                    await talk.hear("send", ANSWER_TIMEOUT)
                    await _send(connection, state)
                    sent = await send_half(
                        connection, files, transfer.region, transfer.filling.missing()
                    )
                    await talk.hear("loaded", _LOAD_TIMEOUT)
                    await offer.make(talk, guard)
                except BaseException as error:
                    with trio.CancelScope(shield=True):
                        if offer.given is Given.PERHAPS:
                            self._on_event("return_in_doubt", reason=str(error))
                        elif machine.status == "running":
                            await go_on(qmp)
                    if not was_paused:
                        transfer.resume_background()
                    raise
                with trio.CancelScope(shield=True):  # the guest is never to run here again
                    await guard.should_we_die("kill")
                    self._on_event("returned", bytes=sent)
                    with suppress(PagenetError):
                        await talk.hear("running", _RUN_TIMEOUT)
                    raise GuestReclaimed("the guest has gone back to its source")


class _Collected:
    """A connection to nowhere, which keeps what is sent."""

    peer = "the source"

    def __init__(self) -> None:
        self.data = bytearray()

    async def send(self, *buffers: Buffer) -> None:
        for buffer in buffers:
            if len(self.data) + len(buffer) > MAX_STATE_BYTES:
                raise PagenetError(f"the devices' state is longer than {MAX_STATE_BYTES >> 20} MiB")
            self.data += buffer
        await trio.lowlevel.checkpoint()

    async def receive_into(self, buffer: memoryview) -> int:
        await trio.sleep_forever()
        return 0

    def close(self) -> None:
        pass


async def _stop(qmp: Qmp, machine: Machine) -> tuple[QmpEvent, bytearray]:
    """Stop the guest. Returns the event of that, and the state of its devices. Threads of QEMU that
    wait for pages get them meanwhile."""
    into = _Collected()
    async with _way(qmp, machine, into) as way:
        await way.prepare()
        stop = await way.stop()
        await way.send()
        if isinstance(way, Migration):  # the other way is done
            await way.wait_loaded(STEP_TIMEOUT)
    return stop, into.data


@asynccontextmanager
async def _way(qmp: Qmp, machine: Machine, into: _Collected) -> AsyncIterator[Way]:
    """The block ends when the whole state is in ``into``."""
    if not machine.leaves_out_ram:
        saved = Saved(qmp, into, machine, answered=False)
        try:
            yield saved
        finally:
            await saved.close()
        return
    async with open_failing_nursery() as nursery:
        yield Migration(qmp, into, nursery, answered=False)
        nursery.cancel_scope.deadline = trio.current_time() + STEP_TIMEOUT


async def _send(connection: Connection, state: bytearray) -> None:
    with trio.move_on_after(STEP_TIMEOUT):
        await connection.send(state)
        return
    raise ConnectionBroken(f"the source did not take the devices' state for {STEP_TIMEOUT:g} s")


@contextmanager
def ending_when_reclaimed(pid: int) -> Iterator[None]:
    """End the QEMU ``pid`` if the block ends because its guest has gone back."""
    pidfd = os.pidfd_open(pid)
    try:
        yield
    except GuestReclaimed:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        raise
    finally:
        os.close(pidfd)
