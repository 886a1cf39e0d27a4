"""The source's lane, in Trio: requests in, pages out. Slow, and obviously right."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import trio

from . import _native, transport
from .errors import ConnectionBroken, ConnectionClosed, SourceLost
from .protocol import (
    MAX_LZ4_BYTES,
    MAX_REASON_BYTES,
    MAX_REQUEST_BYTES,
    Class,
    Encoding,
    Reply,
    Request,
    RequestDecoder,
)
from .region import Run
from .session import LAST_WORDS_TIMEOUT
from .source import Source

__all__ = ["TrioSourceLane"]

_RECEIVE_SIZE = 16 << 10
_LZ4_BLOCK = 128 << 10
_SAMPLE = 32 << 10  # compressed to see what that would be like


class TrioSourceLane:
    """Requests in, pages out, one after the other: slow, and obviously right.

    Where the source is to choose, the background's runs are compressed if that is faster, and pages that somebody waits for are
    not.
    """

    def __init__(self, connection: transport.Connection, source: Source, asked: Counter[Class] | None = None) -> None:
        self._connection = connection
        self._asked = Counter() if asked is None else asked  # pages, by class
        self._source = source
        self._pages = memoryview(bytearray())
        self._packer = _native.Packer()
        self._choice = _native.Choice()

    async def run(self, unread: bytes) -> None:
        """Serve until the peer closes. :exc:`~pagenet.errors.SourceLost`, after the peer has been told, ends everything."""
        decoder = RequestDecoder(self._source.region)
        decoder.feed(unread)
        buffer = memoryview(bytearray(_RECEIVE_SIZE))
        while True:
            self._choice.resume(time.monotonic_ns())
            for request in decoder.requests():
                self._asked[request.class_] += request.run.count
                await self._answer(request)
            count = await self._connection.receive_into(buffer)
            if not count:
                return decoder.check_eof()
            decoder.feed(buffer[:count])

    async def _answer(self, request: Request) -> None:
        try:
            if self._source.region.size_of(request.run) > MAX_REQUEST_BYTES:
                await self._answer_in_pieces(request)
            else:
                await self._answer_at_once(request)
        except _Cut as error:
            raise SourceLost(str(error)) from None
        except SourceLost as error:
            reason = str(error).encode(errors="replace")[:MAX_REASON_BYTES]
            # Told or not: the source is at its end. Shielded, or a peer that leaves at once would hide the cause.
            with trio.move_on_after(LAST_WORDS_TIMEOUT, shield=True), suppress(ConnectionBroken, ConnectionClosed):
                await self._connection.send(_reply(request, Encoding.FAILED, request.run, len(reason)), reason)
            raise

    async def _answer_in_pieces(self, request: Request) -> None:
        """A single unit, of up to a gigabyte: a piece of it is in memory at a time, whether the peer reads or not. It is read
        twice, since its header says whether all of it is zero."""
        run = request.run
        if await self._is_zero(run):
            await self._connection.send(_reply(request, Encoding.ZERO, run, 0))
            return
        await self._connection.send(_reply(request, Encoding.RAW, run, self._source.region.size_of(run)))
        for piece in self._pieces_of(run):
            size = self._source.region.size_of(piece)
            try:
                pages = await self._read(piece)
            except SourceLost as error:
                raise _Cut(str(error)) from None
            await self._connection.send(bytes(size) if pages is None else pages)

    async def _is_zero(self, run: Run) -> bool:
        for piece in self._pieces_of(run):
            pages = await self._read(piece)
            if pages is not None and not _native.leading_alike(pages, 1, len(pages))[1]:
                return False
        return True

    def _pieces_of(self, run: Run) -> Iterator[Run]:
        step = max(MAX_REQUEST_BYTES // self._source.region.page_size_at(run.first), 1)
        for first in range(run.first, run.end, step):
            yield Run(first, min(step, run.end - first))

    async def _answer_at_once(self, request: Request) -> None:
        began = time.monotonic_ns()
        pages = await self._read(request.run)
        if pages is None:
            await self._connection.send(_reply(request, Encoding.ZERO, request.run, 0))
            return
        choosing = request.may_pack and not request.must_pack and request.class_ is Class.BACKGROUND
        buffers = list(self._replies(request, pages, request.must_pack or (choosing and self._choice.packs)))
        if choosing and self._choice.wants_sample(began):
            self._pack(pages[:_SAMPLE])
        working = time.monotonic_ns() - began
        await self._connection.send(*buffers)
        if choosing:
            now = time.monotonic_ns()
            self._choice.answered(len(pages), sum(map(len, buffers)), now - working, now)

    def _pack(self, pages: memoryview) -> memoryview | None:
        began = time.monotonic_ns()
        packed = self._packer.pack(pages)
        self._choice.tried(len(pages), len(packed) if packed else 0, time.monotonic_ns() - began)
        return packed

    async def _read(self, run: Run) -> memoryview | None:
        """The pages, until the next read; None if they are known to be zero."""
        size = self._source.region.size_of(run)
        if len(self._pages) < size:
            self._pages = memoryview(bytearray(size))
        pages = self._pages[:size]
        return pages if await self._source.read_into(run, pages) else None

    def _replies(self, request: Request, pages: memoryview, packing: bool) -> Iterator[transport.Buffer]:
        """Headers and payloads that cover the request: units that are zero as a flag, the others as they are or compressed."""
        page_size = len(pages) // request.run.count
        unit = page_size << request.unit_shift
        done = 0
        while done < len(pages):
            units, zero = _native.leading_alike(pages[done:], (len(pages) - done) // unit, unit)
            size = units * unit
            if not zero and packing:
                size = min(size, max(_LZ4_BLOCK // unit, 1) * unit)
            part = pages[done : done + size]
            run = Run(request.run.first + done // page_size, size // page_size)
            packed = self._pack(part) if packing and not zero and size <= MAX_LZ4_BYTES else None
            if zero:
                yield _reply(request, Encoding.ZERO, run, 0)
            elif packed:
                yield _reply(request, Encoding.LZ4, run, len(packed))
                yield bytes(packed)
            else:
                yield _reply(request, Encoding.RAW, run, size)
                yield part
            done += size


class _Cut(Exception):
    """The source was lost in the middle of a payload: whatever is sent now would be taken for pages."""


def _reply(request: Request, encoding: Encoding, run: Run, length: int) -> bytes:
    return Reply(request.request_id, request.class_, encoding, run, length).encode()
