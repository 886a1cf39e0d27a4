"""Both halves of a guest's memory, where its hosts do not meet: the half at the destination is
saved to a file, and joined with the source's into one memory file.

::

    "PGNH", version (4 bytes)         the file of the half; all numbers are little-endian
    length (4 bytes), msgpack         identity of the source; size of each block
    pieces                            as _half.py has them
"""

from __future__ import annotations

import os
import signal
import stat
import struct
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

import msgpack
import trio

from ..destination.filling import Filling
from ..errors import ConnectionBroken, PagenetError, RemoteProtocolError, UsageError
from ..events import EventHandler, ignore_events
from ..region import Run
from ..session import receive_exactly
from ..source.memory import Source, open_source
from ..transport import Buffer
from ..uffd import AbandonedOwner
from ..whole_file import WholeFile
from ._half import receive_half, send_half

__all__ = ["join_halves", "save_half"]

_HEAD = struct.Struct("<4sII")
_MAGIC = b"PGNH"
_VERSION = 1
_MAX_FIELDS = 256 << 10
_PIECE = 1 << 20


async def save_half(
    pid: int, path: str | os.PathLike[str], *, on_event: EventHandler = ignore_events
) -> None:
    """Save the pages that the guest of QEMU ``pid`` has to ``path``. Its :func:`receive` must be
    gone. The process is stopped (SIGSTOP), and stays so.

    :exc:`~pagenet.errors.UsageError` for a process that is no such QEMU or that another pagenet
    still fills, :exc:`~pagenet.errors.Unsupported`, :exc:`~pagenet.errors.OwnerGone`. Event:
    ``saved`` (``pid``, ``bytes`` that were written, ``pages`` that it has, of ``all``).
    """
    with closing(AbandonedOwner(pid)) as owner, WholeFile(path, "half of a memory") as file:
        if owner.is_finished:
            raise UsageError(f"process {pid} has all of its pages: there is nothing to join")
        owner.send_signal(signal.SIGSTOP)
        region, files = owner.region(), owner.memory_files()
        try:
            target = await owner.attach(region)
            try:
                filling = Filling(target, owner.source)
            except BaseException:
                target.close(target.scope())
                raise
            try:
                missing = filling.missing()
                connection = _ToFile(file)
                fields = msgpack.packb(
                    {"source": owner.source, "blocks": [block.size for block in region.blocks]}
                )
                await connection.send(_HEAD.pack(_MAGIC, _VERSION, len(fields)), fields)
                sent = await send_half(connection, files, region, missing)
            finally:
                filling.close()
        finally:
            for descriptor in files:
                os.close(descriptor)
        await file.wait_committed()
    lacking = sum(run.count for run in missing)
    on_event("saved", pid=pid, bytes=sent, pages=region.pages - lacking, all=region.pages)


async def join_halves(
    half: str | os.PathLike[str],
    sources: Sequence[str],
    output: str | os.PathLike[str],
    *,
    identity: bytes,
    on_event: EventHandler = ignore_events,
) -> None:
    """Write the memory of ``sources`` (see :func:`pagenet.open_source`) to the file ``output``,
    with the pages of the file ``half`` in the place of theirs. ``identity``: that of the source's
    pages.

    :exc:`~pagenet.errors.UsageError` if ``half`` is another guest's, or no half;
    :exc:`~pagenet.errors.SourceLost`. Event: ``joined`` (``output``, ``bytes`` in all, ``half``:
    those of the half)."""
    with ExitStack() as stack:
        connection = _FromFile(half)
        stack.callback(connection.close)
        source = stack.enter_context(open_source(*sources))
        fields = await _read_fields(connection)
        _check(fields, source, identity)
        file = stack.enter_context(WholeFile(output, "memory"))
        region = source.region
        file.resize(region.size)
        await _copy(source, file)

        def write(index: int, offset: int, size: int, data: memoryview | None) -> None:
            file.write(bytes(size) if data is None else data, region.offsets[index] + offset)

        try:
            covered, _ = await receive_half(connection, region, write)
        except (RemoteProtocolError, ConnectionBroken) as error:
            raise UsageError(f"{connection.peer} is damaged: {error}") from None
        source.check_unchanged()
        await file.wait_committed()
    on_event("joined", output=os.fspath(output), bytes=region.size, half=covered)


def _check(fields: dict[str, Any], source: Source, identity: bytes) -> None:
    if fields["source"] != identity:
        was = fields["source"].hex()
        raise UsageError(f"this half belongs to the source {was}, not to {identity.hex()}")
    sizes = [block.size for block in source.region.blocks]
    if fields["blocks"] != sizes:
        raise UsageError(f"the half's blocks have {fields['blocks']} bytes, the source's {sizes}")


async def _copy(source: Source, file: WholeFile) -> None:
    region, buffer = source.region, memoryview(bytearray(_PIECE))
    for run in region.split(Run(0, region.pages), _PIECE):
        into = buffer[: region.size_of(run)]
        if await source.read_into(run, into):
            file.write(into, region.offset_of_page(run.first))


async def _read_fields(connection: _FromFile) -> dict[str, Any]:
    try:
        head = bytearray(_HEAD.size)
        await receive_exactly(connection, memoryview(head))
        magic, version, length = _HEAD.unpack(head)
        if magic != _MAGIC or version != _VERSION or length > _MAX_FIELDS:
            raise ValueError
        body = bytearray(length)
        await receive_exactly(connection, memoryview(body))
        fields = msgpack.unpackb(body)
        sizes = fields["blocks"]
        if not isinstance(fields["source"], bytes) or not isinstance(sizes, list):
            raise ValueError
    except ConnectionBroken:
        raise UsageError(f"{connection.peer} is no half of a memory: it is too short") from None
    except Exception:  # msgpack raises ValueError, its own, and UnicodeDecodeError
        raise UsageError(f"{connection.peer} is no half of a memory") from None
    return dict(fields)


class _ToFile:
    """A connection that writes to a file."""

    def __init__(self, file: WholeFile) -> None:
        self._file = file
        self._at = 0
        self.peer = file.path

    async def send(self, *buffers: Buffer) -> None:
        for buffer in buffers:
            self._file.write(memoryview(buffer), self._at)
            self._at += len(buffer)
        await trio.lowlevel.checkpoint()

    async def receive_into(self, buffer: memoryview) -> int:
        raise NotImplementedError

    def close(self) -> None:
        pass


class _FromFile:
    """A connection whose bytes are those of a regular file. :exc:`UsageError` for any other."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.peer = os.fspath(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise UsageError(f"cannot read {self.peer}: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.close()
            raise UsageError(f"cannot read {self.peer}: it is not a regular file")

    async def send(self, *buffers: Buffer) -> None:
        raise NotImplementedError

    async def receive_into(self, buffer: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        try:
            return os.readv(self._fd, [buffer])
        except OSError as error:
            raise PagenetError(f"cannot read {self.peer}: {error.strerror}") from None

    def close(self) -> None:
        os.close(self._fd)
