"""The opening of a connection: messages over it, and the hellos that both sides exchange."""

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

# In seconds. A stranger that connects and sends nothing takes a task and a descriptor for this
# long. A hello takes a round trip.
HELLO_TIMEOUT = 10.0
# In seconds: for one side's last message, and for the other side to act on it. A round trip is
# enough, and a peer that does not read delays this side no longer.
LAST_WORDS_TIMEOUT = 1.0
_RECEIVE_SIZE = 16 << 10


class MessageStream:
    """Whole messages over a connection, which is borrowed. ``limit``: bytes of a message that the
    peer sends."""

    def __init__(self, connection: Connection, limit: int = MAX_MESSAGE) -> None:
        self.connection = connection
        self._decoder = MessageDecoder(limit)
        #: how many times bytes of the peer have come
        self.received = 0
        # The task that notices the end first sends the goodbye, while another task may be sending a
        # failure.
        self._sending = trio.Lock()

    async def send(self, message: Message) -> None:
        async with self._sending:
            await self.connection.send(encode_message(message))

    async def tell(self, message: Message) -> None:
        """Send a message that matters to the peer alone, if the peer can still receive it."""
        with trio.move_on_after(LAST_WORDS_TIMEOUT), suppress(ConnectionBroken, ConnectionClosed):
            await self.send(message)

    async def answer(self, hello: Hello) -> None:
        """Answer a peer's hello with ``hello``. :exc:`ConnectionBroken` if the peer does not read
        it for 10 s."""
        with trio.move_on_after(HELLO_TIMEOUT) as waiting:
            await self.send(hello)
        if waiting.cancelled_caught:
            raise ConnectionBroken(
                f"the peer did not read the answer to its hello for {HELLO_TIMEOUT:g} s"
            )

    async def receive(self) -> Message | None:
        """The next message; None when the peer has closed. :exc:`RemoteProtocolError` for what is
        not a message."""
        buffer = memoryview(bytearray(_RECEIVE_SIZE))
        while (message := self._decoder.next()) is None:
            count = await self.connection.receive_into(buffer)
            if not count:
                self._decoder.check_eof()
                return None
            self.received += 1
            self._decoder.feed(buffer[:count])
        return message

    def unread(self) -> bytes:
        """The bytes that came after the last message. They belong to the next reader of this
        connection."""
        data = bytes(self._decoder.unread)
        self._decoder.unread.clear()
        return data

    def rest(self) -> Connection:
        """The connection from here on, including the bytes of it that came already."""
        unread = self.unread()
        return _Rest(self.connection, unread) if unread else self.connection

    async def receive_hello(self, role: Role, dialled: bool = False) -> Hello:
        """The peer's hello. :exc:`RemoteProtocolError` if it does not come within 10 s, if it is
        not from a peer in ``role``, or if it has no version in common with this side.
        :exc:`ConnectionBroken` if the peer closes instead. ``dialled``: it is an answer to our
        hello, and the peer may answer that it is busy: :exc:`SourceUnreachable`."""
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
    """A connection some of whose bytes were received too early."""

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
    """The connection as its transport made it, if no byte that was received too early is left;
    otherwise ``connection`` itself."""
    return (
        connection.connection
        if isinstance(connection, _Rest) and not connection.unread
        else connection
    )


def _opposite(role: Role) -> Role:
    return Role.DESTINATION if role is Role.SOURCE else Role.SOURCE


async def receive_exactly(connection: Connection, into: memoryview) -> None:
    """Fill ``into``. :exc:`ConnectionBroken` if the peer closes before it is full."""
    while into:
        count = await connection.receive_into(into)
        if not count:
            raise ConnectionBroken(f"{connection.peer} closed the connection")
        into = into[count:]


async def greet(stream: MessageStream, ours: Hello) -> Hello:
    """Exchange hellos from the side that dialled: send ``ours``, return the answer. Errors as of
    :meth:`MessageStream.receive_hello`."""
    # Not on a lane: a peer that has answered there takes what comes next for lane headers.
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
    """While messages are exchanged: send a peer's error to it, if it can still receive that, before
    the error is raised further."""
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
    """Start ``meet`` for each connection that comes. ``meet`` closes the connection, and raises no
    error that a peer causes. Connections beyond the limit (``admission``'s, or that of spare file
    descriptors) wait in the listener's backlog."""
    places = admission or Admission(spare_descriptors())

    async def meet_counted(connection: Connection) -> None:
        with places.connection():
            await meet(connection)

    async with trio.open_nursery() as nursery:
        while True:
            await places.wait_place()
            nursery.start_soon(meet_counted, await listener.accept())
