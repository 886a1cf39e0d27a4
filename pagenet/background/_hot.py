"""The order ``hot``: first where the faults are."""

from __future__ import annotations

from collections.abc import Sequence

from ..region import Region, Run
from ..residency import Residency
from ._areas import Areas
from ._heat import Ranking
from ._linear import Linear, missing_run
from ._streams import Streams

__all__ = ["Hot"]

# Seconds in which heat halves. Short: pages that are still missing from an area that was hot a
# while ago were not needed then.
HALF_LIFE = 0.03
# Areas remembered: 2 GiB of memory. A decision costs the logarithm of that.
MOST_AREAS = 8192


class Hot:
    """What lies ahead of faults in a line; then the areas that faults are in, the hottest first;
    then the areas beside them; then the rest, from the first page to the last.

    An area is fetched whole. A fault shows where a program works; the lack of a fault shows
    nothing, because a page that came before its touch raises none.
    """

    name = "hot"

    def __init__(self, region: Region, residency: Residency) -> None:
        self._region = region
        self._residency = residency
        self._areas = Areas(region)
        self._streams = Streams(region, residency, self._areas)
        self._within = Ranking(HALF_LIFE, MOST_AREAS)
        self._beside = Ranking(HALF_LIFE, MOST_AREAS)
        # first page of each area handed out in part -> the page after what was handed out
        self._cursors: dict[int, int] = {}
        self._rest = Linear(region, residency)
        self._now = 0.0

    def note_faults(self, pages: Sequence[int], now: float) -> None:
        self._now = now
        for page in pages:
            self._streams.note(page, now)
            area = self._areas.area_of(page).first
            self._cursors.pop(area, None)
            self._within.warm(area, now)

    def next_run(self, max_bytes: int) -> Run | None:
        return (
            self.next_hot_run(max_bytes)
            or self._hottest(self._beside, max_bytes)
            or self._rest.next_run(max_bytes)
        )

    def next_hot_run(self, max_bytes: int) -> Run | None:
        """MISSING pages ahead of a line, or in an area that faults were in; None: there are
        none."""
        return self._streams.next_run(self._now, max_bytes) or self._hottest(
            self._within, max_bytes
        )

    def _hottest(self, ranking: Ranking, max_bytes: int) -> Run | None:
        """MISSING pages of the hottest area, on from what was handed out of it before.

        Areas with no such pages leave the ranking.
        """
        while (first := ranking.hottest()) is not None:
            area = self._areas.area_of(first)
            cursor = self._cursors.get(first, first)
            run = (
                missing_run(self._region, self._residency, cursor, area.end, max_bytes)
                if cursor < area.end
                else None
            )
            if run is not None:
                self._cursors[first] = run.end
                return run
            self._cursors.pop(first, None)
            ranking.unrank(first)
            if ranking is self._within:
                for neighbour in self._areas.beside(area):
                    self._beside.warm(neighbour.first, self._now)
        return None
