"""A source elsewhere, of which runs of pages are read from any thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import trio

from ..errors import (
    ConnectionBroken,
    ConnectionClosed,
    PagenetError,
    RemoteProtocolError,
    SourceDisconnected,
    SourceUnreachable,
)
from ..objects import ObjectStat, Refused, Transient
from ..protocol import Class, printable
from ..region import Region, Run
from ..tls import Tls
from ._session import OnPart, Session
from ._thread import TrioThread

__all__ = ["NOT_NOW", "PeerBlock", "PeerSource"]

T = TypeVar("T")

#: errors of a read after which another one may succeed
NOT_NOW = (SourceUnreachable, SourceDisconnected, ConnectionBroken, ConnectionClosed)
# Seconds between two attempts to open it.
_PAUSE = 0.5
# Seconds without a byte after which a read is given up, and the session with it.
_STALL = 10.0


class PeerSource:
    """The source that listens on ``uri``, with one session at a time, and the same pages in each.
    ``held``: as of :class:`Session`. ``expected``: the identity and the sizes of the blocks that it
    must have; None: those of the first session.

    Close it. It ends with the last of its blocks. Methods that are asynchronous are for its
    thread."""

    def __init__(
        self,
        uri: str,
        tls: Tls | None,
        held: bool = False,
        expected: tuple[bytes, Region] | None = None,
    ) -> None:
        self.uri, self._tls, self._held = uri, tls, held
        self._expected = expected
        self.thread = TrioThread.open()
        self._session: Session | None = None
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._users = 1

    def close(self) -> None:
        """Call it once."""
        self._users -= 1
        if not self._users:
            self.thread.run(self._shut)
            self.thread.close()

    def block(self, index: int) -> PeerBlock:
        """A block of it. Close that."""
        self._users += 1
        return PeerBlock(self, index)

    async def _shut(self) -> None:
        if self._session is not None:
            self._scope.cancel()
            await self._ended.wait()

    async def meet(self) -> Session:
        """The session, or a new one. :exc:`~pagenet.errors.RemoteProtocolError` if it is with
        another source than expected, and other errors of pagenet's."""
        if self._session is None or self._session.error is not None:
            self._session = Session(self.uri, self._tls, self._held)
            self._scope, self._ended = trio.CancelScope(), trio.Event()
            self.thread.spawn(self._keep)
        session = self._session
        await session.ready.wait()
        if session.error is not None:
            raise session.error
        self._check(session)
        return session

    async def _keep(self) -> None:
        assert self._session is not None
        session, scope, ended = self._session, self._scope, self._ended
        try:
            with scope:
                await session.run()
        finally:
            ended.set()

    def _check(self, session: Session) -> None:
        if self._expected is None:
            self._expected = session.identity, session.region
        identity, region = self._expected
        if (identity, _sizes(region)) != (session.identity, _sizes(session.region)):
            was, now = identity.hex()[:8], session.identity.hex()[:8]
            raise RemoteProtocolError(
                "another source answers, or it has other pages now"
                + (f": {now} instead of {was}" if was != now else "")
            )

    def leave(self) -> None:
        """End the session. The next read begins another."""
        self._scope.cancel()

    async def read(self, run: Run, class_: Class, on_part: OnPart) -> bool:
        """As :meth:`Session.read`."""
        return await (await self.meet()).read(run, class_, on_part)

    def open(self, deadline: float) -> tuple[bytes, Region]:
        """Its identity and its blocks, once it answers. Blocks. :exc:`SourceUnreachable` after
        ``deadline`` seconds, and other errors of pagenet's at once."""
        return self.thread.run(partial(self._open, deadline))

    async def _open(self, deadline: float) -> tuple[bytes, Region]:
        last: PagenetError = SourceUnreachable("no answer came in time")
        with trio.move_on_after(deadline):
            while True:
                try:
                    session = await self.meet()
                    return session.identity, session.region
                except NOT_NOW as error:
                    last = error
                await trio.sleep(_PAUSE)
        raise SourceUnreachable(
            f"{printable(self.uri)}: the source has not answered for {deadline:g} s: {last}"
        )


def _sizes(region: Region) -> list[tuple[int, int]]:
    return [(block.size, block.page_size) for block in region.blocks]


class PeerBlock:
    """A block of a source, as an :class:`~pagenet.objects.Origin`: with the source's identity in
    the place of an ETag. A user of the source."""

    kind = "source"
    names_content = True

    def __init__(self, source: PeerSource, index: int) -> None:
        self._source, self._index = source, index
        self.name = f"{source.uri}#{index}" if index else source.uri
        self._is_closed = False

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._source.close()

    async def stat(self) -> ObjectStat:
        session = await self._call(self._source.meet)
        return ObjectStat(session.region.blocks[self._index].size, session.identity.hex())

    async def _call(self, work: Callable[[], Awaitable[T]]) -> T:
        call = self._source.thread.start(work)
        with _translated(self.name):
            try:
                return await asyncio.wrap_future(call.future)
            finally:
                call.cancel()

    async def read(
        self, start: int, end: int, stat: ObjectStat, is_urgent: bool
    ) -> AsyncGenerator[bytes, None]:
        """``start`` is the first byte of a page, and ``end`` that behind the last of one."""
        parts: asyncio.Queue[bytes | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(part: bytes | None) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(parts.put_nowait, part)

        call = self._source.thread.start(partial(self._read, start, end, is_urgent, put))
        call.future.add_done_callback(lambda _: put(None))
        try:
            while (part := await self._next(parts)) is not None:
                yield part
            with _translated(self.name):
                call.future.result()
        finally:
            call.cancel()

    async def _next(self, parts: asyncio.Queue[bytes | None]) -> bytes | None:
        try:
            async with asyncio.timeout(_STALL):
                return await parts.get()
        except TimeoutError:
            self._source.thread.soon(self._source.leave)
            raise Transient(f"the source has sent nothing for {_STALL:g} s") from None

    async def _read(
        self, start: int, end: int, is_urgent: bool, put: Callable[[bytes], None]
    ) -> None:
        region = (await self._source.meet()).region
        page, first = region.blocks[self._index].page_size, region.first_pages[self._index]
        run = Run(first + start // page, (end - start) // page)
        class_ = Class.DEMAND if is_urgent else Class.BACKGROUND
        await self._source.read(run, class_, lambda part: put(bytes(part)))


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Errors of pagenet's, as those of an origin."""
    try:
        yield
    except NOT_NOW as error:
        raise Transient(str(error)) from None
    except PagenetError as error:
        raise Refused(f"{printable(name)}: {error}") from None
    except CancelledError:
        raise Transient("it was given up") from None
