"""The half of a guest's memory that its destination has, on its way back over a stream.

::

    pieces    block, bytes of it, offset in the block: 4, 4 and 8 bytes, little-endian; then the
              bytes. With the highest bit of the second number set, the bytes are zeros, and do not
              follow
    the end   block 2³² - 1, and otherwise zeros

The pieces ascend, and do not overlap.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import trio

from .._native import MappedFile, store
from ..errors import ConnectionBroken, PagenetError, RemoteProtocolError
from ..region import Region, Run
from ..session import receive_exactly
from ..transport import Connection

__all__ = ["Memory", "present", "receive_half", "send_half"]

_HEAD = struct.Struct("<IIQ")
_ZERO = 1 << 31
_NO_BLOCK = (1 << 32) - 1
_PIECE = 256 << 10
_UNIT = 4096
_ZEROS = bytes(_PIECE)
# In seconds: for a piece to leave, or to come.
_PATIENCE = 30.0


def present(region: Region, missing: Sequence[Run]) -> Iterator[tuple[int, int, int]]:
    """The parts of ``region`` that are not ``missing`` (ascending runs): block, offset in it,
    bytes."""
    gaps = {index: list[tuple[int, int]]() for index in range(len(region.blocks))}
    for run in missing:
        index = region.block_index(run.first)
        start = region.offset_of_page(run.first) - region.offsets[index]
        gaps[index].append((start, start + region.size_of(run)))
    for index, block in enumerate(region.blocks):
        at = 0
        for start, end in [*gaps[index], (block.size, block.size)]:
            if start > at:
                yield index, at, start - at
            at = max(at, end)


async def send_half(
    connection: Connection, files: Sequence[int], region: Region, missing: Sequence[Run]
) -> int:
    """Send what is not ``missing`` of the memory in ``files``, one for each block of ``region``.
    Returns the bytes sent. A part that was given up is a hole, and goes as zeros.

    :exc:`~pagenet.errors.PagenetError` if a file is shorter than its block."""
    sent, buffer = 0, memoryview(bytearray(_PIECE))
    for index, offset, size in present(region, missing):
        for at in range(offset, offset + size, _PIECE):
            count = min(_PIECE, offset + size - at)
            if os.preadv(files[index], [buffer[:count]], at) != count:
                raise PagenetError("the guest's memory has become shorter")
            is_zero = buffer[:count] == _ZEROS[:count]
            with _patience():
                if is_zero:
                    await connection.send(_HEAD.pack(index, count | _ZERO, at))
                else:
                    await connection.send(_HEAD.pack(index, count, at), buffer[:count])
                    sent += count
    with _patience():
        await connection.send(_HEAD.pack(_NO_BLOCK, 0, 0))
    return sent


Write = Callable[[int, int, int, memoryview | None], None]


class Memory:
    """The memory in ``files``, one for each block of ``region``, for :func:`receive_half` to write
    to. Close it. :exc:`~pagenet.errors.PagenetError` if it cannot be mapped, or written to."""

    def __init__(self, files: Sequence[int], region: Region) -> None:
        self._files = files
        self._mapped = list[MappedFile]()
        try:
            for file, block in zip(files, region.blocks, strict=True):
                self._mapped.append(MappedFile(block.size, file, writable=True))
        except OSError as error:
            self.close()
            raise PagenetError(f"cannot map the guest's memory: {error.strerror}") from None

    def close(self) -> None:
        for mapped in self._mapped:
            mapped.close()

    def write(self, index: int, offset: int, size: int, data: memoryview | None) -> None:
        if data is None:
            if os.pread(self._files[index], size, offset) == _ZEROS[:size]:
                return  # a hole stays one
            data = memoryview(_ZEROS)[:size]
        try:
            store(self._mapped[index].address + offset, data)
        except OSError as error:
            raise PagenetError(f"cannot write to the guest's memory: {error.strerror}") from None


async def receive_half(connection: Connection, region: Region, write: Write) -> tuple[int, int]:
    """Give each piece that comes over ``connection`` to ``write``: its block, its offset in it, its
    size, and its bytes (None: zeros). Returns the bytes that they cover, and those that came as
    bytes.

    :exc:`~pagenet.errors.RemoteProtocolError` for a piece that is out of place or order."""
    head, buffer = bytearray(_HEAD.size), memoryview(bytearray(_PIECE))
    done, covered, came = (0, 0), 0, 0
    while True:
        with _patience():
            await receive_exactly(connection, memoryview(head))
        index, flags, offset = _HEAD.unpack(head)
        size = flags & ~_ZERO
        if index == _NO_BLOCK:
            return covered, came
        _check_piece(region, index, offset, size, done)
        done = index, offset + size
        covered += size
        if flags & _ZERO:
            write(index, offset, size, None)
        else:
            with _patience():
                await receive_exactly(connection, buffer[:size])
            came += size
            write(index, offset, size, buffer[:size])


def _check_piece(region: Region, index: int, offset: int, size: int, done: tuple[int, int]) -> None:
    fits = (
        0 < size <= _PIECE
        and index < len(region.blocks)
        and offset <= region.blocks[index].size - size
        and (index, offset) >= done
        and offset % _UNIT == size % _UNIT == 0
    )
    if not fits:
        raise RemoteProtocolError(
            f"the peer sends {size} bytes at {offset:#x} of block {index}, which do not fit"
        )


@contextmanager
def _patience() -> Iterator[None]:
    """The block's bytes leave, or come, within 30 s. :exc:`ConnectionBroken` if not."""
    with trio.move_on_after(_PATIENCE) as scope:
        yield
    if scope.cancelled_caught:
        raise ConnectionBroken(f"the other side did not go on for {_PATIENCE:g} s")
