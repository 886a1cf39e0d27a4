"""The order ``linear``: from the first page to the last."""

from __future__ import annotations

from collections.abc import Sequence

from ..region import Region, Run
from ..residency import Residency, State

__all__ = ["Linear", "missing_run"]


def missing_run(
    region: Region, residency: Residency, first: int, end: int, max_bytes: int
) -> Run | None:
    """The first MISSING pages of [first, end): within a block, at most ``max_bytes`` but at least
    one page; None: there are none."""
    found = residency.find(State.MISSING, first, end)
    if found is None:
        return None
    most = next(region.split(Run(found, end - found), max_bytes))
    # Another lane may have taken the first of them a moment ago. The lane that asks for the run
    # leaves out pages that are not MISSING.
    return Run(found, max(1, residency.span(most, State.MISSING)))


class Linear:
    """From the first page to the last, and then again for pages that have become MISSING again."""

    name = "linear"

    def __init__(self, region: Region, residency: Residency) -> None:
        self._region = region
        self._residency = residency
        self.cursor = 0

    def note_faults(self, pages: Sequence[int], now: float) -> None:
        """Faults do not change this order."""

    def next_run(self, max_bytes: int) -> Run | None:
        # Pages that were handed out have been asked for: none is MISSING before the cursor, unless
        # a connection was lost.
        for first, end in ((self.cursor, self._region.pages), (0, self.cursor)):
            run = missing_run(self._region, self._residency, first, end, max_bytes)
            if run is not None:
                self.cursor = run.end
                return run
        return None
