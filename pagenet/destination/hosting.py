"""Many owners in one process: each that connects is a guest of its own. Those of one snapshot are
filled from one host cache."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from math import inf
from typing import Any

import trio

from .._native import Crew
from ..admission import Admission
from ..errors import HandshakeError, OwnerGone, PagenetError, RemoteProtocolError, UsageError
from ..events import EventHandler, ignore_events
from ..nurseries import open_failing_nursery
from ..redialling import PAUSE
from ..statistics import Histogram
from ..target import OnLoss
from ..uffd import CacheMemory, ConnectedOwner, Keeper, Naming, UffdListener
from .caching import Fill, HostCache, caching
from .greeting import Greeter, Greeting
from .learning import LearnedPlace
from .pulling import Transfer

__all__ = ["MAX_GUESTS", "Guest", "Host", "Opening", "Snapshot", "host"]

#: Default limit of the guests at a time. Each takes about twenty file descriptors here, and a
#: session with its source.
MAX_GUESTS = 1024
#: From the URI of a snapshot to a context, whose value is the URI to dial.
Opening = Callable[[str], AbstractAsyncContextManager[str]]
# What the names begin with under which a keeper holds the connections of owners.
_OWNER = "owner."
# Events of the transfer that fills a cache, as a host reports them.
_OF_A_CACHE = {
    **{name: name for name in ("disconnected", "reconnecting", "reconnected")},
    "complete": "cached",
}
# Seconds: from the moment when another owner cannot be accepted (no descriptors) to the next try.
_RETRY_SECONDS = 0.1


@dataclass(eq=False, slots=True)
class Guest:
    """An owner that has connected. ``number``: unique in this host, and never used again;
    ``pid``: its process."""

    number: int
    snapshot: str
    pid: int
    #: once it has handed over its memory
    transfer: Transfer | None = None


@dataclass(eq=False, slots=True)
class Snapshot:
    """A source, and where the owners connect that are filled from it."""

    name: str
    uri: str
    path: str
    listener: UffdListener | None = None
    #: None while there is none: its source has not been met yet
    cache: HostCache | None = None
    _met: trio.Event = field(default_factory=trio.Event)
    #: no more owners come
    removed: trio.Event = field(default_factory=trio.Event)

    @property
    def key(self) -> str:
        """What the names end in under which a keeper holds what belongs to it."""
        return _key_of(self.name)

    def set_cache(self, cache: HostCache | None) -> None:
        self.cache = cache
        if cache is None:
            self._met = trio.Event()
        else:
            self._met.set()

    async def wait_cached(self) -> None:
        """Return when every page is in the cache."""
        await (await self.wait_cache()).transfer.wait_complete()

    async def wait_cache(self) -> HostCache:
        while self.cache is None:
            await self._met.wait()
        return self.cache


def _key_of(name: str) -> str:
    return f".{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class Host:
    """Fills the memory of any number of owners. Made by :func:`host`.

    What goes wrong with one guest, or what it does wrong, is reported and ends that guest's
    transfer alone."""

    def __init__(
        self,
        nursery: trio.Nursery,
        crew: Crew,
        max_guests: int,
        allocate: bool,
        huge: bool,
        most: int | None,
        learn: Callable[[str], LearnedPlace] | None,
        opening: Opening,
        guest_options: Mapping[str, Any],
        options: Mapping[str, Any],
        keeper: Keeper | None,
        on_event: EventHandler,
    ) -> None:
        self._nursery = nursery
        self._crew = crew
        self._keeper = keeper
        self._allocate, self._huge, self._most = allocate, huge, most
        self._learn, self._opening = learn, opening
        self._guest_options = guest_options
        self._options = options
        self._on_event = on_event
        self._places = Admission(max_guests)
        #: the highest number that a guest has
        self._last = 0 if keeper is None else _last_number(keeper)
        self._greeter = Greeter(keeper, self._last)
        # Owners that came at once take turns, so that others are greeted meanwhile.
        self._turns = trio.Lock()
        self._removed_keys = set[str]()
        # names of owners that the keeper had accepted before, and may tell of again
        self._resumed = set[str]()
        #: by name
        self.snapshots: dict[str, Snapshot] = {}
        #: by number; those that are here now
        self.guests: dict[int, Guest] = {}
        #: guests that got every page; whose process ended before that; and whose transfer failed
        self.completed = self.gone = self.failed = 0
        # of the guests that are not here any more
        self._past_latency = Histogram.empty()

    async def add(self, name: str, uri: str, uffd_socket: str | os.PathLike[str]) -> None:
        """Dial the source at ``uri``, and fill the memory of each owner that connects to
        ``uffd_socket`` from it, from now on. A source that does not answer is dialled again and
        again. :exc:`~pagenet.errors.UsageError` if there is a snapshot of that name already, or no
        socket can be made there, or the source can never be dialled."""
        if name in self.snapshots:
            raise UsageError(f"there is a snapshot {name!r} already")
        snapshot = self.snapshots[name] = Snapshot(name, uri, os.fspath(uffd_socket))
        try:
            await self._nursery.start(self._keep_cache, snapshot)
            kept = None if self._keeper is None else Naming(self._keeper, _key_of(name))
            snapshot.listener = UffdListener(snapshot.path, keeper=kept)
            if self._keeper is not None:
                self._resume(snapshot, self._keeper)
            self._greet(snapshot, snapshot.listener)
        except BaseException:
            del self.snapshots[name]
            snapshot.removed.set()
            raise
        self._removed_keys.discard(snapshot.key)
        self._on_event("added", name=name, uri=uri, uffd_socket=snapshot.path)

    def _greet(self, snapshot: Snapshot, listener: UffdListener) -> None:
        try:
            self._greeter.open(snapshot.key, listener.fileno())
        except OSError as error:
            listener.close()
            raise UsageError(f"no more snapshots can be added: {error.strerror}") from None
        if snapshot.cache is not None:
            self._serve(snapshot, snapshot.cache)

    def _serve(self, snapshot: Snapshot, cache: HostCache) -> None:
        self._greeter.serve(snapshot.key, cache.native, cache.file)

    def _resume(self, snapshot: Snapshot, keeper: Keeper) -> None:
        """Go on with the owners of a process that was killed."""
        for name in keeper.names():
            if name.startswith(_OWNER) and name.endswith(snapshot.key):
                self._resumed.add(name)
                sock = socket.socket(fileno=keeper.get(name)[0])
                self._meet(name, sock, self._greeter.left_of(name), resumes=True)

    def remove(self, name: str) -> None:
        """Take no more owners for that snapshot. Those that are here stay.
        :exc:`~pagenet.errors.UsageError` if there is none of that name."""
        snapshot = self.snapshots.get(name)
        if snapshot is None or snapshot.listener is None:
            raise UsageError(f"there is no snapshot {name!r}")
        del self.snapshots[name]
        self._greeter.shut(snapshot.key)
        snapshot.listener.close()
        self._removed_keys.add(snapshot.key)
        self._take_arrivals()  # they may use its cache
        snapshot.removed.set()
        self._on_event("removed", name=name)

    def close(self) -> None:
        for snapshot in self.snapshots.values():
            if snapshot.listener is not None:
                self._greeter.shut(snapshot.key)
                snapshot.listener.close()
        self._greeter.close()

    def fault_latency(self) -> Histogram:
        """Of all guests that there were."""
        found = self._past_latency
        for guest in self.guests.values():
            if guest.transfer is not None:
                found = found.plus(guest.transfer.statistics().fault_latency)
        return found

    def guest(self, number: int) -> Guest:
        """:exc:`~pagenet.errors.UsageError` if it is not here (any more)."""
        if number not in self.guests:
            raise UsageError(f"there is no guest {number}")
        return self.guests[number]

    async def _keep_cache(
        self, snapshot: Snapshot, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep a cache of the snapshot until it is removed, and its last guest has gone. Has
        started once its source was met, or was not to be had. :exc:`~pagenet.errors.UsageError`
        before that if it can never be met."""
        place = None if self._learn is None else self._learn(snapshot.name)
        failure, has_started = "", False

        def start() -> None:
            nonlocal has_started
            if not has_started:
                task_status.started()
            has_started = True

        while not snapshot.removed.is_set():
            kept = self._keeper and Naming(self._keeper, f".cache{snapshot.key}")
            memory = CacheMemory(huge=self._huge, most=self._most, keeper=kept)
            try:
                await self._fill_cache(snapshot, memory, place, start)
            except PagenetError as error:
                if not has_started and isinstance(error, UsageError):
                    memory.forget()
                    raise
                was_met = snapshot.cache is not None
                if was_met:
                    memory.forget()  # nobody maps it any more
                if was_met or str(error) != failure:
                    failure, kind = str(error), type(error).__name__
                    self._on_event("lost", snapshot=snapshot.name, error=kind, reason=failure)
                start()
                snapshot.set_cache(None)
                with trio.move_on_after(PAUSE):
                    await snapshot.removed.wait()
            if snapshot.removed.is_set():
                memory.forget()

    async def _fill_cache(
        self,
        snapshot: Snapshot,
        memory: CacheMemory,
        place: LearnedPlace | None,
        on_met: Callable[[], None],
    ) -> None:
        """Fill a cache in ``memory`` until the snapshot is removed, and its last guest has gone."""

        def on_event(event: str, /, **fields: object) -> None:
            if (told := _OF_A_CACHE.get(event)) is not None:
                self._on_event(told, snapshot=snapshot.name, **fields)

        def on_unkept(reason: str) -> None:
            self._on_event("unkept", snapshot=snapshot.name, reason=reason)

        def on_over() -> None:
            self._greeter.serve_no_longer(snapshot.key)
            self._take_arrivals()  # they may use it already

        async with (
            self._opening(snapshot.uri) as uri,
            caching(
                uri,
                memory,
                self._crew,
                learn=place,
                on_unkept=on_unkept,
                on_over=on_over,
                **self._options,
                on_event=on_event,
            ) as cache,
        ):
            snapshot.set_cache(cache)
            self._serve(snapshot, cache)
            on_met()
            await snapshot.removed.wait()
            await cache.wait_unused()

    async def meet_owners(self) -> None:
        """Meet the owners of all snapshots as they come."""
        while True:
            if self._greeter.wants_places:
                await self._places.wait_place()
                self._greeter.allow(self._last + 1, self._places.free)
            await self._greeter.wait()
            await trio.sleep(0 if self._take_arrivals() else _RETRY_SECONDS)

    def _take_arrivals(self) -> bool:
        """False: no more can be accepted now."""
        try:
            for name, sock, greeting in self._greeter.take():
                if name in self._resumed:
                    self._resumed.discard(name)
                    sock.close()
                else:
                    self._meet(name, sock, greeting, resumes=False)
        except OSError as error:  # no descriptors, or no memory: others will end
            self._on_event("refused", peer="an owner", reason=error.strerror)
            return False
        return True

    def _meet(
        self, name: str, sock: socket.socket, greeting: Greeting | None, *, resumes: bool
    ) -> None:
        """An owner that has connected: its name has its number, and ends in the key of its
        snapshot. ``resumes``: it had connected to a process that was killed."""
        number, key = _parts_of(name)
        self._last = max(self._last, number)
        sock.setblocking(False)
        snapshot = self._snapshot_of(key)
        if snapshot is None and key not in self._removed_keys:
            sock.close()  # the keeper has it until its snapshot is added
            return
        kept = None if self._keeper is None else Naming(self._keeper, f".{number}{key}")
        stream = trio.socket.from_stdlib_socket(sock)
        owner = ConnectedOwner(stream, self._allocate, kept, resumes)
        if snapshot is None:  # it was removed in this moment
            owner.close()
            if greeting is not None:
                greeting.close()
            return
        if greeting is not None and snapshot.cache is not None:
            greeting.use(snapshot.cache.in_use())
        guest = Guest(number, snapshot.name, owner.pid)
        self._nursery.start_soon(self._fill, guest, snapshot, owner, greeting)

    def _snapshot_of(self, key: str) -> Snapshot | None:
        for snapshot in self.snapshots.values():
            if snapshot.key == key and snapshot.listener is not None:
                return snapshot
        return None

    async def _fill(
        self, guest: Guest, snapshot: Snapshot, owner: ConnectedOwner, greeting: Greeting | None
    ) -> None:
        with self._places.connection():
            self.guests[guest.number] = guest
            try:
                await self._fill_from_cache(guest, snapshot, owner, greeting)
                self.completed += 1
            except OwnerGone:
                self.gone += 1
                self._on_event("gone", guest=guest.number, missing=_missing(guest))
            except PagenetError as error:
                self.failed += 1
                self._tell_failure(guest, error)
            finally:
                owner.close()
                if greeting is not None:
                    greeting.close()
                del self.guests[guest.number]
                if guest.transfer is not None:
                    ended = guest.transfer.statistics().fault_latency
                    self._past_latency = self._past_latency.plus(ended)

    async def _fill_from_cache(
        self, guest: Guest, snapshot: Snapshot, owner: ConnectedOwner, greeting: Greeting | None
    ) -> None:
        def on_event(event: str, /, **fields: object) -> None:
            self._on_event(event, guest=guest.number, **fields)

        async with self._turns:
            pass
        with self._places.stranger():
            await owner.wait_handshake()
        on_event("guest", snapshot=guest.snapshot, pid=guest.pid)
        options = dict(self._guest_options)
        if (record := options.pop("record", None)) is not None:
            options["record"] = f"{os.fspath(record)}.{guest.number}"
        cache = await snapshot.wait_cache()
        async with cache.fill(owner, greeting, **options, on_event=on_event) as transfer:
            guest.transfer = transfer
            await transfer.wait_complete()

    def _tell_failure(self, guest: Guest, error: PagenetError) -> None:
        if isinstance(error, HandshakeError | RemoteProtocolError) and guest.transfer is None:
            self._on_event("refused", peer=f"guest {guest.number}", reason=str(error))
            return
        self._on_event(
            "failed",
            guest=guest.number,
            error=type(error).__name__,
            reason=str(error),
            missing=_missing(guest),
        )


