"""Guests of stock QEMU that move while they work: they verify all of their pages, and report all
the time."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from migrations import (
    Events,
    check_goes_on,
    destination,
    incoming_command,
    migrate_command,
    run_incoming,
    status_of,
)
from processes import run
from vm import bare_command, check_unbroken, needs_migration, qemu_command, ram_of, run_vm

from pagenet import PagenetError, SourceUnreachable, UsageError
from pagenet.qemu import connect_qmp, migrate, prepare_incoming

pytestmark = needs_migration


# ---- migrations ----


@pytest.mark.parametrize(("cpus", "lane"), [(1, "native"), (2, "native"), (2, "trio")])
async def test_migration(cpus: int, lane: Any, tmp_path: Path) -> None:
    told = Events()
    command = qemu_command(tmp_path, "b", smp=cpus)
    async with (
        run_vm(qemu_command(tmp_path, "a", smp=cpus), tmp_path, "a") as a,
        destination(tmp_path, command=command, lane=lane) as b,
    ):
        await a.serial.wait_sweeps(1)
        async with migrate(a.qmp, b.uri, lane=lane, on_event=told) as server:
            await server.wait_complete()
        assert await status_of(a.qmp) == "postmigrate"
        await check_goes_on(b.serial)
        check_unbroken(a.serial, b.serial)
        assert b.arrival is not None
        statistics = b.arrival.transfer.statistics()
    told_here, told_there = (
        [n for n in events.names if n not in ("progress", "fault")] for events in (told, b.events)
    )
    assert told_here == ["connected", "stopped", "switchover", "resumed", "complete"]
    assert told_there[-5:] == ["serving", "loaded", "taken", "resumed", "complete"]
    assert statistics.complete
    assert statistics.demand.faults > 0
    assert statistics.placement == "continue"


@pytest.mark.parametrize(("machine", "moves"), [
    (bare_command, 6),
    pytest.param(qemu_command, 50, marks=[pytest.mark.soak, pytest.mark.timeout(1200)]),
])  # fmt: skip
async def test_back_and_forth(
    machine: Callable[[Path, str], list[str]], moves: int, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(run_vm(machine(tmp_path, "m0"), tmp_path, "m0"))
        await first.serial.wait_sweeps(1)
        serials, monitor = [first.serial], first.qmp
        for number in range(1, moves + 1):
            command = machine(tmp_path, f"m{number}")
            there = await stack.enter_async_context(
                destination(tmp_path, f"m{number}", command=command)
            )
            async with migrate(monitor, there.uri) as server:
                await server.wait_complete()
            async with connect_qmp(monitor) as qmp:
                await qmp.command("quit")
            serials.append(there.serial)
            monitor = there.qmp
            await there.serial.wait_beats(1)
        await check_goes_on(serials[-1])
        check_unbroken(*serials)


# ---- migrations that are refused: the guest goes on ----


RNG = ["-device", "virtio-rng-pci"]


def other_cpu_count(directory: Path) -> list[str]:
    return bare_command(directory, "b", smp=2, extra=RNG)


def other_ram_size(directory: Path) -> list[str]:
    return bare_command(directory, "b", memory=80 << 20, extra=RNG)


def other_machine_type(directory: Path) -> list[str]:
    return [word.replace("pc,", "q35,") for word in bare_command(directory, "b", extra=RNG)]


def fewer_devices(directory: Path) -> list[str]:
    return bare_command(directory, "b")


def other_device_order(directory: Path) -> list[str]:
    return bare_command(directory, "b", extra=["-device", "virtio-balloon-pci", *RNG])


PC, Q35 = r"pc-i440fx-\d+\.\d+-machine", r"pc-q35-\d+\.\d+-machine"  # whatever QEMU's version


@pytest.mark.parametrize(("command", "says"), [
    (other_cpu_count, "the number of CPUs differs: 1 at the source, 2 at the destination"),
    (other_ram_size,
        "the RAM size differs: 67108864 bytes at the source, 83886080 at the destination"),
    (other_machine_type, f"the machine type differs: {PC} at the source, {Q35} at the destination"),
    (fewer_devices, "QEMU cannot load the guest's devices"),
    (fewer_devices, r"Unknown savevm section or instance '0000:00:02\.0/virtio-rng'"),
    (other_device_order, r"Unknown savevm section or instance '0000:00:02\.0/virtio-rng'"),
])  # fmt: skip
async def test_destination_is_another_machine(
    command: Callable[[Path], list[str]], says: str, tmp_path: Path
) -> None:
    async with run_vm(bare_command(tmp_path, "a", extra=RNG), tmp_path, "a") as a:
        await a.serial.wait_sweeps(1)
        async with destination(tmp_path, command=command(tmp_path)) as b:
            with pytest.raises(PagenetError) as raised:
                async with migrate(a.qmp, b.uri):
                    raise AssertionError("not reached")
            await b.ended.wait()
            assert await status_of(b.qmp) == "gone"
            assert b.ram.stat().st_size == 0, "the next try would find bytes in it"
        assert re.search(says, str(raised.value))
        assert re.search(says, str(b.error))
        assert await status_of(a.qmp) == "running"
        await check_goes_on(a.serial)
        check_unbroken(a.serial)


async def test_destination_that_has_ended(tmp_path: Path) -> None:
    """A caller that waits for one of its events is told of its end instead."""
    command = [*bare_command(tmp_path, "b"), "-device", "nonsense"]
    with pytest.raises(BaseException) as raised:  # noqa: PT011
        async with destination(tmp_path, command=command):
            raise AssertionError("not reached")
    assert raised.group_contains(
        AssertionError, match="ended before 'listening', .*QEMU has ended with exit status 1"
    )


async def test_nobody_there(tmp_path: Path) -> None:
    async with run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a:
        with pytest.raises(SourceUnreachable):
            async with migrate(a.qmp, f"unix:{tmp_path / 'nobody'}"):
                raise AssertionError("not reached")
        assert await status_of(a.qmp) == "running"


async def test_no_monitor(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"no QMP monitor at .*: No such file or directory; start QEMU with -qmp unix:",
    ):
        async with migrate(tmp_path / "nothing", "unix:nobody"):
            raise AssertionError("not reached")


async def test_source_that_stands_still(tmp_path: Path) -> None:
    async with run_vm(bare_command(tmp_path, "a", extra=["-S"]), tmp_path, "a") as a:
        with pytest.raises(UsageError, match="not running but prelaunch"):
            async with migrate(a.qmp, "unix:nobody"):
                raise AssertionError("not reached")


@pytest.mark.parametrize(("old", "new", "says"), [
    ("share=on", "share=off", "must be shared: add share=on"),
    ("share=on", "share=on,prealloc=on", "leave out prealloc=on"),
    (",memory-backend=ram0", "", "must be a file: start QEMU with -object memory-backend-file"),
    ("memory-backend-file", "memory-backend-ram", "must be a file"),
    ("-nodefaults", "-incoming", "leave -incoming out"),
    ("size=67108864", "size=many", "is not a size"),
    ("-nodefaults", "-daemonize", "leave -daemonize out"),
    ("-nodefaults", "--daemonize", "leave -daemonize out"),
    ("-nodefaults", "mem-lock=on", "leave mem-lock=on out"),
    ("-nodefaults", "-mem-prealloc", "leave -mem-prealloc out"),
    ("-no-reboot -name", "-device vfio-pci,host=1:0.0 -name", "leave vfio-pci,host=1:0.0 out"),
    ("-no-reboot -name", "-netdev vhost-user,id=n -name", "leave vhost-user,id=n out"),
])  # fmt: skip
def test_command_lines_that_cannot_receive(old: str, new: str, says: str, tmp_path: Path) -> None:
    command = bare_command(tmp_path, "b")
    try:
        with pytest.raises(UsageError, match=says):
            prepare_incoming(
                " ".join(command).replace(old, new).split(), tmp_path / "monitor", tmp_path / "uffd"
            )
    finally:
        ram_of(command).unlink()


def test_ram_that_somebody_uses(tmp_path: Path) -> None:
    """The destination has the source's own file, on the same host: the two machines would share
    their memory."""
    command = bare_command(tmp_path, "b")
    try:
        with ram_of(command).open("r+b") as file:
            file.write(b"x")
        with pytest.raises(UsageError, match="holds bytes already"):
            prepare_incoming(command, tmp_path / "monitor", tmp_path / "uffd")
    finally:
        ram_of(command).unlink()


# ---- the commands ----


async def test_commands(tmp_path: Path) -> None:
    async with (
        run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a,
        run_incoming(tmp_path) as (incoming, serial, uri),
    ):
        await a.serial.wait_sweeps(1)
        async with run(migrate_command(a.qmp, uri)) as leaving:
            assert await leaving.wait() == 0
            said = [event["event"] for event in leaving.events]
            assert "round" in said  # its memory is copied before it leaves, unless told otherwise
            said = [name for name in said if name not in ("progress", "round")]
            assert said[:2] == ["connected", "stopped"]
            # all pages may be there before the guest is known to be taken, and to run
            assert [name for name in said[2:] if name != "complete"] == ["switchover", "resumed"]
            assert "complete" in said
        complete = await incoming.event("complete")
        assert complete["pages"] == (64 << 20) // 4096
        await check_goes_on(serial)
        check_unbroken(a.serial, serial)
        async with connect_qmp(tmp_path / "b.qmp") as qmp:
            await qmp.command("quit")
        assert await incoming.wait() == 0


async def test_incoming_ends_with_the_status_of_qemu(tmp_path: Path) -> None:
    command = [*bare_command(tmp_path, "b"), "-device", "nonsense"]
    try:
        async with run(incoming_command("tcp://127.0.0.1:0", command=command)) as incoming:
            assert await incoming.wait() == 5
            assert "QEMU has ended with exit status 1" in incoming.stderr
    finally:
        ram_of(command).unlink()
