"""The destination's side: a session with a source, lanes, and what goes through them."""

from __future__ import annotations

import mmap
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager

import trio

from ..background.pacing import CHUNK_BYTES, Background
from ..background.recording import Recorder, Recording, load_recording, recording_file
from ..background.schedule import Schedule, check_schedule, make_schedule
from ..background.start import Start, begin_background, parse_start
from ..errors import HandshakeError, OwnerGone, Unsupported, UsageError
from ..events import EventHandler, ignore_events
from ..nurseries import open_failing_nursery
from ..progress import complete_fields, tell_progress
from ..protocol import MAX_LANES, MAX_REQUEST_BYTES, Channel, Compress, encodings_for
from ..region import Region
from ..statistics import TransferStatistics
from ..target import Owner, Stored, Target
from ..transport import Connection, LaneKind
from ..whole_file import WholeFile
from .filling import Filling
from .lanes import Lanes, OneSided
from .native_lanes import NativeLanes, can_run_natively
from .source_session import SourceSession, accept_source, dial_source
from .trio_lanes import TrioLanes

__all__ = ["Transfer", "pull"]

# Pages of the source's that the owner may leave unmapped: 1 TiB of small ones. Each costs a byte of the map at once, and the
# source alone says how many there are.
MAX_OUTSIDE = 1 << 28
MAX_BACKGROUND_LANES = MAX_LANES - 1  # and one for demand


class Transfer:
    """A region on its way here. Made by :func:`pull`."""

    def __init__(self, filling: Filling, peer: str, lane: str, streams: Sequence[Connection], background: Background) -> None:
        self.filling = filling
        self._background = background
        #: to the source's ``on_stream``, for the application's own bytes
        self.streams = streams
        self._released = trio.Event()
        #: who drives the lanes: ``native`` or ``trio``
        self.lane = lane
        self.finished = trio.Event()
        #: the source, for people to read
        self.peer = peer

    @property
    def region(self) -> Region:
        """The source's blocks, in the owner's page sizes."""
        return self.filling.region

    def release(self) -> None:
        """Answer faults, and bring pages, from now on: of a transfer that was begun ``held``."""
        self._released.set()

    @property
    def is_released(self) -> bool:
        return self._released.is_set()

    async def wait_released(self) -> None:
        await self._released.wait()

    @property
    def is_over(self) -> bool:
        """It is complete, or has failed: nothing comes any more."""
        return self.finished.is_set() or self.filling.closed

    async def wait_complete(self) -> None:
        """Return when every page is in place or was given up by its owner, and the owner has been let go."""
        await self.finished.wait()

    @property
    def background(self) -> str:
        """The order in which untouched pages come: a name that :meth:`set_background` takes."""
        schedule = self._background.schedule
        return "off" if schedule is None else schedule.name

    def set_background(self, name: str) -> None:
        """Bring untouched pages in that order from now on: ``hot``, ``follow``, ``linear``, or ``off`` to bring none.

        :exc:`~pagenet.errors.UsageError` if there is no such order.
        """
        check_schedule(name)
        self._background.set_schedule(_schedule(name, self.filling))

    @property
    def background_paused(self) -> bool:
        return self._background.paused

    @property
    def background_begun(self) -> bool:
        """False while it waits for what ``start_background`` names."""
        return self._background.begun

    def pause_background(self) -> None:
        """Ask for no more untouched pages until :meth:`resume_background`; those asked for still come."""
        self._background.pause()

    def resume_background(self) -> None:
        self._background.resume()

    def begin_background(self) -> None:
        """Begin now, if ``start_background`` would have it begin later."""
        self._background.begin()

    @property
    def max_bandwidth(self) -> int | None:
        """Bytes a second that untouched pages may take on the wire; None: no limit."""
        return self._background.max_bandwidth

    def set_max_bandwidth(self, bytes_per_second: int | None) -> None:
        """How fast the background may be, on all its lanes together, from now on. Touched pages are never held up.

        :exc:`~pagenet.errors.UsageError` if that is less than a byte a second.
        """
        self._background.set_max_bandwidth(bytes_per_second)

    @property
    def prefetch(self) -> tuple[int, int] | None:
        """Pages asked for behind and before each page that somebody waits for; None: as many as seem right."""
        return self.filling.prefetch

    def set_prefetch(self, prefetch: tuple[int, int] | None) -> None:
        """From now on."""
        self.filling.prefetch = prefetch

    def statistics(self) -> TransferStatistics:
        """What has been done so far; the last word on it once the transfer is over."""
        return self.filling.statistics()


