"""Amounts of memory, as people write them."""

from __future__ import annotations

import argparse
import mmap

__all__ = ["parse_size"]

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
