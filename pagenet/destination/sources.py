"""How a destination gets its session with a source, and the next one when that is lost: it dials,
or it listens."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Protocol

import trio

from .. import transport
from ..admission import Admission, spare_descriptors
from ..errors import (
    ConnectionBroken,
    ProtocolError,
    RemoteProtocolError,
    SourceDisconnected,
    SourceLost,
    SourceUnreachable,
)
from ..events import EventHandler
from ..nurseries import open_failing_nursery
from ..protocol import ALIVE, STREAMS, TRACKED, Channel, Hello, Role
from ..redialling import PAUSE, dial_again, dial_beside
from ..session import MessageStream, accept_forever, greet, telling
from ..tls import Tls
from ..transport import Connection, StreamHandler
from .source_session import SourceSession

__all__ = ["Sources", "accepted_sources", "dial_source", "dialled_sources"]

# The source dials its lanes at once: this is as long as a dial may take.
LANE_TIMEOUT = 10.0
# Seconds between two looks whether a source's session may be followed.
_LOOK = 0.05
_FEATURES = frozenset({ALIVE, TRACKED})


class Sources(Protocol):
    """Sessions with one source, one after the other."""

    async def meet(self) -> SourceSession:
        """The first session."""
        ...

    async def meet_again(
        self, former: SourceSession, on_failure: Callable[[str], None]
    ) -> SourceSession:
        """A session with the source of ``former``, which is over, however long it takes.
        ``on_failure`` is called with what stands in its way."""
        ...

    async def successor(self, session: SourceSession) -> SourceSession:
        """Another session with the source of ``session``, once that is silent and the source
        answers all the same."""
        ...

    async def decline(self, session: SourceSession) -> None:
        """Close a session that is not needed: the one before it is heard again."""
        ...


def _lane_stream(hello: Hello, stream: MessageStream) -> Connection:
    if hello.channel is Channel.STREAM:
        return stream.rest()
    if stream.unread():
        raise RemoteProtocolError(
            f"the source sent pages on lane {hello.channel.value} before it was asked"
        )
    return stream.connection


# ---- the destination dials ----


class DialledSources:
    """:class:`Sources` by dialling ``uri``."""

    def __init__(self, uri: str, tls: Tls | None) -> None:
        self._uri, self._tls = uri, tls
        self._sessions: list[SourceSession] = []

    def close(self) -> None:
        for session in self._sessions:
            session.close()

    async def meet(self) -> SourceSession:
        """Dial. :exc:`~pagenet.errors.SourceUnreachable` if nothing answers."""
        hello = Hello(Role.DESTINATION, Channel.CONTROL, features=_FEATURES)
        connection = await transport.dial(self._uri, self._tls)
        try:
            theirs, stream = await self._converse(connection, hello)
            async with telling(stream):
                session = SourceSession(stream, theirs, self._open_lane)
        except BaseException:
            connection.close()
            raise
        self._sessions = [*(known for known in self._sessions if not known.is_over), session]
        return session

    async def _converse(self, connection: Connection, ours: Hello) -> tuple[Hello, MessageStream]:
        stream = MessageStream(connection)
        try:
            return await greet(stream, ours), stream
        except ConnectionBroken as error:
            raise SourceDisconnected(f"the source is gone: {error}") from None

    async def _open_lane(self, session: SourceSession, channel: Channel) -> Connection:
        try:
            connection = await transport.dial(self._uri, self._tls)
        except SourceUnreachable as error:  # it was there a moment ago
            raise SourceDisconnected(f"the source is gone: {error}") from None
        session.connections.append(connection)
        hello = Hello(Role.DESTINATION, channel, session.session_id)
        return _lane_stream(*await self._converse(connection, hello))

    async def meet_again(
        self, former: SourceSession, on_failure: Callable[[str], None]
    ) -> SourceSession:
        return await dial_again(partial(self._dial_after, former), on_failure)

    async def _dial_after(self, former: SourceSession) -> SourceSession:
        session = await self.meet()
        try:
            session.check_follows(former)
        except SourceLost as error:
            await session.say_bye(complete=False, reason=str(error))
            session.close()
            raise
        return session

    async def successor(self, session: SourceSession) -> SourceSession:
        return await dial_beside(session.heartbeat, partial(self._dial_after, session))

    async def decline(self, session: SourceSession) -> None:
        await session.say_bye(complete=False)
        session.close()


@asynccontextmanager
async def dialled_sources(uri: str, tls: Tls | None = None) -> AsyncIterator[DialledSources]:
    """Sessions with the source that listens on ``uri``."""
    sources = DialledSources(uri, tls)
    try:
        yield sources
    finally:
        sources.close()


@asynccontextmanager
async def dial_source(uri: str, tls: Tls | None = None) -> AsyncIterator[SourceSession]:
    """A session with the source that listens on ``uri``.

    Raises :exc:`~pagenet.errors.SourceUnreachable` if there is none.
    """
    async with dialled_sources(uri, tls) as sources:
        yield await sources.meet()


# ---- the source dials ----


class _Lanes:
    """The lanes that the source dials in one session."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._of = {channel: trio.open_memory_channel[Connection](1) for channel in channels}
        self._missing = Counter(channels)

    def expect(self, channel: Channel) -> bool:
        """Whether the source was asked for this lane, and has not dialled it before."""
        is_expected = self._missing[channel] > 0
        self._missing[channel] -= is_expected
        return is_expected

    async def put(self, channel: Channel, connection: Connection) -> None:
        await self._of[channel][0].send(connection)

    async def open(self, session: SourceSession, channel: Channel) -> Connection:
        with trio.move_on_after(LANE_TIMEOUT):
            return await self._of[channel][1].receive()
        raise RemoteProtocolError(
            f"the source dialled no {channel.value} lane for {LANE_TIMEOUT:g} s"
        )


