"""A host cache: the pages of one source, fetched once, of which many guests are filled."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any, Literal

import trio

from .. import _native
from ..background.learned import StartUp
from ..background.pacing import Background
from ..background.recording import Recorder
from ..background.schedule import make_schedule
from ..errors import HandshakeError, OwnerGone, SourceLost, Unsupported, UsageError
from ..events import EventHandler, ignore_events
from ..nurseries import open_failing_nursery, running_beside
from ..progress import complete_fields
from ..target import OnLoss
from ..uffd import CacheMemory, ConnectedOwner, SharedFile, UffdTarget
from .cached_lanes import CachedLanes
from .ending import Ending
from .filling import Filling
from .greeting import Greeting
from .learning import LearnedPlace, Learning, Restoring
from .pulling import Transfer, pull, recording_to, save

__all__ = ["Fill", "HostCache", "caching"]

#: what of its memory a guest gets: the pages that its threads touch, and those around them; or all
Fill = Literal["touched", "all"]


class HostCache:
    """Pages of a source in this host's memory. Made by :func:`caching`."""

    def __init__(
        self,
        transfer: Transfer,
        memory: CacheMemory,
        crew: _native.Crew,
        background: str,
        learning: Learning | None,
    ) -> None:
        #: what fills it
        self.transfer = transfer
        self._memory, self._crew, self._background = memory, crew, background
        self._learning = learning
        self._users = 0
        self._unused = trio.Event()
        self._unused.set()
        self._over = trio.Event()

    @property
    def bytes_resident(self) -> int:
        """What its pages take of this host's memory."""
        return self._memory.cache.resident * self._memory.page_size

    @property
    def native(self) -> _native.Cache:
        return self._memory.cache

    @property
    def file(self) -> SharedFile:
        """What owners may map."""
        return self._memory.shared

    async def wait_unused(self) -> None:
        """Return when no guest is filled from it."""
        await self._unused.wait()

    def end(self) -> None:
        """Note that no more pages come into it: guests that miss some have lost their source."""
        self._over.set()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep it for as long as the block runs."""
        if not self._users:
            self._unused = trio.Event()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    @asynccontextmanager
    async def fill(
        self,
        owner: ConnectedOwner,
        greeting: Greeting | None = None,
        *,
        fill: Fill = "all",
        prefetch: tuple[int, int] | None = None,
        record: str | os.PathLike[str] | None = None,
        on_loss: OnLoss = "wait",
        on_event: EventHandler = ignore_events,
    ) -> AsyncIterator[Transfer]:
        """Fill the memory of ``owner`` for as long as the block runs: as :func:`pagenet.pull` does,
        but from the cache. If it maps the cache's file, its pages are shared, and it is never
        complete. ``greeting``: what has answered its first faults."""
        with self.in_use():
            async with Ending(on_loss, on_event) as ending, recording_to(record) as recording:
                with ExitStack() as cleanup:
                    if greeting is not None:
                        greeting.stop_listening()
                    target = await owner.attach(self.transfer.region, self._memory.shared)
                    filling = self._filling_of(target, ending, cleanup)
                    filling.prefetch = prefetch
                    restoring = (
                        None
                        if self._learning is None
                        else cleanup.enter_context(self._learning.restore(filling))
                    )
                    plan = self._plan(filling, fill, restoring)
                    if recording is not None:
                        recorder = Recorder(filling.region)
                        plan.observers.append(recorder.note)
                        cleanup.callback(save, recorder, *recording)
                    if greeting is not None:
                        plan.note_faults(filling.adopt(greeting))
                        greeting.close()
                    lanes = CachedLanes(filling, plan, self._memory.cache, self._crew)
                    cleanup.callback(lanes.close)
                    pages, placement = filling.residency.scope, target.placement
                    on_event("owner", placement=placement, lane=lanes.name, pages=pages)
                    peer, connecting = self.transfer.peer, self.transfer.connecting
                    transfer = Transfer(filling, peer, lanes.name, [], plan, None, connecting)
                    transfer.release()
                    ending.arm()
                    try:
                        async with open_failing_nursery() as nursery:
                            nursery.start_soon(self._fill_all, transfer, lanes, on_event)
                            if self._learning is not None and restoring is not None:
                                nursery.start_soon(self._learning.end_later, restoring)
                            yield transfer
                            nursery.cancel_scope.cancel()
                    except SourceLost:
                        ending.lose()
                        raise

    def _filling_of(self, target: UffdTarget, ending: Ending, cleanup: ExitStack) -> Filling:
        try:
            identity = self.transfer.connecting.session.identity
            filling = Filling(target, identity, is_endless=target.shares)
        except BaseException:
            target.close(target.scope())
            raise
        cleanup.callback(filling.close)
        ending.begin(filling, is_still=True)
        cleanup.callback(ending.deal_with_loss)
        return filling

    def _plan(self, filling: Filling, fill: Fill, restoring: Restoring | None) -> Background:
        """What is brought to a guest before it touches it."""
        region, residency = filling.region, filling.residency
        order = self._background if fill == "all" else "off"
        schedule = make_schedule(order, region, residency)
        if restoring is None:
            return Background(schedule)
        plan = Background(StartUp(region, residency, restoring.units, schedule))
        plan.observers.append(restoring.note)
        return plan

    async def _fill_all(
        self, transfer: Transfer, lanes: CachedLanes, on_event: EventHandler
    ) -> None:
        filling = transfer.filling
        async with open_failing_nursery() as nursery:
            nursery.start_soon(_watch_owner, filling)
            nursery.start_soon(self._watch_source)
            nursery.start_soon(lanes.run)
            await filling.completed.wait()
            nursery.cancel_scope.cancel()
        filling.finish()
        filling.residency.finish()
        on_event("complete", **complete_fields(filling.statistics()))
        transfer.finished.set()

    async def _watch_source(self) -> None:
        await self._over.wait()
        away = self.transfer.disconnected
        raise SourceLost("the source is lost" + ("" if away is None else f": {away[1]}"))


async def _watch_owner(filling: Filling) -> None:
    await filling.target.wait_gone()
    filling.check_complete()
    if not filling.completed.is_set():
        raise OwnerGone("the owner of the memory is gone")


@asynccontextmanager
async def _learning(
    place: LearnedPlace | None, transfer: Transfer, on_unkept: Callable[[str], None]
) -> AsyncIterator[Learning | None]:
    if place is None:
        yield None
        return
    learning = Learning(place, transfer.region, on_unkept)
    await learning.load()
    transfer.bring_first(learning.known.order())
    async with running_beside(learning.keep):
        yield learning


@asynccontextmanager
async def caching(
    uri: str,
    memory: CacheMemory,
    crew: _native.Crew,
    *,
    background: str = "hot",
    learn: LearnedPlace | None = None,
    on_unkept: Callable[[str], None] = lambda reason: None,
    on_over: Callable[[], None] = lambda: None,
    **options: Any,
) -> AsyncIterator[HostCache]:
    """A host cache of the source at ``uri``, for as long as the block runs, and until no guest is
    filled from it. ``crew``: threads that fill them. ``learn``: where to keep what guests wait for,
    which is brought first; ``on_unkept`` is called with the reason when it cannot be kept.
    ``on_over`` is called when no more pages come into it: others must not begin to use it.
    ``options``: of :func:`pagenet.pull`, which
    fills ``memory``. It raises what that raises; :exc:`~pagenet.errors.UsageError` for the memory
    of a machine that still runs."""
    cache: HostCache | None = None
    try:
        async with pull(
            uri, memory, lane="native", background=background, progress=False, **options
        ) as transfer:
            if transfer.is_tracked:
                raise UsageError("the source's memory is still in use: it is no snapshot")
            async with _learning(learn, transfer, on_unkept) as learning:
                cache = HostCache(transfer, memory, crew, background, learning)
                try:
                    yield cache
                finally:
                    cache.end()
                    on_over()
                    with trio.CancelScope(shield=True):
                        await cache.wait_unused()
    except (HandshakeError, Unsupported) as error:
        raise UsageError(f"cannot keep the pages in this host's memory: {error}") from None
    finally:
        memory.close()
