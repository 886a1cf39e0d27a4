"""Faults that follow a line: one page after another, forwards or backwards, or at equal steps."""

from __future__ import annotations

from dataclasses import dataclass

from ..region import Region, Run
from ..residency import Residency
from ._areas import Areas
from ._linear import missing_run

__all__ = ["Streams"]

# How many lines are followed at a time. A program has a few, and each fault is compared with all of
# them.
MOST_STREAMS = 16
# Seconds without a fault after which a line is no longer fetched.
PATIENCE = 1.0
# Faults further apart than this are not on one line.
MAX_STEP_BYTES = 64 << 20
# Pages that the window around a fault has fetched raise no fault, so the next fault of a line may
# be up to this many areas, or steps, further on.
REACH = 16
# How far ahead of its last fault a line is fetched: for each fault that confirmed it, and at most.
AHEAD_AREAS, MOST_AREAS = 4, 64
AHEAD_STEPS, MOST_STEPS = 8, 256


@dataclass(slots=True)
class _Stream:
    """One line. ``step`` is in pages, and 0 after the first fault.

    ``dense``: the step is one area, and all pages between two faults are on the line too.
    """

    last: int
    at: float
    step: int = 0
    dense: bool = False
    hits: int = 0
    cursor: int = 0


class Streams:
    """Recognises lines, and returns what comes next on them."""

    def __init__(self, region: Region, residency: Residency, areas: Areas) -> None:
        self._region = region
        self._residency = residency
        self._areas = areas
        self._streams: list[_Stream] = []  # the line with the latest fault first

    def note(self, page: int, now: float) -> None:
        area = self._areas.pages_at(page)
        for stream in self._streams:
            goes_on = self._goes_on(stream, page)
            # within an area of its last fault it is too early to tell whether the line goes on
            if goes_on or abs(page - stream.last) < area:
                stream.last, stream.at = page if goes_on else stream.last, now
                self._streams.remove(stream)
                self._streams.insert(0, stream)
                return
        self._begin(page, area, now)

    def _goes_on(self, stream: _Stream, page: int) -> bool:
        if not stream.step:
            return False
        steps, rest = divmod(page - stream.last, stream.step)
        if not 0 < steps <= REACH or (rest and not stream.dense):
            return False
        stream.hits += 1
        return True

    def _begin(self, page: int, area: int, now: float) -> None:
        """Take the fault as the second of the nearest line that has only one, which gives that line
        its step, and as the first of a new line."""
        most = MAX_STEP_BYTES // self._region.page_size_at(page)
        young = [s for s in self._streams if not s.step and abs(page - s.last) <= most]
        if young:
            stream = min(young, key=lambda s: abs(page - s.last))
            distance = page - stream.last
            stream.dense = abs(distance) <= 4 * area
            stream.step = (area if distance > 0 else -area) if stream.dense else distance
            stream.last, stream.at, stream.cursor = page, now, page
        self._streams.insert(0, _Stream(page, now))
        del self._streams[MOST_STREAMS:]

    def next_run(self, now: float, max_bytes: int) -> Run | None:
        """MISSING pages ahead of a line that at least three faults were on; None: there are
        none."""
        for stream in self._streams:
            if stream.hits and now - stream.at <= PATIENCE:
                run = self._dense(stream, max_bytes) if stream.dense else self._stepped(stream)
                if run is not None:
                    return run
        return None

    def _dense(self, stream: _Stream, max_bytes: int) -> Run | None:
        piece = self._areas.block_of(stream.last)
        ahead = min(stream.hits * AHEAD_AREAS, MOST_AREAS) * abs(stream.step)
        if stream.step > 0:
            first, end = max(stream.last, stream.cursor), min(stream.last + ahead, piece.end)
        else:  # an area at a time, the next one first
            end = min(stream.last, stream.cursor)
            first = max(end + stream.step, stream.last - ahead, piece.first)
        if first >= end:
            return None
        run = missing_run(self._region, self._residency, first, end, max_bytes)
        stream.cursor = (end if run is None else run.end) if stream.step > 0 else first
        return run

    def _stepped(self, stream: _Stream) -> Run | None:
        piece = self._areas.block_of(stream.last)
        steps = min(stream.hits * AHEAD_STEPS, MOST_STEPS)
        for _ in range(steps):
            done = max(0, (stream.cursor - stream.last) // stream.step)
            page = stream.last + (done + 1) * stream.step
            if done >= steps or not piece.first <= page < piece.end:
                return None
            stream.cursor = page
            if (run := missing_run(self._region, self._residency, page, page + 1, 1)) is not None:
                return run
        return None
