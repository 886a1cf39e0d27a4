"""The destination's side: a session with a source, lanes, and what goes through them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import trio

from .errors import OwnerGone, UsageError
from .events import EventHandler, ignore_events
from .filling import Filling
from .lane import TrioLane
from .nurseries import open_failing_nursery
from .protocol import Channel, Class
from .region import Region, Run
from .schedule import Schedule, make_schedule
from .source_session import SourceSession, accept_source, dial_source
from .statistics import TransferStatistics
from .target import Owner, Target

__all__ = ["Transfer", "pull"]

# Background asked for at a time, and how much of it may be on its way. In Trio, 256 KiB amortise the cost of a reply, and
# four of them keep a loopback connection busy while one is placed.
CHUNK_BYTES = 256 << 10
WINDOW_BYTES = 1 << 20
# Pages of the source's that the owner may leave unmapped: 1 TiB of small ones. Each costs a byte of the map at once, and the
# source alone says how many there are.
MAX_OUTSIDE = 1 << 28


class Transfer:
    """A region on its way here. Made by :func:`pull`."""

    def __init__(self, filling: Filling, peer: str) -> None:
        self._filling = filling
        self.finished = trio.Event()
        #: the source, for people to read
        self.peer = peer

    @property
    def region(self) -> Region:
        """The source's blocks, in the owner's page sizes."""
        return self._filling.region

    async def wait_complete(self) -> None:
        """Return when every page is in place or was given up by its owner, and the owner has been let go."""
        await self.finished.wait()

    def statistics(self) -> TransferStatistics:
        """What has been done so far; the last word on it once the transfer is over."""
        return self._filling.statistics()


@asynccontextmanager
async def pull(
    uri: str,
    owner: Owner,
    *,
    listen: bool = False,
    plaintext: bool = False,
    background: str = "linear",
    on_event: EventHandler = ignore_events,
) -> AsyncIterator[Transfer]:
    """Fill the memory of ``owner`` from the source at ``uri`` for as long as the block runs.

    The block begins when the owner has handed over its memory, which is then in use. Leave it after
    :meth:`Transfer.wait_complete`; leaving it earlier gives up: whoever touches a missing page then waits, if the owner
    keeps its userfaultfd, or gets SIGBUS, but never zeros.

    ``listen``: wait at ``uri`` for the source to dial, instead of dialling it (``plaintext`` as in :func:`serve`).
    ``background``: ``linear``, or ``off`` to bring touched pages only.

    Raises, in the block too, :exc:`~pagenet.errors.SourceUnreachable`, :exc:`~pagenet.errors.SourceLost`,
    :exc:`~pagenet.errors.OwnerGone`, :exc:`~pagenet.errors.RemoteProtocolError`, :exc:`~pagenet.errors.UsageError`.
    Events: ``listening``, ``connected``, ``owner``, ``complete``.
    """
    sessions = accept_source(uri, plaintext, on_event) if listen else dial_source(uri)
    async with sessions as session:
        on_event("connected", peer=session.peer, pages=session.region.pages, bytes=session.region.size)
        filling: Filling | None = None
        with ExitStack() as cleanup:  # after the nurseries: their tasks use what is closed here
            try:
                async with open_failing_nursery() as nursery:
                    nursery.start_soon(session.watch)
                    filling = _filling_of(await owner.attach(session.region), session.region, cleanup)
                    nursery.cancel_scope.cancel()
                on_event("owner", placement=filling.target.placement, pages=filling.residency.scope)
                async with open_failing_nursery() as nursery:
                    if background == "off" and filling.target.event_fd is None:
                        raise UsageError("nobody touches the pages of a file: with the background off none would ever come")
                    transfer = Transfer(filling, session.peer)
                    run = _Run(transfer, filling, session, make_schedule(background, filling.region, filling.residency))
                    nursery.start_soon(run.run)
                    yield transfer
                    nursery.cancel_scope.cancel()
            finally:
                if filling is None or not filling.completed.is_set():
                    await session.say_bye(complete=False)


def _filling_of(target: Target, wire: Region, cleanup: ExitStack) -> Filling:
    try:
        for ours, theirs in zip(target.region.blocks, wire.blocks, strict=True):
            if ours.page_size < theirs.page_size:
                sizes = f"{theirs.page_size} bytes, and the owner in smaller ones of {ours.page_size}"
                raise UsageError(f"the source counts block {ours.name!r} in pages of {sizes}")
        mapped = sum(run.count for run in target.scope())
        if target.region.pages - mapped > MAX_OUTSIDE:
            raise UsageError(f"the owner maps {mapped} of the source's {target.region.pages} pages: that is another machine")
        filling = Filling(target)
    except BaseException:
        target.close(target.scope())
        raise
    cleanup.callback(filling.close)
    return filling


class _Run:
    """The tasks of one transfer."""

    def __init__(self, transfer: Transfer, filling: Filling, session: SourceSession, schedule: Schedule | None) -> None:
        self._transfer = transfer
        self._filling = filling
        self._session = session
        self._schedule = schedule
        self._in_flight = 0
        self._arrived = trio.Event()

    async def run(self) -> None:
        """Bring the pages; then let the owner go, and say goodbye to the source."""
        async with open_failing_nursery() as nursery:
            nursery.start_soon(self._session.watch)
            nursery.start_soon(self._watch_owner)
            await self._start_lanes(nursery)
            if self._filling.target.event_fd is not None:
                nursery.start_soon(self._read_events, self._filling.target.event_fd)
            await self._filling.completed.wait()
            nursery.cancel_scope.cancel()
        self._filling.finish()
        await self._session.say_bye(complete=True)
        self._transfer.finished.set()

    async def _start_lanes(self, nursery: trio.Nursery) -> None:
        wire = self._session.region
        demand = TrioLane(await self._session.open_lane(Channel.DEMAND), self._filling, wire)
        background = TrioLane(await self._session.open_lane(Channel.BACKGROUND), self._filling, wire, self._note_arrival)
        self._filling.demand = lambda page: demand.request_nowait(Class.DEMAND, Run(page, 1))
        nursery.start_soon(demand.run)
        nursery.start_soon(background.run)
        if self._schedule is not None:
            nursery.start_soon(self._feed, self._schedule, background)

    async def _watch_owner(self) -> None:
        await self._filling.target.wait_gone()
        raise OwnerGone("the owner of the memory is gone")

    async def _read_events(self, event_fd: int) -> None:
        while True:
            await trio.lowlevel.wait_readable(event_fd)
            self._filling.read_events()

    async def _feed(self, schedule: Schedule, lane: TrioLane) -> None:
        """Ask for what the schedule says, as long as there is room in the window."""
        while True:
            while self._in_flight >= WINDOW_BYTES:
                self._arrived = trio.Event()
                await self._arrived.wait()
            run = schedule.next_run(CHUNK_BYTES)
            if run is None:
                return
            run = self._filling.claim(run)
            self._in_flight += self._filling.region.size_of(run)
            lane.request_nowait(Class.BACKGROUND, run)

    def _note_arrival(self, size: int) -> None:
        self._in_flight -= size
        self._arrived.set()
