"""Many owners in one process: each that connects is a guest of its own, with its own transfer."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import trio

from .._native import Crew
from ..admission import Admission
from ..errors import HandshakeError, OwnerGone, PagenetError, RemoteProtocolError, UsageError
from ..events import EventHandler, ignore_events
from ..nurseries import open_failing_nursery
from ..uffd import ConnectedOwner, Keeper, Naming, UffdListener
from .pulling import Transfer, pull

__all__ = ["MAX_GUESTS", "Guest", "Host", "Snapshot", "host"]

#: Default limit of the guests at a time. Each takes about twenty file descriptors here, and a
#: session with its source.
MAX_GUESTS = 1024
# Seconds: from the moment when another guest cannot be accepted (no descriptors) to the next try.
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
    listener: UffdListener
    scope: trio.CancelScope

    @property
    def key(self) -> str:
        """What the names end in under which a keeper holds what belongs to it."""
        return _key_of(self.name)


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
        options: Mapping[str, Any],
        keeper: Keeper | None,
        on_event: EventHandler,
    ) -> None:
        self._nursery = nursery
        self._crew = crew
        self._keeper = keeper
        self._allocate = allocate
        self._options = options
        self._on_event = on_event
        self._places = Admission(max_guests)
        self._last = 0
        #: by name
        self.snapshots: dict[str, Snapshot] = {}
        #: by number; those that are here now
        self.guests: dict[int, Guest] = {}
        #: guests that got every page; whose process ended before that; and whose transfer failed
        self.completed = self.gone = self.failed = 0

    def add(self, name: str, uri: str, uffd_socket: str | os.PathLike[str]) -> None:
        """Fill the memory of each owner that connects to ``uffd_socket`` from the source at
        ``uri``, from now on. :exc:`~pagenet.errors.UsageError` if there is a snapshot of that name
        already, or no socket can be made there."""
        if name in self.snapshots:
            raise UsageError(f"there is a snapshot {name!r} already")
        path = os.fspath(uffd_socket)
        kept = None if self._keeper is None else Naming(self._keeper, _key_of(name))
        listener = UffdListener(path, allocate=self._allocate, keeper=kept)
        snapshot = Snapshot(name, uri, path, listener, trio.CancelScope())
        self.snapshots[name] = snapshot
        self._on_event("added", name=name, uri=uri, uffd_socket=path)
        if self._keeper is None:
            self._nursery.start_soon(self._accept, snapshot)
        else:
            self._resume(snapshot, self._keeper)

    def _resume(self, snapshot: Snapshot, keeper: Keeper) -> None:
        """Go on with the owners of a process that was killed."""
        for name in keeper.names():
            if name.startswith("owner.") and name.endswith(snapshot.key):
                self._meet(keeper, name, None, resumes=True)

    def remove(self, name: str) -> None:
        """Take no more owners for that snapshot. Those that are here stay.
        :exc:`~pagenet.errors.UsageError` if there is none of that name."""
        snapshot = self.snapshots.pop(name, None)
        if snapshot is None:
            raise UsageError(f"there is no snapshot {name!r}")
        snapshot.scope.cancel()
        snapshot.listener.close()
        self._on_event("removed", name=name)

    def close(self) -> None:
        for snapshot in self.snapshots.values():
            snapshot.listener.close()

    def guest(self, number: int) -> Guest:
        """:exc:`~pagenet.errors.UsageError` if it is not here (any more)."""
        if number not in self.guests:
            raise UsageError(f"there is no guest {number}")
        return self.guests[number]

    async def _accept(self, snapshot: Snapshot) -> None:
        with snapshot.scope:
            while True:
                await self._places.wait_place()
                try:
                    owner = await snapshot.listener.accept()
                except OSError as error:  # no descriptors, or no memory: others will end
                    self._on_event("refused", peer=snapshot.path, reason=error.strerror)
                    await trio.sleep(_RETRY_SECONDS)
                    continue
                self._last += 1
                self._begin(Guest(self._last, snapshot.name, owner.pid), snapshot, owner)

    async def accept_kept(self, keeper: Keeper) -> None:
        """Meet the owners of all snapshots, which ``keeper`` accepts."""
        while True:
            await self._places.wait_place()
            sock, name = await keeper.accept(f"owner.{self._last + 1}")
            self._meet(keeper, name, sock, resumes=False)

    def _meet(
        self, keeper: Keeper, name: str, sock: socket.socket | None, *, resumes: bool
    ) -> None:
        """An owner whose connection ``keeper`` holds under ``name``: its number, and the key of its
        snapshot."""
        _, number, key = name.split(".")
        self._last = max(self._last, int(number))
        if sock is None:
            sock = socket.socket(fileno=keeper.get(name)[0])
        sock.setblocking(False)
        found = [each for each in self.snapshots.values() if each.key == f".{key}"]
        kept = Naming(keeper, f".{number}.{key}")
        stream = trio.socket.from_stdlib_socket(sock)
        owner = ConnectedOwner(stream, self._allocate, kept, resumes)
        if not found:  # its snapshot was removed in this moment
            owner.close()
            return
        self._begin(Guest(int(number), found[0].name, owner.pid), found[0], owner)

    def _begin(self, guest: Guest, snapshot: Snapshot, owner: ConnectedOwner) -> None:
        self._nursery.start_soon(self._fill, guest, snapshot.uri, owner)

    async def _fill(self, guest: Guest, uri: str, owner: ConnectedOwner) -> None:
        with self._places.connection():
            self.guests[guest.number] = guest
            try:
                await self._pull(guest, uri, owner)
                self.completed += 1
            except OwnerGone:
                self.gone += 1
                self._on_event("gone", guest=guest.number, missing=_missing(guest))
            except PagenetError as error:
                self.failed += 1
                self._tell_failure(guest, error)
            finally:
                owner.close()
                del self.guests[guest.number]

    async def _pull(self, guest: Guest, uri: str, owner: ConnectedOwner) -> None:
        def on_event(event: str, /, **fields: object) -> None:
            self._on_event(event, guest=guest.number, **fields)

        # A stranger that connects and says nothing does not get a session with the source.
        with self._places.stranger():
            await owner.wait_handshake()
        on_event("guest", snapshot=guest.snapshot, pid=guest.pid)
        options = dict(self._options)
        if (record := options.pop("record", None)) is not None:
            options["record"] = f"{os.fspath(record)}.{guest.number}"
        async with pull(
            uri, owner, **options, crew=self._crew, progress=False, on_event=on_event
        ) as transfer:
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
    keeper: Keeper | None = None,
    on_event: EventHandler = ignore_events,
    **options: Any,
) -> AsyncIterator[Host]:
    """Fill the memory of any number of owners for as long as the block runs: of those that connect
    to the sockets of :meth:`Host.add`.

    ``threads``: threads that answer faults, and as many for the background, whatever the number of
    guests; None: one for each processor. ``max_guests``: more wait until others have ended.
    ``keeper``: keeps the sockets and the owners' connections, and has those of a process that was
    killed: :meth:`Host.add` goes on with them.
    ``options``: those of :func:`pagenet.pull`, for each guest, and ``allocate`` of
    :class:`~pagenet.UffdSocket`. ``record`` names one file for each guest: FILE.1, FILE.2, and so
    on. ``reconnect_for`` is infinite unless it is given.

    Over RDMA each lane still has a thread. Events: ``added`` and ``removed`` (snapshots), ``guest``
    (its number, its ``snapshot``, and its process ``pid``), ``gone`` (its process has ended) and
    ``failed`` (with the ``reason``), both with the number of ``missing`` pages, ``refused``, and
    those of :func:`pagenet.pull` but ``progress``, with the number of the ``guest``.
    """
    crew = Crew(threads or len(os.sched_getaffinity(0)))
    options.setdefault("reconnect_for", inf)
    hosting: Host | None = None
    try:
        async with open_failing_nursery() as nursery:
            hosting = Host(nursery, crew, max_guests, allocate, options, keeper, on_event)
            if keeper is not None:
                nursery.start_soon(hosting.accept_kept, keeper)
            yield hosting
            nursery.cancel_scope.cancel()
    finally:  # after the tasks that use them
        if hosting is not None:
            hosting.close()
        crew.close()
