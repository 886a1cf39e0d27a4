"""Control messages over a connection."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import inf
from urllib.parse import SplitResult

import trio

from ..errors import ConnectionBroken, RemoteProtocolError
from ..tcp import unix_uri
from ..transport import Connection
from ._protocol import Decoder, Fields, encode

__all__ = ["ControlChannel", "address_of"]

# In seconds: for the rest of a message that has begun, and for a peer to read what is sent to it.
PATIENCE = 10.0
_RECEIVE_SIZE = 16 << 10


def address_of(path: str | os.PathLike[str]) -> SplitResult:
    """The URI of ``path``, as the transport of unix sockets takes it."""
    return SplitResult("unix", "", unix_uri(os.fspath(path)).removeprefix("unix:"), "", "")


class ControlChannel:
    """Control messages over ``connection``, which is borrowed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._decoder = Decoder()
        self._buffer = memoryview(bytearray(_RECEIVE_SIZE))

    async def send(self, fields: Mapping[str, object]) -> None:
        """Send a message. :exc:`ConnectionBroken` if the peer is gone, or does not read it for
        10 s."""
        try:
            with trio.fail_after(PATIENCE):
                await self._connection.send(encode(fields))
        except trio.TooSlowError:
            raise ConnectionBroken(
                f"{self._connection.peer} does not read what it is told"
            ) from None

    async def receive(self) -> Fields | None:
        """The next message, however long it takes to begin; None when the peer has closed.
        :exc:`RemoteProtocolError` if it is no message, or is not whole 10 s after it began."""
        while (fields := self._decoder.next()) is None:
            with trio.move_on_after(PATIENCE if self._decoder.unread else inf) as scope:
                count = await self._connection.receive_into(self._buffer)
            if scope.cancelled_caught:
                raise RemoteProtocolError(f"the rest of a message did not come for {PATIENCE:g} s")
            if not count:
                self._decoder.check_eof()
                return None
            self._decoder.feed(self._buffer[:count])
        return fields
