"""A session with a source, for one who asks for runs of pages, and places them nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from .. import _native, transport
from ..errors import (
    ConnectionClosed,
    PagenetError,
    RemoteProtocolError,
    SourceDisconnected,
    SourceLost,
)
from ..heartbeat import Heartbeat
from ..nurseries import open_failing_nursery
from ..protocol import (
    ALIVE,
    HELD,
    LANE_HEADER_SIZE,
    MAX_LZ4_BYTES,
    TRACKED,
    Alive,
    Bye,
    Channel,
    Class,
    Encoding,
    Failure,
    Hello,
    OutstandingRequests,
    Reply,
    Role,
    encodings_for,
    printable,
)
from ..region import Region, Run
from ..session import MessageStream, greet, receive_exactly, telling
from ..tls import Tls
from ..transport import Connection

__all__ = ["OnPart", "Session"]

#: called with the bytes of a run, part by part, in order; they are valid until it returns
OnPart = Callable[[memoryview], None]

# Bytes of a reply that are handed on at a time.
_PART = 256 << 10
_CHANNELS = (Channel.DEMAND, Channel.BACKGROUND)


class Session:
    """A session with the source that listens on ``uri``. ``held``: it is asked for what it has
    itself, and is to fetch nothing on our behalf.

    :meth:`run` it; :meth:`read` from the time when it is :attr:`ready`.
    """

    def __init__(self, uri: str, tls: Tls | None, held: bool) -> None:
        self._uri, self._tls, self._held = uri, tls, held
        self._connections: list[Connection] = []
        self._lanes: dict[Channel, _Lane] = {}
        #: set when it has begun, or is over
        self.ready = trio.Event()
        #: why it is over; None: it is not
        self.error: PagenetError | None = None
        self._hello: Hello | None = None

    async def run(self) -> None:
        """Dial, and keep the session until cancelled or until it is over; :attr:`error` says why
        it is."""
        try:
            stream = MessageStream(await self._dial())
            hello = await self._meet(stream)
            try:
                async with open_failing_nursery() as nursery:
                    nursery.start_soon(Heartbeat(stream, ALIVE in hello.features).run)
                    nursery.start_soon(_watch, stream)
                    for channel in _CHANNELS:
                        lane = self._lanes[channel] = await self._open_lane(channel, hello)
                        nursery.start_soon(lane.run)
                    self.ready.set()
            finally:
                with trio.CancelScope(shield=True):
                    await stream.tell(Bye(complete=False))
        except PagenetError as error:
            self.error = error
        finally:
            self._end(self.error or ConnectionClosed("the session is over"))

    def _end(self, error: PagenetError) -> None:
        self.error = error
        for connection in self._connections:
            connection.close()
        for lane in self._lanes.values():
            lane.end(error)
        self.ready.set()

    async def _dial(self) -> Connection:
        self._connections.append(await transport.dial(self._uri, self._tls))
        return self._connections[-1]

    async def _meet(self, stream: MessageStream) -> Hello:
        ours = Hello(Role.DESTINATION, Channel.CONTROL, features=frozenset({ALIVE}))
        theirs = await greet(stream, ours)
        async with telling(stream):
            if theirs.region is None or not theirs.session:
                raise RemoteProtocolError("the source's hello has no block table or no session")
        if TRACKED in theirs.features:
            raise SourceLost(f"{stream.connection.peer}: its memory still changes")
        if self._held and HELD not in theirs.features:
            raise RemoteProtocolError(f"{stream.connection.peer} is of a release without peers")
        self._hello = theirs
        return theirs

    @property
    def identity(self) -> bytes:
        assert self._hello is not None
        return self._hello.identity

    @property
    def region(self) -> Region:
        assert self._hello is not None
        assert self._hello.region is not None
        return self._hello.region

    async def _open_lane(self, channel: Channel, hello: Hello) -> _Lane:
        stream = MessageStream(await self._dial())
        features = frozenset({HELD} if self._held else ())
        await greet(stream, Hello(Role.DESTINATION, channel, hello.session, features=features))
        if stream.unread():
            raise RemoteProtocolError("the source sent pages before it was asked")
        encodings = encodings_for("auto", hello.features)
        requests = OutstandingRequests(self.region, encodings, may_be_absent=self._held)
        return _Lane(stream.connection, self.region, requests)

    async def read(self, run: Run, class_: Class, on_part: OnPart) -> bool:
        """Ask for a run within one block, of 4 MiB at most, and hand on its bytes. False: the
        source does not have them, as only one may say that is asked for what it holds.

        :exc:`~pagenet.errors.PagenetError` if they do not come."""
        if self.error is not None:
            raise self.error
        channel = Channel.BACKGROUND if class_ is Class.BACKGROUND else Channel.DEMAND
        return await self._lanes[channel].read(run, class_, on_part)


async def _watch(stream: MessageStream) -> None:
    async with telling(stream):
        while True:
            match await stream.receive():
                case Alive():
                    pass
                case None:
                    raise SourceDisconnected("the source has closed the session")
                case Failure(_, text):
                    raise SourceLost(f"the source cannot go on: {text}")
                case _:
                    raise RemoteProtocolError("the source says what it may not say here")


@dataclass(eq=False, slots=True)
class _Reading:
    on_part: OnPart
    ended: trio.Event = field(default_factory=trio.Event)
    is_there: bool = True
    error: PagenetError | None = None


class _Lane:
    """One connection, with requests one way and replies the other. Borrows the connection."""

    def __init__(
        self, connection: Connection, region: Region, requests: OutstandingRequests
    ) -> None:
        self._connection, self._region, self._requests = connection, region, requests
        self._readings: dict[int, _Reading] = {}
        self._sending = trio.Lock()
        self._part = memoryview(bytearray(_PART))
        self._packed = memoryview(bytearray())
        self._unpacked = memoryview(bytearray())

    def end(self, error: PagenetError) -> None:
        for reading in self._readings.values():
            reading.error = error
            reading.ended.set()
        self._readings.clear()

    async def read(self, run: Run, class_: Class, on_part: OnPart) -> bool:
        request = self._requests.open(class_, run)
        reading = self._readings[request.request_id] = _Reading(on_part)
        try:
            # A part of a request would be the end of the lane. Whoever ends it ends this.
            with trio.CancelScope(shield=True):
                async with self._sending:
                    await self._connection.send(request.encode())
            await reading.ended.wait()
        finally:
            reading.on_part = _ignore
        if reading.error is not None:
            raise reading.error
        return reading.is_there

    async def run(self) -> None:
        header = memoryview(bytearray(LANE_HEADER_SIZE))
        while True:
            await receive_exactly(self._connection, header)
            reply = self._requests.reply(header)
            await self._receive(reply, self._readings[reply.request_id])
            if not self._requests.is_open(reply.request_id):
                self._readings.pop(reply.request_id).ended.set()

    async def _receive(self, reply: Reply, reading: _Reading) -> None:
        match reply.encoding:
            case Encoding.FAILED:
                await receive_exactly(self._connection, self._part[: reply.length])
                text = bytes(self._part[: reply.length]).decode(errors="replace")
                raise SourceLost(f"the source cannot go on: {printable(text)}")
            case Encoding.ABSENT:
                reading.is_there = False
            case Encoding.ZERO:
                reading.on_part(memoryview(bytes(self._region.size_of(reply.run))))
            case Encoding.LZ4:
                await self._receive_packed(reply, reading)
            case Encoding.RAW:
                left = reply.length
                while left:
                    part = self._part[:left]
                    await receive_exactly(self._connection, part)
                    reading.on_part(part)
                    left -= len(part)

    async def _receive_packed(self, reply: Reply, reading: _Reading) -> None:
        if not self._packed:
            self._packed = memoryview(bytearray(MAX_LZ4_BYTES))
            self._unpacked = memoryview(bytearray(MAX_LZ4_BYTES))
        packed = self._packed[: reply.length]
        await receive_exactly(self._connection, packed)
        pages = self._unpacked[: self._region.size_of(reply.run)]
        if not _native.unpack(packed, pages):
            raise RemoteProtocolError(
                f"the source's {len(packed)} compressed bytes are not {reply.run.count} pages"
            )
        reading.on_part(pages)


def _ignore(part: memoryview) -> None:
    """Nobody waits for it any more."""
