"""Amounts of memory and ranges of addresses, as people write them."""

from __future__ import annotations

import argparse
import mmap
import re

__all__ = ["MAX_ADDRESS", "parse_size", "size_text", "split_range"]

MAX_ADDRESS = 1 << 57  # user half of a five-level page table
_SHIFTS = {"K": 10, "M": 20, "G": 30}


def parse_size(text: str) -> int:
    """For argparse: bytes in whole pages, as a number that K, M or G may follow."""
    shift = _SHIFTS.get(text[-1:].upper(), 0)
    number = text[:-1] if shift else text
    size = int(number) << shift if number.isdecimal() else 0
    if size == 0 or size % mmap.PAGESIZE:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number of {mmap.PAGESIZE}-byte pages"
        )
    return size


def size_text(size: int) -> str:
    """Bytes as :func:`parse_size` takes them, in the largest unit that is whole."""
    for letter, shift in reversed(_SHIFTS.items()):
        if size and not size % (1 << shift):
            return f"{size >> shift}{letter}"
    return str(size)


def split_range(text: str) -> tuple[int, int] | None:
    """First address and bytes of ``START-END`` or ``START+SIZE``, in any base that Python has. None
    for anything else. The bytes may be 0, less (END is below START), or more than any process
    has."""
    found = re.fullmatch(r"(\w{1,40})([-+])(\w{1,40})", text)
    if found is None:
        return None
    try:
        first, second = int(found[1], 0), int(found[3], 0)
    except ValueError:
        return None
    return first, second - first if found[2] == "-" else second
