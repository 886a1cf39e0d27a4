"""The processes that tests talk to: daemons, workloads, owners and sources, each a real process.

Everything that pulls is started by :func:`pull` or :func:`pull_command`, which take the name of a
kind of lane, so the same tests run over each kind.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pytest
import trio
from pagenet._pagenet_testing import ffi, lib

import pagenet
from pagenet import _native, _pagenet_testing

PAGE = 4096
HUGE_PAGE = 2 << 20

#: the kinds of lanes; a test that pulls takes one of them
LANES = ("trio", "native")

# Tests that count faults and pages set the prefetch window.
NO_PREFETCH = ("--prefetch", "0,0")

Event = dict[str, Any]


# ---- commands ----


def serve_command(*args: str, as_json: bool = True) -> list[str]:
    return [sys.executable, "-m", "pagenet.cli.serve", *args, *(["--json"] if as_json else [])]


def pull_command(*args: str, lane: str, as_json: bool = True, guard: bool = False) -> list[str]:
    """``guard``: it is started again if it is killed."""
    assert lane in LANES
    driver = "auto" if "--into" in args else lane
    options = ["--lane", driver, *NO_PREFETCH, *(["--json"] if as_json else [])]
    options += [] if guard else ["--no-guard"]
    return [sys.executable, "-m", "pagenet.cli.pull", *args, *options]


# The workload without the rest of pagenet, which takes ten times as long to import: hundreds of
# workloads are started.
WORKLOAD = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
loader = ExtensionFileLoader("pagenet._pagenet_testing", sys.argv[1])
testing = module_from_spec(spec_from_loader("pagenet._pagenet_testing", loader))
loader.exec_module(testing)
ffi = testing.ffi
arguments = [ffi.new("char[]", argument.encode()) for argument in ["workload", *sys.argv[2:]]]
sys.exit(testing.lib.pn_workload(len(arguments), ffi.new("char *[]", [*arguments, ffi.NULL])))
"""


def workload_command(*args: str) -> list[str]:
    """The same as :func:`pagenet.testing.workload.workload_command`."""
    return [sys.executable, "-c", WORKLOAD, str(_pagenet_testing.__file__), *args]


def plant_pagenet(directory: Path) -> None:
    """A package of that name in ``directory``, which leaves a file ``imported`` there if anything
    imports it."""
    (directory / "pagenet").mkdir()
    (directory / "pagenet" / "__init__.py").write_text(
        f"open({str(directory / 'imported')!r}, 'w'); raise SystemExit(9)\n"
    )


def pull(
    uri: str,
    owner: pagenet.UffdSocket | pagenet.OwnMemory | pagenet.IntoFile,
    *,
    lane: str,
    **options: Any,
) -> AbstractAsyncContextManager[pagenet.Transfer]:
    assert lane in LANES
    wanted: Any = (
        "auto"
        if lane == "native" and (uri.startswith("memory:") or isinstance(owner, pagenet.IntoFile))
        else lane
    )
    return pagenet.pull(uri, owner, lane=wanted, **{"prefetch": (0, 0), **options})


# ---- a process and its output ----


class Process:
    """A running process. ``events``: the JSON objects that it has printed so far."""

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
        """Its stderr so far."""
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
        while (found := await self.next_event()) is not None:
            if found["event"] == name:
                return found
        raise AssertionError(f"no {name!r} event, but {self.events} and: {self.stderr}")

    async def next_event(self) -> Event | None:
        """None: there are no more."""
        if (line := await self.line()) is None:
            return None
        self.events.append(json.loads(line))
        return self.events[-1]

    async def wait(self) -> int:
        """Its exit code, or minus the number of the signal that ended it. What it still prints goes
        to ``events``."""
        self.events += [json.loads(line) for line in await self.rest()]
        return await self.wait_end()

    async def wait_end(self) -> int:
        return await self._process.wait()

    async def send(self, text: str) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(text.encode())

    async def close_stdin(self) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.aclose()

    async def close_stdout(self) -> None:
        assert self._process.stdout is not None
        await self._process.stdout.aclose()

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
async def run_server(
    *args: str, listen: str = "tcp://127.0.0.1:0"
) -> AsyncIterator[tuple[Process, str]]:
    """pagenet-serve, and where it listens."""
    async with run(serve_command(*args, "--listen", listen)) as server:
        yield server, (await server.event("listening"))["uri"]


def run_workload(socket: Path, *args: str | int) -> AbstractAsyncContextManager[Process]:
    return run(workload_command("--socket", str(socket), *map(str, args)))


async def check_verified(workload: Process, **expected: Any) -> Event:
    """Check that it has ended, and that every byte was right."""
    verified = await workload.event("verified")
    assert (verified["bad"], verified["first_bad"], verified["poisoned"]) == (0, None, 0), verified
    assert {name: verified[name] for name in expected} == expected
    assert await workload.wait() == 0
    return verified


# ---- what /proc says ----


