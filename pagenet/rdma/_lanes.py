"""The destination's lanes over RDMA: a loop in C over both queue pairs, in a thread that Trio
starts, stops and joins.

The loop is in C because all calls of pyverbs keep the GIL, and a page that a thread waits for must
not wait for Python.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import trio

from .. import _native
from ..background.pacing import Background
from ..destination.filling import Filling
from ..destination.native_lanes import LoopLanes, lane_error, taken
from ..errors import ConnectionBroken, SourceDisconnected, Unsupported, UsageError
from ..region import Region
from ..session import receive_exactly
from ..target import Target
from ..transport import Connection, Detachable, DetachedSocket
from ..uffd import UffdTarget
from ._constants import GIVING_BACK_SECONDS, KEYS_IN_ANY_CASE
from ._path import Path
from ._pyverbs import locked_memory_hint
from ._wire import CHUNK_SIZE, ENDPOINT, Endpoint, chunk_pages

__all__ = ["Carrier", "RdmaLanes", "can_run_in_c", "chunk_table", "exchange"]


class Carrier(Connection, Detachable, Protocol):
    """The connection that carries messages: it has an address of this host's, and a socket to give
    away."""

    @property
    def local_host(self) -> str: ...


class Carried(Protocol):
    """A connection by way of a carrier."""

    @property
    def peer(self) -> str: ...
    @property
    def carrier(self) -> Carrier: ...


def can_run_in_c(target: Target) -> bool:
    return isinstance(target, UffdTarget)


class RdmaLanes(LoopLanes):
    """Queue pairs for demand and background, set up over ``carriers``, the first of which then
    carries keys.

    Raises :exc:`~pagenet.errors.UsageError` if the owner's pages are too large.
    """

    def __init__(
        self,
        filling: Filling,
        wire: Region,
        carriers: Sequence[Carrier],
        path: Path,
        background: Background,
        peer: str,
    ) -> None:
        for ours, theirs in zip(filling.region.blocks, wire.blocks, strict=True):
            if ours.page_size > max(theirs.page_size, KEYS_IN_ANY_CASE * CHUNK_SIZE):
                raise UsageError(
                    f"block {ours.name!r} is in pages of {ours.page_size} bytes: over RDMA, 4 MiB"
                    " is the most"
                )
        super().__init__(filling, wire, background, rings=1)
        self._connected = self._cleanup.enter_context(ExitStack())
        self._wire = wire
        self._path = path
        self._go_over(carriers, peer)
        self.name = f"rdma by {path}"

    def _go_over(self, carriers: Sequence[Carrier], peer: str) -> None:
        self._carriers = carriers
        self._peer = peer
        self._loop: _native.RdmaLoop | None = None
        self._is_set_up = trio.Event()

    def resume(self, connections: Sequence[Carried]) -> None:
        self._connected.close()
        self._go_over([connection.carrier for connection in connections], connections[0].peer)

    def _start_loops(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._run_loop)

    async def give_back(self) -> None:
        await self._is_set_up.wait()
        assert self._loop is not None
        self._loop.give_back(True)
        for ring in self._rings:
            ring.wake()
        while not self._loop.is_keyless:  # noqa: ASYNC110
            await trio.sleep(GIVING_BACK_SECONDS)
        self._loop.give_back(False)

    async def _run_loop(self) -> None:
        try:
            loop, sock = await self._set_up()
        except ConnectionBroken as error:
            raise SourceDisconnected(f"the source is gone: {error}") from None
        self._loop = loop
        self._is_set_up.set()
        end = await trio.to_thread.run_sync(loop.run, *sock, limiter=trio.CapacityLimiter(1))
        if end.kind != _native.END_STOPPED:
            raise lane_error(end, self._peer)

    async def _set_up(self) -> tuple[_native.RdmaLoop, DetachedSocket]:
        """Join both queue pairs to the source's. Return the loop, and the socket for keys."""
        path = self._path
        loop = await trio.to_thread.run_sync(self._make_loop)
        self._connected.callback(loop.close)
        for number, carrier in enumerate(self._carriers):
            psn = secrets.randbelow(1 << 24)
            ours = Endpoint(path.gid, path.lid, loop.number(number), psn, path.mtu, path.reads)
            theirs = await exchange(carrier, ours)
            with _refusals(path):
                loop.connect(
                    number,
                    psn,
                    gid=theirs.gid,
                    number=theirs.number,
                    peer_psn=theirs.psn,
                    lid=theirs.lid,
                    mtu=min(path.mtu, theirs.mtu),
                    reads=min(path.reads, theirs.reads),
                )
        return loop, taken(self._connected, self._carriers[0])

    def _make_loop(self) -> _native.RdmaLoop:
        path = self._path
        blocks, chunks = chunk_table(self._wire)
        with _refusals(path):
            return _native.RdmaLoop(
                self._dest,
                self._stop_fd,
                self._rings[0],
                _native.rdma_window_bytes(self._background.window),
                self._background.chunk,
                device=path.device,
                port=path.port,
                gid_index=path.gid_index,
                blocks=blocks,
                chunks=chunks,
                chunk_size=CHUNK_SIZE,
            )


async def exchange(connection: Connection, ours: Endpoint) -> Endpoint:
    """Tell the source where our queue pair is; return where its own is."""
    await connection.send(ours.encode())
    answer = bytearray(ENDPOINT.size)
    await receive_exactly(connection, memoryview(answer))
    return Endpoint.decode(bytes(answer))


def chunk_table(wire: Region) -> tuple[list[tuple[int, int, int, int]], int]:
    """(first page, pages, page size, first chunk) of each block, and the number of chunks."""
    blocks, chunks = [], 0
    for first, block in zip(wire.first_pages, wire.blocks, strict=False):
        pages = block.size // block.page_size
        blocks.append((first, pages, block.page_size, chunks))
        chunks += -(-pages // chunk_pages(block.page_size))
    return blocks, chunks


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Turn :exc:`OSError` of the device into :exc:`Unsupported` that says what to do."""
    try:
        yield
    except OSError as error:
        hint = locked_memory_hint(error)
        if error.errno == errno.ENOENT:
            hint = " (is libibverbs there? Debian: apt install ibverbs-providers)"
        raise Unsupported(f"cannot use {path} for RDMA: {error.strerror}{hint}") from None
