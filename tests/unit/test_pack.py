"""native/pack.c: what is packed is unpacked to the same bytes, and never to others."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagenet._native import Packer, unpack
from pagenet.protocol import MAX_LZ4_BYTES

pytestmark = pytest.mark.native

PAGE = 4096
TEXT = b"".join(f"{word} pages of {word * word} words\n".encode() for word in range(20_000))


def pack(pages: bytes) -> bytes:
    packed = Packer().pack(memoryview(pages))
    assert packed is not None
    return bytes(packed)


def unpacked(data: bytes, size: int) -> bytes | None:
    into = bytearray(size)
    return bytes(into) if unpack(memoryview(data), memoryview(into)) else None


def by_the_book(block: bytes) -> bytes:
    """Unpacks by the description of LZ4's block format."""
    pages, at = bytearray(), 0

    def length(nibble: int) -> int:
        nonlocal at
        value, more = nibble, nibble == 15
        while more:
            value, more, at = value + block[at], block[at] == 255, at + 1
        return value

    while True:
        token, at = block[at], at + 1
        literals = length(token >> 4)
        pages += block[at : at + literals]
        at += literals
        if at == len(block):
            return bytes(pages)
        distance, at = int.from_bytes(block[at : at + 2], "little"), at + 2
        assert 0 < distance <= len(pages)
        for _ in range(length(token & 15) + 4):
            pages.append(pages[-distance])


@pytest.mark.parametrize("size", [PAGE, 2 * PAGE, 128 << 10, 384 << 10, MAX_LZ4_BYTES])
def test_packed_and_unpacked(size: int) -> None:
    pages = (TEXT * 5)[:size]
    packed = pack(pages)
    assert len(packed) < size / 2
    assert unpacked(packed, size) == pages
    assert by_the_book(packed[8:]) == pages


def test_checksum_is_xxh64() -> None:
    pages = bytes(place % 251 for place in range(PAGE))
    assert (
        int.from_bytes(pack(pages)[:8], "little") == 0x122A8C8D994AD3EC
    )  # as xxhsum -H64 prints it


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 32), st.floats(0, 1))
def test_any_pages(seed: int, count: int, share: float) -> None:
    """Pages of which some are random: packed they are shorter, or they are not packed."""
    order = random.Random(seed)
    pages = b"".join(
        order.randbytes(PAGE) if order.random() < share else TEXT[i : i + PAGE]
        for i in range(count)
    )
    packed = Packer().pack(memoryview(pages))
    if packed is not None:
        assert len(packed) <= len(pages) - len(pages) // 16
        assert unpacked(bytes(packed), len(pages)) == pages


def test_what_does_not_get_shorter_is_not_packed() -> None:
    packer = Packer()
    for size in (PAGE, 128 << 10):
        assert packer.pack(memoryview(os.urandom(size))) is None
        barely = os.urandom(size - size // 20) + bytes(size // 20)
        assert packer.pack(memoryview(barely)) is None


def test_cut_anywhere() -> None:
    packed = pack(TEXT[:PAGE])
    for end in range(len(packed)):
        assert unpacked(packed[:end], PAGE) is None


@pytest.mark.parametrize("tail", [b"\0", b"\xff" * 3, b"\0" * 100, TEXT[:5000]])
def test_trailing_garbage(tail: bytes) -> None:
    assert unpacked(pack(TEXT[:PAGE]) + tail, PAGE) is None


def test_two_blocks_are_not_one() -> None:
    packed = pack(TEXT[:PAGE])
    assert unpacked(packed + packed, 2 * PAGE) is None
    assert unpacked(packed + packed[8:], 2 * PAGE) is None


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, 2 * PAGE, MAX_LZ4_BYTES])
def test_of_another_size(size: int) -> None:
    assert unpacked(pack(TEXT[:PAGE]), size) is None


def test_bombs() -> None:
    """Two megabytes from eight kilobytes: no more is written than there is room for."""
    packed = pack(bytes(MAX_LZ4_BYTES))
    assert len(packed) < 9000
    for size in (PAGE, 128 << 10, MAX_LZ4_BYTES - PAGE):
        assert unpacked(packed, size) is None
    length = b"\xff" * 8000 + b"\0"
    assert unpacked(packed[:8] + b"\x1f\0\1\0" + length + b"\0", PAGE) is None
    assert unpacked(bytes(8) + b"\xf0" + length, PAGE) is None
    assert unpacked(bytes(MAX_LZ4_BYTES + 1), PAGE) is None


def test_a_match_that_copies_what_was_there_before() -> None:
    """Distance 0, which some decoders take: the page would be whatever the memory held."""
    literal = b"\x10a"
    match = b"\0\0"
    block = bytes([literal[0] | 15]) + literal[1:] + match + b"\xff" * 15 + b"\xe9" + b"\x50abcde"
    assert unpacked(bytes(8) + block, PAGE) is None


def test_no_flipped_bit_changes_a_page() -> None:
    """The packed bytes may change: there may be two places to copy the same bytes from."""
    packed = bytearray(pack(TEXT[:PAGE]))
    for place in range(8 * len(packed)):
        packed[place // 8] ^= 1 << place % 8
        assert unpacked(bytes(packed), PAGE) in (None, TEXT[:PAGE])
        packed[place // 8] ^= 1 << place % 8


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_corrupted(data: st.DataObject) -> None:
    packed = bytearray(pack(TEXT[: 8 * PAGE]))
    for _ in range(data.draw(st.integers(1, 8))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    result = unpacked(bytes(packed), 8 * PAGE)
    assert result in (None, TEXT[: 8 * PAGE])  # the drawn byte may be the old one


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300), st.integers(1, 4))
def test_garbage(garbage: bytes, pages: int) -> None:
    assert unpacked(garbage, pages * PAGE) is None
