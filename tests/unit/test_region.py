"""pagenet/region.py: a flat table of pages, written out one by one, is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagenet import Block, Region, Run, UsageError
from pagenet.region import MAX_BLOCKS, MAX_PAGES

PAGE_SIZES = (4096, 8192, 2 << 20)
HUGE = (2**31, 2**32 - 1, 2**63, 2**64 - 1)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 5), st.sampled_from(PAGE_SIZES)), min_size=1, max_size=4)
    )
    return Region(
        Block(f"block{i}", pages * page_size, page_size)
        for i, (pages, page_size) in enumerate(shapes)
    )


def table(region: Region) -> list[tuple[int, int, int]]:
    """(block index, flat byte offset, page size) of every page."""
    pages = []
    offset = 0
    for index, block in enumerate(region.blocks):
        for _ in range(block.size // block.page_size):
            pages.append((index, offset, block.page_size))
            offset += block.page_size
    return pages


@given(regions())
def test_every_page_is_where_the_table_says(region: Region) -> None:
    pages = table(region)
    assert region.pages == len(pages)
    assert region.size == sum(page_size for _, _, page_size in pages)
    assert region.max_page_size == max(page_size for _, _, page_size in pages)
    for page, (index, offset, page_size) in enumerate(pages):
        assert region.block_index(page) == index
        assert region.offset_of_page(page) == offset
        assert region.page_size_at(page) == page_size
        assert region.size_of(Run(page, 1)) == page_size
        for inside in (offset, offset + 1, offset + page_size // 2, offset + page_size - 1):
            assert region.page_at_offset(inside) == page


@given(regions())
def test_outside_the_region_there_is_nothing(region: Region) -> None:
    for page in (-1, region.pages, region.pages + 1, *HUGE):
        with pytest.raises(IndexError, match="outside the region"):
            region.block_index(page)
    for offset in (-1, region.size, region.size + 1, *HUGE):
        with pytest.raises(IndexError, match="outside the region"):
            region.page_at_offset(offset)


@given(regions())
def test_contains_by_brute_force(region: Region) -> None:
    block_of = [index for index, _, _ in table(region)]
    inside = {
        Run(first, count)
        for first in range(len(block_of))
        for count in range(1, len(block_of) + 1)
        if len(set(block_of[first : first + count])) == 1 and first + count <= len(block_of)
    }
    for first in (*range(-2, region.pages + 3), *HUGE):
        for count in (*range(-2, region.pages + 3), *HUGE):
            assert region.contains(Run(first, count)) == (Run(first, count) in inside)


@given(regions(), st.data())
def test_split_covers_exactly(region: Region, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, region.pages - 1))
    run = Run(first, data.draw(st.integers(0, region.pages - first)))
    max_bytes = data.draw(st.sampled_from([1, 4096, 8191, 8192, 12288, 2 << 20, 1 << 40]))
    parts = list(region.split(run, max_bytes))
    assert [page for part in parts for page in range(part.first, part.end)] == list(
        range(run.first, run.end)
    )
    assert all(region.contains(part) for part in parts)
    assert all(region.size_of(part) <= max_bytes or part.count == 1 for part in parts)
    for part in parts[:-1]:  # each has the maximum length
        longer = Run(part.first, part.count + 1)
        assert not region.contains(longer) or region.size_of(longer) > max_bytes


def test_split_of_more_than_the_region() -> None:
    region = Region([Block("a", 8192)])
    with pytest.raises(IndexError):
        list(region.split(Run(1, 5), 4096))


@given(regions())
def test_other_page_sizes_move_no_byte(region: Region) -> None:
    small = region.with_page_sizes([4096] * len(region.blocks))
    assert small.offsets == region.offsets
    assert [block.name for block in small.blocks] == [block.name for block in region.blocks]
    assert small.pages == region.size // 4096
    assert small.with_page_sizes([block.page_size for block in region.blocks]) == region


def test_other_page_sizes_must_divide_and_be_one_a_block() -> None:
    region = Region([Block("a", 12288), Block("b", 8192)])
    with pytest.raises(UsageError, match="not a whole number of 8192-byte pages"):
        region.with_page_sizes([8192, 8192])
    with pytest.raises(ValueError, match="zip"):
        region.with_page_sizes([4096])


def test_equal_by_blocks() -> None:
    region = Region([Block("a", 4096)])
    same, other = Region([Block("a", 4096)]), Region([Block("b", 4096)])
    assert region == same
    assert hash(region) == hash(same)
    assert region != other
    assert region != "a"
    assert eval(repr(region)) == region


@pytest.mark.parametrize("page_size", [0, 1, 2048, 4095, 4097, 12288, 2 << 30, -4096, 2**63, True])
def test_page_size_refused(page_size: int) -> None:
    with pytest.raises(UsageError, match="power of two from 4 KiB to 1 GiB"):
        Block("ram", 1 << 40, page_size)


@pytest.mark.parametrize("size", [0, -4096, 1, 4095, 4097, 2**64 - 1, True])
def test_size_refused(size: int) -> None:
    with pytest.raises(UsageError, match="whole number of 4096-byte pages"):
        Block("ram", size)


@pytest.mark.parametrize("name", ["é" * 255, ""])
def test_any_name_of_255_characters(name: str) -> None:
    assert Block(name, 4096).name == name


def test_long_name_is_refused_before_anything_quotes_it() -> None:
    with pytest.raises(UsageError, match=r"^block name of 1000000 characters \(limit 255\)$"):
        Block("n" * 1_000_000, -1, -1)


def blocks(count: int, **fields: Any) -> list[Block]:
    return [Block(f"block{i}", **{"size": 4096, **fields}) for i in range(count)]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (blocks(0), "1 to 4096 blocks, not 0"),
        (blocks(MAX_BLOCKS + 1), "not 4097"),
        ([*blocks(3), Block("block1", 8192)], "same name"),
        ([Block("ram", 4096 * MAX_PAGES), Block("rom", 4096)], "limit"),
    ],
)
def test_region_refused(table: list[Block], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Region(table)


def test_largest_region() -> None:
    assert Region(blocks(MAX_BLOCKS)).pages == MAX_BLOCKS
    region = Region([Block("a", 4096), Block("ram", 4096 * (MAX_PAGES - 1))])
    assert region.pages == MAX_PAGES
    assert region.offset_of_page(MAX_PAGES - 1) == 4096 * (MAX_PAGES - 1)
    assert region.contains(Run(1, MAX_PAGES - 1))
    assert not region.contains(Run(1, MAX_PAGES))
