"""The source's side: answer requests for pages.

The source does not record which destination has which pages. It answers each connection's hello
and then serves that connection by itself: a peer that breaks the rules loses its connection, and
the others do not notice.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import inf

import trio

from .. import transport
from ..admission import Admission, spare_descriptors
from ..errors import (
    ConnectionBroken,
    ConnectionClosed,
    PagenetError,
    ProtocolError,
    RemoteProtocolError,
    SourceLost,
    SourceUnreachable,
    Unsupported,
    UsageError,
)
from ..events import EventHandler, ignore_events
from ..heartbeat import Heartbeat
from ..nurseries import open_failing_nursery, running_beside
from ..protocol import (
    ALIVE,
    HELD,
    LZ4,
    MAX_DESTINATION_MESSAGE,
    STREAMS,
    TRACKED,
    Alive,
    Bye,
    Channel,
    Class,
    Failure,
    Hello,
    Message,
    Pause,
    Paused,
    Role,
    Stale,
    printable,
)
from ..redialling import dial_again, dial_beside
from ..region import Region
from ..session import LAST_WORDS_TIMEOUT, MessageStream, accept_forever, greet, telling
from ..statistics import ServingStatistics
from ..tls import Tls
from ..transport import LaneKind, StreamHandler
from .lanes import PIN_LIMIT, OneSided, ReadableMemory
from .memory import Source, open_source_in_thread
from .native_lanes import MAX_UNREAD, NativeSourceLanes
from .rounds import Rounds, Tracker
from .trio_lane import LARGE_UNITS, Counts, TrioSourceLane

__all__ = ["MAX_LANES", "MAX_SESSIONS", "Server", "serve"]

#: Default limits of a source that listens. A lane whose peer does not read keeps at most 258 KiB,
#: so all lanes together keep at most 516 MiB, plus 32 MiB of larger units.
MAX_SESSIONS = 128
MAX_LANES = 16

# Seconds between two looks whether the keys that a destination gives back have come.
_LOOK_SECONDS = 0.001


@dataclass(eq=False, slots=True)
class _Session:
    """One destination: a control connection, and lanes that end with it."""

    session_id: bytes
    control: MessageStream
    #: the peer's names, where it is authenticated
    identity: tuple[str, ...] = ()
    #: of a destination of a tracked source
    rounds: Rounds | None = None
    #: set when no more messages come on the control connection
    ended: trio.Event = field(default_factory=trio.Event)
    lanes: set[trio.CancelScope] = field(default_factory=set)
    #: lanes whose hello was accepted and that have not ended
    lane_count: int = 0

    @contextmanager
    def lane(self) -> Iterator[None]:
        self.lane_count += 1
        try:
            yield
        finally:
            self.lane_count -= 1


def _heartbeat(session: _Session, hello: Hello) -> Heartbeat:
    return Heartbeat(session.control, ALIVE in hello.features)


async def _wait_any(*events: trio.Event) -> None:
    async with trio.open_nursery() as nursery:

        async def wait(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        for event in events:
            nursery.start_soon(wait, event)


class _Left(ConnectionBroken):
    """The destination has said goodbye, and lacks pages."""


@dataclass(eq=False)
class _Dialled:
    """A session with a destination that we have dialled, and that has said hello. Once it has
    ended: ``complete``, or because of ``error``."""

    uri: str
    session: _Session
    hello: Hello
    heartbeat: Heartbeat
    ended: trio.Event = field(default_factory=trio.Event)
    complete: bool = False
    error: PagenetError | None = None

    def close(self) -> None:
        self.session.control.connection.close()


class Server:
    """A source that is being served. Made by :func:`serve`."""

    def __init__(
        self,
        source: Source,
        native: NativeSourceLanes | None,
        on_stream: StreamHandler | None,
        on_event: EventHandler,
        pin_limit: int,
        max_sessions: int,
        max_lanes: int,
        tracked: Tracker | None,
        tls: Tls | None,
        reconnect_for: float,
    ) -> None:
        self._source, self._tls = source, tls
        self._reconnect_for = reconnect_for
        self._max_sessions, self._max_lanes = max_sessions, max_lanes
        self._tracked = tracked
        self._rounds: Rounds | None = None
        self._met = trio.Event()
        self.admission = Admission(spare_descriptors())
        self._pin_limit = pin_limit
        #: by path: the source memory that destinations on that path read themselves
        self._readable: dict[str, ReadableMemory] = {}
        self._native = native
        self._on_stream = on_stream
        self._on_event = on_event
        self._sessions: dict[bytes, _Session] = {}
        self._completed = trio.Event()
        self._persists = False
        self._dialled: _Dialled | None = None  # the session in use with a destination
        self._news = trio.Event()  # there is one
        self._redials = trio.Event()  # a lost destination is dialled again
        if reconnect_for > 0:
            self._redials.set()
        self._counts = Counts()  # of lanes in Trio
        self._large_units = trio.Semaphore(LARGE_UNITS)
        self._started = time.monotonic()
        #: where peers may dial; empty if this side dials
        self.uri = ""

    async def wait_rounds(self) -> Rounds | None:
        """The rounds of the destination of a tracked source, once it is connected. None: its
        release of pagenet is too old to know rounds, and nothing may be sent before the memory is
        at rest."""
        await self._met.wait()
        return self._rounds

    async def wait_complete(self) -> None:
        """Return once a destination has said that it has every page."""
        await self._completed.wait()

    def statistics(self) -> ServingStatistics:
        """Counts of the pages requested so far."""
        asked = {
            class_: self._counts.asked[class_] + (self._native.asked(class_) if self._native else 0)
            for class_ in Class
        }
        region = self._source.region
        seconds = time.monotonic() - self._started
        return ServingStatistics(
            region.pages, region.size, sum(asked.values()), asked[Class.DEMAND], seconds
        )

    @property
    def is_complete(self) -> bool:
        """Whether a destination has said that it has every page."""
        return self._completed.is_set()

    @property
    def region(self) -> Region:
        return self._source.region

    @property
    def peers(self) -> list[str]:
        """The destinations that are connected now, in readable form."""
        return [session.control.connection.peer for session in self._sessions.values()]

    @property
    def sessions(self) -> int:
        """The number of destinations that are connected now."""
        return len(self._sessions)

    def _hello(self, channel: Channel, session: _Session) -> Hello:
        if channel is not Channel.CONTROL:
            return Hello(Role.SOURCE, channel, session.session_id)
        source = self._source
        session_id, identity, region = session.session_id, source.identity, source.region
        features = frozenset({ALIVE, LZ4, HELD if self._is_at_rest else TRACKED})
        return Hello(Role.SOURCE, channel, session_id, identity, region, features=features)

    def rest(self) -> None:
        """Note that the memory of a tracked source does not change any more, where no destination
        goes through rounds that say so."""
        self._tracked = None

    @property
    def _is_at_rest(self) -> bool:
        """Whether the memory does not change any more, as far as is known."""
        return self._tracked is None or (self._rounds is not None and self._rounds.is_frozen)

    def _begin_rounds(self, session: _Session, hello: Hello) -> None:
        """Begin the rounds of a destination, if the memory still changes."""
        if self._tracked is not None and not self._is_at_rest and TRACKED in hello.features:
            rounds = Rounds(
                self.region,
                self._tracked,
                session.control.send,
                self._asked_for,
                self._zeros,
                self._wait_given_back,
            )
            self._rounds = session.rounds = rounds
        self._met.set()

    def _asked_for(self) -> int:
        """Pages that destinations have asked for, or got the keys to, so far."""
        granted = sum(memory.granted for memory in self._readable.values())
        return self.statistics().asked + granted

    def _zeros(self) -> int:
        """Pages that were asked for on lanes so far, and are zero."""
        return self._counts.zeros + (self._native.zeros() if self._native else 0)

    async def _wait_given_back(self) -> None:
        """Return when no destination has a key to the memory."""
        while any(memory.pinned for memory in self._readable.values()):  # noqa: ASYNC110
            await trio.sleep(_LOOK_SECONDS)

    def _make_session(self, control: MessageStream) -> _Session:
        return _Session(os.urandom(16), control, transport.identity_of(control.connection))

    @contextmanager
    def _registered(self, session: _Session) -> Iterator[None]:
        """Serve lanes of ``session`` for as long as the block runs."""
        self._sessions[session.session_id] = session
        try:
            yield
        finally:
            self._end(session)

    def _end(self, session: _Session) -> None:
        """End its lanes, and give its place to another. Idempotent."""
        self._sessions.pop(session.session_id, None)
        for lane in session.lanes:
            lane.cancel()

    # ---- destinations that dial us ----

    async def meet(self, connection: transport.Connection) -> None:
        """Serve one connection from hello to end. A peer's error ends it, with one line."""
        try:
            await self._serve_peer(MessageStream(connection, MAX_DESTINATION_MESSAGE))
        except ProtocolError as error:
            self._on_event("refused", peer=connection.peer, reason=str(error))
        except (ConnectionBroken, Unsupported) as error:
            self._on_event("lost", peer=connection.peer, reason=str(error))
        except ConnectionClosed:
            pass  # its session has ended
        finally:
            connection.close()

    async def _serve_peer(self, stream: MessageStream) -> None:
        async with telling(stream):
            with self.admission.stranger():
                hello = await stream.receive_hello(Role.DESTINATION)
            session = self._session_of(hello, stream.connection)
        if reason := self._too_many(session):
            await stream.tell(Failure("busy", reason))
            self._on_event("refused", peer=stream.connection.peer, reason=reason)
        elif session is None:
            async with telling(stream):
                await self._serve_session(stream, hello)
        else:
            with session.lane():
                await stream.answer(self._hello(hello.channel, session))
                await self._serve_lane(hello.channel, stream, session, HELD in hello.features)

    def _session_of(self, hello: Hello, connection: transport.Connection) -> _Session | None:
        if hello.channel is Channel.CONTROL:
            return None
        session = self._sessions.get(hello.session)
        # Whose it is counts, not who knows its number.
        if session is None or transport.identity_of(connection) != session.identity:
            raise RemoteProtocolError(
                "the peer opens a lane for a session that does not exist (any more)"
            )
        return session

    def _too_many(self, session: _Session | None) -> str | None:
        """Why another lane of ``session`` (None: another session) is refused; None if it is not."""
        if session is None and len(self._sessions) >= self._max_sessions:
            limit = self._max_sessions
            return (
                f"{limit} destinations are served already: wait until one is done, or raise"
                " --max-sessions there"
            )
        if session is not None and session.lane_count >= self._max_lanes:
            limit = self._max_lanes
            return (
                f"a session may have {limit} lanes: ask for fewer --background-lanes, or raise"
                " --max-lanes there"
            )
        return None

    async def _serve_session(self, control: MessageStream, hello: Hello) -> None:
        if not self._is_at_rest and TRACKED not in hello.features:
            raise RemoteProtocolError(
                "the source's memory still changes, and this release of the destination cannot be"
                " told: bring it up to date"
            )
        session = self._make_session(control)
        with self._registered(session):
            self._begin_rounds(session, hello)
            await control.answer(self._hello(Channel.CONTROL, session))
            self._on_event("connected", peer=control.connection.peer)
            await self._serve_control(session, _heartbeat(session, hello))

    # ---- destinations that we dial ----

    @property
    def identity(self) -> bytes:
        """The identity by which a destination that comes back recognises the pages."""
        return self._source.identity

    def persist(self) -> None:
        """Dial a lost destination again from now on: only this side has these pages.

        For a server that dials.
        """
        self._persists = True
        self._redials.set()

    async def open_stream(self) -> transport.Connection:
        """Open a stream to the destination that is dialled, for the application's own bytes. Waits
        until one is connected. Close it.

        For a server that dials. :exc:`~pagenet.errors.UsageError` if that destination takes no
        streams (``on_stream`` of :func:`pagenet.pull`); :exc:`SourceUnreachable`,
        :exc:`ConnectionBroken`, :exc:`RemoteProtocolError`."""
        while (dialled := self._dialled) is None:
            await self._news.wait()
        if STREAMS not in dialled.hello.features:
            peer = dialled.session.control.connection.peer
            raise UsageError(f"the destination {peer} takes no streams: bring pagenet up to date")
        return (await self._open_lane(dialled.uri, Channel.STREAM, dialled.session)).rest()

    async def dial(self, uri: str) -> None:
        """Serve the one destination that listens on ``uri``, until it is done.

        A destination that is lost is dialled again: after :meth:`persist` always, and otherwise
        for ``reconnect_for`` seconds, unless it has said goodbye. :exc:`ConnectionBroken`.
        """
        async with open_failing_nursery() as nursery:
            dialled = await self._greet(uri)
            while True:
                nursery.start_soon(self._serve_dialled, dialled)
                dialled = await self._last(dialled, nursery)
                if dialled.error is None:
                    break
                if not self._may_redial(dialled.error):
                    raise dialled.error
                dialled = await self._redial(uri, dialled.error)
            nursery.cancel_scope.cancel()

    def _may_redial(self, error: PagenetError) -> bool:
        is_lost = isinstance(error, ConnectionBroken) and not isinstance(error, _Left)
        return self._persists or (is_lost and self._is_at_rest and self._reconnect_for > 0)

    async def _redial(self, uri: str, error: PagenetError) -> _Dialled:
        told = ""

        def tell(reason: str) -> None:
            nonlocal told
            if reason != told:
                self._on_event("waiting", uri=uri, reason=reason)
            told = reason

        tell(str(error))
        with trio.move_on_after(inf if self._persists else self._reconnect_for):
            return await dial_again(partial(self._greet, uri), tell)
        raise ConnectionBroken(
            f"the destination does not come back within {self._reconnect_for:g} s: {told}"
        )

    async def _last(self, dialled: _Dialled, nursery: trio.Nursery) -> _Dialled:
        """That session, or one that has followed it, when it has ended. ``nursery``: serves them.

        The destination decides: it closes one of two, unless that breaks. It leaves a session that
        is silent once the lanes of the other one are open, and that one if this is heard again."""
        self._use(dialled)
        try:
            while (follower := await self._successor(dialled)) is not None:
                nursery.start_soon(self._serve_dialled, follower)
                await _wait_any(dialled.ended, follower.ended)
                if follower.complete or dialled.error is not None:
                    dialled = follower
                    self._use(dialled)
            return dialled
        finally:
            self._dialled, self._news = None, trio.Event()

    def _use(self, dialled: _Dialled) -> None:
        self._dialled = dialled
        self._news.set()
        dialled.heartbeat.count_lanes(self._asked_for)  # nobody asks in another session
        self._on_event("connected", peer=dialled.session.control.connection.peer)

    async def _successor(self, dialled: _Dialled) -> _Dialled | None:
        """Another session with the destination of ``dialled``, if it answers there and not here.
        None: this one has ended before."""
        found: _Dialled | None = None

        async def dial() -> None:
            nonlocal found
            await self._redials.wait()
            found = await dial_beside(dialled.heartbeat, partial(self._greet, dialled.uri))
            nursery.cancel_scope.cancel()

        async with open_failing_nursery() as nursery:
            nursery.start_soon(dial)
            await dialled.ended.wait()
            nursery.cancel_scope.cancel()
        return found

    async def _greet(self, uri: str) -> _Dialled:
        """Dial the destination that listens on ``uri``, and exchange hellos."""
        connection = await transport.dial(uri, self._tls)
        try:
            stream = MessageStream(connection, MAX_DESTINATION_MESSAGE)
            session = self._make_session(stream)
            hello = await greet(stream, self._hello(Channel.CONTROL, session))
        except BaseException:
            connection.close()
            raise
        return _Dialled(uri, session, hello, _heartbeat(session, hello))

    async def _serve_dialled(self, dialled: _Dialled) -> None:
        """Serve a destination until it is done, or lost."""
        session, hello = dialled.session, dialled.hello
        try:
            with self._registered(session):
                self._begin_rounds(session, hello)
                async with open_failing_nursery() as nursery:
                    for channel in hello.lanes:
                        nursery.start_soon(self._dial_lane, dialled.uri, channel, session)
                    dialled.complete = await self._serve_control(session, dialled.heartbeat)
                    nursery.cancel_scope.cancel()
            if not dialled.complete:
                raise _Left("the destination left before it had every page")
        except (ConnectionBroken, ProtocolError, SourceUnreachable, Unsupported) as error:
            dialled.error = None if dialled.complete else error
        finally:
            dialled.close()
            dialled.ended.set()

    async def _dial_lane(self, uri: str, channel: Channel, session: _Session) -> None:
        try:
            stream = await self._open_lane(uri, channel, session)
            with closing(stream.connection):
                await self._serve_lane(channel, stream, session)
        except SourceUnreachable as error:  # it was there a moment ago: control says why
            await trio.sleep(LAST_WORDS_TIMEOUT)
            raise ConnectionBroken(f"the destination is gone: {error}") from None
        except (ConnectionBroken, RemoteProtocolError):
            # A destination that is done closes its lanes at any point, and we may read its bye
            # later. The control connection decides, and then cancels us.
            await trio.sleep(LAST_WORDS_TIMEOUT)
            raise

    async def _open_lane(self, uri: str, channel: Channel, session: _Session) -> MessageStream:
        connection = await transport.dial(uri, self._tls)
        try:
            stream = MessageStream(connection, MAX_DESTINATION_MESSAGE)
            await greet(stream, self._hello(channel, session))
        except BaseException:
            connection.close()
            raise
        return stream

    # ---- one connection ----

    async def _serve_control(self, session: _Session, heartbeat: Heartbeat) -> bool:
        """Wait until the destination says goodbye. Return whether it has every page."""
        try:
            async with running_beside(heartbeat.run):
                return await self._end_control(session, await self._hear(session))
        finally:
            session.ended.set()
            if session.rounds is not None:
                session.rounds.end()

    async def _hear(self, session: _Session) -> Message | None:
        """The message that ends the session, after all others."""
        while True:
            match await session.control.receive():
                case Alive():
                    pass
                case Paused() as paused if session.rounds is not None:
                    session.rounds.hear(paused)
                case last:
                    return last

    async def _end_control(self, session: _Session, message: Message | None) -> bool:
        match message:
            case Bye(complete):
                if complete:
                    await self._check_unchanged(session)
                self._end(session)
                self._on_event(
                    "complete" if complete else "left", peer=session.control.connection.peer
                )
                if complete:
                    self._completed.set()
                return complete
            case Failure("gave-up", text):
                raise _Left(f"the destination gave up: {text}")
            case Failure(_, text):
                raise RemoteProtocolError(f"the peer gave up: {text}")
            case None:
                raise ConnectionBroken("the destination closed its connection before it was done")
            case Hello():
                raise RemoteProtocolError("the peer says hello twice")
            case Alive() | Pause() | Paused() | Stale():
                raise RemoteProtocolError("the peer speaks of rounds, and there are none")

    async def _serve_lane(
        self, channel: Channel, stream: MessageStream, session: _Session, held: bool = False
    ) -> None:
        """``held``: nothing is fetched for it."""
        if session.session_id not in self._sessions:
            return  # it ended while our hello was in flight
        with trio.CancelScope() as lane:
            session.lanes.add(lane)
            try:
                if channel is not Channel.STREAM:
                    unread = stream.unread()
                    await self._run_lane(channel, stream.connection, unread, session, held)
                elif self._on_stream is None:
                    raise RemoteProtocolError(
                        "the destination opens a stream, and this source has no use for one"
                    )
                else:
                    await self._on_stream(stream.rest())
            finally:
                session.lanes.discard(lane)

    async def _run_lane(
        self,
        channel: Channel,
        connection: transport.Connection,
        unread: bytes,
        session: _Session,
        held: bool,
    ) -> None:
        if isinstance(connection, OneSided):
            await self._serve_reads(connection, unread, session)
        elif (
            self._native is not None
            and not held
            and isinstance(connection, transport.Detachable)
            and len(unread) <= MAX_UNREAD
        ):
            await self._native.serve(channel, connection, unread, link=session.session_id[0])
        else:
            async with self._telling_if_lost():
                await TrioSourceLane(
                    connection, self._source, self._counts, self._large_units, held
                ).run(unread)

    async def _serve_reads(self, connection: OneSided, unread: bytes, session: _Session) -> None:
        try:
            memory = self._readable_by(connection)
            async with self._telling_if_lost():
                await connection.serve_reads(memory, unread)
        except Unsupported as error:
            await self._part([session], error)
            raise

    def _readable_by(self, connection: OneSided) -> ReadableMemory:
        path = connection.find_path()
        if path not in self._readable:
            lane: LaneKind = "trio" if self._native is None else "native"
            try:
                self._readable[path] = connection.open_memory(self._source, self._pin_limit, lane)
            except OSError as error:  # the device was there when we began to listen
                raise ConnectionBroken(str(error)) from None
            self._on_event("path", path=path)
        return self._readable[path]

    def close(self) -> None:
        """Call after the last connection. Idempotent."""
        for memory in self._readable.values():
            memory.close()
        self._readable.clear()

    async def run_native_lanes(self) -> None:
        """Run the loops in C, if there are any."""
        if self._native is not None:
            async with self._telling_if_lost():
                await self._native.run()

    # ---- the end of the source ----

    async def watch_source(self) -> None:
        """Watch the source for changes.

        After a change, the pages that destinations have and those still to come are not of the
        same moment.
        """
        async with self._telling_if_lost():
            await self._source.watch()

    async def _check_unchanged(self, session: _Session) -> None:
        """Check the source before a destination counts as complete.

        It may have received pages since the last check.
        """
        session.ended.set()
        async with self._telling_if_lost():
            self._source.check_unchanged()

    @asynccontextmanager
    async def _telling_if_lost(self) -> AsyncIterator[None]:
        """For code that reads the source: if the source is lost, tell every destination why."""
        try:
            yield
        except SourceLost as error:
            await self._part(self._sessions.values(), error)
            raise

    async def _part(self, sessions: Iterable[_Session], error: PagenetError) -> None:
        """Tell the destinations why, and let them leave, before the error closes everything.

        If the connections closed at once, their end would overtake the reason.
        """
        with trio.move_on_after(LAST_WORDS_TIMEOUT, shield=True):
            async with trio.open_nursery() as nursery:
                for session in sessions:
                    nursery.start_soon(
                        self._part_with, session, Failure("source-lost", printable(str(error)))
                    )

    async def _part_with(self, session: _Session, failure: Failure) -> None:
        await session.control.tell(failure)
        await session.ended.wait()


