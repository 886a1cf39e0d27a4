"""Guests of stock QEMU that move while they work: they check every page of theirs, and say so all the time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from processes import LANES, Process, run
from vm import VM, Serial, check_unbroken, needs_guest, qemu_command, ram_of, run_vm

from pagenet import PagenetError, SourceUnreachable, UsageError
from pagenet.qemu import Arrival, connect_qmp, migrate, prepare_incoming, receive

pytestmark = needs_guest

PATIENCE = 60.0


# ---- a destination in this process ----


@dataclass
class Events:
    said: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    news: trio.Event = field(default_factory=trio.Event)

    def __call__(self, event: str, /, **fields: Any) -> None:
        self.said.append((event, fields))
        self.news.set()
        self.news = trio.Event()

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.said]

    async def wait(self, name: str) -> dict[str, Any]:
        with trio.fail_after(PATIENCE):
            while name not in self.names:
                await self.news.wait()
        return dict(self.said)[name]


@dataclass
class Destination:
    """``arrival``: once the guest runs there. ``error``: what :func:`receive` raised instead."""

    serial: Serial
    qmp: Path
    ram: Path
    uri: str
    events: Events = field(default_factory=Events)
    arrival: Arrival | None = None
    error: PagenetError | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    leave: trio.Event = field(default_factory=trio.Event)

    async def take(self, command: Sequence[str], options: dict[str, Any]) -> None:
        try:
            async with receive(command, listen=self.uri, on_event=self.events, **options) as self.arrival:
                await self.arrival.wait_complete()
        except PagenetError as error:
            self.error = error
        self.ended.set()
        await self.leave.wait()
        if self.arrival is not None:
            self.arrival.process.kill()
            await self.arrival.process.wait()


@asynccontextmanager
async def destination(
    directory: Path, name: str = "b", *, command: Sequence[str] = (), **options: Any
) -> AsyncIterator[Destination]:
    """A QEMU that waits for a guest, and keeps it until the block ends."""
    command = command or qemu_command(directory, name)
    there = Destination(Serial(name), directory / f"{name}.qmp", ram_of(command), f"unix:{directory / name}.sock")
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.take, command, options)
            await there.events.wait("listening")
            nursery.start_soon(there.serial.read, await trio.open_unix_socket(directory / f"{name}.serial"))
            yield there
            there.leave.set()
            if not there.ended.is_set() and there.arrival is None:
                nursery.cancel_scope.cancel()  # nobody came
    finally:
        ram_of(command).unlink(missing_ok=True)


async def status_of(monitor: Path) -> str:
    """Of the machine behind it: "gone" if there is none, "silent" if even its monitor waits for a page."""
    with trio.move_on_after(2):
        try:
            async with connect_qmp(monitor) as qmp:
                return str((await qmp.command("query-status"))["status"])
        except PagenetError:
            return "gone"
    return "silent"


async def check_goes_on(serial: Serial) -> None:
    """The guest is well: it works, and has verified all of its memory once more."""
    await serial.wait_beats(len(serial.beats) + 1)
    await serial.wait_sweeps(serial.beats[-1].sweeps + 2)


# ---- migrations ----


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("cpus", [1, 2])
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
    assert told.names == ["connected", "stopped", "switchover", "resumed", "complete"]
    assert b.events.names[-3:] == ["serving", "loaded", "resumed"]
    assert statistics.complete
    assert statistics.demand.faults > 0
    assert statistics.placement == "continue"


@pytest.mark.parametrize("moves", [3, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
async def test_back_and_forth(moves: int, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(run_vm(qemu_command(tmp_path, "m0"), tmp_path, "m0"))
        await first.serial.wait_sweeps(1)
        serials, monitor = [first.serial], first.qmp
        for number in range(1, moves + 1):
            there = await stack.enter_async_context(destination(tmp_path, f"m{number}"))
            async with migrate(monitor, there.uri) as server:
                await server.wait_complete()
            async with connect_qmp(monitor) as qmp:
                await qmp.command("quit")
            serials.append(there.serial)
            monitor = there.qmp
            await there.serial.wait_beats(1)
        await check_goes_on(serials[-1])
        check_unbroken(*serials)


# ---- what is refused, and the guest goes on ----


RNG = ["-device", "virtio-rng-pci"]


def other_cpu_count(directory: Path) -> list[str]:
    return qemu_command(directory, "b", smp=2, extra=RNG)


def other_ram_size(directory: Path) -> list[str]:
    return qemu_command(directory, "b", memory=320 << 20, extra=RNG)


def other_machine_type(directory: Path) -> list[str]:
    return [word.replace("pc,", "q35,") for word in qemu_command(directory, "b", extra=RNG)]


def fewer_devices(directory: Path) -> list[str]:
    return qemu_command(directory, "b")


@pytest.mark.parametrize(("command", "says"), [
    (other_cpu_count, "the number of CPUs differs: 1 at the source, 2 at the destination"),
    (other_ram_size, "the RAM size differs: 268435456 bytes at the source, 335544320 at the destination"),
    (other_machine_type, "the machine type differs: pc-i440fx-7.2-machine at the source, pc-q35-7.2-machine at the"),
    (fewer_devices, "QEMU cannot load the guest's devices"),
])  # fmt: skip
async def test_destination_is_another_machine(command: Callable[[Path], list[str]], says: str, tmp_path: Path) -> None:
    async with run_vm(qemu_command(tmp_path, "a", extra=RNG), tmp_path, "a") as a:
        await a.serial.wait_sweeps(1)
        async with destination(tmp_path, command=command(tmp_path)) as b:
            with pytest.raises(PagenetError) as raised:
                async with migrate(a.qmp, b.uri):
                    raise AssertionError("not reached")
            await b.ended.wait()
            assert await status_of(b.qmp) == "gone"
            assert b.ram.stat().st_size == 0, "the next try would find bytes in it"
        assert says in str(raised.value)
        assert says in str(b.error)
        assert await status_of(a.qmp) == "running"
        await check_goes_on(a.serial)
        check_unbroken(a.serial)


async def test_nobody_there(tmp_path: Path) -> None:
    async with run_vm(qemu_command(tmp_path, "a"), tmp_path, "a") as a:
        with pytest.raises(SourceUnreachable):
            async with migrate(a.qmp, f"unix:{tmp_path / 'nobody'}"):
                raise AssertionError("not reached")
        assert await status_of(a.qmp) == "running"


async def test_no_monitor(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no QMP monitor at .*: No such file or directory; start QEMU with -qmp unix:"):
        async with migrate(tmp_path / "nothing", "unix:nobody"):
            raise AssertionError("not reached")


async def test_source_that_stands_still(tmp_path: Path) -> None:
    async with run_vm(qemu_command(tmp_path, "a", extra=["-S"]), tmp_path, "a") as a:
        with pytest.raises(UsageError, match="not running but prelaunch"):
            async with migrate(a.qmp, "unix:nobody"):
                raise AssertionError("not reached")


@pytest.mark.parametrize(("old", "new", "says"), [
    ("share=on", "share=off", "must be shared: add share=on"),
    ("share=on", "share=on,prealloc=on", "leave out prealloc=on"),
    (",memory-backend=ram0", "", "must be a file: start QEMU with -object memory-backend-file"),
    ("memory-backend-file", "memory-backend-ram", "must be a file"),
    ("-nodefaults", "-incoming", "leave -incoming out"),
    ("size=268435456", "size=many", "is not a size"),
    ("-nodefaults", "-daemonize", "leave -daemonize out"),
    ("-nodefaults", "mem-lock=on", "leave mem-lock=on out"),
])  # fmt: skip
def test_command_lines_that_cannot_receive(old: str, new: str, says: str, tmp_path: Path) -> None:
    command = qemu_command(tmp_path, "b")
    try:
        with pytest.raises(UsageError, match=says):
            prepare_incoming([word.replace(old, new) for word in command], tmp_path / "monitor", tmp_path / "uffd")
    finally:
        ram_of(command).unlink()


def test_ram_that_somebody_uses(tmp_path: Path) -> None:
    """The source's own file, on the same host: the two machines would share their memory."""
    command = qemu_command(tmp_path, "b")
    try:
        with ram_of(command).open("r+b") as file:
            file.write(b"x")
        with pytest.raises(UsageError, match="holds bytes already"):
            prepare_incoming(command, tmp_path / "monitor", tmp_path / "uffd")
    finally:
        ram_of(command).unlink()