@asynccontextmanager
async def pull(
    uri: str,
    owner: Owner,
    *,
    listen: bool = False,
    plaintext: bool = False,
    background: str = "hot",
    background_lanes: int = 1,
    chunk: int = CHUNK_BYTES,
    lane: LaneKind = "auto",
    prefetch: tuple[int, int] | None = None,
    max_bandwidth: int | None = None,
    start_background: str | None = None,
    record: str | os.PathLike[str] | None = None,
    compress: Compress = "auto",
    streams: int = 0,
    held: bool = False,
    on_event: EventHandler = ignore_events,
) -> AsyncIterator[Transfer]:
    """Fill the memory of ``owner`` from the source at ``uri`` for as long as the block runs.

    The block begins when the owner has handed over its memory, which is then in use. Leave it after
    :meth:`Transfer.wait_complete`; leaving it earlier gives up: whoever touches a missing page then waits, if the owner
    keeps its userfaultfd, or gets SIGBUS, but never zeros.

    ``listen``: wait at ``uri`` for the source to dial, instead of dialling it (``plaintext`` as in :func:`serve`).
    ``background``: the order in which untouched pages come: ``hot`` (first what is near the faults), ``follow`` (on from the
    last fault), ``linear``, ``recorded=FILE`` (as ``record`` wrote it, then ``hot``), or ``off`` to bring touched pages only.
    ``max_bandwidth``: bytes of them a second, on the wire. Both may be changed while it runs (:meth:`Transfer.set_background`).
    ``start_background``: ``after=SECONDS``, or ``rate=N``: begin once fewer than N faults have come within a second (looked at
    ten times a second); both count from when faults are answered (None: at once).
    ``record``: a file that the order in which threads waited for pages is written to at the end, merged with what it has of
    earlier runs. What came before it was touched is not in it: ``background="off", prefetch=(0, 0)`` records every first
    touch. ``background_lanes``: connections for it, 1 to 63, each with a thread of its own; more than one where a processor
    cannot fill the network. ``chunk``: bytes asked for at a time on them, whole pages up to 4 MiB. ``lane``: ``native``
    (loops in C), ``trio`` (the same in Trio, slow and obvious), or ``auto``: native where memory and transport allow it.
    ``prefetch``: pages asked for behind and before each page that somebody waits for (clipped to 1 MiB on either side;
    Yabusame has 8, 8); None: as many as seem right, more where faults are close together or in line, none where they are
    random.
    ``compress``: ``auto`` (the source compresses where its link and processor make that faster), ``lz4`` (whatever becomes
    smaller), ``none``; a source that cannot compress does not. ``streams``: connections
    for the application's own bytes, to the ``on_stream`` of :func:`pagenet.serve`. ``held``: no fault is answered before
    :meth:`Transfer.release`, because until then the source's memory may change.

    Raises, in the block too, :exc:`~pagenet.errors.SourceUnreachable`, :exc:`~pagenet.errors.SourceLost`,
    :exc:`~pagenet.errors.OwnerGone`, :exc:`~pagenet.errors.RemoteProtocolError`, :exc:`~pagenet.errors.UsageError`,
    :exc:`~pagenet.errors.Unsupported`.
    Events: ``listening``, ``connected``, ``owner``, ``progress`` four times a second, ``complete``.
    """
    if not 0 < background_lanes <= MAX_BACKGROUND_LANES:
        raise UsageError(f"{background_lanes} background lanes: there may be 1 to {MAX_BACKGROUND_LANES}")
    if not mmap.PAGESIZE <= chunk <= MAX_REQUEST_BYTES or chunk % mmap.PAGESIZE:
        raise UsageError(f"chunks of {chunk} bytes: they are whole pages, of {MAX_REQUEST_BYTES >> 20} MiB at most")
    check_schedule(background)
    start = Start() if start_background is None else parse_start(start_background)
    channels = (Channel.DEMAND, *[Channel.BACKGROUND] * background_lanes, *[Channel.STREAM] * streams)
    sessions = accept_source(uri, plaintext, channels, on_event) if listen else dial_source(uri)
    async with _recording_to(record) as recording, sessions as session:
        filling: Filling | None = None
        reason = ""
        with ExitStack() as cleanup:  # after the nurseries: their tasks use what is closed here
            try:
                on_event("connected", peer=session.peer, pages=session.region.pages, bytes=session.region.size)
                async with open_failing_nursery() as nursery:
                    nursery.start_soon(session.watch)
                    filling = _filling_of(await owner.attach(session.region), session, cleanup)
                    filling.prefetch = prefetch
                    filling.encodings = encodings_for(compress, session.features)
                    connections = [await session.open_lane(channel) for channel in channels]
                    plan = Background(_schedule(background, filling), chunk, begun=start == Start())
                    plan.set_max_bandwidth(max_bandwidth)
                    if recording is not None:
                        recorder = Recorder(filling.region)
                        plan.observers.append(recorder.note)
                        cleanup.callback(_save, recorder, *recording)
                    pages_go_over, others = connections[: 1 + background_lanes], connections[1 + background_lanes :]
                    lanes = _make_lanes(lane, filling, session.region, pages_go_over, plan, cleanup)
                    nursery.cancel_scope.cancel()
                pages, placement = filling.residency.scope, filling.target.placement
                on_event("owner", placement=placement, lane=lanes.name, pages=pages)
                async with open_failing_nursery() as nursery:
                    transfer = Transfer(filling, session.peer, lanes.name, others, plan)
                    if not held:
                        transfer.release()
                    nursery.start_soon(_TransferTasks(transfer, session, lanes, plan, start, on_event).run)
                    yield transfer
                    nursery.cancel_scope.cancel()
            except (UsageError, HandshakeError, OwnerGone, Unsupported) as error:
                reason = str(error)
                raise
            finally:  # after the lanes: they would take the source's farewell for its loss
                if filling is None or not filling.completed.is_set():
                    await session.say_bye(complete=False, reason=reason)


