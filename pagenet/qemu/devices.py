"""How the state of the devices leaves a QEMU. There are two ways, and the destination's QEMU cannot
tell one from the other.

:class:`Migration`: QEMU migrates, and leaves out the RAM (``x-ignore-shared``). Since 8.1 it leaves
out only RAM that is a named file.

:class:`Saved`: for RAM that is a memfd or the like. QEMU is stopped, and saves its devices, without
RAM, into a memfd of ours (``xen-save-devices-state``, which does not need Xen). pagenet writes the
stream around that (``_stream.py``). It also sends the memory of devices, firmware and tables, which
is in no backend. That memory is read out of the process before the guest stops, and again when the
guest has stopped, and then only the pages that have changed are sent.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from io import FileIO
from itertools import chain
from typing import Protocol

import trio

from .. import _native
from ..errors import PagenetError, UsageError
from ..session import bare
from ..transport import Connection
from ..uffd import Mapped, OtherProcess
from ._stream import (
    PAGE,
    PIECE,
    Memory,
    RamBlock,
    changed_pages,
    devices_of,
    every_page,
    opening,
    ram_end,
    ram_start,
    wait_confirmed,
)
from ._talk import give_to_qemu
from .machine import CAPABILITIES, Machine
from .qmp import Qmp, QmpEvent

__all__ = ["STEP_TIMEOUT", "Migration", "Saved", "Way", "check_way"]

# QEMU's rate limit applies to its stream, which is the devices' state alone. The guest stands still
# while that is in flight, so there is no limit.
_UNLIMITED = 10**12
# In seconds: from "migrate" to the guest's stop, and for the devices' state. A disk that does not
# drain takes long.
STEP_TIMEOUT = 60.0
# The memory of devices is read twice, and kept. More than this was meant to be the guest's RAM.
_MAX_BLOCKS_BYTES = 1 << 30
_CLOSE_TIMEOUT = 1.0
_ZEROS = bytes(PIECE)
# The last byte of a page's entry in /proc/PID/pagemap is at least this if the page is in memory or
# swapped out.
_HAS_PAGE = 0x40
_SAVE = "xen-save-devices-state"
_INSTEAD = "use -object memory-backend-file,id=ID,size=SIZE,mem-path=/dev/shm/NAME,share=on"


class Way(Protocol):
    """A way in which the devices' state leaves. Each method is called once, in this order."""

    async def prepare(self) -> None:
        """Do what can be done while the guest runs."""
        ...

    async def stop(self) -> QmpEvent:
        """Stop the guest. Returns QEMU's STOP event, which has the time of the stop."""
        ...

    async def send(self) -> None:
        """Send the devices' state, or have QEMU begin to send it."""
        ...

    async def wait_loaded(self, patience: float) -> None:
        """Return when the destination's QEMU has loaded the state.
        :exc:`~pagenet.errors.PagenetError` if it fails, or takes longer than ``patience`` s."""
        ...

    async def close(self) -> None:
        """Release what was used, whether or not the guest has left."""
        ...


class Migration:
    """QEMU's own migration. QEMU gets the connection itself. ``answered``: another QEMU reads it,
    and answers."""

    def __init__(
        self, qmp: Qmp, devices: Connection, nursery: trio.Nursery, answered: bool = True
    ) -> None:
        self._qmp = qmp
        self._devices = devices
        self._nursery = nursery
        self._answered = answered
        self._runs = True
        self._uri = ""
        self._since = len(qmp.events)  # an earlier migration, which failed, is not ours

    async def prepare(self) -> None:
        self._uri = await give_to_qemu(self._qmp, self._devices, self._nursery)
        self._runs = await _runs(self._qmp)
        on = [
            {"capability": name, "state": self._answered or name != "return-path"}
            for name in CAPABILITIES
        ]
        await self._qmp.command("migrate-set-capabilities", capabilities=on)
        await self._qmp.command("migrate-set-parameters", max_bandwidth=_UNLIMITED)

    async def stop(self) -> QmpEvent:
        await self._qmp.command("migrate", uri=self._uri)
        await self._wait_status("pre-switchover", STEP_TIMEOUT)
        if not self._runs:
            return _stopped_before()
        return await self._qmp.wait_event("STOP", since=self._since, patience=STEP_TIMEOUT)

    async def send(self) -> None:
        await self._qmp.command("migrate-continue", state="pre-switchover")

    async def wait_loaded(self, patience: float) -> None:
        """This QEMU completes once the other one has confirmed that it has loaded everything."""
        await self._wait_status("completed", patience)

    async def close(self) -> None:
        """Do nothing: QEMU closes what it was given."""

    async def _wait_status(self, status: str, patience: float) -> None:
        """Return when QEMU's migration has that status. :exc:`PagenetError`, with QEMU's reason, if
        it fails."""

        def is_it(data: dict[str, object]) -> bool:
            return data["status"] in (status, "failed", "cancelled")

        event = await self._qmp.wait_event(
            "MIGRATION", since=self._since, where=is_it, patience=patience
        )
        if event.data["status"] != status:
            why = (await self._qmp.command("query-migrate")).get(
                "error-desc", "it does not say why"
            )
            raise PagenetError(f"QEMU's migration {event.data['status']}: {why}")


