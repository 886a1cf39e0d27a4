"""pagenet-snapshot create --running: the memory of a process that writes to it all the time."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from fuzzing import is_one_line
from processes import PAGE, Process, run, skip_without_tracking

from pagenet.cli._running import open_running
from pagenet.snapshot.running import create_running

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="attaching is for x86-64"),
    pytest.mark.usefixtures("uffd_permitted"),
]

PAGES, SIZE, WRITTEN = 4096, 4096 * PAGE, 500
#: writes a counter to some pages, again and again, and says where
WRITER = f"""
import ctypes, mmap, os
fd = os.memfd_create("owner")
os.ftruncate(fd, {SIZE})
memory = mmap.mmap(fd, {SIZE})
for page in range({WRITTEN}, {PAGES}, 3):
    memory[page * 4096 : page * 4096 + 8] = page.to_bytes(8, "little")
print(fd, ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
count = 0
while True:
    count += 1
    page = count * 7919 % {WRITTEN}
    memory[page * 4096 : page * 4096 + 8] = count.to_bytes(8, "little")
"""


@pytest.fixture(autouse=True)
def tracking() -> None:
    skip_without_tracking()


@asynccontextmanager
async def writer() -> AsyncIterator[tuple[Process, str, str]]:
    """A process that writes, and its memory by its descriptor and by its addresses."""
    async with run([sys.executable, "-c", WRITER]) as process:
        fd, address = map(int, (await process.line() or "").split())
        yield process, f"/proc/{process.pid}/fd/{fd}", f"pid:{process.pid}:{address:#x}+{SIZE:#x}"


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def check_one_moment(memory: bytes) -> int:
    """That is what the process had after so many writes, and nothing that it wrote later."""
    counts = [
        int.from_bytes(memory[page * PAGE : page * PAGE + 8], "little") for page in range(WRITTEN)
    ]
    last = max(counts)
    expected = bytearray(SIZE)
    for count in range(max(last - WRITTEN, 0) + 1, last + 1):
        page = count * 7919 % WRITTEN
        expected[page * PAGE : page * PAGE + 8] = count.to_bytes(8, "little")
    for page in range(WRITTEN, PAGES, 3):
        expected[page * PAGE : page * PAGE + 8] = page.to_bytes(8, "little")
    assert memory == expected
    return last


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "pagenet.cli.snapshot", "--json", *map(str, words)]


async def create(*words: str | Path) -> list[dict[str, Any]]:
    async with run(command("create", "--running", *words)) as process:
        events = [json.loads(line) for line in await process.rest()]
        assert await process.wait() == 0, process.stderr
        return [event for event in events if event["event"] != "progress"]


def export(name: Path) -> bytes:
    subprocess.run(command("export", name, name.with_name("out")), check=True, capture_output=True)
    return name.with_name("out").read_bytes()


@pytest.mark.parametrize("named", ["descriptor", "addresses"])
async def test_layers_of_a_process_that_runs(named: str, tmp_path: Path) -> None:
    async with writer() as (process, *specs):
        spec = specs[named == "addresses"]
        await create(spec, tmp_path / "first")
        *rounds, resumed, created = await create(
            spec, tmp_path / "second", "--base", tmp_path / "first"
        )
        assert state_of(process.pid) in "RS"
    assert {event["event"] for event in rounds} == {"round"}
    assert rounds[0]["pages"] == PAGES
    assert resumed["event"] == "resumed"
    assert resumed["pages"] <= WRITTEN  # maybe none: it writes when it gets a processor
    assert (created["layers"], created["new"] <= WRITTEN) == (2, True)
    first, second = (check_one_moment(export(tmp_path / name)) for name in ("first", "second"))
    assert first < second


async def test_it_is_the_memory_of_the_freeze(tmp_path: Path) -> None:
    """Byte by byte, what the process had when it stood still."""
    frozen: list[bytes] = []

    class Watched:
        def __init__(self, owner: Any, pid: int) -> None:
            self.owner, self.pid = owner, pid

        async def stop(self) -> None:
            await self.owner.stop()
            assert state_of(self.pid) == "T"

        async def go_on(self) -> None:
            assert state_of(self.pid) == "T"
            frozen.append(Path(by_descriptor).read_bytes())
            await self.owner.go_on()

    async with (
        writer() as (process, by_descriptor, by_addresses),
        open_running(by_addresses) as (source, owner, tracker),
    ):
        watched, target = Watched(owner, process.pid), str(tmp_path / "one")
        await create_running(source, watched, tracker, target, None, lambda *_, **__: None)
        assert state_of(process.pid) in "RS"
    assert [export(tmp_path / "one")] == frozen


async def test_killed_while_the_process_stands_still() -> None:
    """It goes on."""
    code = """
import os, signal, sys, trio
from pagenet.cli._running import open_running
async def main():
    async with open_running(sys.argv[1]) as (source, owner, tracker):
        await owner.stop()
        print(open(f"/proc/{source.owners[0][0]}/stat").read().rpartition(")")[2].split()[0])
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
trio.run(main)
"""
    async with (
        writer() as (process, _, spec),
        run([sys.executable, "-c", code, spec]) as killed,
    ):
        assert await killed.line() == "T"
        assert await killed.wait_end() == -signal.SIGKILL
        with trio.fail_after(30):
            while state_of(process.pid) == "T":  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_process_that_is_stopped_needs_no_tracking(tmp_path: Path) -> None:
    async with writer() as (process, spec, _):
        process.send_signal(signal.SIGSTOP)
        with trio.fail_after(30):
            while state_of(process.pid) != "T":  # noqa: ASYNC110
                await trio.sleep(0.01)
        async with run(command("create", "--running", spec, tmp_path / "one")) as refused:
            assert await refused.wait() == 7
            assert "it is stopped" in refused.stderr
        async with run(command("create", spec, tmp_path / "one")) as creating:
            assert await creating.wait() == 0
        assert state_of(process.pid) == "T"
        assert export(tmp_path / "one") == Path(spec).read_bytes()


async def test_refusals(tmp_path: Path) -> None:
    """The process does not notice."""
    file, target = tmp_path / "file", tmp_path / "target"
    file.write_bytes(bytes(PAGE))

    async def refused(*words: str | Path) -> str:
        async with run(command("create", "--running", *words)) as refusal:
            assert await refusal.wait() == 2
            assert is_one_line(refusal.stderr.rstrip())
            return refusal.stderr

    async with writer() as (process, spec, _):
        assert "only the memory of one process" in await refused(file, target)
        assert "--sparse is of a file" in await refused(
            spec, target, "--sparse", "--base", tmp_path / "none"
        )
        assert "cannot open snapshot" in await refused(spec, target, "--base", tmp_path / "none")
        assert "cannot write the snapshot" in await refused(spec, tmp_path / "none" / "target")
        assert "no QMP monitor" in await refused(f"qmp:{tmp_path}/none", target)
        assert state_of(process.pid) in "RS"
    assert os.listdir(tmp_path) == ["file"]


async def test_no_room(tmp_path: Path) -> None:
    async with (
        writer() as (process, spec, _),
        run(
            command("create", "--running", spec, tmp_path / "target"),
            env=os.environ | {"TMPDIR": "/dev/null"},
        ) as failed,
    ):
        assert await failed.wait() == 1
        assert "no room for a copy in /dev/null (TMPDIR)" in failed.stderr
        assert state_of(process.pid) in "RS"
