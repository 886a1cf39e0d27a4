"""The processes that tests talk to: daemons, workloads, owners and sources, each a real process of its own.

Everything that pulls comes through :func:`pull` or :func:`pull_command`, which take the name of a lane, so that the same
tests run over each of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import trio
from pagenet._pagenet import ffi, lib

import pagenet
from pagenet.testing.workload import workload_command

PAGE = 4096
HUGE_PAGE = 2 << 20

#: what brings the pages; a test that pulls takes one of them
LANES = ("trio",)

Event = dict[str, Any]


# ---- commands ----


def serve_command(*args: str, as_json: bool = True) -> list[str]:
    return [sys.executable, "-m", "pagenet.cli.serve", *args, *(["--json"] if as_json else [])]


def pull_command(*args: str, lane: str, as_json: bool = True) -> list[str]:
    assert lane in LANES
    return [sys.executable, "-m", "pagenet.cli.pull", *args, *(["--json"] if as_json else [])]


def pull(
    uri: str, owner: pagenet.UffdSocket | pagenet.OwnMemory | pagenet.IntoFile, *, lane: str, **options: Any
) -> AbstractAsyncContextManager[pagenet.Transfer]:
    assert lane in LANES
    return pagenet.pull(uri, owner, **options)


# ---- a process and what it says ----


class Process:
    """One that is running. ``events``: the JSON objects it has said so far."""

    def __init__(self, process: trio.Process, errors: IO[bytes]) -> None:
        self._process = process
        self._errors = errors
        self._unread = bytearray()
        self.events: list[Event] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def stderr(self) -> str:
        """What it has complained of so far."""
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode()

    async def line(self) -> str | None:
        """The next line of its output without the newline; None at the end."""
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            if not (chunk := await self._process.stdout.receive_some()):
                rest, self._unread = self._unread, bytearray()
                return rest.decode() if rest else None
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    async def rest(self) -> list[str]:
        """All lines up to the end of its output."""
        lines = []
        while (line := await self.line()) is not None:
            lines.append(line)
        return lines

    async def event(self, name: str) -> Event:
        """The next event of that name. Those before it are in ``events``."""
        while (line := await self.line()) is not None:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == name:
                return self.events[-1]
        raise AssertionError(f"no {name!r} event, but {self.events} and: {self.stderr}")

    async def wait(self) -> int:
        """Its exit code, or minus the signal; what it still says goes to ``events``."""
        self.events += [json.loads(line) for line in await self.rest()]
        return await self.wait_end()

    async def wait_end(self) -> int:
        return await self._process.wait()

    async def close_stdin(self) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.aclose()

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def run(command: Sequence[str], **options: Any) -> AsyncIterator[Process]:
    """Runs ``command`` for as long as the block does."""
    with tempfile.TemporaryFile() as errors:
        options = {"stdout": subprocess.PIPE, "stderr": errors, **options}
        process = await trio.lowlevel.open_process(list(command), **options)
        try:
            yield Process(process, errors)
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        await stream.aclose()


@asynccontextmanager
async def run_server(*args: str, listen: str = "tcp://127.0.0.1:0") -> AsyncIterator[tuple[Process, str]]:
    """pagenet-serve, and where it listens."""
    async with run(serve_command(*args, "--listen", listen)) as server:
        yield server, (await server.event("listening"))["uri"]


def run_workload(socket: Path, *args: str | int) -> AbstractAsyncContextManager[Process]:
    return run(workload_command("--socket", str(socket), *map(str, args)))


async def check_verified(workload: Process, **expected: Any) -> Event:
    """It has ended, and every byte was right."""
    verified = await workload.event("verified")
    assert (verified["bad"], verified["first_bad"], verified["poisoned"]) == (0, None, 0), verified
    assert {name: verified[name] for name in expected} == expected
    assert await workload.wait() == 0
    return verified


# ---- threads that wait for a page ----


def threads_in_faults(pid: int) -> int:
    """How many threads of a process wait for a page."""
    found = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            found += Path(f"/proc/{pid}/task/{task}/wchan").read_text() == "handle_userfault"
        except (FileNotFoundError, ProcessLookupError):
            continue  # that thread ended meanwhile
    return found


async def wait_in_faults(pid: int, threads: int) -> None:
    """Until so many threads of a process wait for pages: the kernel tells nobody."""
    while threads_in_faults(pid) < threads:  # noqa: ASYNC110
        await trio.sleep(0.01)


async def stop_process(process: Process) -> None:
    """Have it stand still, as a machine does that has died."""
    process.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":  # noqa: ASYNC110
        await trio.sleep(0.001)


# ---- memory ----


def write_pattern(path: Path, size: int, *, first_page: int = 0, seed: int = 0, zero_every: int = 0) -> Path:
    """A file of ``size`` bytes of the pattern that the workload checks, from page ``first_page`` on."""
    pages = bytearray(size)
    lib.pn_pattern_fill(ffi.from_buffer(pages), first_page, size // PAGE, PAGE, seed, zero_every)
    path.write_bytes(pages)
    return path


def write_blocks(directory: Path, sizes: Sequence[int], *, seed: int = 0, zero_every: int = 0) -> list[str]:
    """One file a block, with one pattern through all of them."""
    first, paths = 0, []
    for index, size in enumerate(sizes):
        path = directory / f"block-{index}"
        paths.append(str(write_pattern(path, size, first_page=first, seed=seed, zero_every=zero_every)))
        first += size // PAGE
    return paths


_RESERVED = Path("/proc/sys/vm/nr_hugepages")


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Has at least ``count`` huge pages of 2 MiB free, or skips."""
    try:
        before = int(_RESERVED.read_text())
        _RESERVED.write_text(str(before + count))
    except OSError as error:
        pytest.skip(f"huge pages cannot be reserved: {error.strerror}")
    try:
        if int(_RESERVED.read_text()) < before + count:
            pytest.skip(f"there is no room for {count} huge pages")
        yield
    finally:
        # Not what it was: somebody else may have reserved some meanwhile.
        _RESERVED.write_text(str(max(0, int(_RESERVED.read_text()) - count)))
