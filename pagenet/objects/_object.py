"""An object as a file that is filled chunk by chunk, as its bytes are asked for."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Self

import trio

from .. import _native
from ..errors import PagenetError, SourceLost, UsageError
from ..protocol import Class, printable
from ._cache import CacheFile, open_cache, open_temporary
from ._constants import AHEAD, AROUND, CHUNK, IN_FLIGHT, LOOK, RESERVED, SPLIT, STREAMS
from ._loop import Loop
from ._nbd import NbdExport, is_export
from ._origin import ObjectStat, Origin, Refused, Transient, object_identity, unreachable
from ._store import StoredObject, within

__all__ = ["RemoteObject", "open_object", "open_part", "origin_of"]

# The order of chunks that wait for their turn: that of classes, and last what is read ahead.
_ORDER = {Class.DEMAND: 0, Class.PREFETCH: 1, Class.BACKGROUND: 2}
_READ_AHEAD = 3


@dataclass(slots=True)
class _Span:
    """Bytes of the object that one request is to bring, whole pieces, all in one chunk. Those
    before ``at`` are in the file."""

    start: int
    end: int
    at: int


@dataclass(eq=False, slots=True)
class _Flight:
    """A chunk of which something is being fetched, or waits for its turn."""

    chunk: int
    #: what of it is fetched, in this order; more may be added until the end
    spans: list[_Span]
    order: int
    #: of time.monotonic; later with everybody who waits for it
    deadline: float
    #: somebody waits for it, and is told if it fails
    is_waited_for: bool = False
    task: asyncio.Task[None] | None = None


class RemoteObject:
    """Made by :func:`open_object`. Methods may be called from any thread, unless they say
    otherwise."""

    def __init__(
        self, origin: Origin, stat: ObjectStat, file: CacheFile, loop: Loop, deadline: float
    ) -> None:
        self.uri, self.size = origin.name, stat.size
        self.identity = object_identity(origin.name, stat.etag)
        #: which pieces of the file are there: for lanes in C
        self.here = _native.Here(stat.size)
        for chunk in file.whole():
            start = chunk * CHUNK
            self.here.came(_pieces(start, min(start + CHUNK, stat.size), stat.size))
        self._origin, self._stat, self._file = origin, stat, file
        self._loop, self._deadline = loop, deadline
        #: why the object cannot be read any more
        self._failure: PagenetError | None = None
        self._listeners: set[Callable[[], None]] = set()
        # The rest is for the loop's thread alone.
        self._flights: dict[int, _Flight] = {}
        self._queue: list[tuple[int, int, _Flight]] = []
        self._numbers = count()
        # Streams of the background: where each ends now, and where it began; the latest last.
        self._streams: dict[int, int] = {}
        # chunks of which a thread has waited for a part
        self._touched = set[int]()
        self._active = 0
        self._is_closed = False
        #: bytes that came from the store
        self.fetched = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fd(self) -> int:
        """The file. What is there of it, as ``here`` says, may be read."""
        return self._file.fd

    def close(self) -> None:
        """Give up what is in flight. Idempotent."""
        if self._file.fd >= 0:
            self._loop.run(self._shut())
            self._file.close()
            self._origin.close()
            self._loop.close()

    def is_here(self, offset: int, length: int) -> bool:
        first, last = offset // _native.PIECE, (offset + length - 1) // _native.PIECE
        return range(first, last + 1) in self.here

    def holds(self, offset: int, length: int) -> bool:
        """As :meth:`is_here`, with what other processes of the host have fetched meanwhile."""
        for chunk in range(offset // CHUNK, (offset + length - 1) // CHUNK + 1):
            start, end = chunk * CHUNK, min((chunk + 1) * CHUNK, self.size)
            with suppress(OSError):
                if not self.is_here(start, end - start) and self._file.is_whole(chunk):
                    self.here.came(_pieces(start, end, self.size))
        return self.is_here(offset, length)

    def check(self) -> None:
        """Raise why the object cannot be read any more, if that is so."""
        if self._failure is not None:
            raise self._failure

    def want(self, offset: int, length: int, class_: Class) -> None:
        """Have these bytes fetched. Listeners hear when some have come, or of a failure."""
        self._loop.call(self._want, offset, length, class_)

    def listen(self, heard: Callable[[], None]) -> None:
        """Call ``heard``, in a thread of ours, whenever bytes have come or the object has failed,
        until :meth:`hush`."""
        self._listeners.add(heard)

    def hush(self, heard: Callable[[], None]) -> None:
        """When this returns, ``heard`` is not called any more."""
        self._listeners.discard(heard)
        if not self._is_closed:
            self._loop.run(_nothing())

    async def fetch(self, offset: int, length: int, class_: Class) -> None:
        """Return when these bytes are in the file. For Trio. Raises :exc:`SourceLost`."""
        if self.is_here(offset, length):
            return
        came, token = trio.Event(), trio.lowlevel.current_trio_token()

        def heard() -> None:
            if self._failure is not None or self.is_here(offset, length):
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(came.set)

        self._listeners.add(heard)
        try:
            self.want(offset, length, class_)
            await came.wait()
        finally:
            self._listeners.discard(heard)
        self.check()

    # ---- in the loop's thread ----

    def _want(self, offset: int, length: int, class_: Class) -> None:
        first, last = offset // CHUNK, (offset + length - 1) // CHUNK
        # What is read here and there, by threads or as a recording has it, is brought alone.
        is_apart = not (
            self._goes_on(offset, offset + length)
            if class_ is Class.BACKGROUND
            else self._is_dense(offset, length, class_)
        )
        for chunk in range(first, last + 1):
            start, end = chunk * CHUNK, (chunk + 1) * CHUNK
            if is_apart:
                around = AROUND if class_ is Class.DEMAND and not self._is_planned(offset) else 0
                start = max(start, offset)
                end = min(end, max(offset + length, start + around))
            self._want_bytes(start, end, _ORDER[class_], is_waited_for=True, offset=offset)
        if class_ is Class.BACKGROUND and not is_apart:
            for chunk in range(last + 1, min(last + 1 + AHEAD, -(-self.size // CHUNK))):
                start, end = chunk * CHUNK, (chunk + 1) * CHUNK
                self._want_bytes(start, end, _READ_AHEAD, is_waited_for=False)
        self._start()
        self._tell()  # it may all be there

    def _goes_on(self, start: int, end: int) -> bool:
        """Whether a read of the background goes on with others that are long together, begins with
        the object, or is as long as a chunk."""
        began = self._streams.pop(start, start)
        self._streams[end] = began
        if len(self._streams) > STREAMS:
            del self._streams[next(iter(self._streams))]
        return start - began >= SPLIT or began == 0 or end - start >= CHUNK

    def _is_dense(self, offset: int, length: int, class_: Class) -> bool:
        """Whether a thread has waited before for another part of that chunk, or for what is just
        before these bytes; or they are as long as a chunk."""
        chunk = offset // CHUNK
        was_touched = chunk in self._touched
        follows = chunk - 1 in self._touched and self.is_here(offset - _native.PIECE, 1)
        if class_ is Class.DEMAND and not self._is_planned(offset):
            self._touched.add(chunk)
        return was_touched or follows or length >= CHUNK

    def _is_planned(self, offset: int) -> bool:
        """Whether the byte is there, or in flight."""
        flight = self._flights.get(offset // CHUNK)
        spans = [] if flight is None else flight.spans
        return self.is_here(offset, 1) or any(one.start <= offset < one.end for one in spans)

    def _want_bytes(
        self, start: int, end: int, order: int, is_waited_for: bool, offset: int = 0
    ) -> None:
        """Bytes of one chunk. ``offset``: of the first byte that is waited for, maybe before the
        chunk."""
        end = min(end, self.size)
        if self._is_closed or start == end or self.is_here(start, end - start):
            return
        deadline, chunk = time.monotonic() + self._deadline, start // CHUNK
        flight = self._flights.get(chunk)
        if flight is None:
            flight = self._flights[chunk] = _Flight(chunk, [], _READ_AHEAD + 1, deadline)
        before: list[_Span] = []
        if order < flight.order and flight.task is None:
            flight.order = order  # its earlier place in the queue does not count any more
            if order == _ORDER[Class.DEMAND]:  # what is waited for comes before all else
                before, flight.spans = flight.spans, before
            heappush(self._queue, (order, next(self._numbers), flight))
        self._plan(flight, start, end, offset if order == _ORDER[Class.DEMAND] else 0)
        for span in before:
            self._plan(flight, span.start, span.end, 0)
        if is_waited_for:
            flight.deadline, flight.is_waited_for = deadline, True

    def _plan(self, flight: _Flight, start: int, end: int, wanted: int) -> None:
        """Have the flight bring what is lacking of these bytes, and not planned yet."""
        for pieces in self.here.lacking(_pieces_with(start, end)):
            for low, high in _without(pieces, [_pieces_with(s.start, s.end) for s in flight.spans]):
                low_byte = low * _native.PIECE
                high_byte = min(high * _native.PIECE, self.size)
                flight.spans += _spans(low_byte, high_byte, wanted)

    def _start(self) -> None:
        """Start as many as may be in flight."""
        while self._queue and not self._is_closed:
            order, _, flight = self._queue[0]
            most = IN_FLIGHT if order <= _ORDER[Class.PREFETCH] else IN_FLIGHT - RESERVED
            if flight.task is None and flight.order == order and self._active >= most:
                return
            heappop(self._queue)
            if flight.task is None and flight.order == order:
                self._active += 1
                flight.task = asyncio.get_running_loop().create_task(self._fly(flight))

    async def _fly(self, flight: _Flight) -> None:
        has_flown = False
        try:
            await within(lambda: flight.deadline, lambda: self._fetch(flight))
            has_flown = True
        except Refused as error:
            self._fail(flight, str(error))
        except Transient as error:
            self._fail(flight, str(self._unreachable(error)))
        except OSError as error:
            self._fail(flight, f"cannot keep what {self.uri} has sent: {error.strerror}")
        except Exception as error:  # a bug of ours: nobody may wait for ever because of it
            self._fail(flight, f"cannot fetch {self.uri}: {error!r}")
            raise
        finally:
            self._active -= 1
            del self._flights[flight.chunk]
            if has_flown:  # what was added at the very end
                for span in flight.spans:
                    self._want_bytes(span.at, span.end, flight.order, flight.is_waited_for)
            self._start()

    async def _fetch(self, flight: _Flight) -> None:
        while not self._file.is_whole(flight.chunk) and _is_left(flight):
            if self._file.claim(flight.chunk):
                try:
                    await self._read(flight)
                finally:
                    self._file.release(flight.chunk)
            else:
                await asyncio.sleep(LOOK)
        for span in flight.spans:
            self._came(span.start, span.end)

    async def _read(self, flight: _Flight) -> None:
        """Bring what is left of the flight, and of what is added to it meanwhile."""
        for span in flight.spans:
            if self._file.is_whole(flight.chunk):  # whoever had it claimed has fetched it
                return
            if span.at < span.end:
                await self._read_span(flight, span)

    async def _read_span(self, flight: _Flight, span: _Span) -> None:
        is_urgent = flight.order <= _ORDER[Class.PREFETCH]
        reading = self._origin.read(span.at, span.end, self._stat, is_urgent)
        async with aclosing(reading) as parts:
            async for part in parts:
                self._write(span.at, memoryview(part))
                span.at += len(part)
                self.fetched += len(part)
                self.here.came(_pieces(span.start, span.at, self.size))
                start = flight.chunk * CHUNK
                if self.is_here(start, min(CHUNK, self.size - start)):
                    self._file.finish(flight.chunk)  # before anybody hears of it, and closes us
                self._tell()

    def _write(self, offset: int, data: memoryview) -> None:
        """Zeros are not written: the file has them already, and stays sparse."""
        while data:
            pieces = len(data) // _native.PIECE
            alike, zero = _native.leading_alike(data, pieces, _native.PIECE) if pieces else (0, 0)
            size = alike * _native.PIECE or len(data)
            if not zero:
                self._file.write(offset, data[:size])
            data, offset = data[size:], offset + size

    def _came(self, start: int, end: int) -> None:
        self.here.came(_pieces(start, end, self.size))
        self._tell()

    def _fail(self, flight: _Flight, text: str) -> None:
        if flight.is_waited_for and not self._is_closed:
            self._failure = SourceLost(text)
            self._tell()

    def _unreachable(self, error: Transient) -> PagenetError:
        return unreachable(self.uri, self._origin.kind, self._deadline, error)

    def _tell(self) -> None:
        for heard in list(self._listeners):
            heard()

    async def _shut(self) -> None:
        self._is_closed = True
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _pieces(start: int, end: int, size: int) -> range:
    """The pieces that are whole with these bytes of an object of ``size`` bytes."""
    last = -(-end // _native.PIECE) if end == size else end // _native.PIECE
    return range(start // _native.PIECE, last)


def _pieces_with(start: int, end: int) -> range:
    """The pieces that have some of these bytes."""
    return range(start // _native.PIECE, -(-end // _native.PIECE))


def _without(pieces: range, others: Sequence[range]) -> Iterator[tuple[int, int]]:
    """``pieces`` without the ``others``, as stretches."""
    at = pieces.start
    for other in sorted(others, key=lambda other: other.start):
        if at < min(other.start, pieces.stop):
            yield at, min(other.start, pieces.stop)
        at = max(at, other.stop)
    if at < pieces.stop:
        yield at, pieces.stop


def _is_left(flight: _Flight) -> bool:
    return any(span.at < span.end for span in flight.spans)


def _spans(start: int, end: int, wanted: int) -> list[_Span]:
    """A part of a chunk in the order in which it is fetched: from the piece on that is waited for,
    if that is far from the beginning."""
    first = wanted // _native.PIECE * _native.PIECE
    if not start + SPLIT <= first < end:
        return [_Span(start, end, start)]
    return [_Span(first, end, first), _Span(start, first, start)]


async def _nothing() -> None:
    pass


def origin_of(uri: str) -> Origin:
    """Where the bytes of the object that ``uri`` names come from. Nothing is asked yet. Raises
    :exc:`UsageError`, and :exc:`~pagenet.errors.Unsupported` if what that takes is not
    installed."""
    return NbdExport(uri) if is_export(uri) else StoredObject.of(uri)


def open_object(
    uri: str | Origin,
    *,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int | None = None,
    deadline: float,
) -> RemoteObject:
    """Open the object that ``uri`` names, or a source of its bytes, which it owns. Its size and
    ETag are asked for: blocks for as long as that takes, at most ``deadline`` seconds, which also
    limit the wait for each chunk. ``cache``: a directory in which chunks are kept for all processes
    of the host, ``cache_size`` bytes at most. None: in a file without a name, for this process
    alone.

    Raises :exc:`UsageError` if there is no such object, or the store refuses it,
    :exc:`SourceUnreachable`, and :exc:`Unsupported` without obstore.
    """
    origin = origin_of(uri) if isinstance(uri, str) else uri
    name = printable(origin.name)
    end = time.monotonic() + deadline
    with ExitStack() as undo:
        undo.callback(origin.close)
        loop = Loop.open()
        undo.callback(loop.close)
        try:
            stat = loop.run(within(lambda: end, origin.stat))
        except Refused as error:
            raise UsageError(str(error)) from None
        except Transient as error:
            raise unreachable(name, origin.kind, deadline, error) from None
        if not stat.etag or stat.etag.startswith("W/"):
            raise UsageError(
                f"{name}: its store does not say which content it is (no strong ETag), and a change"
                " could not be noticed: copy it into a file"
            )
        if cache is not None and not origin.names_content:
            raise UsageError(
                f"{name}: its server does not say which content it is, and a cache could mix it"
                " with another: leave --cache out, or copy it into a file"
            )
        file = _open_file(origin, stat, cache, cache_size)
        undo.pop_all()
        return RemoteObject(origin, stat, file, loop, deadline)


def open_part(
    origin: Origin,
    size: int,
    *,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int | None = None,
    deadline: float,
) -> RemoteObject:
    """Open an object whose size is known, and whose bytes are checked by who reads them: nothing is
    asked of its store yet. It owns ``origin``; otherwise as :func:`open_object`."""
    stat = ObjectStat(size, "", is_pinned=False)
    with ExitStack() as undo:
        undo.callback(origin.close)
        loop = Loop.open()
        undo.callback(loop.close)
        file = _open_file(origin, stat, cache, cache_size)
        undo.pop_all()
        return RemoteObject(origin, stat, file, loop, deadline)


def _open_file(
    origin: Origin,
    stat: ObjectStat,
    cache: str | os.PathLike[str] | None,
    cache_size: int | None,
) -> CacheFile:
    if cache is not None:
        return open_cache(cache, origin.name, stat.etag or "", stat.size, cache_size)
    try:
        return open_temporary(stat.size)
    except OSError as error:
        raise UsageError(f"no room for {printable(origin.name)}: {error.strerror}") from None