# ---- the commands ----


def incoming_command(uri: str, command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pagenet.cli.qemu", "incoming", "--json", "--listen", uri, "--", *command]


def migrate_command(monitor: Path, uri: str) -> list[str]:
    return [sys.executable, "-m", "pagenet.cli.qemu", "migrate", "--json", "--qmp", str(monitor), uri]


@asynccontextmanager
async def run_incoming(directory: Path, name: str = "b") -> AsyncIterator[tuple[Process, Serial, str]]:
    """``pagenet-qemu incoming``, what its guest says, and where it listens. At the end its QEMU is gone, whoever has it."""
    command = qemu_command(directory, name)
    serial = Serial(name)
    pid = 0
    try:
        async with run(incoming_command("tcp://127.0.0.1:0", command)) as process, trio.open_nursery() as nursery:
            pid = (await process.event("qemu"))["pid"]
            uri = (await process.event("listening"))["uri"]
            nursery.start_soon(serial.read, await trio.open_unix_socket(directory / f"{name}.serial"))
            try:
                yield process, serial, uri
            finally:
                await kill_machine(pid)
    finally:
        ram_of(command).unlink(missing_ok=True)


async def kill_machine(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with trio.CancelScope(shield=True):
        while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_commands(tmp_path: Path) -> None:
    async with run_vm(qemu_command(tmp_path, "a"), tmp_path, "a") as a, run_incoming(tmp_path) as (incoming, serial, uri):
        await a.serial.wait_sweeps(1)
        async with run(migrate_command(a.qmp, uri)) as leaving:
            assert await leaving.wait() == 0
            assert [event["event"] for event in leaving.events] == ["connected", "stopped", "switchover", "resumed", "complete"]
        complete = await incoming.event("complete")
        assert complete["pages"] == (256 << 20) // 4096
        await check_goes_on(serial)
        check_unbroken(a.serial, serial)
        async with connect_qmp(tmp_path / "b.qmp") as qmp:
            await qmp.command("quit")
        assert await incoming.wait() == 0


async def test_incoming_ends_with_the_status_of_qemu(tmp_path: Path) -> None:
    command = [*qemu_command(tmp_path, "b"), "-device", "nonsense"]
    try:
        async with run(incoming_command("tcp://127.0.0.1:0", command)) as incoming:
            assert await incoming.wait() == 5
            assert "QEMU has ended with exit status 1" in incoming.stderr
    finally:
        ram_of(command).unlink()


# ---- whoever is killed, whenever: the guest runs here, or there, or it stands still and somebody says so ----


@pytest.mark.parametrize("victim", ["migrate", "incoming", "source QEMU", "destination QEMU"])
@pytest.mark.parametrize("moment", [0, 20, 40, *[pytest.param(moment, marks=pytest.mark.soak) for moment in range(1, 99, 4)]])
async def test_killed(victim: str, moment: int, tmp_path: Path) -> None:
    """``moment``: ms after the two sides have met, which is about when the switchover begins."""
    async with run_vm(qemu_command(tmp_path, "a"), tmp_path, "a") as a, run_incoming(tmp_path) as (incoming, serial, uri):
        await a.serial.wait_sweeps(1)
        async with run(migrate_command(a.qmp, uri)) as leaving:
            await leaving.event("connected")
            await trio.sleep(moment / 1000)
            if victim == "migrate":
                await leaving.kill()
            elif victim == "incoming":
                await incoming.kill()
            else:
                os.kill(a.pid if victim == "source QEMU" else incoming.events[0]["pid"], signal.SIGKILL)
            where = await settled(a, tmp_path / "b.qmp")
            told = leaving.stderr if victim != "migrate" else incoming.stderr
            await check_outcome(where, a, serial, victim, told)


async def settled(a: VM, b: Path) -> str:
    """Where the guest runs, once that does not change any more: "a", "b" or "nowhere". Never both, not even for a moment."""
    seen: list[str] = []
    with trio.move_on_after(20):
        while seen[-5:] not in (["a"] * 5, ["b"] * 5):
            here, there = await status_of(a.qmp), await status_of(b)
            assert not (here == "running" and there in ("running", "silent"))
            seen.append("a" if here == "running" else "b" if there in ("running", "silent") else "nowhere")
            await trio.sleep(0.2)
    return seen[-1]


async def check_outcome(where: str, a: VM, serial: Serial, victim: str, told: str) -> None:
    if where == "a":
        await check_goes_on(a.serial)
        check_unbroken(a.serial)
    elif where == "nowhere":  # lost with the QEMU that had it
        assert victim in ("source QEMU", "destination QEMU"), f"the guest was lost; {told}"
        assert await status_of(a.qmp) == ("gone" if victim == "source QEMU" else "postmigrate")
