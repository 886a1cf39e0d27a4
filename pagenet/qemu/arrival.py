"""The destination's side: a QEMU that waits for a guest, and the guest that arrives.
``migration.py`` lists the steps."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence, Set
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from ..destination.pulling import Transfer, pull
from ..errors import GuestReclaimed, OwnerGone, PagenetError, UsageError
from ..events import EventHandler, ignore_events
from ..nurseries import open_failing_nursery, running_beside
from ..progress import tell_faults, telling
from ..protocol import printable
from ..source.memory import open_source
from ..transport import Connection
from ..uffd import AttachedOwner, Mapping, UffdSocket, probe
from ._guard import Guard, guarding
from ._talk import DEVICES, TALK, Talk, give_to_qemu
from .command_line import Incoming, prepare_incoming
from .machine import CAPABILITIES, Machine, describe, ram_of
from .qmp import Qmp, connect_qmp
from .returning import Returning

__all__ = ["Arrival", "receive", "receive_attached"]

# QEMU opens its monitor before it has made the machine, and answers only afterwards.
_START_TIMEOUT = 30.0
_STEP_TIMEOUT = 60.0
_CANNOT_LOAD = (
    "QEMU cannot load the guest's devices: does the command line name the source's, in the same"
    " order?"
)
# QEMU maps its RAM, and hands it over, before its monitor answers.
_HANDSHAKE_TIMEOUT = 5.0
# From the end of QEMU's monitor to the end of QEMU.
_END_TIMEOUT = 5.0
# In seconds. A guest first needs a few hundred pages, one after the other, until its kernel is back
# at its work. For this time it has the link, and the processors, to itself.
_SETTLING = 0.05
# How much of QEMU's stderr is kept: a few lines.
_KEPT_BYTES = 600


class Arrival:
    """A guest that runs here while its pages come. Made by :func:`receive` and
    :func:`receive_attached`."""

    def __init__(self, transfer: Transfer, process: trio.Process | None) -> None:
        #: the QEMU that was started, if one was; it outlives the transfer, and this program
        self.process = process
        self.transfer = transfer

    async def wait_complete(self) -> None:
        """Return when every page is here. From then on the guest does not need its source."""
        await self.transfer.wait_complete()


class _Complaints:
    """QEMU's stderr. It is copied to ours for as long as the event loop runs. Its last lines
    explain why QEMU has ended, which nothing else does."""

    def __init__(self) -> None:
        self._last = b""
        self.ended = trio.Event()

    async def pass_on(self, stream: trio.abc.ReceiveStream) -> None:
        try:
            async with stream:
                async for data in stream:
                    self._last = (self._last + bytes(data))[-_KEPT_BYTES:]
                    with suppress(OSError):  # our stderr has no reader
                        os.write(sys.stderr.fileno(), data)
        finally:
            self.ended.set()

    def __str__(self) -> str:
        lines = [line for line in self._last.decode(errors="replace").splitlines() if line.strip()]
        return printable(f"; it says: {' '.join(lines)}") if lines else ""


class _Started:
    """A QEMU that is our child."""

    def __init__(self, process: trio.Process, prepared: Incoming, owner: UffdSocket) -> None:
        self.pid = process.pid
        self.process = process
        self.owner = owner
        self._prepared = prepared
        self.complaints = _Complaints()
        assert process.stderr is not None
        # A system task, because QEMU outlives the block that it was started in.
        trio.lowlevel.spawn_system_task(self.complaints.pass_on, process.stderr)

    async def wait(self) -> None:
        await self.process.wait()
        with trio.move_on_after(_END_TIMEOUT):  # a child of QEMU's may keep its stderr open
            await self.complaints.ended.wait()

    def has_ended(self) -> bool:
        return self.process.returncode is not None

    def how(self) -> str:
        return f"QEMU has ended with exit status {self.process.returncode}"

    async def empty(self, sources: Set[str]) -> None:
        """Do nothing: its RAM has never held any bytes."""

    async def give_up(self, is_used: bool) -> None:
        self.process.kill()
        await self.process.wait()
        self._prepared.undo()


class _Attached:
    """A QEMU that something else has started. Its stderr is not ours to read."""

    process = None
    complaints = ""

    def __init__(self, pid: int, mappings: Sequence[Mapping]) -> None:
        self.pid = pid
        self.owner = AttachedOwner(pid, mappings)
        self._pidfd = os.pidfd_open(pid)

    async def wait(self) -> None:
        # Trio lets only one task wait for a descriptor, and two may wait here.
        own = os.dup(self._pidfd)
        try:
            await trio.lowlevel.wait_readable(own)
        finally:
            os.close(own)

    def has_ended(self) -> bool:
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def how(self) -> str:
        return "QEMU has ended"

    async def empty(self, sources: Set[str]) -> None:
        """Throw away what QEMU has put into its RAM, such as firmware: the source's bytes replace
        it. :exc:`~pagenet.errors.UsageError` if that RAM is the very memory that one of ``sources``
        identifies."""
        for file in self.owner.files:
            with open_source(file) as ours:
                if ours.identity.hex() in sources:
                    raise UsageError(
                        "both QEMUs have the same file for their RAM: give the destination one of"
                        " its own"
                    )
        await trio.to_thread.run_sync(self.owner.empty)

    async def give_up(self, is_used: bool) -> None:
        """Leave a QEMU that was not told to listen as it was. End one that was: it cannot listen to
        another source."""
        if not is_used:
            await self.owner.uproot()
        else:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await self.wait()

    def close(self) -> None:
        self.owner.close()
        os.close(self._pidfd)


_Qemu = _Started | _Attached


@asynccontextmanager
async def receive(
    command: Sequence[str],
    *,
    listen: str,
    allocate: bool = False,
    on_event: EventHandler = ignore_events,
    **options: Any,
) -> AsyncIterator[Arrival]:
    """Start the QEMU of ``command`` (see :func:`~pagenet.qemu.prepare_incoming`), and receive one
    guest from the ``pagenet-qemu migrate`` that dials ``listen``. The ``options`` are those of
    :func:`pagenet.pull`, ``allocate`` that of :class:`~pagenet.UffdSocket`.

    The block begins when the guest runs here; leave it after :meth:`Arrival.wait_complete`. A
    failure before the guest was handed over ends the QEMU that was started. A later failure leaves
    QEMU alone: a guest whose source is lost stands still at the first page that it misses. The
    source may take the guest back while pages are missing: that ends QEMU too, and raises
    :exc:`~pagenet.errors.GuestReclaimed` in the block.

    :exc:`~pagenet.errors.UsageError` for a command line that cannot receive a guest, or a source
    that is another machine; :exc:`~pagenet.errors.OwnerGone` if QEMU ends; and what
    :func:`pagenet.pull` raises. Events: ``qemu``, ``listening``, ``connected``, ``owner``,
    ``serving``, ``loaded``, ``taken`` (the guest belongs here), ``resumed``; ``fault`` (one for all
    faults of 50 ms) and ``progress``; ``complete``.
    """
    if "PAGENET_UFFD_DEVICE" not in os.environ:
        probe()  # QEMU will use userfaultfd as this same user
    with tempfile.TemporaryDirectory(prefix="pagenet-qemu-") as directory:
        monitor = Path(directory) / "monitor"
        owner = UffdSocket(Path(directory) / "uffd", allocate=allocate)
        await owner.listen()
        prepared = prepare_incoming(command, monitor, owner.path)
        try:
            process = await _start(prepared)
        except BaseException:
            prepared.undo()
            raise
        try:
            on_event(
                "qemu",
                pid=process.pid,
                ram=", ".join(map(str, prepared.rams)),
                added=" ".join(prepared.added),
                monitor=str(monitor),
            )
            qemu = _Started(process, prepared, owner)
            async with _arriving(qemu, monitor, listen, on_event, options) as arrival:
                yield arrival
        finally:
            owner.close()


@asynccontextmanager
async def receive_attached(
    qmp_socket: str | Path, *, listen: str, on_event: EventHandler = ignore_events, **options: Any
) -> AsyncIterator[Arrival]:
    """As :func:`receive`, for a QEMU that runs already and waits for a guest (``-incoming defer``)
    behind the monitor ``qmp_socket``. It is stopped for less than a millisecond, and given a
    userfaultfd.

    Its RAM must be shared, in tmpfs, hugetlbfs or a memfd. A failure before QEMU was told to listen
    leaves it as it was, except that it is as if started with ``-S`` from then on. A failure between
    that and the handover of the guest ends it. :exc:`~pagenet.errors.Unsupported` if this user may
    not attach to it, or it may not use userfaultfd. Events: ``attached`` instead of ``qemu``, and
    else those of :func:`receive`.
    """
    async with connect_qmp(qmp_socket) as qmp:
        machine = await describe(qmp)
        await _check_waits(qmp, machine)
        pid = qmp.pid
        with ram_of(pid, machine) as rams:
            qemu = _Attached(pid, [ram.mapping for ram in rams])
    try:
        await qemu.owner.plant()
        on_event("attached", pid=pid, ram=", ".join(ram.name for ram in rams))
        async with _arriving(qemu, Path(qmp_socket), listen, on_event, options) as arrival:
            yield arrival
    finally:
        qemu.close()


async def _check_waits(qmp: Qmp, machine: Machine) -> None:
    if machine.status != "inmigrate" or "status" in await qmp.command("query-migrate"):
        raise UsageError(
            f"this QEMU does not wait for a guest ({machine.status}): start it with -incoming defer"
        )
    # As -S does. Without it the guest would run as soon as its devices are loaded, before the
    # source has given it away.
    await qmp.command("stop")


@asynccontextmanager
async def _arriving(
    qemu: _Qemu, monitor: Path, listen: str, on_event: EventHandler, options: dict[str, Any]
) -> AsyncIterator[Arrival]:
    arriving: _Arriving | None = None
    returning = Returning(monitor, qemu.pid, on_event)
    try:
        async with (
            _watched(qemu, lambda: arriving is not None and arriving.is_loading) as watching,
            guarding(monitor, qemu.pid) as guard,
        ):
            if isinstance(qemu, _Started):
                await guard.should_we_die("kill")
            async with connect_qmp(monitor, wait=_START_TIMEOUT) as qmp:
                machine = await describe(qmp)
            if isinstance(qemu, _Started):
                await _wait_handed_over(qemu.owner)
            hear = partial(_hear, machine, watching, on_event)
            async with pull(
                listen,
                qemu.owner,
                listen=True,
                streams=2,
                held=True,
                on_stream=returning.meet,
                on_event=hear,
                **options,
            ) as transfer:
                for stream, name in zip(transfer.streams, (TALK, DEVICES), strict=True):
                    await stream.send(name)
                async with connect_qmp(monitor) as qmp:  # a monitor serves one client at a time
                    arriving = _Arriving(qemu, qmp, machine, transfer, guard, on_event)
                    await arriving.take_over()
                returning.arrive(transfer)
                async with (
                    telling(tell_faults, transfer, on_event),
                    running_beside(_settle, transfer),
                ):
                    yield Arrival(transfer, qemu.process)
    except GuestReclaimed:
        assert arriving is not None
        arriving.runs_here = False
        raise
    finally:
        if arriving is None or not arriving.runs_here:
            with trio.CancelScope(shield=True):
                await qemu.give_up(arriving is not None and arriving.is_used)


async def _settle(transfer: Transfer) -> None:
    """Resume the background after ``_SETTLING`` seconds."""
    await trio.sleep(_SETTLING)
    if transfer.background_paused:
        transfer.resume_background()


async def _start(prepared: Incoming) -> trio.Process:
    try:
        return await trio.lowlevel.open_process(
            prepared.command, env=prepared.environment, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise UsageError(f"cannot start {prepared.command[0]}: {error.strerror}") from None


async def _wait_handed_over(owner: UffdSocket) -> None:
    """Return when QEMU has handed over its RAM. :exc:`~pagenet.errors.UsageError` if it does not
    within 5 s: the dynamic loader goes on without a library that it cannot load, and the guest
    would run on zeros."""
    with trio.move_on_after(_HANDSHAKE_TIMEOUT):
        await owner.wait_owner()
        return
    why = "is it setuid, statically linked, or of another architecture?"
    raise UsageError(
        f"QEMU has not handed over its RAM: pagenet's preload library is not in it ({why})"
    )


def _hear(
    machine: Machine,
    watching: trio.CancelScope,
    on_event: EventHandler,
    event: str,
    /,
    **fields: object,
) -> None:
    """Pass the event on. Compare the sizes at ``connected``, before the RAM is handed over:
    mappings that do not fit the region would be refused one by one. Watch QEMU no longer when its
    source is lost and ``on_loss`` has been done to it: it may end by that, which is no cause."""
    if event in ("poisoned", "killed"):
        watching.cancel()
    on_event(event, **fields)
    if event == "connected" and fields["bytes"] != machine.ram:
        raise UsageError(
            f"the RAM size differs: {fields['bytes']} bytes at the source, {machine.ram} at the"
            " destination"
        )


@asynccontextmanager
async def _watched(qemu: _Qemu, is_loading: Callable[[], bool]) -> AsyncIterator[trio.CancelScope]:
    """End the block with :exc:`~pagenet.errors.OwnerGone` when QEMU ends, unless the scope that it
    gets is cancelled before. QEMU closes its monitor first; the error is then that of QEMU's end,
    which explains the other one."""
    watching = trio.CancelScope()

    async def fail_at_its_end() -> None:
        await qemu.wait()
        raise _end_of(qemu, is_loading())

    async def watch() -> None:
        with watching:
            await fail_at_its_end()

    async with open_failing_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            yield watching
        except OwnerGone:
            with trio.move_on_after(_END_TIMEOUT):
                await fail_at_its_end()
            raise
        nursery.cancel_scope.cancel()


def _end_of(qemu: _Qemu, is_loading: bool) -> OwnerGone:
    return OwnerGone(f"{_CANNOT_LOAD if is_loading else qemu.how()}{qemu.complaints}")


class _Arriving:
    """The steps from a QEMU that waits to a guest that runs in it."""

    def __init__(
        self,
        qemu: _Qemu,
        qmp: Qmp,
        machine: Machine,
        transfer: Transfer,
        guard: Guard,
        on_event: EventHandler,
    ) -> None:
        self._qemu = qemu
        self._qmp = qmp
        self._machine = machine
        self._transfer = transfer
        self._guard = guard
        self._on_event = on_event
        #: the source has given the guest away for good: it runs here, or nowhere
        self.runs_here = False
        self.is_loading = False
        #: QEMU was told to listen to a source, and cannot listen to another
        self.is_used = False

    async def take_over(self) -> None:
        talk_connection, devices = self._transfer.streams
        talk = Talk(talk_connection)
        try:
            await self._agree(talk)
            self._transfer.copy()  # not before: RAM that another program filled is empty only now
            if self._transfer.round is not None:
                await talk.say("ready")
                await talk.hear("leaving")
            async with open_failing_nursery() as nursery:
                await self._let_qemu_listen(devices, nursery)
                await talk.say("ready")
                await talk.hear("stopped")
                await self._transfer.wait_frozen()
                self.is_loading = True
                if self._transfer.background_begun:  # until the guest runs, the link is for devices
                    self._transfer.pause_background()
                self._transfer.release()
                self._on_event("serving")
                await talk.say("serving")
                await self._wait_loaded()
                self._on_event("loaded")
                await talk.hear("run")
                with trio.CancelScope(shield=True):  # what "taking" promises is done
                    # The guard's duty does not go from "kill" to "run" in one step. If we are
                    # killed before "taking" is sent, the guest stands still here and goes on at the
                    # source. If we are killed after it, the guest stands still here and runs
                    # nowhere, but is not lost.
                    await self._guard.should_we_die("nothing")
                    await talk.say("taking")
                    self.runs_here = True
                    self._on_event("taken")
                    await self._guard.should_we_die("run")
                nursery.cancel_scope.cancel()
        except BaseException as error:
            with trio.move_on_after(1, shield=True), suppress(PagenetError):
                await talk.say("refuse", reason=self._reason(error))
            raise
        since = len(self._qmp.events)
        await self._qmp.command("cont")
        resumed = await self._qmp.wait_event("RESUME", since=since, patience=_STEP_TIMEOUT)
        await self._guard.should_we_die("nothing")
        await talk.say("running", time=resumed.time)
        self._on_event("resumed")

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, PagenetError):
            return str(error)
        # Cancelled, because QEMU has ended or by a signal.
        ended = self._qemu.has_ended()
        return str(_end_of(self._qemu, self.is_loading)) if ended else "the destination was stopped"

    async def _agree(self, talk: Talk) -> None:
        source = await talk.hear("machine")
        if difference := self._machine.difference(source):
            raise UsageError(difference)
        memories = source.get("memories", [source.get("memory")])  # an older pagenet sends one
        await self._qemu.empty(set(map(str, memories if isinstance(memories, list) else [])))

    async def _let_qemu_listen(self, devices: Connection, nursery: trio.Nursery) -> None:
        on = [{"capability": name, "state": True} for name in CAPABILITIES]
        await self._qmp.command("migrate-set-capabilities", capabilities=on)
        uri = await give_to_qemu(self._qmp, devices, nursery)
        await self._guard.should_we_die("kill")
        self.is_used = True
        await self._qmp.command("migrate-incoming", uri=uri)

    async def _wait_loaded(self) -> None:
        event = await self._qmp.wait_event(
            "MIGRATION",
            where=lambda data: data["status"] in ("completed", "failed"),
            patience=_STEP_TIMEOUT,
        )
        if event.data["status"] != "completed":
            with trio.move_on_after(_END_TIMEOUT):  # QEMU ends by itself, and says why
                await self._qemu.wait()
            raise PagenetError(f"{_CANNOT_LOAD}{self._qemu.complaints}")
        self.is_loading = False
