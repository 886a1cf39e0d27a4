"""The source's lane, in Trio: requests in, pages out. Slow, and obviously right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import trio

from . import _native, transport
from .errors import ConnectionBroken, ConnectionClosed, SourceLost
from .protocol import MAX_REASON_BYTES, MAX_REQUEST_BYTES, Encoding, Reply, Request, RequestDecoder
from .region import Run
from .session import LAST_WORDS_TIMEOUT
from .source import Source

__all__ = ["TrioSourceLane"]

_RECEIVE_SIZE = 16 << 10


class TrioSourceLane:
    """Requests in, pages out, one after the other: slow, and obviously right."""

    def __init__(self, connection: transport.Connection, source: Source) -> None:
        self._connection = connection
        self._source = source
        self._pages = memoryview(bytearray())

    async def run(self, unread: bytes) -> None:
        """Serve until the peer closes. :exc:`~pagenet.errors.SourceLost`, after the peer has been told, ends everything."""
        decoder = RequestDecoder(self._source.region)
        decoder.feed(unread)
        buffer = memoryview(bytearray(_RECEIVE_SIZE))
        while True:
            for request in decoder.requests():
                await self._answer(request)
            count = await self._connection.receive_into(buffer)
            if not count:
                return decoder.check_eof()
            decoder.feed(buffer[:count])

    async def _answer(self, request: Request) -> None:
        try:
            pages = await self._read(request.run)
        except SourceLost as error:
            reason = str(error).encode(errors="replace")[:MAX_REASON_BYTES]
            # Told or not: the source is at its end. Shielded, or a peer that leaves at once would hide the cause.
            with trio.move_on_after(LAST_WORDS_TIMEOUT, shield=True), suppress(ConnectionBroken, ConnectionClosed):
                await self._connection.send(_reply(request, Encoding.FAILED, request.run, len(reason)), reason)
            raise
        if pages is None:
            await self._connection.send(_reply(request, Encoding.ZERO, request.run, 0))
        else:
            await self._connection.send(*self._replies(request, pages))

    async def _read(self, run: Run) -> memoryview | None:
        """The pages, until the next read; None if they are known to be zero."""
        size = self._source.region.size_of(run)
        pages = memoryview(bytearray(size)) if len(self._pages) < size else self._pages[:size]
        if len(self._pages) < size <= MAX_REQUEST_BYTES:  # a single unit may be a gigabyte: that is not kept
            self._pages = pages
        return pages if await self._source.read_into(run, pages) else None

    def _replies(self, request: Request, pages: memoryview) -> Iterator[transport.Buffer]:
        """Headers and payloads that cover the request: units that are zero as a flag, the others as they are."""
        unit_pages = 1 << request.unit_shift
        page_size = len(pages) // request.run.count
        done = 0
        while done < request.run.count:
            rest = pages[done * page_size :]
            units, zero = _native.leading_alike(rest, len(rest) // (unit_pages * page_size), unit_pages * page_size)
            run = Run(request.run.first + done, units * unit_pages)
            size = 0 if zero else run.count * page_size
            yield _reply(request, Encoding.ZERO if zero else Encoding.RAW, run, size)
            if not zero:
                yield rest[:size]
            done += run.count


def _reply(request: Request, encoding: Encoding, run: Run, length: int) -> bytes:
    return Reply(request.request_id, request.class_, encoding, run, length).encode()