class Saved:
    """The state that QEMU saves, in a stream that pagenet writes. ``answered``: as for
    :class:`Migration`."""

    def __init__(
        self, qmp: Qmp, devices: Connection, machine: Machine, answered: bool = True
    ) -> None:
        self._qmp = qmp
        self._answered = answered
        self._runs = True
        self._connection = bare(devices)
        self._machine = machine
        self._memory = _DeviceMemory(qmp.pid, [])
        self._sent: list[Memory] = []
        self._file = _SavedFile()
        self._number: int | None = None

    async def prepare(self) -> None:
        blocks = await _blocks_of(self._qmp, self._machine)
        self._memory = _DeviceMemory(self._qmp.pid, blocks)
        self._sent = await self._memory.read()
        pages = chain.from_iterable(map(every_page, blocks, self._sent))
        kind = self._machine.kind.removesuffix("-machine")
        head = opening(kind, ["x-ignore-shared"], self._answered)
        await self._send([head, *ram_start(blocks, pages)])
        self._runs = await _runs(self._qmp)
        self._number = await self._qmp.give_set(self._file.writable)

    async def stop(self) -> QmpEvent:
        since = len(self._qmp.events)
        await self._qmp.command("stop")
        stop = (
            await self._qmp.wait_event("STOP", since=since, patience=STEP_TIMEOUT)
            if self._runs
            else _stopped_before()
        )
        # With live=True QEMU releases the disks too, which the destination needs; cont takes them
        # back.
        await self._qmp.command(_SAVE, filename=f"/dev/fdset/{self._number}", live=True)
        return stop

    async def send(self) -> None:
        blocks = self._memory.blocks
        if await _blocks_of(self._qmp, self._machine) != blocks:
            raise PagenetError(
                "QEMU's devices have changed while the guest was about to leave: try again"
            )
        pages = chain.from_iterable(
            map(changed_pages, blocks, self._sent, await self._memory.read())
        )
        await self._send([*ram_end(pages), devices_of(self._file.read())])

    async def wait_loaded(self, patience: float) -> None:
        with trio.move_on_after(patience):
            await wait_confirmed(self._connection)
            return
        raise PagenetError(
            f"the destination's QEMU did not confirm for {patience:g} s that it has loaded the"
            " devices' state"
        )

    async def close(self) -> None:
        self._file.close()
        if self._number is not None:
            with trio.move_on_after(_CLOSE_TIMEOUT, shield=True), suppress(PagenetError):
                await self._qmp.command("remove-fd", fdset_id=self._number)

    async def _send(self, parts: Sequence[bytes]) -> None:
        with trio.move_on_after(STEP_TIMEOUT):
            await self._connection.send(b"".join(parts))
            return
        raise PagenetError(
            f"the destination's QEMU did not take the devices' memory for {STEP_TIMEOUT:g} s"
        )


async def _runs(qmp: Qmp) -> bool:
    return bool((await qmp.command("query-status"))["running"])


def _stopped_before() -> QmpEvent:
    """In the place of the event of a guest that stood still already."""
    return QmpEvent("STOP", {}, time.time())


class _DeviceMemory:
    """The memory of QEMU's devices, read while the guest runs and once more when it stands
    still."""

    def __init__(self, pid: int, blocks: Sequence[RamBlock]) -> None:
        self.blocks = blocks
        self._pid = pid
        self._private: list[bool] = []

    async def read(self) -> list[Memory]:
        try:
            return await trio.to_thread.run_sync(self._read_blocks)
        except OSError as error:
            what = f"the memory of QEMU's devices (pid {self._pid})"
            raise PagenetError(f"cannot read {what}: {error.strerror}") from None

    def _read_blocks(self) -> list[Memory]:
        if not self._private:
            with closing(OtherProcess(self._pid)) as qemu:
                mapped = [
                    part for part in qemu.maps() if part.mode.endswith("p") and not part.inode
                ]
            self._private = [_is_within(block, mapped) for block in self.blocks]
        with open(f"/proc/{self._pid}/pagemap", "rb", buffering=0) as pagemap:
            return [
                self._read(block, _used(block, pagemap) if private else range(0, block.size, PIECE))
                for block, private in zip(self.blocks, self._private, strict=True)
            ]

    def _read(self, block: RamBlock, offsets: Iterable[int]) -> Memory:
        found = {}
        for offset in offsets:
            piece = bytearray(min(PIECE, block.size - offset))
            _native.read_process(self._pid, block.address + offset, memoryview(piece))
            if piece != _ZEROS[: len(piece)]:
                found[offset] = bytes(piece)
        return found


