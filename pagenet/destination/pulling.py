"""The destination's side: a session with a source, lanes, and what goes through them."""

from __future__ import annotations

import mmap
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial

import trio

from ..background.learned import StartUp
from ..background.pacing import CHUNK_BYTES, Background
from ..background.recording import Recorder, Recording, load_recording, recording_file
from ..background.schedule import Order, Schedule, check_schedule, make_schedule
from ..background.start import Start, begin_background, parse_start
from ..errors import (
    ConnectionBroken,
    HandshakeError,
    OwnerGone,
    RemoteProtocolError,
    SourceLost,
    Unsupported,
    UsageError,
)
from ..events import EventHandler, ignore_events
from ..nurseries import open_failing_nursery, running_beside
from ..progress import complete_fields, tell_progress
from ..protocol import (
    MAX_LANES,
    MAX_REQUEST_BYTES,
    Channel,
    Compress,
    Pause,
    Stale,
    encodings_for,
)
from ..region import Region
from ..statistics import TransferStatistics
from ..target import OnLoss, Owner, Stored, Target
from ..tls import Tls
from ..transport import Connection, LaneKind, StreamHandler, has_no_link, security_of
from ..whole_file import WholeFile
from .connecting import Connecting
from .copying import Copying
from .ending import Ending, missing_of
from .filling import Filling
from .lanes import Lanes, OneSided
from .native_lanes import NativeLanes, can_run_natively
from .source_session import SourceSession
from .sources import accepted_sources, dialled_sources
from .trio_lanes import TrioLanes

__all__ = ["Transfer", "pull", "recording_to", "save"]

# The owner may leave this many of the source's pages unmapped (1 TiB of 4 KiB pages). Each costs
# a byte of the map at once, and the source alone decides how many there are: so there is a limit.
MAX_OUTSIDE = 1 << 28
# Bytes of the background in flight to a source in this process, which reads a store: as many as a
# far store needs. There is no link on which they delay a page that a thread waits for.
INNER_WINDOW = 8 << 20
MAX_BACKGROUND_LANES = MAX_LANES - 1  # one lane is for demand


