"""An owner that touches its memory until the last page is there: ``python -m
pagenet.bench.pace.player``, started by pagenet-bench alone.

Its one argument is a JSON object: ``uri``, ``lane``, ``window`` (bytes of background in flight;
null: pagenet's choice), ``threads``, ``work_us`` before each touch, and ``trace``, a memfd with the
pages to touch. It prints one JSON object: seconds, touches, and pages that are wrong.
"""

from __future__ import annotations

import mmap
import os
import time
from array import array
from typing import Any

import trio

from ..._native.testing import Play, pattern_differs
from ...destination.pulling import pull
from ...uffd import OwnMemory
from .._figures import Sample
from .._task import work_once
from ..workload._toucher import Toucher


async def _play(
    uri: str, lane: Any, window: int | None, threads: int, work_us: float, trace: int
) -> dict[str, object]:
    pages = array("Q")
    pages.frombytes(os.pread(trace, os.fstat(trace).st_size, 0))
    memory = OwnMemory("anonymous")
    toucher: Toucher | None = None
    try:
        async with pull(
            uri, memory, lane=lane, compress="none", background_window=window
        ) as transfer:
            shared = transfer.filling.residency.shared
            play = Play(memory.address, mmap.PAGESIZE, pages, round(work_us * 1000), threads)

            def touch() -> array[int]:
                play.run(shared, until_complete=True)
                return array("Q", (latency for latency in play.latencies if latency))

            toucher = Toucher(touch)
            began = time.monotonic()
            latencies = await toucher.latencies()
            await transfer.wait_complete()
            seconds = time.monotonic() - began
            count = transfer.region.pages
        wrong = await trio.to_thread.run_sync(
            pattern_differs, memory.address, count, mmap.PAGESIZE, 0, 0
        )
        waits = Sample()
        waits.add(latencies)
        return {
            "stall": play.stall_ns / 1e9 / threads,
            "blocked": play.blocked,
            "complete": seconds,
            "wait": play.stall_ns / 1e9 / max(play.blocked, 1),
            "p99": (waits.microseconds(0.99) or 0.0) / 1e6,
            "wrong": wrong,
        }
    finally:
        if toucher is not None:
            toucher.join()
        memory.close()


if __name__ == "__main__":
    work_once(_play)