@asynccontextmanager
async def serve(
    source: Source | str | Sequence[str],
    *,
    listen: str | None = None,
    connect: str | None = None,
    plaintext: bool = False,
    tls: Tls | None = None,
    lane: LaneKind = "auto",
    rdma_pin_limit: int = PIN_LIMIT,
    max_sessions: int = MAX_SESSIONS,
    max_lanes: int = MAX_LANES,
    tracked: Tracker | None = None,
    reconnect_for: float = 0.0,
    on_stream: StreamHandler | None = None,
    on_event: EventHandler = ignore_events,
) -> AsyncIterator[Server]:
    """Serve ``source`` (one that is open, or what :func:`open_source` takes) for as long as the
    block runs.

    Either ``listen`` on a URI, for any number of destinations, or ``connect`` to the one
    destination that listens there. ``plaintext`` allows a listener that other hosts can reach.
    ``tls``: encrypt every connection, and trust nobody without credentials. ``lane``: ``native``
    or ``auto`` (loops in C, for connections over sockets), or ``trio`` (the same in Trio, slow and
    obvious). ``rdma_pin_limit``: bytes of the source that may be registered for RDMA, and so
    pinned, at a time. ``max_sessions``: destinations that a listener serves at a time;
    ``max_lanes``: lanes of each, streams included. More are refused. ``tracked``: the source's
    owner still writes to it, and this names what it has written (a :class:`~pagenet.WriteTracker`,
    made before). The one destination that may then connect copies pages in
    :meth:`Server.wait_rounds`, until they are frozen. ``reconnect_for``: with ``connect``, seconds
    (``math.inf``: for ever) for which a destination that was connected and is lost is dialled
    again. ``on_stream``: called with each stream that a
    destination opens for the application's own bytes; the connection is closed when the call
    returns.

    Raises :exc:`~pagenet.errors.UsageError` for a source or URI that cannot be used;
    :exc:`~pagenet.errors.SourceUnreachable` for an object whose store does not answer;
    :exc:`~pagenet.errors.SourceLost`, in the block, when the memory is gone, a stored file was
    written to, or an object was replaced or cannot be fetched; with ``connect`` also
    :exc:`~pagenet.errors.SourceUnreachable` and :exc:`~pagenet.errors.ConnectionBroken`, and
    :exc:`~pagenet.errors.Unsupported` over RDMA.
    Events: ``listening``, ``connected``, ``path`` (the RDMA device that pages go by), ``complete``,
    ``left``, ``lost``, ``refused``, ``waiting`` (for a destination that is lost).
    """
    if (listen is None) == (connect is None):
        raise UsageError("a source either listens or connects")
    uri = listen or connect or ""
    # after the nursery: its tasks use what is closed here
    with await _opened(source) as opened, ExitStack() as cleanup:
        if opened.is_filled and uri.startswith("rdma:"):
            raise UsageError(
                "an object or a snapshot is not served over rdma://: use tcp:// or unix:, or copy"
                " or export it into a file"
            )
        native = NativeSourceLanes(opened) if lane != "trio" and opened.is_native() else None
        if native is not None:
            cleanup.callback(native.close)
        server = Server(
            opened,
            native,
            on_stream,
            on_event,
            rdma_pin_limit,
            max_sessions if tracked is None else 1,
            max_lanes,
            tracked,
            tls,
            reconnect_for,
        )
        cleanup.callback(server.close)
        if listen is not None:
            listener = cleanup.enter_context(
                await transport.listen(listen, plaintext=plaintext, tls=tls)
            )
            server.uri = listener.uri
            on_event(
                "listening", uri=server.uri, pages=opened.region.pages, bytes=opened.region.size
            )
            meet_peers = partial(accept_forever, listener, server.meet, server.admission)
        else:
            assert connect is not None
            meet_peers = partial(server.dial, connect)
        async with open_failing_nursery() as nursery:
            nursery.start_soon(server.run_native_lanes)
            nursery.start_soon(server.watch_source)
            nursery.start_soon(meet_peers)
            yield server
            nursery.cancel_scope.cancel()


async def _opened(source: Source | str | Sequence[str]) -> nullcontext[Source] | Source:
    if isinstance(source, Source):
        return nullcontext(source)
    return await open_source_in_thread(*([source] if isinstance(source, str) else source))
