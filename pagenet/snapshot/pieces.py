"""Bytes as they are stored: a checksum, and an LZ4 block or the bytes themselves."""

from __future__ import annotations

from .. import _native

__all__ = ["CHECKSUM_SIZE", "MOST_BYTES", "restore_piece", "store_piece"]

#: of a piece; it is a multiple of 4096 bytes long
MOST_BYTES = 2 << 20
CHECKSUM_SIZE = 8


def store_piece(packer: _native.Packer, piece: memoryview) -> bytes:
    """The piece as it is stored: shorter than with its own bytes, or with its own bytes."""
    packed = packer.pack(piece)
    return bytes(packed) if packed else _native.checksum(piece) + piece


def restore_piece(stored: memoryview, into: memoryview) -> bool:
    """Fill ``into`` with the piece. False: ``stored`` is no piece of that length, and ``into`` may
    hold anything."""
    if len(stored) != len(into) + CHECKSUM_SIZE:
        return _native.unpack(stored, into)
    into[:] = stored[CHECKSUM_SIZE:]
    return _native.checksum(into) == stored[:CHECKSUM_SIZE]
