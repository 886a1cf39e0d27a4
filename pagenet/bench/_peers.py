"""Processes on the other side: a real pagenet-serve, and the peers of the floors."""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, NamedTuple, Self
from urllib.parse import urlsplit

import trio

from .._native.testing import pattern_differs
from ..children import module_command
from ..errors import PagenetError, UsageError
from ..nurseries import open_failing_nursery
from ..protocol import printable
from ..tcp import assume_near, tune
from ..testing.pattern import write_pattern
from ..transport import LaneKind
from .peer import peer_command

__all__ = [
    "MemoryFile",
    "Relay",
    "Served",
    "Source",
    "connected_peer",
    "memory_holder",
    "relayed",
    "running",
    "served",
    "served_at",
    "socket_pair",
]


class MemoryFile:
    """A memfd of ``size`` bytes to be moved. Close it, or use it as a context manager."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("pagenet-bench", os.MFD_CLOEXEC)
        try:
            self._fill()
        except OSError as error:
            self.close()
            raise UsageError(
                f"cannot make {size} bytes of memory to move: {error.strerror}"
            ) from None
        except BaseException:
            self.close()
            raise

    def _fill(self) -> None:
        """Give it its size and content. :exc:`OSError` if there is not that much memory."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def spec(self) -> str:
        """Its name on pagenet-serve's command line."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"


class Source(MemoryFile):
    """Memory in which no two words of a page are alike, and one page in ``zero_every`` is zero (0:
    none)."""

    def __init__(self, size: int, zero_every: int = 0) -> None:
        self.zero_every = zero_every
        super().__init__(size)

    def _fill(self) -> None:
        write_pattern(f"/proc/self/fd/{self.fd}", self.size, zero_every=self.zero_every)

    def differs(self, address: int) -> int:
        """Pages at ``address`` that are not what they should be. Call it in a thread."""
        return pattern_differs(
            address, self.size // mmap.PAGESIZE, mmap.PAGESIZE, 0, self.zero_every
        )


class Child:
    """A process that the bench started. Made by :func:`running`."""

    def __init__(self, process: trio.Process, errors: IO[bytes]) -> None:
        self.process = process
        self._errors = errors

    async def first_line(self) -> str:
        """The first line of its stdout. :exc:`PagenetError`, with the last line of its stderr, if
        it ends before."""
        assert self.process.stdout is not None
        line = bytearray()
        while not line.endswith(b"\n"):
            if not (more := await self.process.stdout.receive_some()):
                raise PagenetError(
                    f"a process that the bench started ended at once{self._complaint()}"
                )
            line += more
        return line.decode()

    async def discard(self) -> None:
        """Read all that it says: it would wait once the pipe is full."""
        assert self.process.stdout is not None
        async for _ in self.process.stdout:
            pass

    def _complaint(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((f": {printable(line)}" for line in reversed(lines) if line.strip()), "")


@asynccontextmanager
async def running(
    command: Sequence[str], fds: Sequence[int] = (), *, env: Mapping[str, str] | None = None
) -> AsyncIterator[Child]:
    """A process, which is killed when the block ends. ``env``: more of its environment."""
    with tempfile.TemporaryFile() as errors:
        process = await trio.lowlevel.open_process(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=fds,
            env={**os.environ, **(env or {})},
        )
        try:
            yield Child(process, errors)
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                await process.wait()
                for stream in (process.stdin, process.stdout):
                    assert stream is not None
                    await stream.aclose()


class Served(NamedTuple):
    uri: str
    pid: int


@asynccontextmanager
async def served(spec: str, transport: str, lane: LaneKind) -> AsyncIterator[Served]:
    """``pagenet-serve`` of ``spec``, for as long as the block runs. :exc:`UsageError` if it
    refuses."""
    with tempfile.TemporaryDirectory(prefix="pagenet-bench-") as directory:
        listen = (
            f"unix:{Path(directory) / 'source'}"
            if transport == "unix"
            else f"{transport}://127.0.0.1:0"
        )
        async with served_at(listen, spec, "--lane", lane) as server:
            yield server


@asynccontextmanager
async def served_at(
    listen: str,
    spec: str,
    *options: str,
    inside: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[Served]:
    """The same, which listens at ``listen``, with these options; ``inside``: a prefix of its
    command; ``env``: more of its environment."""
    command = [
        *inside,
        *module_command("pagenet.cli.serve", spec, "--listen", listen, *options, "--json"),
    ]
    async with running(command, env=env) as server, open_failing_nursery() as nursery:
        event = json.loads(await server.first_line())
        if event["event"] != "listening":
            raise UsageError(event.get("message", "pagenet-serve did not start"))
        nursery.start_soon(server.discard)
        yield Served(event["uri"], server.process.pid)
        nursery.cancel_scope.cancel()


class Relay:
    """A relay that the bench started, on loopback. Made by :func:`relayed`."""

    def __init__(self, child: Child, port: int) -> None:
        self._child = child
        self.port = port

    async def answered(self) -> int:
        """End it. Returns how many bytes have come from where it leads."""
        assert self._child.process.stdin is not None
        await self._child.process.stdin.aclose()
        return int(await self._child.first_line())


@asynccontextmanager
async def relayed(
    to: str, seconds: float, rate: int = 0, *, inside: Sequence[str] = ()
) -> AsyncIterator[Relay]:
    """A relay to the URL ``to`` (a host and a port), with so many seconds on the way in each
    direction, and ``rate`` bytes a second in each direction of each connection (0: as fast as can
    be). ``inside``: a prefix of its command."""
    target = urlsplit(to)
    words = (str(target.hostname), str(target.port), str(seconds), str(rate))
    async with running([*inside, *module_command("pagenet.bench.pace.relay", *words)]) as child:
        yield Relay(child, int(await child.first_line()))


@asynccontextmanager
async def memory_holder(source: Source) -> AsyncIterator[str]:
    """A process that has the same bytes in private memory. Yields what names them on
    pagenet-serve's command line."""
    async with running(peer_command("memory", source.fd, source.size), [source.fd]) as holder:
        address = int(await holder.first_line())
        yield f"pid:{holder.process.pid}:{address:#x}+{source.size:#x}"


@contextmanager
def socket_pair(transport: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a blocking connection, of the kind that pagenet uses."""
    if transport == "unix":
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            assume_near(listener)
            theirs = socket.socket()
            host_control = assume_near(theirs)
            theirs.connect(listener.getsockname())
            ours, _ = listener.accept()
        for sock in (ours, theirs):
            tune(sock, host_control)
    with ours, theirs:
        yield ours, theirs


@asynccontextmanager
async def connected_peer(
    transport: str, role: str, *arguments: int | str, fds: Sequence[int] = ()
) -> AsyncIterator[socket.socket]:
    """A peer of a floor (:mod:`.peer`). Yields the socket that is connected to it."""
    with socket_pair(transport) as (ours, theirs):
        command = peer_command(role, theirs.fileno(), *arguments)
        async with running(command, [theirs.fileno(), *fds]):
            theirs.close()
            yield ours
