"""Behind the last fault."""

from __future__ import annotations

from collections.abc import Sequence

from ._linear import Linear

__all__ = ["Follow"]


class Follow(Linear):
    """On from the page that was faulted on last, to the end, and round: Yabusame's
    move-background."""

    name = "follow"

    def note_faults(self, pages: Sequence[int], now: float) -> None:
        if pages:
            self.cursor = min(pages[-1] + 1, self._region.pages - 1)
