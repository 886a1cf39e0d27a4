"""Areas: the unit in which faults are remembered, since pages are too many."""

from __future__ import annotations

from ..region import Region, Run

__all__ = ["AREA_BYTES", "Areas"]

# Allocators and page tables keep together what is used together for about that long. The window
# (native/window.c) thinks in the same unit. Not tuned.
AREA_BYTES = 256 << 10


class Areas:
    """``AREA_BYTES`` from the beginning of a block on, and so forth, or a page where pages are
    larger."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._pages = [max(1, AREA_BYTES // block.page_size) for block in region.blocks]

    def block_of(self, page: int) -> Run:
        index = self._region.block_index(page)
        return Run(self._region.first_pages[index], self._region.blocks[index].pages)

    def pages_at(self, page: int) -> int:
        """How many pages make an area there."""
        return self._pages[self._region.block_index(page)]

    def area_of(self, page: int) -> Run:
        index = self._region.block_index(page)
        block, pages = self._region.first_pages[index], self._pages[index]
        first = page - (page - block) % pages
        return Run(first, min(pages, self._region.first_pages[index + 1] - first))

    def beside(self, area: Run) -> list[Run]:
        """Those behind and before it, in the same block."""
        block = self.block_of(area.first)
        pages = [page for page in (area.end, area.first - 1) if block.first <= page < block.end]
        return [self.area_of(page) for page in pages]