def _last_number(keeper: Keeper) -> int:
    numbers = [_parts_of(name)[0] for name in keeper.names() if name.startswith(_OWNER)]
    return max(numbers, default=0)


def _parts_of(name: str) -> tuple[int, str]:
    """The number in an owner's name, and the key of its snapshot."""
    _, number, key = name.split(".")
    return int(number), f".{key}"


def _missing(guest: Guest) -> int | None:
    """The pages that it lacks; None: it had not handed over its memory yet."""
    if guest.transfer is None:
        return None
    return sum(count for _, _, count in guest.transfer.missing())


@asynccontextmanager
async def host(
    *,
    threads: int | None = None,
    max_guests: int = MAX_GUESTS,
    allocate: bool = False,
    fill: Fill = "all",
    huge: bool = False,
    cache_memory: int | None = None,
    learn: Callable[[str], LearnedPlace] | None = None,
    opening: Opening = nullcontext,
    record: str | os.PathLike[str] | None = None,
    on_loss: OnLoss = "wait",
    prefetch: tuple[int, int] | None = None,
    keeper: Keeper | None = None,
    on_event: EventHandler = ignore_events,
    **options: Any,
) -> AsyncIterator[Host]:
    """Fill the memory of any number of owners for as long as the block runs: of those that connect
    to the sockets of :meth:`Host.add`.

    All guests of one snapshot are filled from one cache in this host's memory, so each page is
    fetched once, whoever asks for it, and however many wait. A guest that maps the cache's file
    privately shares the pages that it does not write to (:mod:`pagenet.uffd`); others get copies.

    ``threads``: threads that fill guests, whatever their number; None: one for each processor.
    ``max_guests``: more wait until others have ended. ``fill``: what each guest gets: ``all`` pages
    as they come into the cache, or those that its threads ``touched``, and pages around them.
    ``huge``: the caches are of huge pages (2 MiB). ``cache_memory``: bytes that the cache of each
    snapshot may take, about; None: as many as the snapshot has. Beyond that, pages leave it that
    were not used for long, and are fetched again when they are touched. ``learn``: called with the
    name of each snapshot; returns where to keep what its guests wait for. Those pages are brought
    to the next guests at once, and the others that guests wait for later are fetched into the
    cache. ``opening``: called with the URI of each snapshot; what it returns is entered for the URI
    to dial (:func:`pagenet.direct_source`). ``keeper``: keeps the
    sockets, the owners' connections and the caches, and has those of a process that was killed:
    :meth:`Host.add` goes on with them.
    ``options``: those of :func:`pagenet.pull`, for the transfer that fills each cache. Those for
    each guest are ``prefetch`` (for the caches, too), ``on_loss``, ``record`` (one file for each
    guest: FILE.1, FILE.2, and so on), and ``allocate`` of :class:`~pagenet.UffdSocket`.
    ``reconnect_for`` is infinite unless it is given.

    Events: ``added`` and ``removed`` (snapshots), ``lost`` (the source of a snapshot does not
    answer, or not any more: its guests have lost it, and it is tried again for others), ``unkept``
    (what was learned of a ``snapshot`` cannot be kept, and the ``reason``), ``guest``
    (its number, its ``snapshot``, and its process ``pid``), ``gone`` (its process has ended) and
    ``failed`` (with the ``reason``), both with the number of ``missing`` pages, ``refused``,
    and of :func:`pagenet.pull` ``owner``, ``complete``, ``missing``, ``poisoned`` and ``killed``,
    with the number of the ``guest``, and ``disconnected``, ``reconnecting`` and ``reconnected``,
    with the name of the ``snapshot``; ``cached``: every page of the ``snapshot`` is in its cache.
    """
    crew = Crew(threads or len(os.sched_getaffinity(0)))
    options = {"reconnect_for": inf, "prefetch": prefetch, **options}
    guest_options = {"fill": fill, "record": record, "on_loss": on_loss, "prefetch": prefetch}
    hosting: Host | None = None
    try:
        async with open_failing_nursery() as nursery:
            hosting = Host(
                nursery,
                crew,
                max_guests,
                allocate,
                huge,
                cache_memory,
                learn,
                opening,
                guest_options,
                options,
                keeper,
                on_event,
            )
            nursery.start_soon(hosting.meet_owners)
            yield hosting
            nursery.cancel_scope.cancel()
    finally:  # after the tasks that use them
        if hosting is not None:
            hosting.close()
        crew.close()
