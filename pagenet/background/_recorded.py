"""The order ``recorded``: that of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence

from ..region import Region, Run
from ..residency import Residency, State
from ._areas import Areas
from ._hot import Hot
from ._linear import missing_run

__all__ = ["Recorded"]


class Recorded:
    """The pages of a recording in their order; then the areas with faults, as in ``hot``; then the
    rest of the areas that recorded pages are in; then the rest, as in ``hot``.

    A fault on a page that is not in the recording shows that this run differs from the recorded
    one: for each of these faults, one run of ``hot`` comes in between.
    """

    name = "recorded"

    def __init__(self, region: Region, residency: Residency, pages: Sequence[int]) -> None:
        self._region = region
        self._residency = residency
        self._pages = pages
        self._known = frozenset(pages)
        self._next = 0
        self._hot = Hot(region, residency)
        # faults on pages that are not in the recording, and that no run of hot was returned for yet
        self._strange = 0
        areas = Areas(region)
        self._areas = list(dict.fromkeys(areas.area_of(page) for page in pages))
        # index of the current area, and the page after what was handed out of it
        self._area, self._cursor = 0, 0

    def note_faults(self, pages: Sequence[int], now: float) -> None:
        strange = [page for page in pages if page not in self._known]
        self._strange += len(strange)
        self._hot.note_faults(strange if self._next < len(self._pages) else pages, now)

    def next_run(self, max_bytes: int) -> Run | None:
        run = None
        if self._strange:
            self._strange -= 1
            run = self._hot.next_hot_run(max_bytes)
        for more in (self._replayed, self._hot.next_hot_run, self._beside, self._hot.next_run):
            run = run or more(max_bytes)
        return run

    def _replayed(self, max_bytes: int) -> Run | None:
        """The next MISSING page of the recording, and the pages that follow it both in the
        recording and by number."""
        pages, residency = self._pages, self._residency
        while self._next < len(pages):
            first = pages[self._next]
            self._next += 1
            if residency.state(first) is not State.MISSING:
                continue
            count, most = (
                1,
                next(self._region.split(Run(first, self._region.pages - first), max_bytes)).count,
            )
            while count < most and self._next < len(pages) and pages[self._next] == first + count:
                self._next += 1
                count += 1
            return Run(first, count)
        return None

    def _beside(self, max_bytes: int) -> Run | None:
        while self._area < len(self._areas):
            area = self._areas[self._area]
            first = max(area.first, self._cursor)
            run = (
                missing_run(self._region, self._residency, first, area.end, max_bytes)
                if first < area.end
                else None
            )
            if run is not None:
                self._cursor = run.end
                return run
            self._area, self._cursor = self._area + 1, 0
        return None