def _is_within(block: RamBlock, mapped: Sequence[Mapped]) -> bool:
    return any(
        part.start <= block.address and block.address + block.size <= part.end for part in mapped
    )


def _used(block: RamBlock, pagemap: FileIO) -> list[int]:
    """Offsets of the pieces of ``block``, which is private to QEMU, that are not known to be zero.
    Memory without a page, present or swapped out, was never written to. Video memory is large, and
    hardly used."""
    entries = os.pread(pagemap.fileno(), block.size // PAGE * 8, block.address // PAGE * 8)
    pages = entries[7::8]
    step = PIECE // PAGE
    return [
        at * PAGE for at in range(0, len(pages), step) if max(pages[at : at + step]) >= _HAS_PAGE
    ]


class _SavedFile:
    """A file for QEMU to write into. QEMU gets a descriptor that can only write: it takes no
    other."""

    def __init__(self) -> None:
        self._file = os.memfd_create("pagenet-devices")
        self.writable = os.open(f"/proc/self/fd/{self._file}", os.O_WRONLY | os.O_CLOEXEC)

    def read(self) -> bytes:
        return os.pread(self._file, os.fstat(self._file).st_size, 0)

    def close(self) -> None:
        os.close(self.writable)
        os.close(self._file)


# Name, page size, offset, bytes used, bytes reserved and, since QEMU 8.0, address. A block that is
# not migrated has no name.
_BLOCK = re.compile(
    r"^ *(\S*) +\d+ \w+ +0x[0-9a-f]+ 0x([0-9a-f]+) 0x[0-9a-f]+ +0x([0-9a-f]+) +r[ow] *$",
    re.MULTILINE,
)


async def _blocks_of(qmp: Qmp, machine: Machine) -> list[RamBlock]:
    """All memory of a QEMU that is migrated and is in no memory backend. :exc:`PagenetError` if
    QEMU does not list addresses."""
    backends = {backend.address for backend in machine.backends}
    told = await qmp.monitor("info ramblock")
    blocks = [
        RamBlock(name, int(address, 16), int(used, 16))
        for name, used, address in _BLOCK.findall(told)
    ]
    if len(blocks) + 1 != len(told.splitlines()):
        raise PagenetError("QEMU does not say where its memory is (info ramblock)")
    return [block for block in blocks if block.name and block.address not in backends]


async def check_way(qmp: Qmp, machine: Machine) -> None:
    """:exc:`~pagenet.errors.UsageError` if the devices' state can leave in neither way."""
    if machine.leaves_out_ram:
        return
    if why := await _why_not_saved(qmp, machine):
        version = ".".join(map(str, machine.version))
        names = ", ".join(
            backend.name for backend in machine.backends if backend.kind != "memory-backend-file"
        )
        raise UsageError(
            f"QEMU {version} itself sends RAM that is no named file ({names}), and {why}:"
            f" {_INSTEAD}"
        )


async def _why_not_saved(qmp: Qmp, machine: Machine) -> str | None:
    """Why the devices cannot be saved; None if they can. Saving leaves out what QEMU migrates a
    piece at a time (devices of vfio, dirty bitmaps)."""
    if machine.arch not in ("x86_64", "i386"):
        return f"pagenet can do without that on x86 only, not on {machine.arch}"
    if not any(command["name"] == _SAVE for command in await qmp.command("query-commands")):
        return f"this one has no {_SAVE}"
    for path in ("/machine/peripheral", "/machine/peripheral-anon"):
        for device in await qmp.command("qom-list", path=path):
            if device["type"].startswith("child<vfio-"):
                return "a device of vfio has state of its own to send"
    capabilities = await qmp.command("query-migrate-capabilities")
    if any(known["state"] for known in capabilities if known["capability"] == "dirty-bitmaps"):
        return "dirty bitmaps are to go along (capability dirty-bitmaps)"
    size = sum(block.size for block in await _blocks_of(qmp, machine))
    if size > _MAX_BLOCKS_BYTES or size % PAGE:
        return f"its devices have {size} bytes of memory of their own"
    return None
