"""The source's lane, in Trio: requests in, pages out. Slow, and obviously right."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from .. import _native, transport
from ..errors import ConnectionBroken, ConnectionClosed, SourceLost
from ..nurseries import open_failing_nursery
from ..protocol import (
    MAX_LZ4_BYTES,
    MAX_REASON_BYTES,
    Class,
    Encoding,
    Reply,
    Request,
    RequestDecoder,
)
from ..region import Run
from ..session import LAST_WORDS_TIMEOUT
from .memory import Source

__all__ = ["LARGE_UNITS", "Counts", "TrioSourceLane"]

_RECEIVE_SIZE = 16 << 10
# bytes kept at most for a peer that does not read, and as much again where they are compressed
_CHUNK = 256 << 10
_LZ4_BLOCK = 128 << 10
#: Units larger than a chunk that may be kept to be compressed, for all lanes together: 2 MiB each.
#: Further ones travel uncompressed.
LARGE_UNITS = 8
#: Requests of a lane whose pages are still to be fetched, while further ones are answered.
_PUT_OFF = 128
_SAMPLE = 32 << 10  # bytes compressed to measure what compressing would bring


@dataclass(slots=True)
class Counts:
    """Pages that were asked for, by class, and how many of all those were zero."""

    asked: Counter[Class] = field(default_factory=Counter)
    zeros: int = 0


class TrioSourceLane:
    """Requests in, pages out, one after the other: slow, and obviously right. Only requests whose
    pages have to be fetched first are put off.

    Where the source chooses, runs of the background are compressed if that is faster, and pages
    that a thread waits for are not.
    """

    def __init__(
        self,
        connection: transport.Connection,
        source: Source,
        counts: Counts | None = None,
        large_units: trio.Semaphore | None = None,
        held: bool = False,
    ) -> None:
        """``held``: pages that have to be fetched first are said to be absent."""
        self._connection, self._held = connection, held
        self._large_units = large_units or trio.Semaphore(LARGE_UNITS)
        self._next = Run(0, 0)  # the part of the current request that has no reply yet
        self._turn = trio.Lock()  # of the request that is being answered
        self._put_off = trio.Semaphore(_PUT_OFF)
        self._streaming = False  # a reply has begun that is sent in several pieces
        self._counts = counts or Counts()
        self._source = source
        self._pages = memoryview(bytearray())
        self._packer = _native.Packer()
        self._choice = _native.Choice()

    async def run(self, unread: bytes) -> None:
        """Serve until the peer closes. ``unread``: what was received from it already.

        Raises :exc:`~pagenet.errors.SourceLost`, after the peer has been told: it ends everything.
        """
        decoder = RequestDecoder(self._source.region)
        decoder.feed(unread)
        buffer = memoryview(bytearray(_RECEIVE_SIZE))
        async with open_failing_nursery() as nursery:
            while True:
                self._choice.resume(time.monotonic_ns())
                for request in decoder.requests():
                    self._counts.asked[request.class_] += request.run.count
                    if self._is_here(request.run):
                        await self._answer(request)
                    elif self._held:
                        async with self._turn:
                            await self._connection.send(
                                _reply(request, Encoding.ABSENT, request.run, 0)
                            )
                    else:
                        await self._put_off.acquire()
                        nursery.start_soon(self._fetch_and_answer, request)
                count = await self._connection.receive_into(buffer)
                if not count:
                    nursery.cancel_scope.cancel()
                    return decoder.check_eof()
                decoder.feed(buffer[:count])

    def _is_here(self, run: Run) -> bool:
        return self._source.holds(run) if self._held else self._source.is_here(run)

    async def _fetch_and_answer(self, request: Request) -> None:
        try:
            await self._source.fetch(request.run, request.class_)
        except SourceLost as error:
            async with self._turn:
                self._next = request.run
                await self._say_last_words(request, error)
            raise
        await self._answer(request)
        self._put_off.release()

    async def _answer(self, request: Request) -> None:
        async with self._turn:
            if self._streaming:  # a reply has broken off: what follows would be taken for pages
                return
            try:
                for run in self._chunks(request):
                    await self._answer_run(request, run)
            except SourceLost as error:
                await self._say_last_words(request, error)
                raise

    async def _say_last_words(self, request: Request, error: SourceLost) -> None:
        # The source cannot go on, whether the peer is told or not. Shielded, because a peer that
        # leaves at once would hide the cause.
        with (
            trio.move_on_after(LAST_WORDS_TIMEOUT, shield=True),
            suppress(ConnectionBroken, ConnectionClosed),
        ):
            await self._tell_lost(request, str(error))

    def _chunks(self, request: Request) -> Iterator[Run]:
        """Split the request into runs of whole units: at most ``_CHUNK`` bytes, which is what is
        kept for a peer that does not read, but at least one unit."""
        unit = 1 << request.unit_shift
        most = max(_CHUNK // self._page_size(request.run) // unit, 1) * unit
        for first in range(request.run.first, request.run.end, most):
            self._next = Run(first, request.run.end - first)
            yield Run(first, min(most, request.run.end - first))

    async def _tell_lost(self, request: Request, reason: str) -> None:
        if not self._streaming:  # otherwise the peer would take what is sent now for pages
            text = reason.encode(errors="replace")[:MAX_REASON_BYTES]
            await self._connection.send(
                _reply(request, Encoding.FAILED, self._next, len(text)), text
            )

    async def _answer_run(self, request: Request, run: Run) -> None:
        size = self._source.region.size_of(run)
        choosing = request.may_pack and not request.must_pack and request.class_ is Class.BACKGROUND
        packing = request.must_pack or (choosing and self._choice.packs)
        if size <= _CHUNK:
            await self._answer_chunk(request, run, packing, choosing)
        elif packing and size <= MAX_LZ4_BYTES and self._large_units.value:
            async with self._large_units:
                await self._answer_chunk(request, run, packing, choosing)
        else:
            await self._stream(request, run)

    async def _answer_chunk(
        self, request: Request, run: Run, packing: bool, choosing: bool
    ) -> None:
        began = time.monotonic_ns()
        pages = await self._read(run)
        if pages is None:
            await self._connection.send(self._zero_reply(request, run))
            return
        buffers = list(self._replies(request, run, pages, packing))
        if choosing and self._choice.wants_sample(began):
            self._pack(pages[:_SAMPLE])
        working = time.monotonic_ns() - began
        await self._connection.send(*buffers)
        if choosing:
            now = time.monotonic_ns()
            self._choice.answered(len(pages), sum(map(len, buffers)), now - working, now)

    async def _stream(self, request: Request, unit: Run) -> None:
        """Answer a unit of which only one piece is kept at a time: it is searched for bytes that
        are not zero first, and read again to be sent."""
        if await self._is_zero(unit):
            await self._connection.send(self._zero_reply(request, unit))
            return
        self._streaming = True
        await self._connection.send(
            _reply(request, Encoding.RAW, unit, self._source.region.size_of(unit))
        )
        for piece in self._pieces(unit):
            await self._connection.send(
                await self._read(piece) or bytes(self._source.region.size_of(piece))
            )
        self._streaming = False

    async def _is_zero(self, unit: Run) -> bool:
        for piece in self._pieces(unit):
            pages = await self._read(piece)
            if pages is not None and not _native.leading_alike(pages, 1, len(pages))[1]:
                return False
            await trio.lowlevel.checkpoint()
        return True

    def _pieces(self, unit: Run) -> Iterator[Run]:
        most = _CHUNK // self._page_size(unit)
        return (
            Run(first, min(most, unit.end - first)) for first in range(unit.first, unit.end, most)
        )

    def _page_size(self, run: Run) -> int:
        return self._source.region.size_of(run) // run.count

    def _pack(self, pages: memoryview) -> memoryview | None:
        began = time.monotonic_ns()
        packed = self._packer.pack(pages)
        self._choice.tried(len(pages), len(packed) if packed else 0, time.monotonic_ns() - began)
        return packed

    async def _read(self, run: Run) -> memoryview | None:
        """The pages, valid until the next read; None if they are known to be zero."""
        size = self._source.region.size_of(run)
        pages = memoryview(bytearray(size)) if len(self._pages) < size else self._pages[:size]
        if len(self._pages) < size <= _CHUNK:  # a larger buffer is not kept
            self._pages = pages
        return pages if await self._source.read_into(run, pages) else None

    def _replies(
        self, request: Request, whole: Run, pages: memoryview, packing: bool
    ) -> Iterator[transport.Buffer]:
        """Headers and payloads that cover the run: zero units as a flag, the others raw or
        compressed."""
        page_size = len(pages) // whole.count
        unit = page_size << request.unit_shift
        done = 0
        while done < len(pages):
            units, zero = _native.leading_alike(pages[done:], (len(pages) - done) // unit, unit)
            size = units * unit
            if not zero and packing:
                size = min(size, max(_LZ4_BLOCK // unit, 1) * unit)
            part = pages[done : done + size]
            run = Run(whole.first + done // page_size, size // page_size)
            packed = self._pack(part) if packing and not zero and size <= MAX_LZ4_BYTES else None
            if zero:
                yield self._zero_reply(request, run)
            elif packed:
                yield _reply(request, Encoding.LZ4, run, len(packed))
                yield bytes(packed)
            else:
                yield _reply(request, Encoding.RAW, run, size)
                yield part
            done += size

    def _zero_reply(self, request: Request, run: Run) -> bytes:
        self._counts.zeros += run.count
        return _reply(request, Encoding.ZERO, run, 0)


def _reply(request: Request, encoding: Encoding, run: Run, length: int) -> bytes:
    return Reply(request.request_id, request.class_, encoding, run, length).encode()
