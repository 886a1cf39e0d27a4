"""A destination's session with a source: the control connection, and lanes on request, whichever
side dials."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from .. import transport
from ..admission import Admission, spare_descriptors
from ..errors import (
    ConnectionBroken,
    ProtocolError,
    RemoteProtocolError,
    SourceLost,
    SourceUnreachable,
)
from ..events import EventHandler
from ..nurseries import open_failing_nursery
from ..protocol import (
    TRACKED,
    Bye,
    Channel,
    Failure,
    Hello,
    Pause,
    Paused,
    Role,
    Stale,
    printable,
)
from ..session import MessageStream, accept_forever, greet, telling
from ..tls import Tls
from ..transport import Connection

__all__ = ["SourceSession", "accept_source", "dial_source"]

# The source dials its lanes at once: this is as long as a dial may take.
LANE_TIMEOUT = 10.0


class SourceSession:
    """A source that has said hello. Made by :func:`dial_source` and :func:`accept_source`, which
    close its connections."""

    def __init__(
        self,
        stream: MessageStream,
        hello: Hello,
        open_lane: Callable[[Channel], Awaitable[Connection]],
    ) -> None:
        if hello.region is None:
            raise RemoteProtocolError("the source's hello has no block table")
        self._stream = stream
        self.region = hello.region
        self.identity = hello.identity
        self.features = hello.features
        self.peer = stream.connection.peer
        #: opens a connection for a channel; the hellos are exchanged, and its lane may begin
        self.open_lane = open_lane

    @property
    def is_tracked(self) -> bool:
        """Whether the source's memory changes while it is served."""
        return TRACKED in self.features

    async def watch(self, on_round: Callable[[Pause | Stale], None] | None = None) -> None:
        """Raise the error that ends the session.

        The destination is the side that says goodbye, so an end that comes from the source is
        always an error: :exc:`SourceLost` or :exc:`RemoteProtocolError`. ``on_round``: called with
        what a tracked source says of its rounds.
        """
        try:
            async with telling(self._stream):
                while True:
                    await self._watch_once(on_round)
        except ConnectionBroken as error:
            raise SourceLost(f"the source is gone: {error}") from None

    async def _watch_once(self, on_round: Callable[[Pause | Stale], None] | None) -> None:
        match await self._stream.receive():
            case Pause() | Stale() as message if on_round is not None:
                on_round(message)
            case None | Bye():
                raise SourceLost(f"the source {self.peer} has closed the session")
            case Failure("source-lost", text):
                raise SourceLost(f"the source cannot go on: {text}")
            case Failure(_, text):
                raise SourceLost(f"the source {self.peer} gave up: {text}")
            case Hello():
                raise RemoteProtocolError("the source says hello twice")
            case Pause() | Paused() | Stale():
                raise RemoteProtocolError(
                    "the source speaks of rounds, and did not say that it is tracked"
                )

    async def say_paused(self, round_: int, missing: int) -> None:
        """Tell a tracked source that nothing is in flight."""
        try:
            await self._stream.send(Paused(round_, missing))
        except ConnectionBroken as error:
            raise SourceLost(f"the source is gone: {error}") from None

    async def say_bye(self, complete: bool, reason: str = "") -> None:
        """Tell the source, if it still listens, that we are done, or why we give up."""
        with trio.CancelScope(shield=True):
            await self._stream.tell(
                Failure("gave-up", printable(reason)) if reason else Bye(complete)
            )


def _lane_stream(hello: Hello, stream: MessageStream) -> Connection:
    if hello.channel is Channel.STREAM:
        return stream.rest()
    if stream.unread():
        raise RemoteProtocolError(
            f"the source sent pages on lane {hello.channel.value} before it was asked"
        )
    return stream.connection