class Transfer:
    """A transfer of one region to this side. Made by :func:`pull`."""

    def __init__(
        self,
        filling: Filling,
        peer: str,
        lane: str,
        streams: Sequence[Connection],
        background: Background,
        copying: Copying | None,
        connecting: Connecting,
    ) -> None:
        self.filling = filling
        self._connecting = connecting
        self._copying = copying
        self._background = background
        #: connections to the source's ``on_stream``, for the application's own bytes
        self.streams = streams
        self._released = trio.Event()
        self._may_copy = trio.Event()
        #: what drives the lanes: ``native`` or ``trio``
        self.lane = lane
        self.finished = trio.Event()
        #: the source, for people to read
        self.peer = peer

    @property
    def region(self) -> Region:
        """The source's blocks, in the owner's page sizes."""
        return self.filling.region

    def release(self) -> None:
        """Start to answer faults and fetch pages, in a transfer begun with ``held=True``."""
        self._may_copy.set()
        self._released.set()

    def copy(self) -> None:
        """Start to fetch the pages of a tracked source, in a transfer begun with ``held=True``.
        Faults still wait for :meth:`release`, and with any other source pages do, too."""
        self._may_copy.set()

    async def wait_begun(self) -> None:
        """Return when pages may be fetched."""
        await (self._released if self._copying is None else self._may_copy).wait()

    @property
    def is_released(self) -> bool:
        return self._released.is_set()

    async def wait_released(self) -> None:
        await self._released.wait()

    @property
    def round(self) -> int | None:
        """The round that a tracked source is in, from 1 on; None once its owner stands still, and
        for any other source."""
        copying = self._copying
        return None if copying is None or copying.frozen.is_set() else copying.round

    async def wait_frozen(self) -> None:
        """Return when the source's memory does not change any more. Until then no page is visible,
        and no fault is answered."""
        if self._copying is not None:
            await self._copying.frozen.wait()

    @property
    def disconnected(self) -> tuple[float, str] | None:
        """The seconds since the source went away, and why it is not back; None: it is there."""
        why = self._connecting.away
        return None if why is None else (self._connecting.seconds_away, why)

    @property
    def state(self) -> str:
        """``held`` (no fault is answered yet), ``running``, ``disconnected`` or ``complete``."""
        if self.finished.is_set():
            return "complete"
        if self.disconnected is not None:
            return "disconnected"
        return "running" if self.is_released else "held"

    @property
    def reconnected(self) -> int:
        """How often the source has come back."""
        return self._connecting.reconnected

    def give_up(self) -> None:
        """Wait no longer for a source that is away, now or later: the transfer then ends with
        :exc:`~pagenet.errors.SourceLost`."""
        self._connecting.give_up()

    @property
    def connecting(self) -> Connecting:
        """The connections to the source."""
        return self._connecting

    @property
    def is_tracked(self) -> bool:
        """Whether the source's memory changed while pages came."""
        return self._copying is not None

    @property
    def is_over(self) -> bool:
        """Whether the transfer is complete or has failed: no more pages come."""
        return self.finished.is_set() or self.filling.closed

    async def wait_complete(self) -> None:
        """Return when the transfer is complete.

        Every page is then in place or was given up by its owner, and the owner has been let go.
        """
        await self.finished.wait()

    @property
    def background(self) -> str:
        """The order in which untouched pages are fetched, by its :meth:`set_background` name."""
        schedule = self._background.schedule
        return "off" if schedule is None else schedule.name

    def set_background(self, name: Order) -> None:
        """Fetch untouched pages in that order from now on.

        ``hot``, ``follow``, ``linear``, or ``off`` to fetch none; or a function that makes a
        schedule of one's own (``examples/schedule.py``). While the source goes through
        rounds, they keep theirs, and this one follows.

        :exc:`~pagenet.errors.UsageError` if there is no such order.
        """
        check_schedule(name)
        if self._copying is not None and not self._copying.frozen.is_set():
            self._copying.schedule = partial(_schedule, name, self.filling)
        else:
            self._background.set_schedule(_schedule(name, self.filling))

    def bring_first(self, units: Sequence[int]) -> None:
        """Fetch these pages before those that the order of the background names: flat numbers of
        pages of 4 KiB."""
        background, filling = self._background, self.filling
        background.set_schedule(
            StartUp(filling.region, filling.residency, units, background.schedule)
        )

    @property
    def background_paused(self) -> bool:
        return self._background.paused

    @property
    def background_begun(self) -> bool:
        """False while the background waits for the condition in ``start_background``."""
        return self._background.begun

    def pause_background(self) -> None:
        """Request no more untouched pages until :meth:`resume_background`.

        Those in flight still come.
        """
        self._background.pause()

    def resume_background(self) -> None:
        self._background.resume()

    def begin_background(self) -> None:
        """Begin now, even if ``start_background`` means later."""
        self._background.begin()

    @property
    def max_bandwidth(self) -> int | None:
        """The background's rate limit, in bytes per second on the wire; None: no limit."""
        return self._background.max_bandwidth

    def set_max_bandwidth(self, bytes_per_second: int | None) -> None:
        """Limit the rate of the background, all its lanes together, from now on.

        Touched pages are never limited. :exc:`~pagenet.errors.UsageError` for a limit below one
        byte per second.
        """
        self._background.set_max_bandwidth(bytes_per_second)

    @property
    def prefetch(self) -> tuple[int, int] | None:
        """Pages requested after and before each page that a thread waits for.

        None: pagenet adapts the number.
        """
        return self.filling.prefetch

    def set_prefetch(self, prefetch: tuple[int, int] | None) -> None:
        """Use this prefetch window (see :attr:`prefetch`) from now on."""
        self.filling.prefetch = prefetch

    def missing(self) -> list[tuple[str, int, int]]:
        """The pages that are missing now, or were when the transfer ended: of each run, the name of
        its block, its first page within that block, and the number of pages. A page that its owner
        gave up is not missing."""
        return missing_of(self.filling)

    def statistics(self) -> TransferStatistics:
        """The statistics so far; they are final once the transfer is over."""
        return self.filling.statistics()


