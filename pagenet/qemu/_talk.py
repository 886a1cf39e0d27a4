"""The messages between the two sides of a migration, over a stream of their session: msgpack maps
with a field ``say``."""

from __future__ import annotations

import math
import os
from typing import Any

import msgpack
import trio

from ..errors import ConnectionBroken, PagenetError, RemoteProtocolError
from ..protocol import printable
from ..session import bare, receive_exactly
from ..transport import Connection, Detachable
from .qmp import Qmp

__all__ = [
    "ANSWER_TIMEOUT",
    "DEVICES",
    "TALK",
    "MigrationRefused",
    "Talk",
    "give_to_qemu",
    "which_stream",
]

#: the first byte that a destination sends on a stream: the purpose of the stream
TALK, DEVICES = b"T", b"D"

#: In seconds, while the guest stands still: for a message that needs no work. A link that is dead
#: ends the connection after PEER_TIMEOUT of tcp/_constants.py; this is for a side that has stopped.
ANSWER_TIMEOUT = 10.0

_MAX_MESSAGE = 64 << 10
_PIECE = 256 << 10
# The name by which QEMU knows the socket for the devices' state.
_NAME = "pagenet-devices"


class MigrationRefused(PagenetError):
    """The other side cannot go on. The text is the reason that it gave."""


class Talk:
    """Messages over ``connection``, which is borrowed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._unpacker = msgpack.Unpacker(max_buffer_size=_MAX_MESSAGE, strict_map_key=True)
        self._sending = trio.Lock()

    async def say(self, what: str, **fields: Any) -> None:
        async with self._sending:
            await self._connection.send(msgpack.packb({"say": what, **fields}))

    async def hear(self, what: str, within: float = math.inf) -> dict[str, Any]:
        """The next message, which must be ``what``. :exc:`~pagenet.errors.PagenetError` if no
        message comes ``within`` that number of seconds, :exc:`MigrationRefused` if it is a refusal,
        :exc:`~pagenet.errors.RemoteProtocolError` if it is anything else,
        :exc:`~pagenet.errors.ConnectionBroken` if the peer closes instead."""
        with trio.move_on_after(within) as scope:
            message = await self._next()
        if scope.cancelled_caught:
            raise PagenetError(f"{self._connection.peer} did not say {what!r} for {within:g} s")
        if message["say"] == "refuse":
            raise MigrationRefused(printable(str(message.get("reason", "no reason given"))))
        if message["say"] != what:
            raise RemoteProtocolError(
                f"the peer says {printable(message['say'][:40])!r} where {what!r} was expected"
            )
        return message

    async def _next(self) -> dict[str, Any]:
        buffer = memoryview(bytearray(_MAX_MESSAGE // 2))
        while True:
            try:
                message = next(self._unpacker, None)
            except Exception as error:
                # msgpack raises ValueError, its own, and UnicodeDecodeError; all mean the same here
                raise RemoteProtocolError(
                    f"the peer's message is not msgpack: {str(error) or type(error).__name__}"
                ) from None
            if message is not None:
                break
            count = await self._connection.receive_into(buffer)
            if not count:
                raise ConnectionBroken(
                    f"{self._connection.peer} closed the connection in the middle of a migration"
                )
            try:
                self._unpacker.feed(buffer[:count])
            except msgpack.BufferFull:
                raise RemoteProtocolError(
                    f"the peer's message is longer than {_MAX_MESSAGE} bytes"
                ) from None
        if not isinstance(message, dict) or not isinstance(message.get("say"), str):
            raise RemoteProtocolError("the peer's message is not a map with a 'say'")
        return message


async def which_stream(connection: Connection) -> bytes:
    """The purpose for which the destination opened the stream: TALK or DEVICES.
    :exc:`~pagenet.errors.RemoteProtocolError` for any other."""
    byte = bytearray(1)
    await receive_exactly(connection, memoryview(byte))
    if byte not in (TALK, DEVICES):
        raise RemoteProtocolError(f"the peer opens a stream for {bytes(byte)!r}, which is unknown")
    return bytes(byte)


async def give_to_qemu(qmp: Qmp, connection: Connection, nursery: trio.Nursery) -> str:
    """Hand the socket of ``connection`` to QEMU, and return QEMU's URI for it.

    A guest that stands still waits for these bytes, and this way no process of ours has to wake up
    to pass them on. If the connection has no socket, or is encrypted, a task in ``nursery`` passes
    them on.
    """
    connection = bare(connection)
    if isinstance(connection, Detachable) and not connection.is_encrypted:
        fd = connection.detach().fd
    else:
        ours, theirs = trio.socket.socketpair()
        nursery.start_soon(_relay, connection, trio.SocketStream(ours))
        fd = theirs.detach()
    try:
        os.set_blocking(fd, True)
        await qmp.give(_NAME, fd)
    finally:
        os.close(fd)
    return f"fd:{_NAME}"


async def _relay(connection: Connection, local: trio.SocketStream) -> None:
    """Pass bytes in both directions between a peer and a socket of QEMU's, until QEMU closes its
    end."""

    async def outwards() -> None:
        while data := await local.receive_some(_PIECE):
            await connection.send(data)

    async def inwards() -> None:
        buffer = memoryview(bytearray(_PIECE))
        while count := await connection.receive_into(buffer):
            await local.send_all(buffer[:count])
        await local.send_eof()

    try:
        async with local, trio.open_nursery() as nursery:
            nursery.start_soon(inwards)
            await outwards()
            nursery.cancel_scope.cancel()
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # QEMU has closed its end; its monitor tells how the migration went
