"""``inside:NAME``: connections within this process, as pairs of connected sockets.

Nothing outside can dial them: they have no name in any file system or network.
"""

from __future__ import annotations

import socket
from collections import deque
from itertools import count
from types import TracebackType
from typing import Self
from urllib.parse import SplitResult, unquote

import trio

from ..errors import ConnectionClosed, SourceUnreachable, UsageError
from ..one_task import OneTask
from ..tls import Tls
from ._connection import SocketConnection, reason

__all__ = ["PairTransport"]

_numbers = count(1)


class PairTransport:
    """A :class:`~pagenet.transport.Transport` within one process, for the tasks of one Trio run.
    NAME is what each end calls the other; in it, ``%XX`` stands for the byte XX. Nobody is between
    the ends: credentials are not used."""

    has_no_link = True

    def __init__(self) -> None:
        self._listeners: dict[str, _PairListener] = {}

    async def dial(self, uri: SplitResult) -> SocketConnection:
        await trio.lowlevel.checkpoint()
        listener = self._listeners.get(uri.geturl())
        if listener is None:
            raise SourceUnreachable(f"{_name_of(uri)}: nothing listens for it in this process")
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise SourceUnreachable(f"{_name_of(uri)}: {reason(error)}") from error
        listener.put(_connection(theirs, uri))
        return _connection(ours, uri)

    async def listen(self, uri: SplitResult) -> _PairListener:
        """Listen on ``uri``, or without a number in it (``#N``) on one that nobody else has."""
        await trio.lowlevel.checkpoint()
        if not _name_of(uri):
            raise UsageError(f"{uri.geturl()}: the name is missing")
        here = uri.geturl() if uri.fragment else f"{uri.geturl()}#{next(_numbers)}"
        if here in self._listeners:
            raise UsageError(f"{here}: cannot listen: there is a listener already")
        self._listeners[here] = listener = _PairListener(here, self._listeners)
        return listener

    async def dial_tls(self, uri: SplitResult, tls: Tls) -> SocketConnection:
        return await self.dial(uri)

    async def listen_tls(self, uri: SplitResult, tls: Tls) -> _PairListener:
        return await self.listen(uri)

    def is_private(self, uri: SplitResult) -> bool:
        return True


def _name_of(uri: SplitResult) -> str:
    return unquote(uri.path)


def _connection(sock: socket.socket, uri: SplitResult) -> SocketConnection:
    sock.setblocking(False)
    return SocketConnection(trio.socket.from_stdlib_socket(sock), _name_of(uri))


class _PairListener:
    """A :class:`~pagenet.transport.Listener`, one of ``listeners`` until it is closed."""

    def __init__(self, uri: str, listeners: dict[str, _PairListener]) -> None:
        self._uri, self._listeners = uri, listeners
        self._waiting: deque[SocketConnection] = deque()
        self._changed = trio.Event()
        self._closed = False
        self._accepting = OneTask(f"accepting on {uri}")

    @property
    def uri(self) -> str:
        return self._uri

    def put(self, connection: SocketConnection) -> None:
        self._waiting.append(connection)
        self._changed.set()

    async def accept(self) -> SocketConnection:
        await trio.lowlevel.checkpoint()
        with self._accepting:
            while not self._closed:
                if self._waiting:
                    return self._waiting.popleft()
                self._changed = trio.Event()
                await self._changed.wait()
        raise ConnectionClosed(f"the listener on {self._uri} is closed")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            del self._listeners[self._uri]
            for connection in self._waiting:
                connection.close()
            self._changed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
