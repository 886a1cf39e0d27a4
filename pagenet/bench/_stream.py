"""How fast the background brings pages that no thread touches, by placement and by source.

The clock runs from the moment the lanes start until the last page is in place. Every page is
verified afterwards. The floors are bare loops in C in two processes: the bytes alone (send, and
recv into one buffer), and the same with each chunk put in place: by COPY; written to a file and
made visible by CONTINUE; or received in place, in memory that is allocated already, and made
visible by CONTINUE. And memcpy between two buffers that are in memory already.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import trio

from .. import _native
from .._native.testing import bench_claim_memory, bench_memcpy, bench_receive
from ..destination.pulling import pull
from ..errors import PagenetError, UsageError
from ..events import EventHandler
from ..transport import LaneKind
from ..uffd import Mode, OwnMemory, Userfaultfd
from ._environment import available_memory
from ._far import far_socket, order_bytes
from ._figures import median
from ._peers import Source, connected_peer, memory_holder, served, socket_pair
from .peer import ORDER, READY

__all__ = ["FLOORS", "PLACEMENTS", "SOURCES", "StreamOptions", "StreamResult", "measure_streams"]

#: by name: the memory that makes pagenet place pages that way
PLACEMENTS = {
    "copy": lambda: OwnMemory("anonymous"),
    "move": lambda: OwnMemory("anonymous", move=True),
    "continue": lambda: OwnMemory("memfd"),
    "continue-allocated": lambda: OwnMemory("memfd", allocate=True),
}
#: the floor of each: bare C that allocates as early or as late, in memory of that kind. Pages that
#: are moved could be copied.
FLOORS = {
    "copy": "send/recv+copy",
    "move": "send/recv+copy",
    "continue": "send/recv+write",
    "continue-allocated": "send/recv+continue",
}
SOURCES = ("file", "process")
# More than any cache holds.
_MEMCPY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """``chunk``: bytes that the floors send, and that pagenet asks for, at a time. ``lanes``:
    connections for the background, each number in turn. ``zero_every``: N adds a run of each
    placement in which one page in N is zero (0: no further run). ``uri``: a source to measure
    instead of one that is started here; ``floors``: the URI of the ``pagenet-bench peer`` beside
    it, for the socket floors."""

    lane: LaneKind = "native"
    size: int = 512 << 20
    chunk: int = 256 << 10
    lanes: Sequence[int] = (1,)
    placements: Sequence[str] = tuple(PLACEMENTS)
    sources: Sequence[str] = SOURCES
    zero_every: int = 2
    transport: Literal["tcp", "unix"] = "tcp"
    rounds: int = 3
    uri: str | None = None
    floors: str | None = None


@dataclass(slots=True)
class StreamResult:
    """``seconds``: of each round, for ``size`` bytes. ``source`` is empty for a floor."""

    name: str
    source: str = ""
    lanes: int = 1
    zero_share: float = 0.0
    size: int = 0
    lane: str = ""
    seconds: list[float] = field(default_factory=list)

    @property
    def gbps(self) -> float:
        """10^9 bytes a second."""
        return round(self.size / median(self.seconds) / 1e9, 3)

    @property
    def is_floor(self) -> bool:
        return not self.source


@dataclass(frozen=True, slots=True)
class _Variant:
    """One row: a source to pull from, and a placement. ``source`` is None if its bytes are not
    known here."""

    result: StreamResult
    uri: str
    source: Source | None


async def measure_streams(options: StreamOptions, on_event: EventHandler) -> list[StreamResult]:
    """The floors, then every placement from every source. Event: ``skipped``, of a source that
    cannot be measured here.

    Raises :exc:`UsageError` if there is too little memory, and :exc:`PagenetError` if pages differ
    after a transfer, or were placed in another way."""
    async with AsyncExitStack() as stack:
        if options.uri is not None:
            variants = [_Variant(result, options.uri, None) for result in _results(options, "peer")]
            floors = _Floors(
                options, None if options.floors is None else partial(_far_sender, options.floors)
            )
        else:
            if (needed := 5 * options.size) > available_memory():
                raise UsageError(
                    f"this takes {needed >> 20} MiB of memory, and {available_memory() >> 20} are"
                    " available"
                )
            source = stack.enter_context(Source(options.size))
            variants = [
                _Variant(result, uri, source)
                for kind in options.sources
                if (uri := await _uri_of(kind, source, options, stack, on_event)) is not None
                for result in _results(options, kind)
            ]
            if options.zero_every:
                zeros = stack.enter_context(Source(options.size, options.zero_every))
                uri = (
                    await stack.enter_async_context(
                        served(zeros.spec, options.transport, options.lane)
                    )
                ).uri
                share = 1 / options.zero_every
                variants += [
                    _Variant(result, uri, zeros) for result in _results(options, "file", share)
                ]
            sender = await stack.enter_async_context(
                connected_peer("unix", "bytes", source.fd, source.size, fds=[source.fd])
            )
            if await trio.to_thread.run_sync(sender.recv, len(READY)) != READY:
                raise PagenetError("the floor's sender ended at once")
            floors = _Floors(options, partial(_near_sender, sender, options.transport))
        for _ in range(options.rounds):
            await floors.round()
            for variant in variants:
                await trio.to_thread.run_sync(bench_claim_memory, 2 * options.size)
                await _stream(variant, options)
    return [*floors.results, *(variant.result for variant in variants)]


def _results(options: StreamOptions, source: str, zero_share: float = 0.0) -> list[StreamResult]:
    return [
        StreamResult(name, source, lanes, zero_share)
        for lanes in options.lanes
        for name in options.placements
    ]


async def _uri_of(
    kind: str, source: Source, options: StreamOptions, stack: AsyncExitStack, on_event: EventHandler
) -> str | None:
    spec = source.spec if kind == "file" else await stack.enter_async_context(memory_holder(source))
    try:
        return (await stack.enter_async_context(served(spec, options.transport, options.lane))).uri
    except UsageError as error:
        if kind == "file":
            raise
        on_event("skipped", source=kind, reason=str(error))
        return None


async def _stream(variant: _Variant, options: StreamOptions) -> None:
    result = variant.result
    memory = PLACEMENTS[result.name]()
    try:
        async with pull(
            variant.uri,
            memory,
            background_lanes=result.lanes,
            chunk=options.chunk,
            lane=options.lane,
            prefetch=(0, 0),
        ) as transfer:
            await transfer.wait_complete()
        statistics = transfer.statistics()
        if statistics.placement != result.name.partition("-")[0]:
            raise PagenetError(
                f"this kernel places pages by {statistics.placement}, where {result.name} was to be"
                " measured"
            )
        result.size, result.lane = statistics.size, transfer.lane
        result.seconds.append(statistics.seconds)
        if variant.source is not None and (
            bad := await trio.to_thread.run_sync(variant.source.differs, memory.address)
        ):
            raise PagenetError(
                f"{bad} pages are not what they should be after {result.name} from {result.source}"
            )
    finally:
        memory.close()


# A connection over which bytes will come: the socket, and a function that orders a number of bytes
# in chunks of a given size.
_Sender = Callable[
    [], AbstractAsyncContextManager[tuple[socket.socket, Callable[[int, int], None]]]
]


@asynccontextmanager
async def _near_sender(
    peer: socket.socket, transport: str
) -> AsyncIterator[tuple[socket.socket, Callable[[int, int], None]]]:
    with socket_pair(transport) as (ours, theirs):

        def order(length: int, chunk: int) -> None:
            socket.send_fds(peer, [ORDER.pack(length, chunk)], [theirs.fileno()])
            theirs.close()

        await trio.lowlevel.checkpoint()
        yield ours, order


@asynccontextmanager
async def _far_sender(uri: str) -> AsyncIterator[tuple[socket.socket, Callable[[int, int], None]]]:
    async with far_socket(uri) as sock:
        yield sock, lambda length, chunk: sock.sendall(order_bytes(length, chunk))


class _Floors:
    """What no page mover can beat by much. Without a sender, memcpy alone.

    Every measurement has a connection of its own, as every transfer has: a warm connection is
    faster.
    """

    def __init__(self, options: StreamOptions, sender: _Sender | None) -> None:
        self._options = options
        self._sender = sender
        self._memcpy = StreamResult("memcpy", size=min(options.size, _MEMCPY_BYTES))
        self._receive = StreamResult("send/recv", size=options.size)
        self._copy = StreamResult("send/recv+copy", size=options.size)
        self._write = StreamResult("send/recv+write", size=options.size)
        self._continue = StreamResult("send/recv+continue", size=options.size)

    @property
    def results(self) -> list[StreamResult]:
        return [self._memcpy] if self._sender is None else [
            self._memcpy, self._receive, self._copy, self._write, self._continue
        ]  # fmt: skip

    async def round(self) -> None:
        """Run each floor once."""
        self._memcpy.seconds.append(await trio.to_thread.run_sync(self._time_memcpy))
        if self._sender is not None:
            for result, time_it in (
                (self._receive, self._time_receive),
                (self._copy, self._time_copy),
                (self._write, self._time_write),
                (self._continue, self._time_continue),
            ):
                async with self._sender() as (sock, order):
                    result.seconds.append(await trio.to_thread.run_sync(time_it, sock, order))

    def _time_memcpy(self) -> float:
        size = self._memcpy.size
        from_, to = _native.Mapped(size), _native.Mapped(size)
        try:
            # All pages of memory that was never written are one page of zeros, in the cache.
            bench_memcpy(from_.address, to.address, size)
            for _ in range(2):  # the first pass allocates the pages
                start = time.perf_counter()
                bench_memcpy(to.address, from_.address, size)
                seconds = time.perf_counter() - start
            return seconds
        finally:
            from_.close()
            to.close()

    def _time_receive(
        self, sock: socket.socket, order: Callable[[int, int], None], **place: int
    ) -> float:
        """``place``: as :func:`bench_receive` has it."""
        size, chunk = self._options.size, self._options.chunk
        start = time.perf_counter()
        try:
            order(size, chunk)
            bench_receive(sock.fileno(), size, chunk, **place)
        except OSError as error:
            raise PagenetError(f"the floor's sender is gone: {error.strerror}") from None
        return time.perf_counter() - start

    def _time_copy(self, sock: socket.socket, order: Callable[[int, int], None]) -> float:
        bench_claim_memory(2 * self._options.size)
        memory = _native.Mapped(self._options.size)
        uffd = Userfaultfd.open()
        try:
            uffd.register(memory.address, memory.size, Mode.MISSING)
            return self._time_receive(sock, order, uffd=uffd.fd, address=memory.address)
        finally:
            uffd.close()
            memory.close()

    def _time_write(self, sock: socket.socket, order: Callable[[int, int], None]) -> float:
        with self._shared() as (fd, memory, uffd):
            return self._time_receive(sock, order, uffd=uffd, address=memory.address, file=fd)

    def _time_continue(self, sock: socket.socket, order: Callable[[int, int], None]) -> float:
        """Into memory that is allocated, with a second mapping made, before the clock starts."""
        size = self._options.size
        with self._shared() as (fd, memory, uffd), ExitStack() as stack:
            second = _native.Mapped(size, fd)
            stack.callback(second.close)
            if not _native.populate(second.address, second.size):
                os.posix_fallocate(fd, 0, size)
            place = {"uffd": uffd, "address": memory.address, "second": second.address}
            return self._time_receive(sock, order, **place)

    @contextmanager
    def _shared(self) -> Iterator[tuple[int, _native.Mapped, int]]:
        """A memfd, its mapping, and the uffd that watches that."""
        size = self._options.size
        bench_claim_memory(2 * size)
        with ExitStack() as stack:
            fd = os.memfd_create("pagenet-floor", os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
            os.ftruncate(fd, size)
            memory = _native.Mapped(size, fd)
            stack.callback(memory.close)
            uffd = Userfaultfd.open()
            stack.callback(uffd.close)
            uffd.register(memory.address, size, Mode.MISSING | Mode.MINOR)
            yield fd, memory, uffd.fd
