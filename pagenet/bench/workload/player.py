"""A program that works on memory while pages come: ``python -m pagenet.bench.workload.player``,
started by pagenet-bench alone.

Its one argument is a JSON object: ``uri``, ``memory`` (a kind of :class:`OwnMemory`), ``lane``,
``background``, ``prefetch``, ``max_bandwidth``, ``record``, ``work_us``, ``change`` (the touch with
which another phase begins, or 0) and ``trace``, a memfd with the pages to touch. If ``work_us`` is
null, the ns of work before each touch follow them. The program touches the pages from C, and prints
its figures as one JSON object.
"""

from __future__ import annotations

import mmap
import os
import time
from array import array
from typing import Any

import trio

from ..._native.testing import Play, bench_count
from ...destination.pulling import Transfer, pull
from ...residency import State
from ...uffd import OwnMemory
from .._task import work_once
from ._toucher import Toucher

# Seconds between two looks at residency.
_LOOK = 0.005


def _read_trace(fd: int) -> array[int]:
    trace = array("Q")
    trace.frombytes(os.pread(fd, os.fstat(fd).st_size, 0))
    return trace


class _Watch:
    """Looks at residency while a trace is played."""

    def __init__(self, transfer: Transfer, play: Play, trace: array[int], change: int) -> None:
        self._shared = transfer.filling.residency.shared
        self._play = play
        self._set = array("Q", sorted(set(trace)))
        self._change = change
        self._after = (
            array("Q", range(max(trace[:change], default=0) + 1, transfer.region.pages))
            if change
            else array("Q")
        )
        self._all = array("Q", range(transfer.region.pages)) if change else array("Q")
        self._began = time.monotonic()
        self._changed: float | None = None
        #: seconds, and how many pages of the working set were resident
        self.curve: list[tuple[float, int]] = []
        #: seconds after the change at which most pages that the background had in flight lay behind
        #: those touched before it
        self.followed: float | None = None

    async def run(self) -> None:
        while True:
            self.look()
            await trio.sleep(_LOOK)

    def look(self) -> None:
        now = time.monotonic() - self._began
        self.curve.append((round(now, 4), bench_count(self._shared, self._set, State.RESIDENT)))
        if self._change and self._changed is None and self._play.done >= self._change:
            self._changed = now
        if self._changed is not None and self.followed is None:
            coming = bench_count(self._shared, self._all, State.COMING)
            if 2 * bench_count(self._shared, self._after, State.COMING) > coming:
                self.followed = now - self._changed

    def seconds_to(self, share: float) -> float | None:
        """Seconds until that share of the working set was resident; None if it never was while the
        trace was played."""
        wanted = share * len(self._set)
        return next((seconds for seconds, there in self.curve if there >= wanted), None)

    def wasted(self) -> int:
        """Resident pages that the trace never touches."""
        resident = bench_count(self._shared, array("Q", range(self._shared.pages)), State.RESIDENT)
        return resident - bench_count(self._shared, self._set, State.RESIDENT)


async def _play(
    uri: str,
    trace: int,
    work_us: float | None,
    change: int,
    prefetch: Any,
    memory: Any,
    **options: Any,
) -> dict[str, object]:
    pages = _read_trace(trace)
    work: int | array[int] = 0 if work_us is None else round(work_us * 1000)
    if work_us is None:
        pages, work = pages[: len(pages) // 2], pages[len(pages) // 2 :]
    memory = OwnMemory(memory)
    toucher: Toucher | None = None
    try:
        window = None if prefetch is None else tuple(prefetch)
        async with pull(uri, memory, prefetch=window, compress="none", **options) as transfer:
            play = Play(memory.address, mmap.PAGESIZE, pages, work)
            watch = _Watch(transfer, play, pages, change)
            shared = transfer.filling.residency.shared

            def touch() -> array[int]:
                play.run(shared)
                return array("Q")

            toucher = Toucher(touch)
            began = time.monotonic()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch.run)
                await toucher.latencies()
                seconds = time.monotonic() - began
                nursery.cancel_scope.cancel()
            watch.look()
            wasted, statistics = watch.wasted(), transfer.statistics()
        return {
            "blocked": play.blocked,
            "stall": play.stall_ns / 1e9,
            "seconds": seconds,
            "to_50": watch.seconds_to(0.5),
            "to_90": watch.seconds_to(0.9),
            "to_99": watch.seconds_to(0.99),
            "followed": watch.followed,
            "wasted": wasted * mmap.PAGESIZE,
            "prefetch_unused": statistics.prefetch_unused,
            "demand": statistics.demand.pages,
            "prefetch": statistics.prefetch.pages,
            "background": statistics.background.pages,
            "curve": watch.curve[:: max(1, len(watch.curve) // 400)],
        }
    finally:
        if toucher is not None:
            toucher.join()
        memory.close()


if __name__ == "__main__":
    work_once(_play)
