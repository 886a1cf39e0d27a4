"""Processes that stand on the other side: a real pagenet-serve, and what the floors talk to."""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import trio

from .. import _native
from ..errors import PagenetError, UsageError
from ..lane import LaneKind
from ..tcp import assume_near, tune
from ..testing.pattern import write_pattern
from .peer import peer_command

__all__ = ["Served", "Source", "connected_peer", "first_line", "memory_holder", "running", "served", "socket_pair"]


class Source:
    """Memory to be moved: a memfd of ``size`` bytes in which no two words of a page are alike, and one page in ``zero_every``
    is zero (0: none). Close it, or use it as a context manager."""

    def __init__(self, size: int, zero_every: int = 0) -> None:
        self.size = size
        self.zero_every = zero_every
        self.fd = os.memfd_create("pagenet-bench", os.MFD_CLOEXEC)
        try:
            write_pattern(f"/proc/self/fd/{self.fd}", size, zero_every=zero_every)
        except OSError as error:
            self.close()
            raise UsageError(f"cannot make {size} bytes of memory to move: {error.strerror}") from None

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def spec(self) -> str:
        """How pagenet-serve is told of it."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def differs(self, address: int) -> int:
        """Pages at ``address`` that are not what they should be. Call it in a thread."""
        return _native.pattern_differs(address, self.size // mmap.PAGESIZE, mmap.PAGESIZE, 0, self.zero_every)


@asynccontextmanager
async def running(command: Sequence[str], fds: Sequence[int] = ()) -> AsyncIterator[trio.Process]:
    """A process, for as long as the block runs."""
    process = await trio.lowlevel.open_process(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=fds
    )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                await stream.aclose()


async def first_line(process: trio.Process) -> str:
    """What it says first. :exc:`PagenetError` if it ends instead."""
    assert process.stdout is not None
    line = bytearray()
    while not line.endswith(b"\n"):
        if not (more := await process.stdout.receive_some()):
            raise PagenetError("a process that the bench started ended at once")
        line += more
    return line.decode()


class Served(NamedTuple):
    uri: str
    pid: int


@asynccontextmanager
async def served(spec: str, transport: str, lane: LaneKind) -> AsyncIterator[Served]:
    """``pagenet-serve`` of ``spec``, for as long as the block runs. :exc:`UsageError` if it refuses."""
    with tempfile.TemporaryDirectory(prefix="pagenet-bench-") as directory:
        listen = f"unix:{Path(directory) / 'source'}" if transport == "unix" else f"{transport}://127.0.0.1:0"
        command = [sys.executable, "-m", "pagenet.cli.serve", spec, "--listen", listen, "--lane", lane, "--json"]
        async with running(command) as process:
            event = json.loads(await first_line(process))
            if event["event"] != "listening":
                raise UsageError(event.get("message", "pagenet-serve did not start"))
            yield Served(event["uri"], process.pid)


@asynccontextmanager
async def memory_holder(source: Source) -> AsyncIterator[str]:
    """A process that has the same bytes in private memory: the source's name for it."""
    async with running(peer_command("memory", source.fd, source.size), [source.fd]) as process:
        address = int(await first_line(process))
        yield f"pid:{process.pid}:{address:#x}+{source.size:#x}"


@contextmanager
def socket_pair(transport: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a blocking connection, of the kind that pagenet would use."""
    if transport == "unix":
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            assume_near(listener)
            theirs = socket.socket()
            assume_near(theirs)
            theirs.connect(listener.getsockname())
            ours, _ = listener.accept()
        for sock in (ours, theirs):
            tune(sock)
    with ours, theirs:
        yield ours, theirs


@asynccontextmanager
async def connected_peer(transport: str, role: str, *numbers: int, fds: Sequence[int] = ()) -> AsyncIterator[socket.socket]:
    """A peer of a floor (:mod:`.peer`), and the socket to talk to it over."""
    with socket_pair(transport) as (ours, theirs):
        command = peer_command(role, theirs.fileno(), *numbers)
        async with running(command, [theirs.fileno(), *fds]):
            theirs.close()
            yield ours
