"""A bitmap of the written pages each second."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ..uffd import WriteTracker
from ._history import History, Second
from ._memory import WatchedMemory

__all__ = ["EARLY", "Watch", "watch"]

# Seconds. How much is written in less than a second is seen at the beginning of each: to look more
# often would cost the process a page fault more for each page that it writes to.
EARLY = 0.1


class Watch:
    """Seconds of one memory, one after the other. Made by :func:`watch`."""

    def __init__(self, tracker: WriteTracker) -> None:
        self._tracker = tracker
        self._history = History(tracker.region)
        self._began = trio.current_time()

    async def next_second(self) -> Second:
        """Wait for the end of the second that began with the last call, or with the watch. It is
        longer if this process was late. Errors as of :meth:`pagenet.WriteTracker.mark`."""
        began, bits = self._began, bytearray(-(-self._tracker.region.pages // 8))
        early_seconds = await self._mark(bits, began + EARLY) - began
        early = self._history.bytes_in(int.from_bytes(bits, "little"))
        self._began = await self._mark(bits, began + 1)
        written = int.from_bytes(bits, "little")
        return Second(self._began - began, written, early, early_seconds)

    async def _mark(self, bits: bytearray, at: float) -> float:
        """Mark at that time what was written since the last one. Returns when that was done."""
        await trio.sleep_until(at)
        await trio.to_thread.run_sync(self._tracker.mark, bits)
        return trio.current_time()


@asynccontextmanager
async def watch(memory: WatchedMemory) -> AsyncIterator[Watch]:
    """Track writes to that memory while the block runs. Errors as of
    :class:`pagenet.WriteTracker`."""
    tracker = await trio.to_thread.run_sync(
        WriteTracker, memory.pid, memory.mappings, memory.region
    )
    try:
        yield Watch(tracker)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(tracker.close)
