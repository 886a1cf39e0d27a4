"""The index of a snapshot, checked, and its frames, unpacked."""

from __future__ import annotations

from dataclasses import dataclass

from ._declarations import pn_frames, pn_snapshot
from ._library import NULL, ffi, lib, new_struct, opened
from ._pointers import CData
from .memory import Buffer

ZERO_FRAME: int = lib.PN_ZERO_FRAME
NO_RUN: int = lib.PN_NO_RUN

# Bytes for the reason why a frame cannot be had.
_REASON = 1024
_FLAWS = {
    lib.PN_FLAW_FRAME: "frame {at} is not within its object",
    lib.PN_FLAW_RUN: "run {at} is not within its frame, or not within the memory",
    lib.PN_FLAW_END: "its runs end before its memory does",
    lib.PN_FLAW_UNUSED: "no run is of frame {at}",
}


@dataclass(frozen=True, slots=True)
class SnapshotColumns:
    """The columns of ``struct pn_snapshot``: views of memory that stays where it is. They are as
    long as there are objects (of ``Q``), frames (``Q``, ``I``, ``H``) and runs (``I``, ``H``), and
    ``frame_runs`` is one longer."""

    object_sizes: memoryview
    frame_offsets: memoryview
    frame_objects: memoryview
    frame_lengths: memoryview
    frame_pages: memoryview
    run_starts: memoryview
    run_frames: memoryview
    run_at: memoryview
    frame_runs: memoryview
    next_runs: memoryview


def _struct_of(pages: int, columns: SnapshotColumns) -> tuple[pn_snapshot, list[CData]]:
    """The struct, and what it points to, which the caller keeps alive."""
    snapshot = new_struct(pn_snapshot)
    kept = []
    for name in SnapshotColumns.__dataclass_fields__:
        column: memoryview = getattr(columns, name)
        types = {"Q": "uint64_t[]", "I": "uint32_t[]", "H": "uint16_t[]"}
        kept.append(ffi.from_buffer(types[column.format], column))
        setattr(snapshot, name, kept[-1])
    snapshot.pages = pages
    snapshot.objects = len(columns.object_sizes)
    snapshot.frames = len(columns.frame_offsets)
    snapshot.runs = len(columns.run_starts)
    return snapshot, kept


def check_snapshot(pages: int, columns: SnapshotColumns) -> str:
    """Check the columns of a snapshot of ``pages`` pages. The pages of each run are replaced by its
    first page, and ``frame_runs`` and ``next_runs`` are set.

    Returns what is wrong, or nothing.
    """
    snapshot, _kept = _struct_of(pages, columns)
    flaw = lib.pn_snapshot_check(snapshot)
    return _FLAWS[flaw.what].format(at=flaw.at) if flaw.what != lib.PN_FLAW_NONE else ""


class Frames:
    """``struct pn_frames``: the frames of a checked snapshot, unpacked into ``file`` as they are
    needed. ``objects``: the directory that has them, or -1: they are there only after
    :meth:`place`. ``name`` and ``place``: what errors call the snapshot and where the file is.

    Every call may block, for a disk or another thread, and any thread may call. :exc:`LookupError`,
    with the reason in one line, if a frame cannot be had.
    """

    def __init__(
        self,
        pages: int,
        columns: SnapshotColumns,
        names: memoryview,
        objects: int,
        file: int,
        name: str,
        place: str,
    ) -> None:
        snapshot, self._kept = _struct_of(pages, columns)
        self._kept.append(ffi.from_buffer(names))
        words = [text.encode(errors="replace") for text in (name, place)]
        self._frames: pn_frames | None = lib.pn_frames_new(
            snapshot, self._kept[-1], objects, file, *words
        )
        if self._frames == NULL:
            raise MemoryError("no memory for a snapshot's frames")

    def close(self) -> None:
        """Not to be called while another thread, or a loop, uses it. Idempotent."""
        if self._frames is not None:
            lib.pn_frames_free(self._frames)
            self._frames = None
            self._kept.clear()

    @property
    def struct(self) -> pn_frames:
        return opened(self._frames)

    def need(self, offset: int, size: int) -> None:
        """Have all of these bytes in the file."""
        text = ffi.new("char[]", _REASON)
        if lib.pn_frames_need(self.struct, offset, size, text, _REASON):
            raise LookupError(_words(text))

    def place(self, frame: int, fd: int, at: int) -> None:
        """Unpack a frame into the file; its stored bytes are in ``fd`` from ``at`` on."""
        text = ffi.new("char[]", _REASON)
        if lib.pn_frames_place(self.struct, frame, fd, at, text, _REASON):
            raise LookupError(_words(text))

    def put(self, frame: int, pages: memoryview) -> None:
        """Put all pages of a frame into the file."""
        text = ffi.new("char[]", _REASON)
        if lib.pn_frames_put(self.struct, frame, ffi.from_buffer(pages), text, _REASON):
            raise LookupError(_words(text))

    def are_there(self, offset: int, size: int) -> bool:
        """Whether all of these bytes are in the file, or are zero."""
        return bool(lib.pn_frames_are_there(self.struct, offset, size))

    def are_zero(self, offset: int, size: int) -> bool:
        """Whether these bytes are zero by the index."""
        return bool(lib.pn_frames_are_zero(self.struct, offset, size))

    def lacking(self, offset: int, size: int) -> set[int]:
        """The frames of these bytes that are not in the file."""
        room, end = 1024, offset + size
        numbers, next_ = ffi.new("uint32_t[]", room), ffi.new("uint64_t *", offset)
        found: set[int] = set()
        while next_[0] < end:
            at = int(next_[0])
            count = lib.pn_frames_lacking(self.struct, at, end - at, numbers, room, next_)
            found.update(numbers[0:count])
        return found


def _words(text: CData) -> str:
    return bytes(ffi.buffer(text)).partition(b"\0")[0].decode(errors="replace")


def checksum(data: Buffer) -> bytes:
    """XXH64 of ``data``, little-endian. Its length is a multiple of 32."""
    return lib.pn_checksum(ffi.from_buffer(data), len(data)).to_bytes(8, "little")
