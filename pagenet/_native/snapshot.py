"""The index of a snapshot, checked."""

from __future__ import annotations

from dataclasses import dataclass

from ._declarations import pn_snapshot
from ._library import ffi, lib, new_struct
from .memory import Buffer

ZERO_FRAME: int = lib.PN_ZERO_FRAME
NO_RUN: int = lib.PN_NO_RUN

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


def check_snapshot(pages: int, columns: SnapshotColumns) -> str:
    """Check the columns of a snapshot of ``pages`` pages. The pages of each run are replaced by its
    first page, and ``frame_runs`` and ``next_runs`` are set.

    Returns what is wrong, or nothing.
    """
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
    flaw = lib.pn_snapshot_check(snapshot)
    return _FLAWS[flaw.what].format(at=flaw.at) if flaw.what != lib.PN_FLAW_NONE else ""


def checksum(data: Buffer) -> bytes:
    """XXH64 of ``data``, little-endian. Its length is a multiple of 32."""
    return lib.pn_checksum(ffi.from_buffer(data), len(data)).to_bytes(8, "little")
