"""pagenet-dirty, as a user runs it, on a process that writes to memory."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from processes import PAGE, Process, run

from pagenet.dirty import load_dirty

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="attaching is for x86-64"),
    pytest.mark.usefixtures("uffd_permitted"),
]

SIZE = 8 << 20
# Writes to the first 100 pages of shared memory, and to the first 10 of private memory, again and
# again.
WRITER = """
import ctypes, mmap, sys
shared, private = mmap.mmap(-1, int(sys.argv[1])), mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE)
address = ctypes.addressof(ctypes.c_char.from_buffer(private))
print(address, flush=True)
while True:
    for page in range(100):
        shared[page * 4096] = 1
        private[page % 10 * 4096] = 1
"""


def dirty_command(*args: str | int | Path) -> list[str]:
    return [sys.executable, "-m", "pagenet.cli.dirty", *map(str, args)]


@asynccontextmanager
async def writer() -> AsyncIterator[tuple[Process, int]]:
    """A process that writes, and the address of its private memory."""
    async with run([sys.executable, "-c", WRITER, str(SIZE)]) as process:
        yield process, int(await process.line() or "")


async def test_seconds_and_what_is_made_of_them(tmp_path: Path) -> None:
    recording, plot = tmp_path / "dirty", tmp_path / "plot.svg"
    files = ("--record", recording, "--plot", plot)
    async with writer() as (process, _):
        command = dirty_command(process.pid, *files, "--link", 100, "--seconds", 2, "--json")
        async with run(command) as dirty:
            assert await dirty.wait() == 0, dirty.stderr
    watching, *seconds, recorded, plotted, complete = dirty.events
    assert watching == {"event": "watching", "pid": process.pid, "bytes": SIZE, "blocks": 1}
    assert [second["event"] for second in seconds] == ["second"] * 2
    for second in seconds:
        assert second["working_set"].keys() == {"1", "10", "60"}
        assert second["working_set"]["1"] <= 100 * PAGE
        assert second["working_set"]["10"] is None
    assert recorded == {"event": "recorded", "seconds": 2, "file": str(recording)}
    assert plotted == {"event": "plotted", "file": str(plot)}
    assert complete["seconds"] == 2
    assert complete["bytes_per_s"] <= 100 * PAGE
    assert complete["forecast"]["precopy_rounds"] == 1
    assert complete["forecast"]["postcopy_seconds"] == pytest.approx(SIZE / 12.5e6)
    assert complete["forecast"]["hybrid_rest"] <= 100 * PAGE
    loaded = load_dirty(recording)
    assert [each.bits >> 100 for each in loaded.history().seconds] == [0, 0]
    assert "MB written in a second" in plot.read_text()


async def wait_all(dirty: Process, pages: int) -> None:
    """Wait for a second in which the writer has written to all of its pages."""
    while (await dirty.event("second"))["working_set"]["1"] < pages * PAGE:
        pass
    assert dirty.events[-1]["working_set"]["1"] == pages * PAGE


async def test_every_page_that_is_written_is_seen() -> None:
    async with writer() as (process, _), run(dirty_command(process.pid, "--json")) as dirty:
        await wait_all(dirty, 100)


async def test_words_for_people() -> None:
    async with writer() as (process, _):
        command = dirty_command(process.pid, "--seconds", 1, "--link", 1)
        async with run(command) as dirty:
            lines = await dirty.rest()
            assert await dirty.wait_end() == 0
    assert lines[0] == f"watching {SIZE} bytes of process {process.pid}, in 1 blocks"
    assert "B/s  working set, MiB: 1 s 0." in lines[1]
    assert ", 10 s -, 60 s -" in lines[1]
    assert lines[2].startswith("mean: ")
    assert lines[3].startswith("over 1 Mbit/s, precopy: ")
    assert lines[4] == "over 1 Mbit/s, postcopy: every page is there after 67.1 s"
    assert lines[5].startswith("over 1 Mbit/s, hybrid: 1 round, 67.1 s, then ")
    assert lines[6].startswith("that takes longer than what was seen")


async def test_range_of_private_memory() -> None:
    async with writer() as (process, address):
        where = f"{address & -PAGE:#x}+{64 * PAGE:#x}"
        async with run(dirty_command(process.pid, "--range", where, "--json")) as dirty:
            await wait_all(dirty, 10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_stopped_by_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """What was seen until then is there, and the process is watched no longer."""
    recording = tmp_path / "dirty"
    async with writer() as (process, _):
        async with run(dirty_command(process.pid, "--record", recording, "--json")) as dirty:
            await dirty.event("second")
            dirty.send_signal(number)
            assert await dirty.wait() == 128 + number
        assert dirty.events[-1]["event"] == "complete"
        async with run(dirty_command(process.pid, "--seconds", 1)) as again:
            assert await again.wait_end() == 0
    assert len(load_dirty(recording).seconds) >= 1


async def test_stopped_within_the_first_second(tmp_path: Path) -> None:
    recording = tmp_path / "dirty"
    async with (
        writer() as (process, _),
        run(dirty_command(process.pid, "--record", recording, "--json")) as dirty,
    ):
        await dirty.event("watching")
        dirty.send_signal(signal.SIGINT)
        assert await dirty.wait() == 130
    assert recording.exists() == any(event["event"] == "second" for event in dirty.events)


async def test_process_that_ends(tmp_path: Path) -> None:
    recording = tmp_path / "dirty"
    async with (
        writer() as (process, _),
        run(dirty_command(process.pid, "--record", recording, "--json")) as dirty,
    ):
        await dirty.event("second")
        await process.kill()
        assert await dirty.wait() == 5
        assert dirty.stderr.startswith(f"pagenet-dirty: process {process.pid} has ended")
        assert dirty.stderr.count("\n") == 1
    assert len(load_dirty(recording).seconds) >= 1


async def test_killed_while_it_watches() -> None:
    async with writer() as (process, _):
        async with run(dirty_command(process.pid, "--json")) as dirty:
            await dirty.event("second")
            await dirty.kill()
        assert not process.has_ended
        async with run(dirty_command(process.pid, "--seconds", 1)) as again:
            assert await again.wait_end() == 0, again.stderr


async def test_process_that_is_watched_already() -> None:
    async with writer() as (process, _), run(dirty_command(process.pid, "--json")) as first:
        await first.event("watching")
        async with run(dirty_command(process.pid)) as second:
            assert await second.wait_end() == 2
            assert "another userfaultfd watches it already" in second.stderr
            assert second.stderr.count("\n") == 1
        await first.event("second")


def ended(*args: str | int | Path) -> tuple[int, str]:
    done = subprocess.run(dirty_command(*args), capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize(("args", "reason"), [
    ([], "name either the PID of a process, or a QEMU's monitor with --qmp"),
    (["1", "--qmp", "/x"], "name either the PID of a process, or a QEMU's monitor with --qmp"),
    (["x"], "'x' is not a number from 1 on"),
    (["--qmp", "/x", "--range", "1+1"], "--range is for a process"),
    (["1", "--compare"], "--compare asks QEMU: it needs --qmp"),
    (["1", "--link", "nan"], "'nan' is no number of Mbit/s"),
    (["1", "--link", "0"], "'0' is no number of Mbit/s"),
    (["1", "--range", "5-3"], "'5-3' is no range of addresses"),
    (["--qmp", "/nowhere"], "no QMP monitor at /nowhere"),
    (["1", "--plot", "x.jpg"], "the name ends in .svg or .png"),
    (["1", "--record", "/nowhere/x"], "cannot write the recording /nowhere/x"),
])  # fmt: skip
def test_bad_usage_is_one_line(args: Sequence[str], reason: str) -> None:
    status, said = ended(*args)
    assert status == 2
    assert said.startswith("pagenet-dirty: ")
    assert reason in said
    assert said.count("\n") == 1


def test_processes_that_cannot_be_watched() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        assert ended(process.pid) == (
            2,
            f"pagenet-dirty: process {process.pid} has no memory that is mapped shared and"
            " writable: name addresses (--range)\n",
        )
        assert ended(process.pid, "--range", "0x10000+0x1000")[1] == (
            f"pagenet-dirty: process {process.pid} has mapped nothing at 0x10000\n"
        )
        process.kill()
    status, said = ended(process.pid)
    assert (status, said) == (5, f"pagenet-dirty: process {process.pid} has ended\n")


def test_broken_pipe_is_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(SIZE)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            dirty_command(process.pid), stdout=writing, stderr=subprocess.PIPE, text=True
        )
        os.close(writing)
        process.kill()
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