def children_of(pid: int) -> list[int]:
    """The children that any thread of it has started; none if it has ended."""
    with suppress(OSError):
        return [
            int(child)
            for task in os.listdir(f"/proc/{pid}/task")
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        ]
    return []


def parent_of(pid: int) -> int:
    """0 if it has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


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


def can_track() -> bool:
    """Whether this kernel can say which pages were written."""
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        _native.track_probe(pagemap)
    except OSError:
        return False
    finally:
        os.close(pagemap)
    return True


def skip_without_tracking() -> None:
    if not can_track():
        pytest.skip("this kernel has no PAGEMAP_SCAN (Linux 6.7)")


async def wait_in_faults(pid: int, threads: int) -> None:
    """Wait, by looking again and again, until ``threads`` threads of a process wait for pages: the
    kernel does not report it."""
    while threads_in_faults(pid) < threads:  # noqa: ASYNC110
        await trio.sleep(0.01)


async def stop_process(process: Process) -> None:
    """Stop it, as if its machine had died."""
    process.send_signal(signal.SIGSTOP)
    await wait_stopped(process)


async def wait_stopped(process: Process) -> None:
    """Wait, by looking again and again, until it is stopped."""
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":  # noqa: ASYNC110
        await trio.sleep(0.001)


# ---- a network that stops in the middle ----


class Relay:
    """Passes on the bytes of both sides, until the source has sent ``hold_after`` bytes: then the
    source's bytes are held back."""

    def __init__(self, uri: str, hold_after: int) -> None:
        where = urlsplit(uri)
        assert where.hostname is not None
        assert where.port is not None
        self._source = (where.hostname, where.port)
        self._left = hold_after
        self._streams: list[trio.SocketStream] = []
        self._released = trio.Event()
        self.uri = ""
        #: set when the source has sent that many bytes: no more get through
        self.held = trio.Event()

    def release(self) -> None:
        self._released.set()

    async def cut(self) -> None:
        """Break all connections, as the end of a machine does; bytes that were held back are
        lost."""
        for stream in self._streams:
            await trio.aclose_forcefully(stream)

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.uri = "tcp://{}:{}".format(*listeners[0].socket.getsockname())
        task_status.started()
        await trio.serve_listeners(self._meet, listeners)

    async def _meet(self, destination: trio.SocketStream) -> None:
        try:
            async with (
                destination,
                await trio.open_tcp_stream(*self._source) as source,
                trio.open_nursery() as nursery,
            ):
                self._streams += [destination, source]
                nursery.start_soon(self._pass_on, destination, source)
                await self._pass_back(source, destination)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # one side is gone, and the other is told by the end of its connection

    async def _pass_back(self, source: trio.SocketStream, destination: trio.SocketStream) -> None:
        async for data in source:
            self._left -= len(data)
            if self._left < 0 and not self._released.is_set():
                self.held.set()
                await self._released.wait()
            await destination.send_all(data)

    async def _pass_on(self, destination: trio.SocketStream, source: trio.SocketStream) -> None:
        async for data in destination:
            await source.send_all(data)
        await source.send_eof()


@asynccontextmanager
async def run_relay(uri: str, hold_after: int) -> AsyncIterator[Relay]:
    """Between a destination and the source at ``uri``."""
    relay = Relay(uri, hold_after)
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        yield relay
        await relay.cut()
        nursery.cancel_scope.cancel()


# ---- memory ----


def write_pattern(
    path: Path, size: int, *, first_page: int = 0, seed: int = 0, zero_every: int = 0
) -> Path:
    """A file of ``size`` bytes of the pattern that the workload checks, from page ``first_page``
    on."""
    pages = bytearray(size)
    lib.pn_pattern_fill(ffi.from_buffer(pages), first_page, size // PAGE, PAGE, seed, zero_every)
    path.write_bytes(pages)
    return path


def write_blocks(
    directory: Path, sizes: Sequence[int], *, seed: int = 0, zero_every: int = 0
) -> list[str]:
    """One file for each block, with one pattern through all of them."""
    first, paths = 0, []
    for index, size in enumerate(sizes):
        path = directory / f"block-{index}"
        paths.append(
            str(write_pattern(path, size, first_page=first, seed=seed, zero_every=zero_every))
        )
        first += size // PAGE
    return paths


_RESERVED = Path("/proc/sys/vm/nr_hugepages")


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Makes ``count`` huge pages of 2 MiB free, and some to spare; skips the test if that fails."""
    try:
        file = _RESERVED.open("r+")
    except OSError as error:
        pytest.skip(f"huge pages cannot be reserved: {error.strerror}")
    with file:
        # Locked while they are in use: another run of the tests on this host would take them for
        # free.
        fcntl.flock(file, fcntl.LOCK_EX)
        before = int(_RESERVED.read_text())
        _RESERVED.write_text(str(before + count + 4))
        try:
            if int(_RESERVED.read_text()) < before + count:
                pytest.skip(f"there is no room for {count} huge pages")
            yield
        finally:
            _RESERVED.write_text(str(before))
