"""The order ``follow``: the pages after the last fault."""

from __future__ import annotations

from collections.abc import Sequence

from ._linear import Linear

__all__ = ["Follow"]


class Follow(Linear):
    """From the page after the last fault to the region's end, then on from the first page.

    This is Yabusame's move-background.
    """

    name = "follow"

    def note_faults(self, pages: Sequence[int], now: float) -> None:
        if pages:
            self.cursor = min(pages[-1] + 1, self._region.pages - 1)
