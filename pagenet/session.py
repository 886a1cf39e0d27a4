"""The opening of a conversation: messages over a connection, and the hellos that both sides
exchange."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext, suppress

import trio

from .admission import Admission, spare_descriptors
from .errors import ConnectionBroken, ConnectionClosed, RemoteProtocolError, SourceUnreachable
from .protocol import (
    MAX_MESSAGE,
    Channel,
    Failure,
    Hello,
    Message,
    MessageDecoder,
    Role,
    encode_message,
    negotiate,
    printable,
)
from .transport import Connection, Listener

__all__ = ["MessageStream", "accept_forever", "bare", "greet", "receive_exactly", "telling"]

# A stranger who connects and says nothing holds a task and a descriptor for this long. A hello is a
# round trip.
HELLO_TIMEOUT = 10.0
# What one side has to say at the end, and waits for the other to heed: a round trip will do, and
# nobody is held up by a peer that does not listen.
LAST_WORDS_TIMEOUT = 1.0
_RECEIVE_SIZE = 16 << 10


class MessageStream:
    """Whole messages over a connection, which it borrows. ``limit``: bytes of one that the peer
    sends."""

    def __init__(self, connection: Connection, limit: int = MAX_MESSAGE) -> None:
        self.connection = connection
        self._decoder = MessageDecoder(limit)
        # Goodbyes come from whichever task notices the end first, and another may be telling the
        # peer what it did wrong.
        self._sending = trio.Lock()

    async def send(self, message: Message) -> None:
        async with self._sending:
            await self.connection.send(encode_message(message))

    async def tell(self, message: Message) -> None:
        """Send what is of no use to us, if the peer can still hear it."""
        with trio.move_on_after(LAST_WORDS_TIMEOUT), suppress(ConnectionBroken, ConnectionClosed):
            await self.send(message)

    async def answer(self, hello: Hello) -> None:
        """Say hello to a peer that has said so. It must read that in time."""
        with trio.move_on_after(HELLO_TIMEOUT) as waiting:
            await self.send(hello)
        if waiting.cancelled_caught:
            raise ConnectionBroken(
                f"the peer did not read the answer to its hello for {HELLO_TIMEOUT:g} s"
            )

    async def receive(self) -> Message | None:
        """The next message; None when the peer has closed."""
        buffer = memoryview(bytearray(_RECEIVE_SIZE))
        while (message := self._decoder.next()) is None:
            count = await self.connection.receive_into(buffer)
            if not count:
                self._decoder.check_eof()
                return None
            self._decoder.feed(buffer[:count])
        return message

    def unread(self) -> bytes:
        """What came after the last message: it belongs to whoever speaks on this connection
        next."""
        data = bytes(self._decoder.unread)
        self._decoder.unread.clear()
        return data

    def rest(self) -> Connection:
        """The connection from here on, with what has come of it already."""
        unread = self.unread()
        return _Rest(self.connection, unread) if unread else self.connection

    async def receive_hello(self, role: Role, dialled: bool = False) -> Hello:
        """The peer's hello, in time, in that role, and in a version that we speak. ``dialled``: it
        is an answer to ours, which may be that the peer is busy:
        :exc:`~pagenet.errors.SourceUnreachable`."""
        try:
            with trio.fail_after(HELLO_TIMEOUT):
                message = await self.receive()
        except trio.TooSlowError:
            raise RemoteProtocolError(f"the peer sent no hello for {HELLO_TIMEOUT:g} s") from None
        match message:
            case Hello():
                negotiate(message)
                if message.role is not role:
                    raise RemoteProtocolError(
                        f"the peer is a {message.role.value} too: one side serves, the other pulls"
                    )
                return message
            case Failure("busy", text) if dialled:
                raise SourceUnreachable(f"{self.connection.peer} is busy: {text}")
            case Failure():
                raise RemoteProtocolError(f"the peer refused: {message.text}")
            case None:
                raise ConnectionBroken("the peer closed the connection instead of a hello")
        raise RemoteProtocolError("the peer's first message is not a hello")


class _Rest:
    """A connection of which something was received too early."""

    def __init__(self, connection: Connection, unread: bytes) -> None:
        self.connection = connection
        self.unread = memoryview(unread)
        self.send = connection.send
        self.close = connection.close

    @property
    def peer(self) -> str:
        return self.connection.peer

    async def receive_into(self, buffer: memoryview) -> int:
        if not self.unread:
            return await self.connection.receive_into(buffer)
        await trio.lowlevel.checkpoint()
        count = min(len(buffer), len(self.unread))
        buffer[:count] = self.unread[:count]
        self.unread = self.unread[count:]
        return count


def bare(connection: Connection) -> Connection:
    """A connection as its transport made it, if nothing that was received of it is left to be
    read."""
    return (
        connection.connection
        if isinstance(connection, _Rest) and not connection.unread
        else connection
    )


def _opposite(role: Role) -> Role:
    return Role.DESTINATION if role is Role.SOURCE else Role.SOURCE


async def receive_exactly(connection: Connection, into: memoryview) -> None:
    """Fill ``into``. :exc:`ConnectionBroken` if the peer closes before."""
    while into:
        count = await connection.receive_into(into)
        if not count:
            raise ConnectionBroken(f"{connection.peer} closed the connection")
        into = into[count:]


async def greet(stream: MessageStream, ours: Hello) -> Hello:
    """What whoever dialled begins with: say hello, and have it answered."""
    # Whoever has answered for a lane takes what comes next for lane headers.
    async with telling(stream) if ours.channel is Channel.CONTROL else nullcontext():
        await stream.send(ours)
        theirs = await stream.receive_hello(
            _opposite(ours.role), dialled=ours.role is Role.DESTINATION
        )
        if theirs.channel is not ours.channel:
            raise RemoteProtocolError(
                f"the peer answers on channel {theirs.channel.value}, not {ours.channel.value}"
            )
        return theirs


@asynccontextmanager
async def telling(stream: MessageStream) -> AsyncIterator[None]:
    """While messages are spoken: tell the peer, if it can still hear, what it did wrong, before the
    error goes on up."""
    try:
        yield
    except RemoteProtocolError as error:
        await stream.tell(Failure("protocol", printable(str(error))))
        raise


async def accept_forever(
    listener: Listener,
    meet: Callable[[Connection], Awaitable[None]],
    admission: Admission | None = None,
) -> None:
    """Start ``meet`` for each connection that comes. It closes the connection, and lets no peer's
    mistakes out. For more than there are file descriptors, or ``admission`` says, the rest wait in
    the listener's backlog."""
    places = admission or Admission(spare_descriptors())

    async def meet_counted(connection: Connection) -> None:
        with places.connection():
            await meet(connection)

    async with trio.open_nursery() as nursery:
        while True:
            await places.wait_place()
            nursery.start_soon(meet_counted, await listener.accept())
