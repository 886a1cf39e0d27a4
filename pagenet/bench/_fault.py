"""How long a thread waits for a missing page, from its touch until it resumes.

Threads in C touch random pages of memory in this process, each once, and read the clock before and
after. Only touches that had to wait count: touches of pages that background or prefetch had already
brought are left out.

The floors are the same touches, of memory of the same kind, answered by a bare loop in C that
handles one fault after the other: one has the page at hand, the other asks a process for it over a
blocking socket. Both put it in place by COPY.
"""

from __future__ import annotations

import os
import random
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import trio

from .. import _native
from .._native.testing import bench_claim_memory, bench_fault_floor, bench_touch
from ..destination.pulling import Transfer, pull
from ..errors import PagenetError, SourceLost, Unsupported, UsageError
from ..nurseries import open_failing_nursery
from ..tls import Tls
from ..transport import LaneKind
from ..uffd import Mode, OwnMemory, Userfaultfd
from ._environment import available_memory
from ._far import far_socket, order_pages
from ._figures import Sample
from ._peers import Source, connected_peer, served
from .workload._toucher import Toucher

__all__ = ["LIMIT_SECONDS", "FaultOptions", "FaultResult", "MemoryKind", "measure_faults"]

MemoryKind = Literal["anonymous", "memfd", "hugetlb"]

HUGE_PAGE = 2 << 20
# Seconds after which a measurement ends, whatever is left to touch: with slow lanes it has fewer
# touches, and takes no longer.
LIMIT_SECONDS = 3.0
# Seconds for which a task of the destination keeps Trio, and the GIL, to itself in the busy
# variant.
BUSY_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class FaultOptions:
    """``touches``: at most, in each round of each variant. ``size``: bytes. ``prefetch``: pages
    forward and back, or None for auto. ``uri``: a source to measure instead of one that is started
    here; ``floors``: the URI of the ``pagenet-bench peer`` beside it, for the socket floors."""

    lane: LaneKind = "native"
    threads: Sequence[int] = (1, 8, 64)
    touches: int = 4000
    size: int = 512 << 20
    memory: MemoryKind = "anonymous"
    prefetch: tuple[int, int] | None = (0, 0)
    transport: Literal["tcp", "unix", "rdma"] = "tcp"
    rounds: int = 5
    uri: str | None = None
    #: for ``uri``
    tls: Tls | None = None
    floors: str | None = None
    #: leave out the busy and loaded variants, and the socket floors
    only_idle: bool = False
    #: bytes; the first touch in each area of that size is counted apart (0: none is)
    area: int = 0


@dataclass(slots=True)
class FaultResult:
    """Latencies with ``threads`` threads. Floors may be empty: a source on another host has a
    socket floor only if ``floors`` names a peer there."""

    threads: int
    floor_local: Sample = field(default_factory=Sample)
    floor: Sample = field(default_factory=Sample)
    floor_busy: Sample = field(default_factory=Sample)
    idle: Sample = field(default_factory=Sample)
    #: of the idle touches, the first in each area
    first: Sample = field(default_factory=Sample)
    loaded: Sample = field(default_factory=Sample)
    busy: Sample = field(default_factory=Sample)
    #: of the pages chosen under load, those that were not counted: the background had brought them,
    #: or all pages, before their turn came, or the time was over
    loaded_not_counted: int = 0
    placement: str = ""
    lane: str = ""


async def measure_faults(options: FaultOptions) -> list[FaultResult]:
    """A result for each number of threads."""
    results = [FaultResult(threads) for threads in options.threads]
    async with AsyncExitStack() as stack:
        uri, size = options.uri, options.size
        if uri is None:
            _check_memory(2 * size)
            source = stack.enter_context(Source(size))
            uri = (
                await stack.enter_async_context(
                    served(source.spec, options.transport, options.lane)
                )
            ).uri
        else:
            size = await _size_of(uri, options)
            _check_memory(size)
        page_size = HUGE_PAGE if options.memory == "hugetlb" else os.sysconf("SC_PAGESIZE")
        if size % page_size:
            raise UsageError(f"{size} bytes is not a whole number of {page_size}-byte pages")
        peer = None
        if options.only_idle:
            pass
        elif options.uri is None:
            peer = await stack.enter_async_context(
                connected_peer(options.transport, "pages", page_size)
            )
        elif options.floors is not None:
            peer = await stack.enter_async_context(far_socket(options.floors))
            peer.sendall(order_pages(page_size))
        measure = _Measure(options, uri, size, page_size, -1 if peer is None else peer.fileno())
        for number in range(options.rounds):
            for result in results:
                await measure.round(number, result)
    return results


async def _size_of(uri: str, options: FaultOptions) -> int:
    memory = OwnMemory(options.memory)
    try:
        async with pull(
            uri, memory, background="off", lane=options.lane, tls=options.tls
        ) as transfer:
            return transfer.region.size
    finally:
        memory.close()


def _check_memory(size: int) -> None:
    if size > available_memory():
        raise UsageError(
            f"this takes {size >> 20} MiB of memory, and {available_memory() >> 20} are available"
        )


