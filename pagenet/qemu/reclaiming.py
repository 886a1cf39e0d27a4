"""The source's side of a reclaim: a guest that was given away comes back before all of its pages
have gone.

::

    here                               there
    "reclaim"                          "machine"
    compare; "leave"                   the background pauses
                                       the guest stops; this side still answers its faults
                                       "stopped"
    "send"                             devices' state; each page that is there
    write the pages over this QEMU's
    load the devices' state; "loaded"  "run"
    "taking"; cont; "running"          QEMU ends

The pages that are not there are here already, unchanged since the guest left. What is written over
here is there. So until "run" the guest can go on there, whatever fails here.

QEMU cannot receive a guest again after it has given one away. But it can load the state of its
devices from an internal snapshot, in any qcow2 image (``snapshot-load``). QEMU resets the machine
before that, and then writes the contents of its ROMs to where they belong. Those that belong into
the guest's RAM are put back to what was there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import trio

from .. import _native
from ..errors import ConnectionBroken, PagenetError, RemoteProtocolError, UsageError
from ..events import EventHandler, ignore_events
from ..region import Block, Region
from ..session import receive_exactly
from ..source.memory import open_source
from ..source.serving import Server, serve
from ..tls import Tls
from ..transport import Connection, LaneKind
from ._guard import guarding
from ._half import Memory, receive_half
from ._qcow2 import TAG, snapshot_image
from ._talk import ANSWER_TIMEOUT, Talk
from .devices import STEP_TIMEOUT
from .machine import Machine, Ram, describe, files_of, host_address, ram_of, ram_sources
from .qmp import Qmp, connect_qmp
from .returning import MAX_STATE_BYTES

__all__ = ["reclaim", "reclaim_from"]

_COMMANDS = frozenset({"blockdev-add", "snapshot-load", "add-fd"})
_NODE = "pagenet-devices"
_JOB = "pagenet-load"
# A ROM that belongs into RAM, in the output of "info roms".
_ROM_IN_RAM = re.compile(r"^addr=([0-9a-f]+) size=0x([0-9a-f]+) mem=ram ", re.MULTILINE)


async def _check(qmp: Qmp, machine: Machine) -> None:
    """:exc:`~pagenet.errors.UsageError` if no guest can come back to that QEMU."""
    if machine.status not in ("postmigrate", "paused"):
        raise UsageError(
            f"this QEMU has given no guest away: it is {machine.status}, and not postmigrate or"
            " paused"
        )
    known = {command["name"] for command in await qmp.command("query-commands")}
    if missing := _COMMANDS - known:
        raise UsageError(
            f"this QEMU cannot load the state of devices: it has no {', '.join(sorted(missing))}"
        )


async def reclaim(
    server: Server, qmp_socket: str | Path, *, on_event: EventHandler = ignore_events
) -> None:
    """Take a guest back into the QEMU behind ``qmp_socket``, from the destination of ``server``,
    which serves that QEMU's memory. Waits until the destination is connected. The guest runs here
    when this returns: end ``server`` then.

    If it fails, the guest goes on at the destination, and needs ``server``:
    :exc:`~pagenet.errors.UsageError`, :exc:`MigrationRefused` (with the destination's reason),
    :exc:`~pagenet.errors.PagenetError`. Events: ``reclaiming``, ``taken`` (the guest belongs here
    again), and ``reclaimed`` (``bytes`` of pages that came, ``downtime_ms``).
    """
    async with connect_qmp(qmp_socket) as qmp:
        machine = await describe(qmp)
        await _check(qmp, machine)
        connection = await server.open_stream()
        try:
            on_event("reclaiming", peer=connection.peer)
            async with guarding(qmp_socket, qmp.pid) as guard:
                with ram_of(qmp.pid, machine) as rams:
                    taking = _Taking(qmp, machine, rams, connection)
                    try:
                        await taking.fetch()
                    except BaseException as error:
                        await taking.refuse(error)
                        raise
                with trio.CancelScope(shield=True):  # what "taking" promises is done
                    await taking.take()
                    await guard.should_we_die("run")
                    on_event("taken")
                    downtime = await taking.resume()
                    with suppress(PagenetError):
                        await taking.talk.say("running")
            on_event("reclaimed", bytes=taking.came, downtime_ms=round(downtime * 1000, 1))
        finally:
            connection.close()


async def reclaim_from(
    uri: str,
    qmp_socket: str | Path,
    *,
    identity: bytes,
    tls: Tls | None = None,
    lane: LaneKind = "auto",
    on_event: EventHandler = ignore_events,
) -> None:
    """As :func:`reclaim`, after the :func:`migrate` that has given the guest to the destination at
    ``uri`` has ended. ``identity``: that of its pages (16 bytes; event ``switchover``). Errors and
    events of :func:`pagenet.serve` too."""
    async with connect_qmp(qmp_socket) as qmp:
        machine = await describe(qmp)
        await _check(qmp, machine)
        pid = qmp.pid
    with ram_sources(pid, machine) as specs, open_source(*specs) as source:
        source.identity = identity
        async with serve(source, connect=uri, tls=tls, lane=lane, on_event=on_event) as server:
            server.persist()
            await reclaim(server, qmp_socket, on_event=on_event)


class _Taking:
    """The steps from a guest that runs there to one that runs here."""

    def __init__(
        self, qmp: Qmp, machine: Machine, rams: Sequence[Ram], connection: Connection
    ) -> None:
        self._qmp = qmp
        self._machine = machine
        self._rams = rams
        self._connection = connection
        self._stopped = 0.0
        self.talk = Talk(connection)
        #: bytes of pages that came
        self.came = 0

    async def fetch(self) -> None:
        """Have the guest stop there, and get everything that it needs here, up to "run"."""
        files = files_of(self._rams)
        await self.talk.say("reclaim")
        there = await self.talk.hear("machine", STEP_TIMEOUT)
        if difference := self._machine.difference(there):
            raise UsageError(difference)
        await self.talk.say("leave")
        stopped = await self.talk.hear("stopped", STEP_TIMEOUT)
        size, time = stopped.get("state"), stopped.get("time")
        if not isinstance(size, int) or not 0 < size <= MAX_STATE_BYTES:
            raise RemoteProtocolError("the peer does not say how long the devices' state is")
        if not isinstance(time, float):
            raise RemoteProtocolError("the peer does not say when the guest has stopped")
        self._stopped = time
        await self.talk.say("send")
        state = await _receive(self._connection, size)
        region = Region(Block(backend.name, backend.size) for backend in self._machine.backends)
        with closing(Memory(files, region)) as memory:
            _, self.came = await receive_half(self._connection, region, memory.write)
        await self._load(state)
        await self.talk.say("loaded")
        await self.talk.hear("run", ANSWER_TIMEOUT)

    async def refuse(self, error: BaseException) -> None:
        if isinstance(error, ConnectionBroken):
            return
        reason = str(error) if isinstance(error, PagenetError) else "the source gave up"
        with trio.move_on_after(1, shield=True), suppress(PagenetError):
            await self.talk.say("refuse", reason=reason)

    async def take(self) -> None:
        try:
            await self.talk.say("taking")
        except PagenetError as error:
            raise PagenetError(
                f"the destination may have been told that the guest is here ({error}): look there,"
                " and only if it does not run, send cont to this QEMU"
            ) from None

    async def resume(self) -> float:
        """Returns the seconds for which the guest stood still."""
        since = len(self._qmp.events)
        await self._qmp.command("cont")
        resumed = await self._qmp.wait_event("RESUME", since=since, patience=STEP_TIMEOUT)
        return resumed.time - self._stopped

    async def _load(self, state: bytearray) -> None:
        on = [{"capability": "x-ignore-shared", "state": True}]
        await self._qmp.command("migrate-set-capabilities", capabilities=on)
        kept = await self._roms_in_ram()
        await load_devices(self._qmp, state)
        for address, content in kept:
            _write_process(self._qmp.pid, address, content)

    async def _roms_in_ram(self) -> list[tuple[int, bytes]]:
        """What is in the guest's RAM where a reset writes ROMs: address in QEMU, bytes."""
        found = []
        for start, size in _ROM_IN_RAM.findall(await self._qmp.monitor("info roms")):
            address = await host_address(self._qmp, start)
            if address is None:
                raise PagenetError(f"QEMU does not say where its ROM at {start} is")
            content = bytearray(int(size, 16))
            _native.read_process(self._qmp.pid, address, memoryview(content))
            found.append((address, bytes(content)))
        return found


def _write_process(pid: int, address: int, content: bytes) -> None:
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(content)


async def _receive(connection: Connection, size: int) -> bytearray:
    state = bytearray(size)
    with trio.move_on_after(STEP_TIMEOUT):
        await receive_exactly(connection, memoryview(state))
        return state
    raise ConnectionBroken(f"the devices' state did not come for {STEP_TIMEOUT:g} s")


async def load_devices(qmp: Qmp, state: bytes | bytearray) -> None:
    """Have a QEMU whose guest stands still load ``state`` into its devices.
    :exc:`~pagenet.errors.PagenetError`, with QEMU's reason, if it cannot."""
    file = os.memfd_create("pagenet-devices")
    try:
        for offset, piece in snapshot_image(state):
            os.pwrite(file, piece, offset)
        number = await qmp.give_set(file)
    finally:
        os.close(file)
    try:
        await qmp.command(
            "blockdev-add",
            driver="qcow2",
            node_name=_NODE,
            file={"driver": "file", "filename": f"/dev/fdset/{number}"},
        )
        try:
            await _run_load(qmp)
        finally:
            await qmp.command("blockdev-del", node_name=_NODE)
    finally:
        await qmp.command("remove-fd", fdset_id=number)


async def _run_load(qmp: Qmp) -> None:
    since = len(qmp.events)
    await qmp.command("snapshot-load", job_id=_JOB, tag=TAG, vmstate=_NODE, devices=[_NODE])
    await qmp.wait_event(
        "JOB_STATUS_CHANGE",
        since=since,
        where=lambda data: data.get("id") == _JOB and data["status"] == "concluded",
        patience=STEP_TIMEOUT,
    )
    jobs = await qmp.command("query-jobs")
    await qmp.command("job-dismiss", id=_JOB)
    for job in jobs:
        if job.get("id") == _JOB and "error" in job:
            raise PagenetError(f"QEMU cannot load the devices' state: {job['error']}")
