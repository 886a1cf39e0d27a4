"""Which pages were written in each second, on disk.

A file is one msgpack map: ``format`` ("pagenet-dirty"), ``version`` (1), ``blocks`` (of each its
name, bytes and page size) and ``seconds``. Each second is a list: its length in us, the bytes that
were written in its beginning, the length of that in us, and the bitmap of the pages that were
written in it, compressed by zlib. The lowest bit of the first byte is page 0, and pages are
numbered through all blocks.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..background.recording import load_fields, recording_file, write_fields
from ..errors import UsageError
from ..region import Block, Region
from ..whole_file import WholeFile
from ._history import History, Second

__all__ = [
    "FORMAT",
    "VERSION",
    "DirtyRecorder",
    "DirtyRecording",
    "dirty_file",
    "load_dirty",
    "write_dirty",
]

FORMAT, VERSION = "pagenet-dirty", 1
# Of all bitmaps before they are compressed: more than two hours of 16 GiB. It bounds what a file
# can cost its reader.
_MOST_BITMAPS = 4 << 30
# What a reader accepts has 64 MiB at most (pagenet/background/recording.py).
_MOST_COMPRESSED = 60 << 20
# Of a second, beside its bitmap; zlib makes that larger by less than a thousandth.
_ROW_BYTES = 1024
# An hour: a process that is watched may be stopped for a while.
_LONGEST_US = 3_600_000_000


@dataclass(frozen=True)
class DirtyRecording:
    """What was written to ``region``, second by second. Bitmaps are kept compressed."""

    region: Region
    seconds: tuple[tuple[int, int, int, bytes], ...]

    def history(self) -> History:
        """All of it, with rates and working sets."""
        return History(self.region, [_second_of(row, self.region) for row in self.seconds])


class DirtyRecorder:
    """Collects seconds for a file."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._rows: list[tuple[int, int, int, bytes]] = []
        self._compressed = 0

    @property
    def is_full(self) -> bool:
        """Whether a file can have no more: the next second would be one too many."""
        size = _bitmap_bytes(self._region)
        return (
            self._compressed + size + _ROW_BYTES > _MOST_COMPRESSED
            or (len(self._rows) + 1) * size > _MOST_BITMAPS
        )

    def add(self, second: Second) -> None:
        bits = second.bits.to_bytes(_bitmap_bytes(self._region), "little")
        compressed = zlib.compress(bits, 1)
        self._compressed += len(compressed) + _ROW_BYTES
        us, early_us = (
            min(round(length * 1e6), _LONGEST_US)
            for length in (second.seconds, second.early_seconds)
        )
        self._rows.append((us, second.early, early_us, compressed))

    def recording(self) -> DirtyRecording:
        return DirtyRecording(self._region, tuple(self._rows))


def dirty_file(path: str | os.PathLike[str]) -> WholeFile:
    """The file that :func:`write_dirty` writes. :exc:`UsageError` if there can be no file."""
    return recording_file(path)


def write_dirty(recording: DirtyRecording, file: WholeFile) -> None:
    """Write it as the whole content of ``file``, and commit that."""
    blocks = [[block.name, block.size, block.page_size] for block in recording.region.blocks]
    seconds = [list(row) for row in recording.seconds]
    write_fields(file, {"format": FORMAT, "version": VERSION, "blocks": blocks, "seconds": seconds})


def load_dirty(path: str | os.PathLike[str]) -> DirtyRecording:
    """The recording at ``path``. :exc:`UsageError`, in one line, if there is none, or it is
    foreign, broken, or of a version that is not known."""
    fields = load_fields(path, {FORMAT: VERSION}, "recording")
    try:
        return _checked(fields)
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise UsageError(f"{os.fspath(path)} is a broken recording: {error}") from None


def _checked(fields: dict[str, Any]) -> DirtyRecording:
    blocks, rows = fields["blocks"], fields["seconds"]
    if not isinstance(blocks, list) or not isinstance(rows, list):
        raise ValueError("its blocks make no sense")
    for block in blocks:
        if list(map(type, block)) != [str, int, int]:
            raise ValueError("its blocks make no sense")
    try:
        region = Region(Block(*block) for block in blocks)
    except UsageError as error:
        raise ValueError(str(error)) from None
    if len(rows) * _bitmap_bytes(region) > _MOST_BITMAPS:
        raise ValueError("it has more seconds than any that pagenet writes")
    for row in rows:
        _second_of(row, region)
    return DirtyRecording(region, tuple(tuple(row) for row in rows))


def _bitmap_bytes(region: Region) -> int:
    return -(-region.pages // 8)


def _second_of(row: Sequence[Any], region: Region) -> Second:
    """:exc:`ValueError` or :exc:`zlib.error` if it makes no sense."""
    if list(map(type, row)) != [int, int, int, bytes]:
        raise ValueError("its seconds make no sense")
    us, early, early_us, compressed = row
    if not 0 < us <= _LONGEST_US or not 0 < early_us <= us or not 0 <= early <= region.size:
        raise ValueError("its seconds make no sense")
    unpacker = zlib.decompressobj()
    bitmap = unpacker.decompress(compressed, _bitmap_bytes(region) + 1)
    bits = int.from_bytes(bitmap, "little")
    if (
        len(bitmap) != _bitmap_bytes(region)
        or not unpacker.eof
        or unpacker.unused_data
        or bits >> region.pages
    ):
        raise ValueError("a bitmap has another size than its memory")
    return Second(us / 1e6, bits, early, early_us / 1e6)
