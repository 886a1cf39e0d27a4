"""Guests whose RAM is a memfd, as libvirt has it; QEMU since 8.1 does not leave it out of its own
stream."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from devices import BLOCKS, echoing, screen, wait_devices, with_devices
from migrations import attach_command, check_goes_on, migrate_command, status_of
from processes import Process, run
from vm import VM, bare_command, check_unbroken, in_memfd, needs_migration, qemu_version, run_vm

from pagenet import PagenetError, UsageError
from pagenet.qemu import MigrationRefused, connect_qmp, devices, machine, migrate
from pagenet.qemu._stream import (
    PAGE,
    PIECE,
    RamBlock,
    changed_pages,
    devices_of,
    every_page,
    opening,
)

pytestmark = needs_migration
needs_addresses = pytest.mark.skipif(
    qemu_version() < (8, 1),
    reason="needs QEMU 8.1 or newer, which says where the memory of its devices is",
)
WAITS = ("-incoming", "defer")


def in_memory(directory: Path, name: str, *extra: str) -> list[str]:
    return in_memfd(bare_command(directory, name, extra=extra))


def with_display(directory: Path, name: str, *extra: str) -> list[str]:
    return in_memory(directory, name, "-device", "VGA", "-device", "virtio-net-pci", *extra)


def with_disk(directory: Path, name: str, *extra: str) -> list[str]:
    """A machine with a disk that both machines see, and that only one of them may have at a time:
    QEMU locks it."""
    (directory / "disk").touch()
    os.truncate(directory / "disk", 1 << 20)
    disk = f"file={directory / 'disk'},format=raw,if=none,id=disk,cache=none"
    return in_memory(
        directory, name, "-drive", disk, "-device", "virtio-blk-pci,drive=disk", *extra
    )


def locks(path: Path) -> int:
    return Path("/proc/locks").read_text().count(f":{path.stat().st_ino} ")


async def go(here: VM, there: VM) -> None:
    async with run(attach_command(there.qmp)) as incoming:
        uri = (await incoming.event("listening"))["uri"]
        async with run(migrate_command(here.qmp, uri)) as leaving:
            assert await leaving.wait() == 0, leaving.stderr
        assert await incoming.wait() == 0, incoming.stderr
    await check_goes_on(there.serial)


@needs_addresses
async def test_twice(tmp_path: Path) -> None:
    """The guest can leave the machine that it came to in the same way."""
    async with (
        run_vm(with_display(tmp_path, "a"), tmp_path, "a") as a,
        run_vm(with_display(tmp_path, "b", *WAITS), tmp_path, "b") as b,
        run_vm(with_display(tmp_path, "c", *WAITS), tmp_path, "c") as c,
    ):
        await a.serial.wait_sweeps(1)
        await go(a, b)
        await go(b, c)
        assert [await status_of(vm.qmp) for vm in (a, b, c)] == ["paused", "paused", "running"]
        check_unbroken(a.serial, b.serial, c.serial)
        assert device_bytes(a.pid, await blocks_of(a)) == device_bytes(c.pid, await blocks_of(c))


@needs_addresses
@pytest.mark.timeout(300)
async def test_devices(tmp_path: Path) -> None:
    """A guest with a kernel and two CPUs, a display, a network, and a disk that moves with it."""
    (tmp_path / "disk").touch()
    os.truncate(tmp_path / "disk", BLOCKS * 4096)
    async with (
        echoing(tmp_path / "echo"),
        run_vm(in_memfd(with_devices(tmp_path, "a")), tmp_path, "a") as a,
        run_vm([*in_memfd(with_devices(tmp_path, "b")), *WAITS], tmp_path, "b") as b,
    ):
        before = await wait_devices(a.serial)
        await go(a, b)
        await wait_devices(b.serial, before)
        shown = await screen(a.qmp, tmp_path)
        assert shown == await screen(b.qmp, tmp_path)
        assert len(set(shown)) == 256
        check_unbroken(a.serial, b.serial)


async def blocks_of(vm: VM) -> list[RamBlock]:
    async with connect_qmp(vm.qmp) as qmp:
        return await devices._blocks_of(qmp, await machine.describe(qmp))


def device_bytes(pid: int, blocks: list[RamBlock]) -> dict[str, bytes]:
    with open(f"/proc/{pid}/mem", "rb") as memory:
        return {
            block.name: os.pread(memory.fileno(), block.size, block.address) for block in blocks
        }


# ---- on any QEMU: what it leaves out itself, it is taken not to; what it does not say of its
#   memory is not sent ----


@pytest.fixture
def narrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_NAMED_ONLY", (0, 0, 0))
    if qemu_version() >= (8, 1):
        return

    async def nothing(*_: object) -> list[RamBlock]:
        return []  # a guest without a kernel needs no firmware

    monkeypatch.setattr(devices, "_blocks_of", nothing)


@asynccontextmanager
async def two(
    make: Callable[..., list[str]], directory: Path, *extra: str
) -> AsyncIterator[tuple[VM, VM, Process, str]]:
    """A machine with further devices, and one without them that waits for its guest."""
    async with (
        run_vm(make(directory, "a", *extra), directory, "a") as a,
        run_vm(make(directory, "b", *WAITS), directory, "b") as b,
        run(attach_command(b.qmp)) as incoming,
    ):
        await a.serial.wait_sweeps(1)
        yield a, b, incoming, (await incoming.event("listening"))["uri"]


@pytest.mark.usefixtures("narrowed")
async def test_saved_devices(tmp_path: Path) -> None:
    async with two(with_disk, tmp_path) as (a, b, _, uri):
        async with migrate(a.qmp, uri) as server:
            await server.wait_complete()
        await check_goes_on(b.serial)
        check_unbroken(a.serial, b.serial)


@pytest.mark.usefixtures("narrowed")
async def test_destination_cannot_load(tmp_path: Path) -> None:
    """The guest goes on, with its devices as they were."""
    async with two(in_memory, tmp_path, "-device", "virtio-rng-pci") as (a, b, incoming, uri):
        with pytest.raises(MigrationRefused) as raised:
            async with migrate(a.qmp, uri):
                raise AssertionError("not reached")
        assert "cannot load the guest's devices" in str(raised.value)
        assert await incoming.wait() == 5
        assert incoming.stderr.count("\n") == 1
        assert "cannot load the guest's devices" in incoming.stderr
        assert await status_of(b.qmp) == "gone"
        await check_goes_on(a.serial)
        check_unbroken(a.serial)


@pytest.mark.usefixtures("narrowed")
async def test_failure_after_the_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest is stopped and its devices are saved: whatever fails then, the guest continues at
    the source."""

    async def fails(_: object) -> None:
        raise PagenetError("no further")

    monkeypatch.setattr(devices.Saved, "send", fails)
    async with two(with_disk, tmp_path) as (a, b, _, uri):
        held = locks(tmp_path / "disk")
        with pytest.raises(PagenetError, match="no further"):
            async with migrate(a.qmp, uri):
                raise AssertionError("not reached")
        await check_goes_on(a.serial)
        assert await status_of(b.qmp) == "gone"
        assert locks(tmp_path / "disk") == held > 0
        check_unbroken(a.serial)