@asynccontextmanager
async def pull(
    uri: str,
    owner: Owner,
    *,
    listen: bool = False,
    plaintext: bool = False,
    tls: Tls | None = None,
    background: Order = "hot",
    background_lanes: int = 1,
    chunk: int = CHUNK_BYTES,
    background_window: int | None = None,
    lane: LaneKind = "auto",
    prefetch: tuple[int, int] | None = None,
    max_bandwidth: int | None = None,
    start_background: str | None = None,
    record: str | os.PathLike[str] | None = None,
    compress: Compress = "auto",
    streams: int = 0,
    held: bool = False,
    reconnect_for: float = 0.0,
    on_stream: StreamHandler | None = None,
    on_loss: OnLoss = "wait",
    progress: bool = True,
    on_event: EventHandler = ignore_events,
) -> AsyncIterator[Transfer]:
    """Fill the memory of ``owner`` from the source at ``uri`` for as long as the block runs.

    The block begins when the owner has handed over its memory, which is then in use. Leave it after
    :meth:`Transfer.wait_complete`. Leaving it earlier gives up: a thread that touches a missing
    page then waits if the owner keeps its userfaultfd, or else gets SIGBUS, but never zeros.

    ``listen``: wait at ``uri`` for the source to dial, instead of dialling it. ``plaintext`` and
    ``tls``: as in :func:`serve`. ``background``: the order in which untouched pages are fetched:
    ``hot`` (pages near the faults first), ``follow`` (on from the last fault), ``linear``,
    ``recorded=FILE`` (the order that ``record`` wrote, then ``hot``), or ``off`` to fetch touched
    pages only. ``max_bandwidth``: the background's rate limit, in bytes per second on the wire.
    Both may be changed during the transfer (:meth:`Transfer.set_background`,
    :meth:`Transfer.set_max_bandwidth`). ``start_background``: when the background begins:
    ``after=SECONDS``, or ``rate=N`` (once fewer than N faults have come within a second, checked
    ten times a second). Both count from the time when faults are answered. None: at once.
    ``record``: a file to which the order in which threads waited for pages is written at the end,
    merged with the file's record of earlier runs. A page that came before it was touched is not
    recorded: ``background="off", prefetch=(0, 0)`` records every first touch. ``background_lanes``:
    connections for the background, 1 to 63, each with its own thread; more than one helps where one
    processor cannot fill the network. ``chunk``: bytes per request on these connections, whole
    pages up to 4 MiB. ``background_window``: bytes that each of these connections may have in
    flight; None: pagenet adapts it to the path (lanes in Trio always have their own). ``lane``:
    ``native`` (loops in C), ``trio`` (the same in Trio, slow and obvious), or ``auto``: native
    where memory and transport allow it. ``prefetch``: pages requested after and before each page
    that a thread waits for (clipped to 1 MiB on either side; Yabusame has 8, 8). None: pagenet
    adapts the number: more where faults are close together or in line, none where they are random.
    ``compress``: ``auto`` (the source compresses where its link and processor make that faster),
    ``lz4`` (it compresses whatever becomes smaller) or ``none``. A source that cannot compress
    sends pages uncompressed. ``streams``: connections for the application's own bytes, to the
    ``on_stream`` of :func:`pagenet.serve`. ``held``: no fault is answered, and no page comes,
    before :meth:`Transfer.release`, because the source's memory may change until then. A tracked
    source (:func:`serve`) says itself when its memory has stopped changing
    (:meth:`Transfer.wait_frozen`), and pages come before that: at once, or if ``held``, from
    :meth:`Transfer.copy` on. ``max_bandwidth`` then limits that time alone, and
    ``start_background`` is about the time after it.

    ``reconnect_for``: seconds (``math.inf``: for ever) for which a source is waited for that does
    not answer any more, from the time when faults are answered. It is dialled, or may dial, again
    and again; threads that touch missing pages wait; once it is back, what was in flight is asked
    for again. With 0 a source that goes away ends the transfer. ``on_stream``, with ``listen``:
    called with each stream that the source opens (:meth:`~pagenet.Server.open_stream`); its errors
    end the transfer, and the connection is closed when the call returns. ``progress`` False: no
    such events.

    ``on_loss``: what becomes of the owner when the source is lost for good, that is, when this
    raises :exc:`~pagenet.errors.SourceLost` after pages were first asked for. ``wait``: its threads
    wait for missing pages, so that another destination can go on
    (:class:`~pagenet.AbandonedOwner`). ``poison``: its missing pages are poisoned (Linux 6.6); a
    thread that waits for one, or touches one, gets SIGBUS. ``kill``: it gets SIGKILL.
    :exc:`~pagenet.errors.Unsupported` if that cannot be done to this owner.

    Raises, in the block too, :exc:`~pagenet.errors.SourceUnreachable`,
    :exc:`~pagenet.errors.SourceLost`, :exc:`~pagenet.errors.OwnerGone`,
    :exc:`~pagenet.errors.RemoteProtocolError`, :exc:`~pagenet.errors.UsageError`,
    :exc:`~pagenet.errors.Unsupported`. Events: ``listening``, ``connected``, ``owner``,
    ``progress`` four times a second, ``disconnected``, ``reconnecting`` once a minute until
    ``reconnected``, ``complete``; or at an earlier end, once pages were asked for, ``missing``, and
    then ``poisoned`` or ``killed``.
    """
    if not 0 < background_lanes <= MAX_BACKGROUND_LANES:
        raise UsageError(
            f"{background_lanes} background lanes: there may be 1 to {MAX_BACKGROUND_LANES}"
        )
    if not mmap.PAGESIZE <= chunk <= MAX_REQUEST_BYTES or chunk % mmap.PAGESIZE:
        raise UsageError(
            f"chunks of {chunk} bytes: they are whole pages, of {MAX_REQUEST_BYTES >> 20} MiB at"
            " most"
        )
    if background_window is not None and background_window < mmap.PAGESIZE:
        raise UsageError(f"a window of {background_window} bytes: a page is {mmap.PAGESIZE}")
    if background_window is None and has_no_link(uri):
        background_window = INNER_WINDOW
    check_schedule(background)
    start = Start() if start_background is None else parse_start(start_background)
    if on_stream is not None and not listen:
        raise UsageError("only a source that dials opens streams: listen for it")
    channels = (
        Channel.DEMAND,
        *[Channel.BACKGROUND] * background_lanes,
        *[Channel.STREAM] * streams,
    )
    pages_go_over = channels[: 1 + background_lanes]
    meeting = (
        accepted_sources(uri, plaintext, tls, channels, on_stream, on_event)
        if listen
        else dialled_sources(uri, tls)
    )
    async with (
        Ending(on_loss, on_event) as ending,
        recording_to(record) as recording,
        meeting as sources,
    ):
        session = await sources.meet()
        filling: Filling | None = None
        connecting: Connecting | None = None
        reason = ""
        with ExitStack() as cleanup:  # after the nurseries: their tasks use what is closed here
            try:
                on_event(
                    "connected",
                    peer=session.peer,
                    pages=session.region.pages,
                    bytes=session.region.size,
                )
                early = _Early()
                async with open_failing_nursery() as nursery:
                    nursery.start_soon(session.watch, early.hear if session.is_tracked else None)
                    filling = _filling_of(await owner.attach(session.region), session, cleanup)
                    ending.begin(filling, is_still=not (held or session.is_tracked))
                    cleanup.callback(ending.deal_with_loss)
                    filling.prefetch = prefetch
                    filling.encodings = encodings_for(compress, session.features)
                    connections = [await session.open_lane(channel) for channel in channels]
                    plan = Background(
                        _schedule(background, filling),
                        chunk,
                        begun=start == Start(),
                        window=background_window,
                    )
                    plan.set_max_bandwidth(max_bandwidth)
                    if recording is not None:
                        recorder = Recorder(filling.region)
                        plan.observers.append(recorder.note)
                        cleanup.callback(save, recorder, *recording)
                    for_pages = connections[: len(pages_go_over)]
                    security = security_of(for_pages[0])
                    lanes = _make_lanes(lane, filling, session.region, for_pages, plan, cleanup)
                    connecting = Connecting(
                        sources, session, lanes, pages_go_over, filling, reconnect_for, on_event
                    )
                    name = f"{lanes.name}, {security}" if security else lanes.name
                    copying = None
                    if session.is_tracked:
                        after = partial(_schedule, background, filling)
                        copying = Copying(filling, session.region, lanes, plan, session, after)
                    nursery.cancel_scope.cancel()
                if copying is not None and early.is_paused:
                    copying.hear(Pause())
                pages, placement = filling.residency.scope, filling.target.placement
                on_event("owner", placement=placement, lane=name, pages=pages)
                async with open_failing_nursery() as nursery:
                    others = connections[len(pages_go_over) :]
                    transfer = Transfer(
                        filling, session.peer, name, others, plan, copying, connecting
                    )
                    if not held:
                        transfer.release()
                    tasks = _TransferTasks(
                        transfer, connecting, plan, start, copying, ending.arm, on_event
                    )
                    tells = progress and on_event is not ignore_events
                    nursery.start_soon(tasks.run, tells)
                    yield transfer
                    nursery.cancel_scope.cancel()
            except (UsageError, HandshakeError, OwnerGone, Unsupported) as error:
                reason = str(error)
                raise
            except (SourceLost, ConnectionBroken):
                ending.lose()
                raise
            finally:  # after the lanes: they would take the source's farewell for its loss
                if filling is None or not filling.completed.is_set():
                    last = session if connecting is None else connecting.session
                    await last.say_bye(complete=False, reason=reason)


