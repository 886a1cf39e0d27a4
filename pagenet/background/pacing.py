"""What is brought that nobody waits for: in which order, how fast, and whether at all. All of it
changes while it goes on."""

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

# Background asked for at a time. 256 KiB amortise the cost of a reply.
CHUNK_BYTES = 256 << 10
# Faults that a schedule is told of when it takes over.
REMEMBERED = 4096
# Of a limited rate, lanes in Trio ask for so many seconds' worth at a time: Trio's timers are no
# better. What was missed in the last CATCH_UP seconds is asked for at once, and what was missed in
# the last MAKE_UP seconds at PEAK times the rate: so it is kept on a busy machine, and yet no 10 ms
# see twice of it.
TURN = 0.002
CATCH_UP = 0.004
MAKE_UP = 0.05
PEAK = 1.25


class Background:
    """Runs for the lanes, as the schedule names them (None: no more runs); ``chunk`` bytes are
    asked for at a time.

    ``begun``: False if it waits for :meth:`begin`.
    """

    def __init__(
        self, schedule: Schedule | None, chunk: int = CHUNK_BYTES, *, begun: bool = True
    ) -> None:
        self.chunk = chunk
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
        """It has begun, and is not paused."""
        return self._begun and not self._paused

    @property
    def max_bandwidth(self) -> int | None:
        """Bytes a second, of all its lanes together; None: no limit."""
        return self._max_bandwidth

    def set_schedule(self, schedule: Schedule | None) -> None:
        """From now on; what was named before comes all the same. The new schedule hears of the
        latest faults."""
        self._schedule = schedule
        if schedule is not None and self._recent:
            for page, at in self._recent:
                schedule.note_faults([page], at)
        self._waiting.unpark_all()

    @contextmanager
    def telling(self, on_change: Callable[[], None]) -> Iterator[None]:
        """Call ``on_change`` whenever pause, begin or limit change, for as long as the block
        runs."""
        self._on_change.append(on_change)
        try:
            yield
        finally:
            self._on_change.remove(on_change)

    def _tell(self) -> None:
        for on_change in self._on_change:
            on_change()

    def pause(self) -> None:
        """Ask for nothing more; what was asked for comes."""
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

    def set_max_bandwidth(self, bytes_per_second: int | None) -> None:
        """:exc:`UsageError` if that is less than a byte."""
        if bytes_per_second is not None and bytes_per_second < 1:
            raise UsageError(
                f"a bandwidth of {bytes_per_second} bytes a second: pausing the background is"
                " another matter"
            )
        self._max_bandwidth = bytes_per_second
        self._paid_until = self._next_turn = -inf  # at the former rate that may be hours away
        self._limited.unpark_all()
        self._tell()

    @property
    def heeds_faults(self) -> bool:
        """Somebody may act on what :meth:`note_faults` says, or writes it down."""
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
        """What to ask for next; waits while there is nothing, or while paused."""
        while (run := self.next_run_nowait(max_bytes)) is None:
            await self._waiting.park()
        return run

    def next_run_nowait(self, max_bytes: int) -> Run | None:
        """The same; None if there is nothing to ask for now."""
        return (
            self._schedule.next_run(max_bytes) if self.runs and self._schedule is not None else None
        )

    # ---- the limit, for lanes in Trio; those in C have the same rule of their own ----

    @property
    def turn_bytes(self) -> int:
        """What to ask for at a time."""
        return (
            self.chunk
            if self._max_bandwidth is None
            else min(self.chunk, max(1, int(self._max_bandwidth * TURN)))
        )

    async def wait_turn(self) -> None:
        """Return when something may be asked for, which is then paid for with :meth:`pay`."""
        while self._max_bandwidth is not None:
            wait = max(self._paid_until, self._next_turn) - trio.current_time()
            if wait <= 0:
                break
            with trio.move_on_after(wait):
                await self._limited.park()

    def pay(self, size: int) -> None:
        """So many bytes were asked for."""
        if self._max_bandwidth is not None:
            now, seconds = trio.current_time(), size / self._max_bandwidth
            self._paid_until = max(self._paid_until, now - MAKE_UP) + seconds
            self._next_turn = max(self._next_turn, now - CATCH_UP) + seconds / PEAK

    def refund(self, size: int) -> None:
        """What was asked for took so many bytes less on the wire than it has in memory."""
        if self._max_bandwidth is not None:
            seconds = size / self._max_bandwidth
            self._paid_until -= seconds
            self._next_turn -= seconds / PEAK
            self._limited.unpark_all()
