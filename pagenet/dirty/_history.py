"""Rates, and working sets over windows, from a bitmap of written pages for each second."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from ..region import Region

__all__ = ["WINDOWS", "Figures", "History", "Second"]

# In seconds.
WINDOWS = (1, 10, 60)
# Windows of one length of which a working set is the mean, spread over the history.
_MOST_WINDOWS = 16
_MOST_BYTES = 256 << 20

_Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Second:
    """A period of ``seconds``, about one, and the pages written in it: the lowest bit of the
    integer ``bits`` is page 0. ``early`` bytes of them were written in its first ``early_seconds``.
    """

    seconds: float
    bits: int = field(repr=False)  # too many digits for repr()
    early: int
    early_seconds: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the latest second: when it ended, since the beginning; bytes a second that were written in
    it, each page once; and bytes written in each of the last ``WINDOWS``, None for those that are
    longer than the history."""

    at: float
    rate: float
    windows: tuple[int | None, ...]


class History:
    """Seconds of one region, in order. Older ones are dropped where the bitmaps would have more
    than 256 MiB, but never the last minute's."""

    def __init__(self, region: Region, seconds: Iterable[Second] = ()) -> None:
        self.region = region
        firsts = region.first_pages
        self._blocks = [
            (firsts[index], (1 << block.pages) - 1, block.page_size)
            for index, block in enumerate(region.blocks)
        ]
        most = max(_MOST_BYTES // (region.pages // 8 + 32), max(WINDOWS))
        self.seconds = deque[Second](maxlen=most)
        self._at = self._rates = 0.0
        self._count = 0
        for second in seconds:
            self.add(second)

    def add(self, second: Second) -> Figures:
        self.seconds.append(second)
        rate = self.bytes_in(second.bits) / second.seconds
        self._at += second.seconds
        self._rates += rate
        self._count += 1
        return Figures(self._at, rate, tuple(map(self._last_window, WINDOWS)))

    @property
    def mean_rate(self) -> float:
        """Of all seconds, dropped ones too: bytes a second; 0 if there are none."""
        return self._rates / max(1, self._count)

    def bytes_in(self, bits: int) -> int:
        """Bytes of the pages in ``bits``."""
        if len(self._blocks) == 1:
            return bits.bit_count() * self._blocks[0][2]
        return sum(
            (bits >> first & mask).bit_count() * page_size
            for first, mask, page_size in self._blocks
        )

    def _last_window(self, count: int) -> int | None:
        total = len(self.seconds)
        return None if count > total else self._union(total - count, count)

    def _union(self, start: int, count: int) -> int:
        bits = 0
        for second in islice(self.seconds, start, start + count):
            bits |= second.bits
        return self.bytes_in(bits)

    def mean_window(self, count: int) -> float:
        """The mean of the bytes written in windows of ``count`` seconds, which the history has."""
        starts = len(self.seconds) - count + 1
        step = -(-starts // _MOST_WINDOWS)
        sizes = [self._union(start, count) for start in range(0, starts, step)]
        return sum(sizes) / len(sizes)

    def written_in(self, duration: float) -> float:
        """Bytes of the pages that are written in ``duration`` seconds, by what was seen; 0 if that
        is nothing.

        It is interpolated within the history. Beyond that it grows as it did in the second half of
        the history: a working set grows ever more slowly, so that is too much rather than too
        little.
        """
        if not self.seconds:
            return 0.0
        (at, size), (next_at, next_size) = self._segment(duration)
        slope = (next_size - size) / (next_at - at) if next_at > at else 0.0
        return min(size + slope * (duration - at), float(self.region.size))

    def _segment(self, duration: float) -> tuple[_Point, _Point]:
        """Two durations around ``duration``, or below it, with the bytes that are written in
        them."""
        total = len(self.seconds)
        early_at = sum(second.early_seconds for second in self.seconds) / total
        early = early_at, sum(second.early for second in self.seconds) / total
        whole = sum(second.seconds for second in self.seconds) / total
        if duration <= early_at:
            return (0.0, 0.0), early
        if duration <= whole or total == 1:
            return early, (whole, self.mean_window(1))
        count = int(duration / whole)
        first, second = (count, count + 1) if count < total else (max(1, total // 2), total)
        return (first * whole, self.mean_window(first)), (second * whole, self.mean_window(second))