class _Early:
    """What a tracked source says of its rounds before the owner has handed over its memory."""

    def __init__(self) -> None:
        self.is_paused = False

    def hear(self, message: Pause | Stale) -> None:
        if isinstance(message, Stale):
            raise RemoteProtocolError("the source names stale pages before a round is over")
        self.is_paused = True


def _filling_of(target: Target, session: SourceSession, cleanup: ExitStack) -> Filling:
    try:
        for ours, theirs in zip(target.region.blocks, session.region.blocks, strict=True):
            if ours.page_size < theirs.page_size:
                sizes = (
                    f"{theirs.page_size} bytes, and the owner in smaller ones of {ours.page_size}"
                )
                raise UsageError(f"the source counts block {ours.name!r} in pages of {sizes}")
        mapped = sum(run.count for run in target.scope())
        if target.region.pages - mapped > MAX_OUTSIDE:
            raise UsageError(
                f"the owner maps {mapped} of the source's {target.region.pages} pages: that is"
                " another machine"
            )
        filling = Filling(target, session.identity)
    except BaseException:
        target.close(target.scope())
        raise
    cleanup.callback(filling.close)
    return filling


def _schedule(background: Order, filling: Filling) -> Schedule | None:
    if background == "off" and filling.target.event_fd is None:
        raise UsageError(
            "no thread touches the pages of a file: with the background off none would ever come"
        )
    return make_schedule(background, filling.region, filling.residency)


