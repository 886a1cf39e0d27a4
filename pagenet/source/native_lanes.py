"""The source's lanes, in C: two loops, one for demand and one for the background, each for any
number of connections.

There are two loops so that a page that a thread waits for is never behind a chunk that no thread
waits for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import count

import trio

from .. import _native
from ..errors import ConnectionBroken, ConnectionClosed, RemoteProtocolError, SourceLost
from ..nurseries import open_failing_nursery
from ..protocol import LANE_HEADER_SIZE, Channel, Class
from ..region import Run
from ..transport import Detachable
from .memory import Source

__all__ = ["MAX_UNREAD", "NativeSourceLanes"]


#: Bytes received from a peer that a loop takes over: as many requests as it reads at a time. A
#: connection with more goes to a lane in Trio.
MAX_UNREAD = 128 * LANE_HEADER_SIZE


@dataclass(eq=False, slots=True)
class _Serving:
    """One connection that a loop drives."""

    ended: trio.Event = field(default_factory=trio.Event)
    end: _native.End | None = None


class _Loop:
    """One loop, its thread, and the connections in it."""

    def __init__(self, source: Source, background: bool, links: _native.Links) -> None:
        self._loop = _native.SourceLoop(source.native_blocks(), background, links)
        self._source = source
        self._serving: dict[int, _Serving] = {}
        self._numbers = count()

    def close(self) -> None:
        self._loop.close()

    def asked(self, class_: Class) -> int:
        return self._loop.asked(class_)

    def zeros(self) -> int:
        return self._loop.zeros()

    async def run(self, limiter: trio.CapacityLimiter) -> None:
        async with open_failing_nursery() as nursery:
            nursery.start_soon(self._stop_when_cancelled)
            nursery.start_soon(self._hear_of_ends)
            if self._source.is_remote:
                nursery.start_soon(self._fetch_what_lacks)
            end = await trio.to_thread.run_sync(
                self._loop.run, limiter=limiter, abandon_on_cancel=False
            )
            if end.kind == _native.END_FAILED:
                raise SourceLost(end.text)
            nursery.cancel_scope.cancel()

    async def _stop_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._loop.stop()

    async def _hear_of_ends(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._loop.ended_fd)
            os.eventfd_read(self._loop.ended_fd)
            for number, end in self._loop.ended():
                serving = self._serving.pop(number)
                serving.end = end
                serving.ended.set()

    async def _fetch_what_lacks(self) -> None:
        """Have pages fetched that were asked for and are not here. That one cannot be fetched is
        for :meth:`Source.watch` to say."""
        self._source.listen(self._loop.look)
        try:
            while True:
                await trio.lowlevel.wait_readable(self._loop.lacks_fd)
                os.eventfd_read(self._loop.lacks_fd)
                for first, pages, class_ in self._loop.lacks():
                    self._source.want(Run(first, pages), Class(class_))
        finally:
            self._source.hush(self._loop.look)

    async def serve(self, connection: Detachable, unread: bytes, link: int) -> _native.End:
        """Drive ``connection`` until it ends."""
        number, serving = next(self._numbers), _Serving()
        self._serving[number] = serving
        sock, tls = connection.detach()
        try:
            self._loop.add(sock, number, unread, link, tls)
        except BaseException:
            if tls is not None:
                tls.close()
            os.close(sock)
            raise
        try:
            await serving.ended.wait()
        except trio.Cancelled:
            self._loop.remove(number)
            raise
        assert serving.end is not None
        return serving.end


class NativeSourceLanes:
    """Serves connections whose transport has sockets."""

    def __init__(self, source: Source) -> None:
        links = _native.Links()
        self._demand = _Loop(source, background=False, links=links)
        self._background = _Loop(source, background=True, links=links)

    def asked(self, class_: Class) -> int:
        """The number of pages asked for in ``class_`` so far."""
        return self._demand.asked(class_) + self._background.asked(class_)

    def zeros(self) -> int:
        """The number of pages that were asked for so far, and are zero."""
        return self._demand.zeros() + self._background.zeros()

    def close(self) -> None:
        """Not to be called while :meth:`run` runs."""
        self._demand.close()
        self._background.close()

    async def run(self) -> None:
        """Run both loops until cancelled. :exc:`SourceLost` if the memory is gone."""
        limiter = trio.CapacityLimiter(2)
        async with open_failing_nursery() as nursery:
            nursery.start_soon(self._demand.run, limiter)
            await self._background.run(limiter)

    async def serve(
        self, channel: Channel, connection: Detachable, unread: bytes, link: int
    ) -> None:
        """Serve ``connection`` until the peer closes it.

        ``link``: a number that all connections of one destination share, and that connections of
        others hardly ever have. Raises :exc:`RemoteProtocolError` for what the peer did wrong,
        :exc:`ConnectionBroken`, or :exc:`ConnectionClosed` if the loop was stopped.
        """
        peer = connection.peer
        loop = self._demand if channel is Channel.DEMAND else self._background
        end = await loop.serve(connection, unread, link)
        match end.kind:
            case _native.END_CLOSED:
                return
            case _native.END_PROTOCOL:
                raise RemoteProtocolError(end.text)
            case _native.END_STOPPED:
                raise ConnectionClosed(f"{peer}: closed by us")
        raise ConnectionBroken(f"{peer}: {os.strerror(end.error)}")
