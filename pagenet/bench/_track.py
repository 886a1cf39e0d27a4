"""What write tracking costs: to begin with it, to look for what was written, and for the process
that writes.

The memory is this process's own, and sparse: only the pages that are written have bytes, unless all
of it is to be filled. The floors are PAGEMAP_SCAN alone over the same memory at the same moment,
which neither protects anything nor checks what is mapped there, and the same writes to memory that
is not tracked.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from .. import _native
from .._native import testing
from ..region import Block, Region
from ..uffd import Mapping, WriteTracker
from ._environment import available_memory
from ._figures import median

__all__ = ["TrackOptions", "TrackResult", "measure_tracking"]

_T = TypeVar("_T")

# Of memory that is filled, so much more must be free: page tables, and what else runs here.
_SPARE = 1 << 30


@dataclass(frozen=True, slots=True)
class TrackOptions:
    """``sizes``: bytes. ``dirty``: bytes at the beginning of the memory of which every second page
    is written. ``fill``: give all of the memory bytes."""

    sizes: Sequence[int] = (1 << 30, 4 << 30, 16 << 30)
    dirty: int = 128 << 20
    fill: bool = False
    rounds: int = 5


@dataclass(slots=True)
class TrackResult:
    """Seconds of each round, by what was done: ``arm``, ``clean`` (nothing was written), ``dirty``
    (``pages`` pages were), ``close``; ``clean_floor`` and ``dirty_floor``: a bare PAGEMAP_SCAN;
    ``write`` and ``write_floor``: of the pages, tracked and not."""

    size: int
    pages: int
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def seconds(self, name: str) -> float:
        return median(self.rounds[name])

    def ratio(self, name: str, floor: str) -> float:
        pairs = zip(self.rounds[name], self.rounds[floor], strict=True)
        return median([ours / least for ours, least in pairs])

    def page_seconds(self) -> float:
        """What a look costs more for each page that was written."""
        pairs = zip(self.rounds["dirty"], self.rounds["clean"], strict=True)
        return median([dirty - clean for dirty, clean in pairs]) / self.pages

    def write_seconds(self) -> float:
        """What the first write to a page after a look costs more."""
        pairs = zip(self.rounds["write"], self.rounds["write_floor"], strict=True)
        return median([tracked - plain for tracked, plain in pairs]) / self.pages


async def measure_tracking(
    options: TrackOptions, on_skip: Callable[[int, int], None]
) -> list[TrackResult]:
    """``on_skip``: called with each size that does not fit into memory, and what it needs.
    :exc:`~pagenet.errors.Unsupported` where the kernel cannot track writes."""
    results = []
    for size in options.sizes:
        needed = (size if options.fill else min(size, options.dirty)) + size // 256 + _SPARE
        if needed > available_memory():
            on_skip(size, needed)
            continue
        dirty = min(size, options.dirty) // mmap.PAGESIZE
        results.append(result := TrackResult(size, -(-dirty // 2)))
        for _ in range(options.rounds):
            await trio.to_thread.run_sync(_measure, result, dirty, options.fill)
    return results


def _measure(result: TrackResult, dirty: int, fill: bool) -> None:
    with ExitStack() as stack:
        fd = os.memfd_create("pagenet-bench", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.ftruncate(fd, result.size)
        memory = _native.Mapped(result.size, fd)
        stack.callback(memory.close)
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, pagemap)
        if fill:
            _native.populate(memory.address, result.size)
        _Round(result, memory, pagemap, dirty).run()


class _Round:
    def __init__(
        self, result: TrackResult, memory: _native.Mapped, pagemap: int, dirty: int
    ) -> None:
        self._result = result
        self._memory = memory
        self._pagemap = pagemap
        self._dirty = dirty
        self._bits = bytearray(-(-result.size // mmap.PAGESIZE // 8))

    def run(self) -> None:
        self._write()  # allocates the pages
        self._time("write_floor", self._write)
        mapping = Mapping(self._memory.address, self._memory.size, 0, mmap.PAGESIZE)
        region = Region([Block("bench", self._memory.size)])
        tracker = self._time("arm", lambda: WriteTracker(os.getpid(), [mapping], region))
        try:
            for name, pages in (("clean", 0), ("dirty", self._result.pages)):
                if pages:
                    self._time("write", self._write)
                found = self._time(f"{name}_floor", self._scan)
                self._time(name, lambda: self._look(tracker))
                named = int.from_bytes(self._bits, "little").bit_count()
                assert named == pages == found // mmap.PAGESIZE, "pages were missed"
        finally:
            self._time("close", tracker.close)

    def _look(self, tracker: WriteTracker) -> None:
        tracker.mark(self._bits)
        tracker.check()

    def _write(self) -> None:
        testing.bench_write(self._memory.address, mmap.PAGESIZE, self._dirty)

    def _scan(self) -> int:
        return testing.bench_scan(self._pagemap, self._memory.address, self._memory.size)

    def _time(self, name: str, work: Callable[[], _T]) -> _T:
        began = time.perf_counter()
        done = work()
        self._result.rounds.setdefault(name, []).append(time.perf_counter() - began)
        return done
