"""What grows with the memory: how long a touch waits, and how much memory each daemon needs for a
page.

The memory is sparse, and may be larger than the host's: only pages that are touched have bytes.
During a first transfer, with the background off, pages are touched as in :mod:`._fault`, each size
in turn. A second transfer is completed, and then the memory of both processes is read, less the
pages of the region.
"""

from __future__ import annotations

import mmap
import os
import random
from array import array
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .._native.testing import bench_touch
from ..destination.pulling import pull
from ..errors import UsageError
from ..transport import LaneKind
from ..uffd import OwnMemory
from ._figures import Sample
from ._peers import Served, served
from .workload._toucher import Toucher

__all__ = ["ScaleOptions", "ScaleResult", "held_by", "measure_scale"]

# Seconds after which a touch loop ends, whatever is left.
_LIMIT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ScaleOptions:
    """``sizes``: bytes. ``touches``: pages that are touched in each round, and that are not
    zero."""

    lane: LaneKind = "native"
    sizes: Sequence[int] = (256 << 20, 8 << 30)
    touches: int = 4000
    transport: Literal["tcp", "unix"] = "tcp"
    rounds: int = 5


@dataclass(slots=True)
class ScaleResult:
    """``source_bytes``, ``destination_bytes``: by how much each process had grown at the end of a
    complete transfer, without the pages that were moved."""

    size: int
    latencies: Sample = field(default_factory=Sample)
    source_bytes: int = 0
    destination_bytes: int = 0

    @property
    def pages(self) -> int:
        return self.size // mmap.PAGESIZE


async def measure_scale(options: ScaleOptions) -> list[ScaleResult]:
    """A result for each size."""
    results = [ScaleResult(size) for size in options.sizes]
    async with AsyncExitStack() as stack:
        sources = [await _sparse_source(result, options, stack) for result in results]
        for number in range(options.rounds):
            for result, source in zip(results, sources, strict=True):
                pages = random.Random(number).sample(source.pages, len(source.pages))
                result.latencies.add(await _touch(source.served, pages, options))
        for result, source in zip(results, sources, strict=True):
            await _weigh(source, result, options)
    return results


@dataclass(frozen=True, slots=True)
class _Source:
    served: Served
    pages: Sequence[int]


async def _sparse_source(
    result: ScaleResult, options: ScaleOptions, stack: AsyncExitStack
) -> _Source:
    if result.size % mmap.PAGESIZE or not result.size:
        raise UsageError(f"{result.size} bytes is not a whole number of pages")
    pages = random.Random(0).sample(range(result.pages), min(options.touches, result.pages))
    fd = os.memfd_create("pagenet-bench", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    os.ftruncate(fd, result.size)
    for page in pages:
        os.pwrite(fd, os.urandom(mmap.PAGESIZE), page * mmap.PAGESIZE)
    spec = f"/proc/{os.getpid()}/fd/{fd}"
    return _Source(
        await stack.enter_async_context(served(spec, options.transport, options.lane)), pages
    )


async def _touch(source: Served, pages: Sequence[int], options: ScaleOptions) -> array[int]:
    memory = OwnMemory()
    with ExitStack() as stack:
        stack.callback(memory.close)
        async with pull(source.uri, memory, background="off", lane=options.lane, prefetch=(0, 0)):
            toucher = Toucher(
                lambda: bench_touch(memory.address, mmap.PAGESIZE, pages, 1, _LIMIT_SECONDS)
            )
            stack.callback(toucher.join)
            return await toucher.latencies()
    raise AssertionError("the transfer was cancelled without a reason")


async def _weigh(source: _Source, result: ScaleResult, options: ScaleOptions) -> None:
    memory = OwnMemory()
    moved = len(source.pages) * mmap.PAGESIZE  # what is zero takes no memory
    try:
        source_before, destination_before = held_by(source.served.pid), held_by(os.getpid())
        async with pull(source.served.uri, memory, lane=options.lane, prefetch=(0, 0)) as transfer:
            await transfer.wait_complete()
            result.source_bytes = max(0, held_by(source.served.pid) - source_before)
            result.destination_bytes = max(0, held_by(os.getpid()) - destination_before - moved)
    finally:
        memory.close()


def held_by(pid: int) -> int:
    """Resident bytes of the process: its anonymous memory, and the shared memory that it has mapped
    (the map of pages)."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))
