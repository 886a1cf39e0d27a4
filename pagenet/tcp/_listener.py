"""A listening socket that keeps accepting, whatever else happens on its host."""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import trio

from ..errors import ConnectionBroken, ConnectionClosed
from ..one_task import OneTask
from ._connection import SocketConnection, reason
from ._constants import ACCEPT_PAUSE

# The next connection in the backlog died before it was accepted. accept(2) wants these errors
# treated as "try again". EPERM comes from a firewall.
_PEER_GONE = frozenset(
    {
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EPROTO,
    }
)
# This host is short of descriptors or memory. The connection still waits in the backlog.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

# Makes a connection of an accepted socket and its address. OSError if the socket cannot be used any
# more.
Welcome = Callable[[trio.socket.SocketType, Any], SocketConnection]


class SocketListener:
    """A :class:`~pagenet.transport.Listener`. It owns the socket. ``close``, if given, is called
    once, and must close the socket."""

    def __init__(
        self,
        sock: trio.socket.SocketType,
        uri: str,
        welcome: Welcome,
        close: Callable[[], None] | None = None,
    ) -> None:
        self._socket = sock
        self._uri = uri
        self._welcome = welcome
        self._close = close or sock.close
        self._closed = False
        self._accepting = OneTask(f"accepting on {uri}")

    def __repr__(self) -> str:
        return f"<SocketListener on {self._uri}: {'closed' if self._closed else 'open'}>"

    @property
    def uri(self) -> str:
        return self._uri

    async def accept(self) -> SocketConnection:
        self._check_open()
        with self._accepting:
            while True:
                connection = await self._accept_one()
                if connection is not None:
                    return connection

    async def _accept_one(self) -> SocketConnection | None:
        try:
            sock, address = await self._socket.accept()
        except trio.ClosedResourceError:
            raise self._closed_error() from None
        except OSError as error:
            await self._endure(error)
            return None
        try:
            return self._welcome(sock, address)
        except OSError:
            # The peer was gone again before the socket was set up.
            sock.close()
            return None

    async def _endure(self, error: OSError) -> None:
        self._check_open()
        if error.errno in _PEER_GONE:
            await trio.lowlevel.checkpoint()
        elif error.errno in _EXHAUSTED:
            await trio.sleep(ACCEPT_PAUSE)
        else:
            raise ConnectionBroken(f"the listener on {self._uri} broke: {reason(error)}") from error

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed_error()

    def _closed_error(self) -> ConnectionClosed:
        return ConnectionClosed(f"the listener on {self._uri} is closed")
