"""The destination's lanes, in Trio: ask, receive, place. Slow, and obviously right.

They are the oracle for the lanes in C. They run where those cannot, and a new transport begins with
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import trio

from .. import _native
from ..background.pacing import Background
from ..errors import ConnectionBroken, RemoteProtocolError, SourceDisconnected, SourceLost
from ..nurseries import open_failing_nursery
from ..protocol import (
    LANE_HEADER_SIZE,
    MAX_LZ4_BYTES,
    Class,
    Encoding,
    OutstandingRequests,
    Reply,
    printable,
)
from ..region import Region, Run
from ..session import receive_exactly
from ..transport import Connection
from .filling import Filling

__all__ = ["WINDOW_CHUNKS", "TrioLane", "TrioLanes", "act_on_faults", "read_events_forever"]

# Chunks of the background that may be in flight on each lane: enough to keep a loopback connection
# busy while one chunk is placed.
WINDOW_CHUNKS = 4


class TrioLanes:
    """A demand lane and background lanes, as Trio tasks.

    The first of ``connections`` is for demand. Borrows the connections.
    """

    name = "trio"

    def __init__(
        self,
        filling: Filling,
        wire: Region,
        connections: Sequence[Connection],
        background: Background,
    ) -> None:
        self._filling = filling
        self._wire = wire
        self._background = background
        self.resume(connections)

    def resume(self, connections: Sequence[Connection]) -> None:
        self._demand = TrioLane(connections[0], self._filling, self._wire, self._note_arrival)
        self._pushers = [
            _Pusher(connection, self._filling, self._wire, self._background, self._act)
            for connection in connections[1:]
        ]

    async def idle(self) -> None:
        await read_events_forever(self._filling, lambda: None)

    async def run(self) -> None:
        self._act()  # what threads wait for since before this connection
        async with open_failing_nursery() as nursery:
            nursery.start_soon(self._demand.run)
            for pusher in self._pushers:
                nursery.start_soon(pusher.run)
            await read_events_forever(self._filling, self._act)

    def _act(self) -> None:
        act_on_faults(self._filling, self._demand.request_nowait, self._background)

    def _note_arrival(self, size: int, wire_bytes: int) -> None:
        self._act()

    def withhold(self, withhold: bool) -> None:
        """Do nothing: the filling, which was told, places the pages."""

    async def give_back(self) -> None:
        """Do nothing: over a stream no keys are granted."""

    def close(self) -> None:
        """Trio lanes own nothing."""


def act_on_faults(
    filling: Filling, ask: Callable[[Class, Run], None], background: Background
) -> None:
    """Ask for what ``filling`` wants now, and tell ``background`` the pages that faulted.

    To be called after anything that may have read the owner's events.
    """
    for class_, run in filling.take_wanted():
        ask(class_, run)
    if faulted := filling.take_faulted():
        background.note_faults(faulted)


async def read_events_forever(filling: Filling, act: Callable[[], None]) -> None:
    """Read the owner's events until cancelled; return at once if the target has no events.

    ``act`` is called after each read.
    """
    if filling.target.event_fd is None:
        return
    while True:
        await trio.lowlevel.wait_readable(filling.target.event_fd)
        filling.read_events()
        act()


class _Pusher:
    """A background lane that takes its work from the schedule."""

    def __init__(
        self,
        connection: Connection,
        filling: Filling,
        wire: Region,
        background: Background,
        act: Callable[[], None],
    ) -> None:
        self._filling = filling
        self._background = background
        self._act = act  # called when pages came
        self._lane = TrioLane(connection, filling, wire, self._note_arrival)
        self._in_flight = 0
        self._arrived = trio.Event()

    async def run(self) -> None:
        async with open_failing_nursery() as nursery:
            nursery.start_soon(self._lane.run)
            await self._feed()

    async def _feed(self) -> None:
        """Ask for what the schedule names, while there is room in the window."""
        while True:
            while self._in_flight >= WINDOW_CHUNKS * self._background.chunk:
                self._arrived = trio.Event()
                await self._arrived.wait()
            await self._background.wait_turn()
            run = await self._background.next_run(self._background.turn_bytes)
            parts = list(self._filling.claim(run))
            if not parts:  # this may repeat without end if the owner writes to the map
                await trio.lowlevel.checkpoint()
            for part in parts:
                size = self._filling.region.size_of(part)
                self._in_flight += size
                self._lane.request_nowait(Class.BACKGROUND, part)
                self._background.pay(size)

    def _note_arrival(self, size: int, wire_bytes: int) -> None:
        self._in_flight -= size
        if wire_bytes < size:
            self._background.refund(size - wire_bytes)
        self._arrived.set()
        self._act()


class TrioLane:
    """One connection, and the loop that drives it.

    Runs are of the filling's pages, which may be larger than those on the wire (``wire``): a huge
    page is asked for as one unit, and comes as one. ``on_done`` is called after each reply with its
    bytes in memory and its bytes on the wire.
    """

    def __init__(
        self,
        connection: Connection,
        filling: Filling,
        wire: Region,
        on_done: Callable[[int, int], None],
    ) -> None:
        self._connection = connection
        self._filling = filling
        self._wire = wire
        self._requests = OutstandingRequests(wire, filling.encodings)
        both = 1 << Encoding.RAW | 1 << Encoding.LZ4
        self._choice = _native.DemandChoice() if filling.encodings & both == both else None
        # request of a page that a thread waits for -> (monotonic ns, whether asked for compressed)
        self._asked_at: dict[int, tuple[int, bool]] = {}
        self._on_done = on_done
        self._outbox = bytearray()
        self._asked = trio.Event()

    def request_nowait(self, class_: Class, run: Run) -> None:
        """Ask for ``run``, which the caller has claimed."""
        region = self._filling.region
        shift = region.unit_shift(region.block_index(run.first), self._wire)
        packed = class_ is not Class.BACKGROUND and self._choice is not None and self._choice.packs
        request = self._requests.open(class_, region.in_pages_of(self._wire, run), shift, packed)
        if class_ is Class.DEMAND and self._choice is not None:
            self._asked_at[request.request_id] = time.monotonic_ns(), packed
        self._outbox += request.encode()
        self._filling.residency.add(class_, "requests")
        self._asked.set()

    async def run(self) -> None:
        """Drive the lane until cancelled.

        :exc:`SourceLost` if the source cannot go on, or the connection is gone;
        :exc:`RemoteProtocolError` if the peer breaks the protocol.
        """
        # mapped here, and not earlier: a lane that never runs has nothing to release
        self._staging = _native.Mapped(1 << 20)
        self._unpacked = _native.Mapped(MAX_LZ4_BYTES)
        try:
            async with open_failing_nursery() as nursery:
                nursery.start_soon(self._send_forever)
                await self._receive_forever()
        except ConnectionBroken as error:
            raise SourceDisconnected(f"the source is gone: {error}") from None
        finally:
            self._staging.close()
            self._unpacked.close()

    async def _send_forever(self) -> None:
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            requests, self._outbox = self._outbox, bytearray()
            await self._connection.send(requests)

    async def _receive_forever(self) -> None:
        header = memoryview(bytearray(LANE_HEADER_SIZE))
        while True:
            await receive_exactly(self._connection, header)
            reply = self._requests.reply(header)
            pages = self._room(reply.length)
            await receive_exactly(self._connection, pages)
            if reply.encoding is Encoding.FAILED:
                raise SourceLost(f"the source cannot go on: {_text(pages)}")
            if reply.encoding is Encoding.LZ4:
                pages = self._unpack(reply, pages)
            self._arrived(reply, pages)

    def _unpack(self, reply: Reply, packed: memoryview) -> memoryview:
        pages = self._unpacked.buffer(0, self._wire.size_of(reply.run))
        if not _native.unpack(packed, pages):
            raise RemoteProtocolError(
                f"the peer's {len(packed)} compressed bytes are not {reply.run.count} pages"
            )
        return pages

    def _room(self, length: int) -> memoryview:
        """Staging for a payload of ``length`` bytes. It is page-aligned, private and anonymous,
        because MOVE takes pages out of it."""
        if length > self._staging.size:
            self._staging.close()
            self._staging = _native.Mapped(length)
        return self._staging.buffer(0, length)

    def _arrived(self, reply: Reply, pages: memoryview) -> None:
        run = self._wire.in_pages_of(self._filling.region, reply.run)
        data = None if reply.encoding is Encoding.ZERO else pages
        wire_bytes = LANE_HEADER_SIZE + reply.length
        self._filling.arrived(reply.class_, run, data, wire_bytes, reply.encoding is Encoding.LZ4)
        self._note_time(reply)
        self._on_done(self._filling.region.size_of(run), wire_bytes)

    def _note_time(self, reply: Reply) -> None:
        if reply.request_id in self._asked_at and not self._requests.is_open(reply.request_id):
            at, packed = self._asked_at.pop(reply.request_id)
            if self._choice is not None and reply.encoding is not Encoding.ZERO:
                took = time.monotonic_ns() - at
                self._choice.came(packed, took * 4096 // self._wire.size_of(reply.run))


def _text(reason: memoryview) -> str:
    return printable(bytes(reason).decode(errors="replace"))
