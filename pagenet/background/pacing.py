"""How pages that no thread waits for are fetched: in which order, how fast, and whether at all.

All of this may change during a transfer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf

import trio

from ..errors import UsageError
from ..region import Run
from .schedule import Schedule

__all__ = ["CHUNK_BYTES", "Background"]

# Bytes of background per request. 256 KiB amortise the cost of a reply.
CHUNK_BYTES = 256 << 10
# Faults that a new schedule is told of when it takes over.
REMEMBERED = 4096
# Under a rate limit, lanes in Trio ask for TURN seconds' worth at a time: Trio's timers are no more
# precise. What was missed in the last CATCH_UP seconds is asked for at once. What was missed in the
# last MAKE_UP seconds is asked for at PEAK times the rate. So a busy machine keeps the rate, and no
# 10 ms carry twice as much as the rate allows.
TURN = 0.002
CATCH_UP = 0.004
MAKE_UP = 0.05
PEAK = 1.25


class Background:
    """Hands runs to the lanes, in the order of ``schedule`` (None: no runs).

    ``chunk``: bytes asked for at a time. ``begun``: False if it waits for :meth:`begin`.
    ``window``: bytes that each lane may have in flight; None: native/pace.c adapts it.
    """

    def __init__(
        self,
        schedule: Schedule | None,
        chunk: int = CHUNK_BYTES,
        *,
        begun: bool = True,
        window: int | None = None,
    ) -> None:
        self.chunk = chunk
        self.window = window
        self._schedule = schedule
        self._begun = begun
        self._paused = False
        self._max_bandwidth: int | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        self._waiting = trio.lowlevel.ParkingLot()
        self._limited = trio.lowlevel.ParkingLot()
        self._paid_until = self._next_turn = -inf
        #: told of each batch of pages that threads waited for, in their order
        self.observers: list[Callable[[Sequence[int]], None]] = []
        self._on_change: list[Callable[[], None]] = []

    @property
    def schedule(self) -> Schedule | None:
        return self._schedule

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def begun(self) -> bool:
        return self._begun

    @property
    def runs(self) -> bool:
        """Whether it has begun and is not paused."""
        return self._begun and not self._paused

    @property
    def max_bandwidth(self) -> int | None:
        """The limit in bytes a second, for all background lanes together; None: no limit."""
        return self._max_bandwidth

    def set_schedule(self, schedule: Schedule | None) -> None:
        """Use ``schedule`` from now on, after telling it the latest faults.

        Runs that were handed out before still come.
        """
        self._schedule = schedule
        if schedule is not None and self._recent:
            for page, at in self._recent:
                schedule.note_faults([page], at)
        self._waiting.unpark_all()

    @contextmanager
    def telling(self, on_change: Callable[[], None]) -> Iterator[None]:
        """Call ``on_change`` at each pause, resume, begin or change of the limit, for as long as
        the block runs."""
        self._on_change.append(on_change)
        try:
            yield
        finally:
            self._on_change.remove(on_change)

    def _tell(self) -> None:
        for on_change in self._on_change:
            on_change()

    def pause(self) -> None:
        """Ask for nothing more. What is in flight still comes."""
        self._paused = True
        self._tell()

    def resume(self) -> None:
        self._paused = False
        self._tell()
        self._waiting.unpark_all()

    def begin(self) -> None:
        self._begun = True
        self._tell()
        self._waiting.unpark_all()

    def hold(self) -> None:
        """Wait once more for :meth:`begin`."""
        self._begun = False
        self._tell()

    def set_max_bandwidth(self, bytes_per_second: int | None) -> None:
        """Limit the rate from now on; None: no limit. :exc:`UsageError` if it is below one byte a
        second."""
        if bytes_per_second is not None and bytes_per_second < 1:
            raise UsageError(
                f"a bandwidth of {bytes_per_second} bytes a second: pausing the background is"
                " another matter"
            )
        self._max_bandwidth = bytes_per_second
        self._paid_until = self._next_turn = -inf  # at the former rate these may be hours away
        self._limited.unpark_all()
        self._tell()

    @property
    def heeds_faults(self) -> bool:
        """Whether a schedule or an observer uses what :meth:`note_faults` is told."""
        return self._schedule is not None or bool(self.observers)

    def note_faults(self, pages: Sequence[int]) -> None:
        """Threads have waited for these pages, in this order."""
        now = trio.current_time()
        self._recent.extend((page, now) for page in pages)
        if self._schedule is not None:
            self._schedule.note_faults(pages, now)
        for observe in self.observers:
            observe(pages)

    async def next_run(self, max_bytes: int) -> Run:
        """The run to ask for next. Waits while there is none, before :meth:`begin`, or while
        paused."""
        while (run := self.next_run_nowait(max_bytes)) is None:
            await self._waiting.park()
        return run

    def next_run_nowait(self, max_bytes: int) -> Run | None:
        """As :meth:`next_run`, but None if there is nothing to ask for now."""
        return (
            self._schedule.next_run(max_bytes) if self.runs and self._schedule is not None else None
        )

    # ---- the limit, for lanes in Trio; lanes in C implement the same rule ----

    @property
    def turn_bytes(self) -> int:
        """Bytes to ask for at a time."""
        return (
            self.chunk
            if self._max_bandwidth is None
            else min(self.chunk, max(1, int(self._max_bandwidth * TURN)))
        )

    async def wait_turn(self) -> None:
        """Return when the next run may be asked for. The caller then pays for it with
        :meth:`pay`."""
        while self._max_bandwidth is not None:
            wait = max(self._paid_until, self._next_turn) - trio.current_time()
            if wait <= 0:
                break
            with trio.move_on_after(wait):
                await self._limited.park()

    def pay(self, size: int) -> None:
        """Note that ``size`` bytes were asked for."""
        if self._max_bandwidth is not None:
            now, seconds = trio.current_time(), size / self._max_bandwidth
            self._paid_until = max(self._paid_until, now - MAKE_UP) + seconds
            self._next_turn = max(self._next_turn, now - CATCH_UP) + seconds / PEAK

    def refund(self, size: int) -> None:
        """Note that what was asked for took ``size`` bytes less on the wire than in memory."""
        if self._max_bandwidth is not None:
            seconds = size / self._max_bandwidth
            self._paid_until -= seconds
            self._next_turn -= seconds / PEAK
            self._limited.unpark_all()