@pytest.mark.usefixtures("narrowed")
async def test_what_saving_would_lose(tmp_path: Path) -> None:
    """Refused in one line, which tells what to do instead; nothing has changed."""
    async with run_vm(in_memory(tmp_path, "a"), tmp_path, "a") as a:
        await a.serial.wait_sweeps(1)
        async with connect_qmp(a.qmp) as qmp:
            dirty = [{"capability": "dirty-bitmaps", "state": True}]
            await qmp.command("migrate-set-capabilities", capabilities=dirty)
        says = (
            r"sends RAM that is no named file \(ram0\), and dirty bitmaps are to go along .*: use"
            r" -object memory-backend"
        )
        with pytest.raises(UsageError, match=says):
            async with migrate(a.qmp, "unix:nobody"):
                raise AssertionError("not reached")
        await check_goes_on(a.serial)


# ---- the stream ----


def test_opening() -> None:
    said = opening("pc-q35-10.0", ["x-ignore-shared"], answered=True)
    name = bytes([26]) + b"configuration/capabilities"
    capability = bytes([15]) + b"x-ignore-shared"
    configuration = b"\x07\0\0\0\x0bpc-q35-10.0\x05" + name + b"\0\0\0\1\0\0\0\1" + capability
    assert said == b"QEVM\0\0\0\3" + configuration + b"\x08\0\1\0\0"


def test_pages() -> None:
    block = RamBlock("vram", 0, 2 * PIECE)
    before = {0: b"a" * PAGE + bytes(PIECE - PAGE)}
    records = every_page(block, before)
    assert records[0] == (0x08).to_bytes(8, "big") + b"\4vram" + b"a" * PAGE
    assert records[1:3] == [
        (PAGE | 0x22).to_bytes(8, "big") + b"\0",
        (2 * PAGE | 0x22).to_bytes(8, "big") + b"\0",
    ]
    assert len(records) == 2 * PIECE // PAGE
    assert changed_pages(block, before, dict(before)) == []
    now = {PIECE: bytes(PAGE) + b"b" * PAGE + bytes(PIECE - 2 * PAGE)}
    assert changed_pages(block, before, now) == [
        (0x02).to_bytes(8, "big") + b"\4vram\0",
        (PIECE + PAGE | 0x28).to_bytes(8, "big") + b"b" * PAGE,
    ]


@pytest.mark.parametrize("saved", [b"", b"QEVM\0\0\0\4\0", b"QEVM\0\0\0\3\1"])
def test_devices_that_are_saved_otherwise(saved: bytes) -> None:
    with pytest.raises(PagenetError, match="in a way that pagenet does not know"):
        devices_of(saved)
