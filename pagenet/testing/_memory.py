"""``memory://NAME``: connections within one process, for tests of code that talks over a transport.

Connections are bounded like real ones, so senders block. There is no kernel in between, so a test
does the same thing each time: a connection breaks after an exact number of bytes, and receives at
most a given number at once.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import SplitResult

import trio

from ..errors import ConnectionBroken, ConnectionClosed, SourceUnreachable, UsageError
from ..one_task import OneTask
from ..transport import Buffer

# Bytes that one direction holds before its sender blocks. Small, so tests get there soon.
DEFAULT_CAPACITY = 64 * 1024


class _Wire:
    """What the two ends share: whether the connection is broken, and the tasks that wait for a
    change at either end."""

    def __init__(self) -> None:
        self.broken = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def changed(self) -> None:
        """Wait for a change. Every change wakes every waiter, at most four of them, and they look
        again. That is simple, and fast enough here.

        Looking without finding anything is no change: two waiters would wake each other for ever.
        """
        await self._waiting.park()

    def wake(self) -> None:
        self._waiting.unpark_all()

    def break_now(self) -> None:
        self.broken = True
        self.wake()


class _Pipe:
    """The bytes in flight in one direction."""

    def __init__(self, wire: _Wire, capacity: int) -> None:
        self._wire = wire
        self._capacity = capacity
        self._bytes = bytearray()
        self._until_break: int | None = None
        self.sender_closed = False
        self.receiver_closed = False

    def put(self, view: memoryview) -> int:
        """Take the first bytes of ``view``, as many as there is room for. Returns their number."""
        room = self._capacity - len(self._bytes)
        if self._until_break is not None:
            room = min(room, self._until_break)
        count = min(len(view), room)
        if not count:
            return 0
        self._bytes += view[:count]
        if self._until_break is not None:
            self.break_after(self._until_break - count)
        self._wire.wake()
        return count

    def get(self, view: memoryview) -> int:
        count = min(len(view), len(self._bytes))
        if not count:
            return 0
        view[:count] = self._bytes[:count]
        del self._bytes[:count]
        self._wire.wake()
        return count

    def break_after(self, count: int) -> None:
        self._until_break = count
        if count == 0:
            self._wire.break_now()


class MemoryConnection:
    """One end of a connection within this process: a :class:`~pagenet.transport.Connection`.

    ``max_receive``, which may be set at any time, is how many bytes :meth:`receive_into` returns at
    most. 1 finds every place that takes a short read for a whole message.
    """

    def __init__(self, wire: _Wire, outgoing: _Pipe, incoming: _Pipe, peer: str) -> None:
        self.max_receive: int | None = None
        self._wire = wire
        self._outgoing = outgoing
        self._incoming = incoming
        self._peer = peer
        self._closed = False
        self._sending = OneTask(f"sending to {peer}")
        self._receiving = OneTask(f"receiving from {peer}")

    def __repr__(self) -> str:
        state = "closed" if self._closed else "broken" if self._wire.broken else "open"
        return f"<MemoryConnection to {self._peer}: {state}>"

    @property
    def peer(self) -> str:
        return self._peer

    async def send(self, *buffers: Buffer) -> None:
        self._check_open()
        with self._sending:
            views = [
                memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes
            ]
            try:
                await trio.lowlevel.checkpoint()
                for view in views:
                    await self._send_view(view)
            finally:
                for view in views:
                    view.release()

    async def _send_view(self, view: memoryview) -> None:
        sent = 0
        while sent < len(view):
            self._check_open()
            if self._wire.broken or self._outgoing.receiver_closed:
                raise self._broken_error()
            count = self._outgoing.put(view[sent:])
            sent += count
            if not count:
                await self._wire.changed()

    async def receive_into(self, buffer: memoryview) -> int:
        self._check_open()
        if not buffer.nbytes:
            raise ValueError(
                "an empty buffer receives nothing, and nothing would look like the end of the"
                " stream"
            )
        with self._receiving:
            await trio.lowlevel.checkpoint()
            with buffer.cast("B") as whole, whole[: self.max_receive] as view:
                return await self._receive_view(view)

    async def _receive_view(self, view: memoryview) -> int:
        while True:
            self._check_open()
            if count := self._incoming.get(view):
                return count
            if self._wire.broken:
                raise self._broken_error()
            if self._incoming.sender_closed:
                return 0
            await self._wire.changed()

    def close(self) -> None:
        self._closed = True
        self._outgoing.sender_closed = True
        self._incoming.receiver_closed = True
        self._wire.wake()

    def break_after(self, count: int) -> None:
        """Break the connection once this end has sent ``count`` more bytes; 0 breaks it now.

        The peer receives them all. From then on both ends raise
        :exc:`~pagenet.errors.ConnectionBroken`, once they have received what was in flight.
        """
        self._outgoing.break_after(count)

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionClosed(f"the connection to {self._peer} is closed on this side")

    def _broken_error(self) -> ConnectionBroken:
        why = "it was told to" if self._wire.broken else "the peer has closed it"
        return ConnectionBroken(f"the connection to {self._peer} broke: {why}")


def memory_pair(
    *, capacity: int = DEFAULT_CAPACITY, max_receive: int | None = None, name: str = "pair"
) -> tuple[MemoryConnection, MemoryConnection]:
    """Two connected ends. Each direction holds ``capacity`` bytes before its sender blocks."""
    wire = _Wire()
    there, back = _Pipe(wire, capacity), _Pipe(wire, capacity)
    dialled = MemoryConnection(wire, there, back, f"memory://{name}")
    accepted = MemoryConnection(wire, back, there, f"memory://{name} (dialled)")
    dialled.max_receive = accepted.max_receive = max_receive
    return dialled, accepted


class MemoryListener:
    """A :class:`~pagenet.transport.Listener`. Any number of connections wait in it until they are
    accepted."""

    def __init__(self, transport: MemoryTransport, name: str) -> None:
        self._transport = transport
        self._name = name
        self._backlog: deque[MemoryConnection] = deque()
        self._changed = trio.lowlevel.ParkingLot()
        self._closed = False
        self._accepting = OneTask(f"accepting on {self.uri}")

    @property
    def uri(self) -> str:
        return f"memory://{self._name}"

    async def accept(self) -> MemoryConnection:
        self._check_open()
        with self._accepting:
            await trio.lowlevel.checkpoint()
            while True:
                self._check_open()
                if self._backlog:
                    return self._backlog.popleft()
                await self._changed.park()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._transport.listeners.pop(self._name, None)
        self._changed.unpark_all()
        while self._backlog:
            self._backlog.popleft().break_after(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def enqueue(self, connection: MemoryConnection) -> None:
        self._backlog.append(connection)
        self._changed.unpark_all()

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionClosed(f"the listener on {self.uri} is closed")


class MemoryTransport:
    """A :class:`~pagenet.transport.Transport` whose names are known to this object alone.

    Without a NAME, a listener chooses one. Each connection gets ``capacity`` and ``max_receive``,
    and then ``on_connect(dialled, accepted)`` may change it as the test needs, before a byte is
    sent::

        memory = MemoryTransport(on_connect=lambda dialled, accepted: accepted.break_after(1000))
        pagenet.transport.register("memory", memory)
    """

    def __init__(
        self,
        *,
        capacity: int = DEFAULT_CAPACITY,
        max_receive: int | None = None,
        on_connect: Callable[[MemoryConnection, MemoryConnection], None] | None = None,
    ) -> None:
        self.capacity = capacity
        self.max_receive = max_receive
        self.on_connect = on_connect
        self.listeners: dict[str, MemoryListener] = {}
        self._numbers = itertools.count(1)

    async def dial(self, uri: SplitResult) -> MemoryConnection:
        name = _name(uri)
        await trio.lowlevel.checkpoint()
        if name not in self.listeners:
            raise SourceUnreachable(
                f"{uri.geturl()}: no process listens there: listen first on this MemoryTransport"
            )
        dialled, accepted = memory_pair(
            capacity=self.capacity, max_receive=self.max_receive, name=name
        )
        if self.on_connect is not None:
            self.on_connect(dialled, accepted)
        self.listeners[name].enqueue(accepted)
        return dialled

    async def listen(self, uri: SplitResult) -> MemoryListener:
        name = _name(uri) or f"unnamed-{next(self._numbers)}"
        await trio.lowlevel.checkpoint()
        if name in self.listeners:
            raise UsageError(
                f"{uri.geturl()}: another process listens there already; choose another name"
            )
        listener = self.listeners[name] = MemoryListener(self, name)
        return listener

    def is_private(self, uri: SplitResult) -> bool:
        return True


def _name(uri: SplitResult) -> str:
    if uri.path or uri.query or uri.fragment:
        raise UsageError(f"{uri.geturl()}: say memory://NAME, without '/', '?' or '#' in NAME")
    return uri.netloc