@asynccontextmanager
async def dial_source(uri: str, tls: Tls | None = None) -> AsyncIterator[SourceSession]:
    """A session with the source that listens on ``uri``.

    Raises :exc:`~pagenet.errors.SourceUnreachable` if there is none.
    """
    connections: list[Connection] = []

    async def converse(connection: Connection, ours: Hello) -> tuple[Hello, MessageStream]:
        connections.append(connection)
        stream = MessageStream(connection)
        try:
            return await greet(stream, ours), stream
        except ConnectionBroken as error:
            raise SourceLost(f"the source is gone: {error}") from None

    async def open_lane(channel: Channel) -> Connection:
        try:
            connection = await transport.dial(uri, tls)
        except SourceUnreachable as error:  # it was there a moment ago
            raise SourceLost(f"the source is gone: {error}") from None
        return _lane_stream(
            *await converse(connection, Hello(Role.DESTINATION, channel, hello.session))
        )

    try:
        hello, stream = await converse(
            await transport.dial(uri, tls),
            Hello(Role.DESTINATION, Channel.CONTROL, features=frozenset({TRACKED})),
        )
        async with telling(stream):
            session = SourceSession(stream, hello, open_lane)
        yield session
    finally:
        for connection in connections:
            connection.close()


class _Reception:
    """A destination that listens.

    The first source that dials gets the session. Each lane that it dials goes to the caller of
    :meth:`open_lane` that waits for its channel.
    """

    def __init__(self, lanes: Sequence[Channel], on_event: EventHandler) -> None:
        self._wanted = lanes
        self._on_event = on_event
        self._sources_in, self.sources = trio.open_memory_channel[tuple[Hello, MessageStream]](1)
        self._lanes = {channel: trio.open_memory_channel[Connection](1) for channel in lanes}
        self._session: bytes | None = None
        self._identity: tuple[str, ...] = ()
        self._connections: list[Connection] = []
        self.admission = Admission(spare_descriptors())

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    async def open_lane(self, channel: Channel) -> Connection:
        with trio.move_on_after(LANE_TIMEOUT):
            return await self._lanes[channel][1].receive()
        raise RemoteProtocolError(
            f"the source dialled no {channel.value} lane for {LANE_TIMEOUT:g} s"
        )

    async def meet(self, connection: Connection) -> None:
        self._connections.append(connection)
        stream = MessageStream(connection)
        try:
            async with telling(stream):
                with self.admission.stranger():
                    hello = await stream.receive_hello(Role.SOURCE)
                await self._welcome(hello, stream)
        except (ProtocolError, ConnectionBroken) as error:
            self._on_event("refused", peer=connection.peer, reason=str(error))
            connection.close()
        except BaseException:
            connection.close()
            raise

    async def _welcome(self, hello: Hello, stream: MessageStream) -> None:
        if hello.channel is Channel.CONTROL:
            if self._session is not None:
                raise RemoteProtocolError("another source is being pulled from here already")
            if hello.region is None or not hello.session:
                raise RemoteProtocolError("the source's hello has no block table or no session")
            self._session = hello.session
            self._identity = transport.identity_of(stream.connection)
            try:
                await stream.send(
                    Hello(
                        Role.DESTINATION,
                        Channel.CONTROL,
                        hello.session,
                        lanes=tuple(self._wanted),
                        features=frozenset({TRACKED}),
                    )
                )
            except BaseException:
                self._session = None  # that source is gone: another one may try
                raise
            await self._sources_in.send((hello, stream))
        else:
            # Whose it is counts, not who knows its number.
            is_same = transport.identity_of(stream.connection) == self._identity
            if hello.session != self._session or not is_same:
                raise RemoteProtocolError(
                    "the source opens a lane for a session that does not exist"
                )
            await stream.send(Hello(Role.DESTINATION, hello.channel, hello.session))
            await self._lanes[hello.channel][0].send(_lane_stream(hello, stream))


@asynccontextmanager
async def accept_source(
    uri: str,
    plaintext: bool,
    tls: Tls | None,
    lanes: Sequence[Channel],
    on_event: EventHandler,
) -> AsyncIterator[SourceSession]:
    """A session with the first source that dials ``uri``. The source is asked to dial ``lanes``
    too."""
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(await transport.listen(uri, plaintext=plaintext, tls=tls))
        on_event("listening", uri=listener.uri)
        reception = _Reception(lanes, on_event)
        stack.callback(reception.close)
        nursery = await stack.enter_async_context(open_failing_nursery())
        nursery.start_soon(accept_forever, listener, reception.meet, reception.admission)
        hello, stream = await reception.sources.receive()
        yield SourceSession(stream, hello, reception.open_lane)
        nursery.cancel_scope.cancel()
