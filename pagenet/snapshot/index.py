"""The index of a snapshot: which pages are where. Flat: it names the objects of all layers itself,
so nothing depends on how many there are.

The columns of an index are in memory as they are in the file, in one buffer: 10 bytes a run, and 4
more to find the runs of a frame.
"""

from __future__ import annotations

import string
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .. import _native
from ..errors import PagenetError, UsageError
from .pieces import CHECKSUM_SIZE, MOST_BYTES, restore_piece, store_piece

__all__ = [
    "DIGEST_SIZE",
    "FRAME_PAGES",
    "PAGE",
    "VERSION",
    "ZERO_FRAME",
    "Frame",
    "Index",
    "Stretch",
    "Tables",
    "decode_index",
    "encode_index",
]

MAGIC, VERSION = b"pagesnap", 1
PAGE = 4096
#: of a frame, at most
FRAME_PAGES = MOST_BYTES // PAGE
DIGEST_SIZE = 16
#: the frame of runs of zeros
ZERO_FRAME = _native.ZERO_FRAME

_NAME_SIZE = 64
_IN_NAMES = (string.ascii_letters + string.digits + "._-").encode()
# 4 TiB of memory. An index of so many runs takes 200 MiB.
_MOST_PAGES = 1 << 30
_MOST_RUNS = 1 << 23
_MOST_FRAMES = 1 << 21
_MOST_OBJECTS = 1 << 16
# magic, checksum, version, page size, id, base's id, pages, layers, objects, frames, runs, blocks;
# then the stored length of each block of the body, and zeros
_HEADER = struct.Struct("<8s8sII16s16sQIIIII")
_HEADER_SIZE = 4096
_MOST_BLOCKS = (_HEADER_SIZE - _HEADER.size) // 4
# The widest first: no column needs padding. Name, format of a value, what it has a value of.
_COLUMNS = (
    ("object_names", "64s", "objects"),
    ("frame_digests", "16s", "frames"),
    ("object_sizes", "Q", "objects"),
    ("frame_offsets", "Q", "frames"),
    ("frame_objects", "I", "frames"),
    ("frame_lengths", "I", "frames"),
    ("run_starts", "I", "runs"),
    ("run_frames", "I", "runs"),
    ("frame_pages", "H", "frames"),
    ("run_at", "H", "runs"),
)


class Stretch(NamedTuple):
    """``pages`` pages from page ``first`` on: those of a frame from its page ``at`` on, or zeros
    (``ZERO_FRAME``)."""

    first: int
    pages: int
    frame: int
    at: int


@dataclass(frozen=True, slots=True)
class Frame:
    """``pages`` pages, stored in ``length`` bytes of an object from ``offset`` on. ``digest``: of
    the pages, the first 16 bytes of their SHA-256."""

    object: str
    offset: int
    length: int
    pages: int
    digest: bytes


@dataclass(frozen=True)
class Index:
    """A checked index. ``id``: of this snapshot; ``base``: of the one that it was made from, or
    zeros; ``layers``: how many have been made, each from the one before."""

    id: bytes
    base: bytes
    pages: int
    layers: int
    objects: tuple[str, ...]
    #: of objects, as in the file
    names: memoryview
    columns: _native.SnapshotColumns
    digests: memoryview

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return self.pages * PAGE

    @property
    def frames(self) -> int:
        return len(self.columns.frame_pages)

    @property
    def runs(self) -> int:
        return len(self.columns.run_starts)

    def frame(self, number: int) -> Frame:
        columns = self.columns
        return Frame(
            self.objects[columns.frame_objects[number]],
            columns.frame_offsets[number],
            columns.frame_lengths[number],
            columns.frame_pages[number],
            self.digest(number),
        )

    def digest(self, frame: int) -> bytes:
        return bytes(self.digests[frame * DIGEST_SIZE : (frame + 1) * DIGEST_SIZE])

    def run(self, number: int) -> Stretch:
        columns, starts = self.columns, self.columns.run_starts
        end = starts[number + 1] if number + 1 < len(starts) else self.pages
        first = starts[number]
        return Stretch(first, end - first, columns.run_frames[number], columns.run_at[number])

    def stretches(self, first: int, count: int) -> Iterator[Stretch]:
        """What pages ``first`` to ``first + count`` are, in order."""
        number, end = bisect_right(self.columns.run_starts, first) - 1, first + count
        while first < end:
            run = self.run(number)
            skip, until = first - run.first, min(run.first + run.pages, end)
            is_zero = run.frame == ZERO_FRAME
            yield Stretch(first, until - first, run.frame, 0 if is_zero else run.at + skip)
            first, number = until, number + 1

    def runs_of(self, frame: int) -> Iterator[Stretch]:
        """Where the pages of ``frame`` are in the memory."""
        number = self.columns.frame_runs[frame]
        while number != _native.NO_RUN:
            yield self.run(number)
            number = self.columns.next_runs[number]

    def scatter(
        self, frame: int, pages: memoryview, write: Callable[[memoryview, int], object]
    ) -> None:
        """Call ``write`` with all of the frame's ``pages``, and the byte of the memory where they
        belong."""
        columns, last = self.columns, self.runs - 1
        starts, ats, number = columns.run_starts, columns.run_at, columns.frame_runs[frame]
        while number != _native.NO_RUN:  # as runs_of, but a layer of scattered pages has many
            first, at = starts[number], ats[number]
            end = starts[number + 1] if number < last else self.pages
            write(pages[at * PAGE : (at + end - first) * PAGE], first * PAGE)
            number = columns.next_runs[number]