def _filling_of(target: Target, session: SourceSession, cleanup: ExitStack) -> Filling:
    try:
        for ours, theirs in zip(target.region.blocks, session.region.blocks, strict=True):
            if ours.page_size < theirs.page_size:
                sizes = f"{theirs.page_size} bytes, and the owner in smaller ones of {ours.page_size}"
                raise UsageError(f"the source counts block {ours.name!r} in pages of {sizes}")
        mapped = sum(run.count for run in target.scope())
        if target.region.pages - mapped > MAX_OUTSIDE:
            raise UsageError(f"the owner maps {mapped} of the source's {target.region.pages} pages: that is another machine")
        filling = Filling(target, session.identity)
    except BaseException:
        target.close(target.scope())
        raise
    cleanup.callback(filling.close)
    return filling


def _schedule(background: str, filling: Filling) -> Schedule | None:
    if background == "off" and filling.target.event_fd is None:
        raise UsageError("nobody touches the pages of a file: with the background off none would ever come")
    return make_schedule(background, filling.region, filling.residency)


@asynccontextmanager
async def _recording_to(path: str | os.PathLike[str] | None) -> AsyncIterator[tuple[Recording | None, WholeFile] | None]:
    """What earlier runs have left there, and the file that takes its place: refused before anything has moved."""
    if path is None:
        yield None
        return
    with recording_file(path) as file:
        yield _earlier(path), file


def _earlier(path: str | os.PathLike[str]) -> Recording | None:
    return load_recording(path) if os.path.exists(path) else None


def _save(recorder: Recorder, earlier: Recording | None, file: WholeFile) -> None:
    now = recorder.recording()
    (now if earlier is None else earlier.merge(now)).write(file)


class _TransferTasks:
    """The tasks of one transfer."""

    def __init__(
        self,
        transfer: Transfer,
        session: SourceSession,
        lanes: Lanes,
        background: Background,
        start: Start,
        on_event: EventHandler,
    ) -> None:
        self._transfer = transfer
        self._on_event = on_event
        self._filling = transfer.filling
        self._session = session
        self._lanes = lanes
        self._background = background
        self._start = start

    async def run(self) -> None:
        """Bring the pages; then let the owner go, and say goodbye to the source."""
        async with open_failing_nursery() as nursery:
            nursery.start_soon(self._session.watch)
            nursery.start_soon(self._watch_owner)
            nursery.start_soon(self._run_lanes)
            nursery.start_soon(self._begin_background)
            if self._on_event is not ignore_events:
                nursery.start_soon(tell_progress, self._transfer, self._on_event)
            await self._filling.completed.wait()
            nursery.cancel_scope.cancel()
        if isinstance(self._filling.target, Stored):
            await self._filling.target.wait_stored()
        self._filling.finish()
        await self._session.say_bye(complete=True)
        self._filling.residency.finish()
        self._on_event("complete", **complete_fields(self._filling.statistics()))
        self._transfer.finished.set()

    async def _run_lanes(self) -> None:
        await self._transfer.wait_released()
        await self._lanes.run()

    async def _begin_background(self) -> None:
        await self._transfer.wait_released()
        if not self._background.begun:
            await begin_background(self._background, self._start, lambda: self._filling.statistics().demand.faults)

    async def _watch_owner(self) -> None:
        await self._filling.target.wait_gone()
        self._filling.check_complete()  # an owner may end as soon as it has its last page: then it had them all
        if not self._filling.completed.is_set():
            raise OwnerGone("the owner of the memory is gone")


def _make_lanes(
    lane: LaneKind,
    filling: Filling,
    wire: Region,
    connections: Sequence[Connection],
    background: Background,
    cleanup: ExitStack,
) -> Lanes:
    first = connections[0]
    if isinstance(first, OneSided):
        reading = first.make_lanes(filling, wire, connections, background, lane)
        cleanup.callback(reading.close)
        return reading
    if lane != "trio" and can_run_natively(filling.target, connections):
        native = NativeLanes(filling, wire, connections, background)
        cleanup.callback(native.close)
        return native
    if lane == "native":
        raise UsageError("lanes in C need memory behind a userfaultfd and a transport over sockets: use lane trio")
    return TrioLanes(filling, wire, connections, background)