@asynccontextmanager
async def recording_to(
    path: str | os.PathLike[str] | None,
) -> AsyncIterator[tuple[Recording | None, WholeFile] | None]:
    """The recording of earlier runs, and the file that replaces it.

    A bad file fails before any page moves.
    """
    if path is None:
        yield None
        return
    with recording_file(path) as file:
        yield _earlier(path), file


def _earlier(path: str | os.PathLike[str]) -> Recording | None:
    return load_recording(path) if os.path.exists(path) else None


def save(recorder: Recorder, earlier: Recording | None, file: WholeFile) -> None:
    now = recorder.recording()
    (now if earlier is None else earlier.merge(now)).write(file)


class _TransferTasks:
    """The tasks of one transfer."""

    def __init__(
        self,
        transfer: Transfer,
        connecting: Connecting,
        background: Background,
        start: Start,
        copying: Copying | None,
        on_settled: Callable[[], None],
        on_event: EventHandler,
    ) -> None:
        self._on_settled = on_settled
        self._transfer = transfer
        self._connecting = connecting
        self._copying = copying
        self._on_event = on_event
        self._filling = transfer.filling
        self._background = background
        self._start = start

    async def run(self, tells_progress: bool) -> None:
        """Fetch the pages, then let the owner go and say goodbye to the source."""
        async with open_failing_nursery() as nursery:
            if self._copying is not None:
                nursery.start_soon(self._copying.run)
            on_round = None if self._copying is None else self._copying.hear
            nursery.start_soon(self._watch_owner)
            nursery.start_soon(
                self._connecting.run, self._transfer.wait_begun, self._wait_settled, on_round
            )
            nursery.start_soon(self._begin_background)
            if tells_progress:
                nursery.start_soon(tell_progress, self._transfer, self._on_event)
            await self._filling.completed.wait()
            nursery.cancel_scope.cancel()
        if isinstance(self._filling.target, Stored):
            async with running_beside(self._connecting.keep_alive):  # a slow disk takes a while
                await self._filling.target.wait_stored()
        self._filling.finish()
        await self._connecting.session.say_bye(complete=True)
        self._filling.residency.finish()
        self._on_event("complete", **complete_fields(self._filling.statistics()))
        self._transfer.finished.set()

    async def _wait_settled(self) -> None:
        """Return when faults are answered: from then on a source that goes away is waited for."""
        await self._transfer.wait_released()
        await self._transfer.wait_frozen()
        self._on_settled()

    async def _begin_background(self) -> None:
        await self._wait_settled()
        if not self._background.begun:
            await begin_background(
                self._background, self._start, lambda: self._filling.statistics().demand.faults
            )

    async def _watch_owner(self) -> None:
        await self._filling.target.wait_gone()
        self._filling.check_complete()  # an owner that has every page may end before we notice
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
        raise UsageError(
            "lanes in C need memory behind a userfaultfd and a transport over sockets: use lane"
            " trio"
        )
    return TrioLanes(filling, wire, connections, background)