class _Measure:
    """Runs variants of the same touches."""

    def __init__(
        self, options: FaultOptions, uri: str, size: int, page_size: int, peer: int
    ) -> None:
        self._options = options
        self._uri = uri
        self._size = size
        self._page_size = page_size
        self._peer = peer

    async def round(self, number: int, result: FaultResult) -> None:
        """Each variant once, next to its floor."""
        pick = random.Random(number)
        result.floor_local.add(await self._floor(-1, pick, result.threads))
        if self._peer >= 0:
            result.floor.add(await self._floor(self._peer, pick, result.threads))
        result.idle.add(await self._pulled("off", pick, result))
        if self._options.only_idle:
            return
        if self._peer >= 0:
            async with _kept_busy():
                result.floor_busy.add(await self._floor(self._peer, pick, result.threads))
        async with _kept_busy():
            result.busy.add(await self._pulled("off", pick, result))
        result.loaded.add(await self._pulled("linear", pick, result))

    def _pages(self, pick: random.Random, first: int = 0) -> list[int]:
        pages = self._size // self._page_size
        return pick.sample(range(first, pages), min(self._options.touches, pages - first))

    async def _floor(self, peer: int, pick: random.Random, threads: int) -> array[int]:
        with _bare_memory(self._options.memory, self._size, self._page_size) as (memory, uffd):
            pages = self._pages(pick)
            toucher = Toucher(
                lambda: bench_touch(memory.address, self._page_size, pages, threads, LIMIT_SECONDS)
            )
            stop = os.eventfd(0, os.EFD_CLOEXEC)
            try:
                async with open_failing_nursery() as nursery:
                    nursery.start_soon(_answer, uffd, peer, stop, self._page_size)
                    # the touches cannot be cancelled, and end within LIMIT_SECONDS
                    with trio.CancelScope(shield=True):
                        latencies = await toucher.latencies()
                    os.eventfd_write(stop, 1)
                return latencies
            finally:
                toucher.join()
                os.close(stop)

    async def _pulled(
        self, background: str, pick: random.Random, result: FaultResult
    ) -> array[int]:
        options = self._options
        await trio.to_thread.run_sync(bench_claim_memory, self._size)
        memory = OwnMemory(options.memory)
        toucher: Toucher | None = None
        try:
            async with pull(
                self._uri,
                memory,
                background=background,
                lane=options.lane,
                prefetch=options.prefetch,
                tls=options.tls,
            ) as transfer:
                self._check(transfer, result)
                # The background goes from the first page to the last, so the pages of the second
                # half stay missing longest.
                first = 0 if background == "off" else transfer.region.pages // 2
                pages = self._pages(pick, first)
                toucher = Toucher(self._touch(transfer, memory.address, pages, result.threads))
                latencies = await toucher.latencies()
                if background != "off":
                    result.loaded_not_counted += len(pages) - len(latencies)
                return self._without_first(pages, latencies, result) if options.area else latencies
        finally:
            if toucher is not None:
                toucher.join()
            memory.close()
        raise AssertionError("the transfer was cancelled without a reason")

    def _without_first(
        self, pages: Sequence[int], latencies: array[int], result: FaultResult
    ) -> array[int]:
        """The latencies without the first in each area, which go to ``result.first``. One thread
        has touched ``pages`` in turn."""
        first, others, seen = array("Q"), array("Q"), set[int]()
        for page, latency in zip(pages, latencies, strict=False):
            area = page * self._page_size // self._options.area
            (others if area in seen else first).append(latency)
            seen.add(area)
        result.first.add(first)
        return others

    def _touch(
        self, transfer: Transfer, address: int, pages: Sequence[int], threads: int
    ) -> Callable[[], array[int]]:
        shared_fd = transfer.filling.residency.shared.fd
        return lambda: bench_touch(
            address, self._page_size, pages, threads, LIMIT_SECONDS, shared_fd
        )

    def _check(self, transfer: Transfer, result: FaultResult) -> None:
        if transfer.region.size != self._size:
            raise SourceLost("the source serves other memory than a moment ago")
        result.placement = transfer.filling.target.placement
        result.lane = transfer.lane


@asynccontextmanager
async def _kept_busy() -> AsyncIterator[None]:
    """Run the block beside a task that keeps Trio busy for 10 ms at a time."""

    async def be_busy() -> None:
        while True:
            until = time.perf_counter() + BUSY_SECONDS
            while time.perf_counter() < until:
                pass
            await trio.lowlevel.checkpoint()

    async with open_failing_nursery() as nursery:
        nursery.start_soon(be_busy)
        yield
        nursery.cancel_scope.cancel()


@contextmanager
def _bare_memory(
    kind: MemoryKind, size: int, page_size: int
) -> Iterator[tuple[_native.Mapped, Userfaultfd]]:
    """Memory of that kind in which everything is missing, and its userfaultfd."""
    fd = -1
    uffd = Userfaultfd.open()
    try:
        if kind != "anonymous":
            fd = os.memfd_create(
                "pagenet-floor", os.MFD_CLOEXEC | (os.MFD_HUGETLB if kind == "hugetlb" else 0)
            )
            os.ftruncate(fd, size)
        memory = _native.Mapped(size, fd, alignment=page_size)
    except OSError as error:
        uffd.close()
        raise Unsupported(f"cannot map {size} bytes of {kind} memory: {error.strerror}") from None
    finally:
        if fd >= 0:
            os.close(fd)
    try:
        uffd.register(memory.address, size, Mode.MISSING)
        yield memory, uffd
    finally:
        uffd.close()
        memory.close()


async def _answer(uffd: Userfaultfd, peer: int, stop: int, page_size: int) -> None:
    """The bare handler. It closes the userfaultfd when it ends: missing pages then read as zeros,
    and no thread waits any longer."""
    try:
        await trio.to_thread.run_sync(bench_fault_floor, uffd.fd, peer, stop, page_size)
    except OSError as error:
        raise PagenetError(f"the floor's page server is gone: {error.strerror}") from None
    finally:
        uffd.close()
