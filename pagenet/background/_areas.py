"""Areas: the unit in which faults are remembered, since pages are too many."""

from __future__ import annotations

from ..region import Region, Run

__all__ = ["AREA_BYTES", "Areas"]

# Allocators and page tables place data that is used together within about this distance. The window
# (native/window.c) has the same unit. Not tuned.
AREA_BYTES = 256 << 10


class Areas:
    """Divides each block, from its beginning, into areas of ``AREA_BYTES``.

    Where pages are larger than that, an area is one page.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._pages = [max(1, AREA_BYTES // block.page_size) for block in region.blocks]

    def block_of(self, page: int) -> Run:
        index = self._region.block_index(page)
        return Run(self._region.first_pages[index], self._region.blocks[index].pages)

    def pages_at(self, page: int) -> int:
        """The number of pages in an area of the block that ``page`` is in."""
        return self._pages[self._region.block_index(page)]

    def area_of(self, page: int) -> Run:
        index = self._region.block_index(page)
        block, pages = self._region.first_pages[index], self._pages[index]
        first = page - (page - block) % pages
        return Run(first, min(pages, self._region.first_pages[index + 1] - first))

    def beside(self, area: Run) -> list[Run]:
        """The areas after and before ``area``, in the same block."""
        block = self.block_of(area.first)
        pages = [page for page in (area.end, area.first - 1) if block.first <= page < block.end]
        return [self.area_of(page) for page in pages]
