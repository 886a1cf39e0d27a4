"""Memory to be moved: content that compresses as a guest's memory does, random bytes, or zeros."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from .. import _native
from ..errors import PagenetError
from ._peers import MemoryFile

__all__ = ["CONTENTS", "RATIO", "Content"]

#: names of what is in the pages
CONTENTS = ("compressible", "random", "zero")
#: compression ratio of compressible content in blocks of 128 KiB: that of a guest's program text
#: and heap
RATIO = 2.5
_STRETCH = 128 << 10
_STEP = 1 << 20
_PAGE = 4096
# Bytes: at most from each mapping, and at least in all, or it would not be much of a mixture. The
# chosen stretches repeat, at a distance that LZ4 does not look back to.
_MOST, _LEAST = 16 << 20, 4 << 20


class Content(MemoryFile):
    """Memory of the content of that name."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        super().__init__(size)

    def _fill(self) -> None:
        os.ftruncate(self.fd, self.size)
        pieces = _MAKERS[self.name]()
        at = 0
        while at < self.size and (piece := next(pieces, None)) is not None:
            at += os.pwrite(self.fd, piece[: self.size - at], at)


def _random() -> Iterator[bytes]:
    while True:
        yield os.urandom(_STEP)


def _programs() -> Iterator[bytes]:
    """Stretches of this process's programs and heap, in random order, over and over. Those that
    compress worst are left out, so that the others compress to RATIO. :exc:`PagenetError` if too
    few are left."""
    stretches = sorted(_stretches(), key=lambda stretch: stretch[1])
    sizes = [length for _, length in stretches]
    while sizes and sum(sizes) * RATIO > len(sizes) * _STRETCH:
        sizes.pop()
    chosen = [stretch for stretch, _ in stretches[: len(sizes)]]
    if len(chosen) * _STRETCH < _LEAST:
        raise PagenetError(f"the memory of this process does not come to a ratio of {RATIO}")
    random.Random(0).shuffle(chosen)
    return cycle(chosen)


def _stretches() -> Iterator[tuple[bytes, int]]:
    """Stretches of 128 KiB without zero pages, each with its compressed size in bytes."""
    packer = _native.Packer()
    pages = b""
    for data in _memory():
        pages += b"".join(
            data[i : i + _PAGE] for i in range(0, len(data), _PAGE) if any(data[i : i + _PAGE])
        )
        while len(pages) >= _STRETCH:
            stretch, pages = pages[:_STRETCH], pages[_STRETCH:]
            packed = packer.pack(memoryview(stretch))
            yield stretch, len(packed) if packed else _STRETCH


def _nothing() -> Iterator[bytes]:
    """A hole is zeros."""
    return iter(())


_MAKERS = {"compressible": _programs, "random": _random, "zero": _nothing}


def _memory() -> Iterator[bytes]:
    """The private mappings of this process, anonymous or of files, in pieces of at most 1 MiB."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in Path("/proc/self/maps").read_text().splitlines():
            if match := re.match(r"(\w+)-(\w+) r..p ", line):
                start, end = int(match[1], 16), int(match[2], 16)
                for at in range(start, min(end, start + _MOST), _STEP):
                    try:
                        yield os.pread(memory.fileno(), min(_STEP, end - at), at)
                    except OSError:  # the kernel's own, or gone
                        break
