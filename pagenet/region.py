"""The memory being moved: named blocks in one flat page numbering.

A region is a sequence of blocks. Byte offsets are flat: block 1 begins where block 0 ends, as in a
memory file that holds the blocks one after the other. Page numbers are flat too, but each block
counts in its own page size, so that 2 MiB hugetlbfs blocks and 4 KiB blocks can stand in one
region. A run never crosses a block.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from .errors import UsageError

__all__ = ["MAX_BLOCKS", "MAX_PAGES", "MAX_PAGE_SIZE", "Block", "Region", "Run"]

# QEMU guests have tens of blocks; a table that a stranger sends must still be bounded.
MAX_BLOCKS = 4096
# 64 TiB of 4 KiB pages. Keeps every product of pages and page sizes far from 2**63.
MAX_PAGES = 1 << 34
MAX_PAGE_SIZE = 1 << 30


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` consecutive pages from page number ``first`` on."""

    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


@dataclass(frozen=True, slots=True)
class Block:
    """One piece of memory: ``size`` bytes in pages of ``page_size`` bytes.

    Raises :exc:`UsageError` if the size is not a whole, positive number of pages.
    """

    name: str
    size: int
    page_size: int = 4096

    def __post_init__(self) -> None:
        if len(self.name) > 255:  # first: the other errors quote it
            raise UsageError(f"block name of {len(self.name)} characters (limit 255)")
        page = self.page_size
        if page < 4096 or page > MAX_PAGE_SIZE or page & (page - 1):
            raise UsageError(
                f"block {self.name!r}: page size {page} is not a power of two from 4 KiB to 1 GiB"
            )
        if self.size <= 0 or self.size % page:
            raise UsageError(
                f"block {self.name!r}: {self.size} bytes is not a whole number of {page}-byte pages"
            )

    @property
    def pages(self) -> int:
        return self.size // self.page_size


class Region:
    """Blocks, and the arithmetic between page numbers, byte offsets and blocks.

    Immutable. Lookups are O(log blocks). :exc:`UsageError` for no blocks or more than MAX_BLOCKS,
    for two blocks of one name, and for more than MAX_PAGES pages.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        self.blocks = tuple(blocks)
        if not 0 < len(self.blocks) <= MAX_BLOCKS:
            raise UsageError(f"a region has 1 to {MAX_BLOCKS} blocks, not {len(self.blocks)}")
        if len({block.name for block in self.blocks}) < len(self.blocks):
            raise UsageError("two blocks of a region have the same name")
        #: flat number of each block's first page, and one past the last
        self.first_pages = tuple(_running_sum(block.pages for block in self.blocks))
        #: flat byte offset of each block, and one past the last
        self.offsets = tuple(_running_sum(block.size for block in self.blocks))
        if self.pages > MAX_PAGES:
            raise UsageError(f"a region of {self.pages} pages (limit {MAX_PAGES})")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Region) and self.blocks == other.blocks

    def __hash__(self) -> int:
        return hash(self.blocks)

    def __repr__(self) -> str:
        return f"Region({list(self.blocks)!r})"

    def with_page_sizes(self, page_sizes: Iterable[int]) -> Region:
        """The same blocks, counted in pages of other sizes, one for each block. :exc:`UsageError`
        for a page size that does not divide its block."""
        pairs = zip(self.blocks, page_sizes, strict=True)
        return Region(Block(block.name, block.size, page_size) for block, page_size in pairs)

    def unit_shift(self, block: int, wire: Region) -> int:
        """Each page of ``block`` is ``1 << unit_shift`` pages of ``wire``, which has the same
        blocks in pages that are as large, or smaller."""
        return (self.blocks[block].page_size // wire.blocks[block].page_size).bit_length() - 1

    def in_pages_of(self, other: Region, run: Run) -> Run:
        """``run`` in pages of ``other``, which has the same blocks in pages of other sizes."""
        index = self.block_index(run.first)
        ours, theirs = self.blocks[index].page_size, other.blocks[index].page_size
        offset = (run.first - self.first_pages[index]) * ours
        return Run(other.first_pages[index] + offset // theirs, run.count * ours // theirs)

    @property
    def pages(self) -> int:
        return self.first_pages[-1]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.offsets[-1]

    @cached_property
    def max_page_size(self) -> int:
        return max(block.page_size for block in self.blocks)

    def block_index(self, page: int) -> int:
        """The block that holds ``page``; :exc:`IndexError` outside the region."""
        if not 0 <= page < self.pages:
            raise IndexError(f"page {page} is outside the region of {self.pages} pages")
        return bisect_right(self.first_pages, page) - 1

    def page_size_at(self, page: int) -> int:
        return self.blocks[self.block_index(page)].page_size

    def offset_of_page(self, page: int) -> int:
        """Flat byte offset at which ``page`` begins."""
        index = self.block_index(page)
        return self.offsets[index] + (page - self.first_pages[index]) * self.blocks[index].page_size

    def page_at_offset(self, offset: int) -> int:
        """Number of the page that holds flat byte ``offset``; :exc:`IndexError` outside the
        region."""
        if not 0 <= offset < self.size:
            raise IndexError(f"offset {offset:#x} is outside the region of {self.size:#x} bytes")
        index = bisect_right(self.offsets, offset) - 1
        return (
            self.first_pages[index] + (offset - self.offsets[index]) // self.blocks[index].page_size
        )

    def contains(self, run: Run) -> bool:
        """Whether ``run`` is a non-empty run inside one block. It compares by subtraction, and so
        never overflows."""
        if run.count <= 0 or not 0 <= run.first < self.pages:
            return False
        return run.count <= self.first_pages[self.block_index(run.first) + 1] - run.first

    def size_of(self, run: Run) -> int:
        """Bytes in ``run``, which lies in one block."""
        return run.count * self.page_size_at(run.first)

    def split(self, run: Run, max_bytes: int) -> Iterator[Run]:
        """``run`` cut at block ends and into pieces of at most ``max_bytes`` (at least one page
        each)."""
        first = run.first
        while first < run.end:
            index = self.block_index(first)
            limit = max(1, max_bytes // self.blocks[index].page_size)
            count = min(limit, run.end - first, self.first_pages[index + 1] - first)
            yield Run(first, count)
            first += count


def _running_sum(numbers: Iterable[int]) -> Iterator[int]:
    total = 0
    yield total
    for number in numbers:
        total += number
        yield total
