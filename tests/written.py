"""Memory that is written to while it is copied in rounds."""

from __future__ import annotations

import ctypes
import os
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import Any, Literal

import trio
from lanes import MADV_REMOVE, libc
from processes import HUGE_PAGE, PAGE

import pagenet
from pagenet import Block, OwnMemory, Region, Transfer, WriteTracker, _native
from pagenet.nurseries import running_beside
from pagenet.source.precopy import Precopy
from pagenet.source.rounds import Rounds
from pagenet.transport import LaneKind
from pagenet.uffd import Mapping

Kind = Literal["memfd", "hugetlb"]
WRITERS = 3
PATIENCE = 30.0


class Written:
    """Shared memory that threads of this process write to. ``punches``: they also punch holes into
    it, for some of the pages that they write to at once. :meth:`track` names what was written."""

    def __init__(self, kind: Kind, size: int, seed: int, *, punches: bool = False) -> None:
        flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB if kind == "hugetlb" else 0)
        self.page_size = HUGE_PAGE if kind == "hugetlb" else PAGE
        self.fd, self.size, self._seed = os.memfd_create("written", flags), size, seed
        os.ftruncate(self.fd, size)
        self._mapped = _native.Mapped(size, self.fd, alignment=self.page_size)
        self.address = self._mapped.address
        self._punches = punches
        self._noted: set[int] | None = None
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(number,)) for number in range(WRITERS)
        ]

    @property
    def spec(self) -> str:
        return f"/proc/self/fd/{self.fd}"

    @property
    def region(self) -> Region:
        return Region([Block("x", self.size, PAGE)])

    def track(self) -> WriteTracker:
        mapping = Mapping(self.address, self.size, 0, self.page_size)
        return WriteTracker(os.getpid(), [mapping], self.region)

    def note(self) -> Noted:
        """A tracker for kernels that cannot track writes: the threads themselves note theirs."""
        self._noted = set()
        return Noted(self.region, self._noted)

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def _write(self, number: int) -> None:
        """Write parts of pages, most of them in a few; zeros now and then."""
        choose = random.Random(self._seed * WRITERS + number)
        pages = self.size // PAGE
        while not self._stop.is_set():
            hot = choose.random() < 0.7
            page = choose.randrange(max(1, pages // 16) if hot else pages)
            whole = choose.random() < 0.1
            at, size = (0, PAGE) if whole else (choose.randrange(PAGE - 64), 64)
            byte = choose.randrange(256) if choose.random() < 0.8 else 0
            if self._punches and choose.random() < 0.1:
                self.punch(page)
            ctypes.memset(self.address + page * PAGE + at, byte, size)
            self._note(page)

    def write(self, page: int, byte: int) -> None:
        ctypes.memset(self.address + page * PAGE, byte, PAGE)
        self._note(page)

    def punch(self, page: int) -> None:
        address = ctypes.c_void_p(self.address + page * PAGE)
        assert libc.madvise(address, ctypes.c_size_t(PAGE), MADV_REMOVE) == 0

    def _note(self, page: int) -> None:
        if self._noted is not None:
            self._noted.add(page)

    def freeze(self) -> None:
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def content(self) -> bytes:
        return ctypes.string_at(self.address, self.size)

    def close(self) -> None:
        self.freeze()
        self._mapped.close()
        os.close(self.fd)


class Noted:
    """A :class:`~pagenet.source.rounds.Tracker` that names what ``written`` has."""

    def __init__(self, region: Region, written: set[int]) -> None:
        self.region, self._written = region, written

    def mark(self, bits: bytearray) -> None:
        while self._written:
            page = self._written.pop()
            bits[page // 8] |= 1 << page % 8

    def check(self) -> None:
        """There is nothing that could have changed."""

    def close(self) -> None:
        """There is nothing to close."""


@asynccontextmanager
async def copying(
    written: Written,
    memory: OwnMemory,
    lane: LaneKind,
    *,
    listen: str = "tcp://127.0.0.1:0",
    notes: bool = False,
    **options: Any,
) -> AsyncIterator[tuple[Rounds, Transfer]]:
    """A transfer of memory that is being written. ``notes``: track it by :meth:`Written.note`."""
    track: Callable[[], Noted | WriteTracker] = written.note if notes else written.track
    tracker = await trio.to_thread.run_sync(track)
    with closing(tracker):
        async with pagenet.serve(written.spec, listen=listen, lane=lane, tracked=tracker) as server:
            pulled = pagenet.pull(server.uri, memory, lane=lane, **options)
            async with pulled as transfer:
                rounds = await server.wait_rounds()
                assert rounds is not None
                yield rounds, transfer


async def switch_after(precopy: Precopy, seconds: float) -> None:
    await trio.sleep(seconds)
    precopy.switch()


async def freeze_after(seconds: float, precopy: Precopy, written: Written, rounds: Rounds) -> None:
    """Have threads write while the memory is copied, and stop them when the rounds are over: after
    ``seconds`` at the latest."""
    written.begin()
    with trio.fail_after(PATIENCE):
        async with running_beside(switch_after, precopy, seconds):
            await precopy.run(rounds, lambda *_, **__: None)
        await rounds.pause()
        await rounds.name_early()
        await trio.to_thread.run_sync(written.freeze)
        await rounds.freeze()


async def check_frozen(written: Written, memory: OwnMemory, transfer: Transfer) -> None:
    """Read all of the memory at once, while it lacks what is stale, and once more in the end."""
    with trio.fail_after(PATIENCE):
        await transfer.wait_frozen()
        assert await memory.read(0, written.size) == written.content()
        await transfer.wait_complete()
    assert await memory.read(0, written.size) == written.content()
    statistics = transfer.statistics()
    assert statistics.complete
    by_class = (statistics.demand, statistics.prefetch, statistics.background)
    assert sum(each.pages for each in by_class) == statistics.pages