class AcceptedSources:
    """:class:`Sources` that dial this side.

    The first source that dials gets the session, and only that source gets the next one. Each lane
    that it dials goes to the caller of :meth:`SourceSession.open_lane` that waits for its channel.
    It is asked to dial ``channels``; in later sessions, those that pages go over. A stream that it
    opens unasked is for ``on_stream``.
    """

    def __init__(
        self, channels: Sequence[Channel], on_stream: StreamHandler | None, on_event: EventHandler
    ) -> None:
        self._on_event = on_event
        self._on_stream = on_stream
        self._features = _FEATURES if on_stream is None else _FEATURES | {STREAMS}
        self._on_failure: Callable[[str], None] | None = None
        self._met_in, self._met = trio.open_memory_channel[SourceSession](1)
        self._wanted = tuple(channels)
        self._is_first = True
        self._is_answering = False
        self._former: SourceSession | None = None  # somebody waits for the one after it
        #: by their numbers: the session in use, and one that may follow it
        self._sessions: dict[bytes, tuple[SourceSession, _Lanes]] = {}
        self.admission = Admission(spare_descriptors())

    def close(self) -> None:
        for session, _ in self._sessions.values():
            session.close()

    async def meet(self) -> SourceSession:
        return await self._met.receive()

    async def meet_again(
        self, former: SourceSession, on_failure: Callable[[str], None]
    ) -> SourceSession:
        self._on_failure = on_failure
        try:
            return await self.successor(former)
        finally:
            self._on_failure = None

    async def successor(self, session: SourceSession) -> SourceSession:
        self._former = session
        try:
            return await self._met.receive()
        finally:
            self._former = None

    async def decline(self, session: SourceSession) -> None:
        session.close()  # without goodbye: the source goes on with the session before

    async def meet_peer(self, connection: Connection) -> None:
        stream = MessageStream(connection)
        try:
            async with telling(stream):
                with self.admission.stranger():
                    hello = await stream.receive_hello(Role.SOURCE)
                await self._welcome(hello, stream)
        except (ProtocolError, ConnectionBroken) as error:
            if self._on_failure is not None:
                self._on_failure(f"{connection.peer}: refused: {error}")
            self._on_event("refused", peer=connection.peer, reason=str(error))
            connection.close()
        except BaseException:
            connection.close()
            raise

    async def _welcome(self, hello: Hello, stream: MessageStream) -> None:
        if hello.channel is Channel.CONTROL:
            await self._welcome_source(hello, stream)
        else:
            await self._welcome_lane(hello, stream)

    async def _welcome_source(self, hello: Hello, stream: MessageStream) -> None:
        if hello.region is None or not hello.session:
            raise RemoteProtocolError("the source's hello has no block table or no session")
        is_first, wanted = self._is_first and not self._is_answering, self._wanted
        if not is_first:
            wanted = tuple(channel for channel in wanted if channel is not Channel.STREAM)
        lanes = _Lanes(wanted)
        session = SourceSession(stream, hello, lanes.open)
        if not is_first:
            self._check_follows(session, await self._followed())
        self._keep(session, lanes)
        answer = Hello(
            Role.DESTINATION, Channel.CONTROL, hello.session, lanes=wanted, features=self._features
        )
        self._is_answering = True
        try:
            await stream.send(answer)
        except BaseException:
            session.close()  # it is gone: another one may try
            raise
        finally:
            self._is_answering = False
        self._is_first, self._former = False, None
        await self._met_in.send(session)

    async def _followed(self) -> SourceSession:
        """The session that another one may follow now. :exc:`RemoteProtocolError` if there is none
        within ``PAUSE`` seconds: the source may notice a silence a little earlier."""
        with trio.move_on_after(PAUSE):
            while True:
                former = self._former
                if former is not None and former.may_be_followed and not self._is_answering:
                    return former
                await trio.sleep(_LOOK)
        raise RemoteProtocolError("another source is being pulled from here already")

    def _check_follows(self, session: SourceSession, former: SourceSession) -> None:
        try:
            session.check_follows(former)
        except SourceLost as error:
            raise RemoteProtocolError(str(error)) from None

    def _keep(self, session: SourceSession, lanes: _Lanes) -> None:
        """Accept lanes of it."""
        known = self._sessions.items()
        self._sessions = {number: kept for number, kept in known if not kept[0].is_over}
        self._sessions[session.session_id] = session, lanes

    async def _welcome_lane(self, hello: Hello, stream: MessageStream) -> None:
        names = transport.identity_of(stream.connection)
        session, lanes = self._sessions.get(hello.session, (None, None))
        # Whose it is counts, not who knows its number.
        if session is None or lanes is None or session.is_over or session.names != names:
            raise RemoteProtocolError("the source opens a lane for a session that does not exist")
        handler = None
        if not lanes.expect(hello.channel):
            handler = self._on_stream if hello.channel is Channel.STREAM else None
            if handler is None:
                raise RemoteProtocolError("the source opens a lane that it was not asked for")
        session.connections.append(stream.connection)
        await stream.send(Hello(Role.DESTINATION, hello.channel, hello.session))
        connection = _lane_stream(hello, stream)
        if handler is None:
            await lanes.put(hello.channel, connection)
        else:
            await handler(connection)
            connection.close()


@asynccontextmanager
async def accepted_sources(
    uri: str,
    plaintext: bool,
    tls: Tls | None,
    channels: Sequence[Channel],
    on_stream: StreamHandler | None,
    on_event: EventHandler,
) -> AsyncIterator[AcceptedSources]:
    """Sessions with the source that dials ``uri``, which is asked to dial ``channels`` too. Each
    stream that it opens unasked is for ``on_stream``."""
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(await transport.listen(uri, plaintext=plaintext, tls=tls))
        on_event("listening", uri=listener.uri)
        sources = AcceptedSources(channels, on_stream, on_event)
        stack.callback(sources.close)
        nursery = await stack.enter_async_context(open_failing_nursery())
        nursery.start_soon(accept_forever, listener, sources.meet_peer, sources.admission)
        yield sources
        nursery.cancel_scope.cancel()
