"""pagenet-serve --tracked, as a user runs it: the memory of a process that writes to it all the
time."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from processes import PAGE, Process, run, serve_command

import pagenet
from pagenet import OwnMemory
from pagenet.control import connect_control

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="attaching is for x86-64"),
    pytest.mark.usefixtures("uffd_permitted"),
]

SIZE = 8 << 20
#: writes a counter to some pages, again and again, and says where
WRITER = """
import ctypes, mmap, os, sys
size = int(sys.argv[1])
fd = os.memfd_create("owner")
os.ftruncate(fd, size)
memory = mmap.mmap(fd, size)
print(fd, ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
count = 0
while True:
    count += 1
    page = count * 7919 % 500
    memory[page * 4096 : page * 4096 + 8] = count.to_bytes(8, "little")
"""


@asynccontextmanager
async def writer() -> AsyncIterator[tuple[Process, int, int]]:
    """A process that writes, its memory's descriptor, and its memory's address."""
    async with run([sys.executable, "-c", WRITER, str(SIZE)]) as process:
        fd, address = (await process.line() or "").split()
        yield process, int(fd), int(address)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def content_of(pid: int, fd: int) -> bytes:
    return Path(f"/proc/{pid}/fd/{fd}").read_bytes()


@pytest.mark.parametrize("named", ["descriptor", "addresses"])
@pytest.mark.parametrize("rounds", ["auto", "0", "3"])
async def test_moved(named: str, rounds: str) -> None:
    memory = OwnMemory("memfd")
    try:
        async with writer() as (process, fd, address):
            spec = f"/proc/{process.pid}/fd/{fd}"
            if named == "addresses":
                spec = f"pid:{process.pid}:{address:#x}+{SIZE:#x}"
            command = serve_command(
                spec, "--listen", "tcp://127.0.0.1:0", "--tracked", "--rounds", rounds, "--once"
            )
            async with run(command) as server:
                uri = (await server.event("listening"))["uri"]
                async with pagenet.pull(uri, memory) as transfer:
                    await transfer.wait_frozen()
                    assert state_of(process.pid) == "T"
                    moved = await memory.read(0, SIZE)
                    await transfer.wait_complete()
                assert await server.wait() == 0
            assert moved == content_of(process.pid, fd)
            over = [event for event in server.events if event["event"] == "round"]
            assert rounds == "auto" or len(over) == int(rounds)
            assert all(event["written"] <= 500 for event in over)
            frozen = next(event for event in server.events if event["event"] == "frozen")
            assert frozen["left"] <= (500 if over else SIZE // PAGE)
    finally:
        memory.close()


async def test_switched_by_hand(tmp_path: Path) -> None:
    memory, path = OwnMemory("memfd"), tmp_path / "ctl"
    try:
        async with writer() as (process, fd, _):
            command = serve_command(
                f"/proc/{process.pid}/fd/{fd}",
                *("--listen", "tcp://127.0.0.1:0", "--tracked", "--rounds", "100", "--once"),
                *("--control", str(path)),
            )
            async with run(command) as server:
                uri = (await server.event("listening"))["uri"]
                async with pagenet.pull(uri, memory, max_bandwidth=1 << 20) as transfer:
                    async with connect_control(path) as control:
                        await control.command("switch")
                    await transfer.wait_complete()
                assert await server.wait() == 0
            assert await memory.read(0, SIZE) == content_of(process.pid, fd)
    finally:
        memory.close()


@pytest.mark.parametrize("ends", ["source", "destination"])
async def test_one_side_ends_in_a_round(ends: str) -> None:
    """The owner runs on, as if nothing had been."""
    memory = OwnMemory("memfd")
    try:
        async with writer() as (process, fd, _):
            command = serve_command(
                f"/proc/{process.pid}/fd/{fd}", "--listen", "tcp://127.0.0.1:0", "--tracked"
            )
            async with run(command) as server:
                uri = (await server.event("listening"))["uri"]
                await pull_a_little(uri, memory, server if ends == "source" else None)
                if ends == "destination":
                    assert await server.wait() == 4
                    assert "has left in round 1" in server.events[-1]["message"]
            assert state_of(process.pid) in "RS"
            assert " uw" not in Path(f"/proc/{process.pid}/smaps").read_text()
    finally:
        memory.close()


async def pull_a_little(uri: str, memory: OwnMemory, server: Process | None) -> None:
    """Begin a transfer, and leave it, or kill its source."""
    try:
        async with pagenet.pull(uri, memory, max_bandwidth=1 << 20) as transfer:
            assert transfer.round == 1
            if server is not None:
                await server.kill()
                await trio.sleep_forever()
    except pagenet.SourceLost:
        assert server is not None


REFUSED: list[tuple[Sequence[str], str]] = [
    (["{file}"], "only the memory of one process can be tracked"),
    (["{file}", "pid:{pid}:{address}+0x1000"], "only the memory of one process can be tracked"),
    (["pid:{pid}:{address}+0x800000000"], "cannot read process"),
]


@pytest.mark.parametrize(("specs", "says"), REFUSED)
async def test_refused(specs: Sequence[str], says: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(PAGE))
    async with writer() as (process, _, address):
        names = {"file": file, "pid": process.pid, "address": hex(address)}
        command = serve_command(
            *(spec.format(**names) for spec in specs), "--listen", "tcp://127.0.0.1:0", "--tracked"
        )
        async with run(command) as server:
            assert await server.wait() == 2
            assert says in server.events[-1]["message"]
        assert state_of(process.pid) in "RS"
        os.kill(process.pid, signal.SIGKILL)