@dataclass
class Tables:
    """An index that is being made."""

    object_names: list[str] = field(default_factory=list)
    object_sizes: array[int] = field(default_factory=lambda: array("Q"))
    frame_digests: bytearray = field(default_factory=bytearray)
    frame_offsets: array[int] = field(default_factory=lambda: array("Q"))
    frame_objects: array[int] = field(default_factory=lambda: array("I"))
    frame_lengths: array[int] = field(default_factory=lambda: array("I"))
    frame_pages: array[int] = field(default_factory=lambda: array("H"))
    run_starts: array[int] = field(default_factory=lambda: array("I"))
    run_frames: array[int] = field(default_factory=lambda: array("I"))
    run_at: array[int] = field(default_factory=lambda: array("H"))
    pages: int = 0

    def add_object(self, name: str, size: int) -> int:
        self.object_names.append(name)
        self.object_sizes.append(size)
        return len(self.object_names) - 1

    def add_frame(self, object_: int, offset: int, length: int, pages: int, digest: bytes) -> int:
        self.frame_objects.append(object_)
        self.frame_offsets.append(offset)
        self.frame_lengths.append(length)
        self.frame_pages.append(pages)
        self.frame_digests += digest
        return len(self.frame_pages) - 1

    def add_run(self, count: int, frame: int, at: int) -> None:
        """``count`` pages behind those that were added before."""
        self.pages += count
        if self.run_frames and self.run_frames[-1] == frame:
            before = self.run_starts[-1]
            if frame == ZERO_FRAME or self.run_at[-1] + before == at:
                self.run_starts[-1] += count
                return
        self.run_starts.append(count)
        self.run_frames.append(frame)
        self.run_at.append(at)

    def take_runs(self) -> list[tuple[int, int, int]]:
        """Remove all runs: pages, frame, page in it, of each."""
        runs = list(zip(self.run_starts, self.run_frames, self.run_at, strict=True))
        for column in (self.run_starts, self.run_frames, self.run_at):
            del column[:]
        self.pages = 0
        return runs

    def _bytes_of(self, column: str) -> bytes:
        if column == "object_names":
            return b"".join(name.encode().ljust(_NAME_SIZE, b"\0") for name in self.object_names)
        return bytes(getattr(self, column))

    def body(self) -> bytes:
        body = b"".join(self._bytes_of(name) for name, _, _ in _COLUMNS)
        return body.ljust(-(-len(body) // PAGE) * PAGE, b"\0")


def encode_index(id_: bytes, base: bytes, layers: int, tables: Tables) -> bytes:
    """The index as it is stored. :exc:`PagenetError` if it would be larger than one may be."""
    objects, frames, runs = (
        len(tables.object_names),
        len(tables.frame_pages),
        len(tables.run_frames),
    )
    if tables.pages > _MOST_PAGES:
        raise PagenetError("a snapshot has at most 4 TiB of memory")
    if runs > _MOST_RUNS or frames > _MOST_FRAMES or objects > _MOST_OBJECTS:
        raise PagenetError(
            f"this snapshot would have {runs} runs of pages in {frames} frames of {objects}"
            f" objects, and may have {_MOST_RUNS} in {_MOST_FRAMES} of {_MOST_OBJECTS}: create it"
            " without a base"
        )
    packer, body = _native.Packer(), memoryview(tables.body())
    blocks = [
        store_piece(packer, body[at : at + MOST_BYTES]) for at in range(0, len(body), MOST_BYTES)
    ]
    numbers = (tables.pages, layers, objects, frames, runs, len(blocks))
    lengths = struct.pack(f"<{len(blocks)}I", *map(len, blocks))

    def header(checksum: bytes) -> bytes:
        fixed = _HEADER.pack(MAGIC, checksum, VERSION, PAGE, id_, base, *numbers)
        return (fixed + lengths).ljust(_HEADER_SIZE, b"\0")

    return b"".join([header(_native.checksum(header(bytes(CHECKSUM_SIZE)))), *blocks])


def decode_index(read: Callable[[int, int], bytes], name: str) -> Index:
    """The index that ``read(offset, length)`` reads; it returns fewer bytes where the file ends.

    :exc:`UsageError`, in one line, if it is foreign, broken, or of another version. ``name``: what
    errors call it. Nothing in it is trusted; it takes at most 210 MiB of memory, whatever is in it.
    """
    try:
        return _decode(read, name)
    except _Broken as broken:
        raise UsageError(f"snapshot {name} is broken: {broken}") from None


class _Broken(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Head:
    id: bytes
    base: bytes
    pages: int
    layers: int
    counts: dict[str, int]
    lengths: tuple[int, ...]


def _decode(read: Callable[[int, int], bytes], name: str) -> Index:
    head = _decode_header(read(0, _HEADER_SIZE), name)
    body = memoryview(bytearray(_body_size(head.counts)))
    _read_body(read, head.lengths, body)
    columns = _cut(head.counts, body)
    names = columns.pop("object_names")
    objects = _object_names(names)
    digests = columns.pop("frame_digests")
    checked = _native.SnapshotColumns(
        frame_runs=memoryview(bytearray(4 * head.counts["frames"] + 4)).cast("I"),
        next_runs=memoryview(bytearray(4 * head.counts["runs"])).cast("I"),
        **columns,
    )
    if flaw := _native.check_snapshot(head.pages, checked):
        raise _Broken(flaw)
    return Index(head.id, head.base, head.pages, head.layers, objects, names, checked, digests)


def _decode_header(header: bytes, name: str) -> _Head:
    if header[: len(MAGIC)] != MAGIC:
        raise UsageError(f"{name} is not a snapshot of pagenet's")
    if len(header) < _HEADER_SIZE:
        raise _Broken(f"it ends at byte {len(header)}")
    _, checksum, version, page, id_, base, pages, layers, *numbers = _HEADER.unpack_from(header)
    if version != VERSION:
        raise UsageError(
            f"{name} is a snapshot of version {version}: this pagenet reads version {VERSION}"
        )
    at = len(MAGIC)
    zeroed = header[:at] + bytes(CHECKSUM_SIZE) + header[at + CHECKSUM_SIZE :]
    if _native.checksum(zeroed) != checksum:
        raise _Broken("its header is not what was written")
    objects, frames, runs, blocks = numbers
    most = (_MOST_PAGES, _MOST_OBJECTS, _MOST_FRAMES, _MOST_RUNS)
    if any(a > b for a, b in zip((pages, objects, frames, runs), most, strict=True)):
        raise _Broken("it is larger than a snapshot may be")
    counts = {"objects": objects, "frames": frames, "runs": runs}
    if page != PAGE or not pages or blocks != -(-_body_size(counts) // MOST_BYTES):
        raise _Broken("its header makes no sense")
    lengths = struct.unpack_from(f"<{blocks}I", header, _HEADER.size)
    if header[_HEADER.size + 4 * blocks :].strip(b"\0"):
        raise _Broken("its header makes no sense")
    return _Head(id_, base, pages, layers, counts, lengths)


def _body_size(counts: dict[str, int]) -> int:
    size = sum(struct.calcsize(format_) * counts[of] for _, format_, of in _COLUMNS)
    return -(-size // PAGE) * PAGE


def _read_body(
    read: Callable[[int, int], bytes], lengths: tuple[int, ...], body: memoryview
) -> None:
    offset = _HEADER_SIZE
    for number, length in enumerate(lengths):
        into = body[number * MOST_BYTES : (number + 1) * MOST_BYTES]
        if length > len(into) + CHECKSUM_SIZE:
            raise _Broken("its header makes no sense")
        # one more byte where it should end, to see whether it does
        stored = read(offset, length + (number == len(lengths) - 1))
        if len(stored) < length:
            raise _Broken(f"it ends at byte {offset + len(stored)}")
        if len(stored) > length:
            raise _Broken(f"it does not end at byte {offset + length}")
        if not restore_piece(memoryview(stored), into):
            raise _Broken(f"bytes {offset} to {offset + length} are not what was written")
        offset += length


def _cut(counts: dict[str, int], body: memoryview) -> dict[str, memoryview]:
    columns, at = {}, 0
    for name, format_, of in _COLUMNS:
        size = struct.calcsize(format_) * counts[of]
        column = body[at : at + size]
        columns[name] = _as_numbers(column, format_)
        at += size
    if bytes(body[at:]).strip(b"\0"):
        raise _Broken("there is something behind its last column")
    return columns


def _as_numbers(column: memoryview, format_: str) -> memoryview:
    match format_:
        case "Q":
            return column.cast("Q")
        case "I":
            return column.cast("I")
        case "H":
            return column.cast("H")
    return column


def _object_names(column: memoryview) -> tuple[str, ...]:
    names = [padded.rstrip(b"\0") for (padded,) in struct.iter_unpack(f"{_NAME_SIZE}s", column)]
    # All at once: one by one takes longer than all else, where there are many.
    if b"".join(names).translate(None, _IN_NAMES) or not all(names):
        raise _Broken("it has names that no object can have")
    decoded = tuple(name.decode() for name in names)
    if any(name[0] in "._-" for name in decoded):
        raise _Broken("it has names that no object can have")
    return decoded
