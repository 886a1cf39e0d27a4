"""Frames of a snapshot in a store: fetched as their pages are asked for, and unpacked.

Each object of the snapshot is one of pagenet.objects, which reads in chunks of 2 MiB, many at once
and ahead, keeps what came in a file, and retries. Once a frame's bytes are there, a thread unpacks
it.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from .. import _native
from ..errors import PagenetError, SourceLost
from ..protocol import Class
from .objects import STORE_TIMEOUT, StoreObjects
from .opened import Snapshot
from .peered import PeeredFrames

if TYPE_CHECKING:
    from ..objects import RemoteObject

__all__ = ["Cache", "RemoteFrames"]

# Threads that unpack, and that wait for peers.
_UNPACKERS = 2
_ASKERS = 4


@dataclass(frozen=True, slots=True)
class Cache:
    """Where objects are kept, how much of them, and how long their store is waited for: see
    :func:`~pagenet.open_source`."""

    directory: str | os.PathLike[str] | None = None
    size: int | None = None
    timeout: float = STORE_TIMEOUT


class RemoteFrames:
    """The frames of a snapshot that ``peers`` are asked for, or whose objects are in a store.
    Methods may be called from any thread, but for :meth:`fetch`. Close it before ``frames``, and
    the peers before it."""

    def __init__(
        self,
        snapshot: Snapshot,
        frames: _native.Frames,
        cache: Cache,
        peers: PeeredFrames | None = None,
    ) -> None:
        self._snapshot, self._index = snapshot, snapshot.index
        self._frames, self._cache, self._peers = frames, cache, peers
        # for what a thread waits for, and for the rest
        self._askers = [ThreadPoolExecutor(_ASKERS, "pagenet peers") for _ in range(2)]
        #: frames that peers are asked for, or were
        self._asked: set[int] = set()
        self._listeners: set[Callable[[], None]] = set()
        self._unpackers = ThreadPoolExecutor(_UNPACKERS, "pagenet frames")
        self._lock = threading.Lock()
        #: by number of the object
        self._objects: dict[int, RemoteObject] = {}
        #: frames whose bytes are awaited, by object
        self._awaited: defaultdict[int, set[int]] = defaultdict(set)
        #: those that wait for an unpacker, or have one
        self._unpacked: set[int] = set()
        self._failure: PagenetError | None = None

    def close(self) -> None:
        """Idempotent."""
        for executor in (*self._askers, self._unpackers):  # they read the objects' files
            executor.shutdown(cancel_futures=True)
        for object_ in self._objects.values():
            object_.close()

    def check(self) -> None:
        """Raise why frames cannot be read any more, if that is so."""
        for object_ in list(self._objects.values()):
            object_.check()
        if self._failure is not None:
            raise self._failure

    def is_here(self, offset: int, length: int) -> bool:
        return self._frames.are_there(offset, length)

    def want(self, offset: int, length: int, class_: Class) -> None:
        """Have these bytes fetched. Listeners hear when some have come, or of a failure."""
        for frame in sorted(self._frames.lacking(offset, length)):
            if self._peers is None:
                self._want(frame, class_)
            else:
                self._ask(self._peers, frame, class_)
        self._tell()  # it may all be there

    def _ask(self, peers: PeeredFrames, frame: int, class_: Class) -> None:
        with self._lock:
            if frame in self._asked:
                return
            self._asked.add(frame)
        askers = self._askers[class_ is Class.BACKGROUND]
        with suppress(RuntimeError):  # it is closed
            askers.submit(self._bring, peers, frame, class_)

    def _want(self, frame: int, class_: Class) -> None:
        """Have a frame brought from its object."""
        columns = self._index.columns
        if not isinstance(self._snapshot.objects, StoreObjects):
            self._unpack_file(frame)
            return
        number = columns.frame_objects[frame]
        with self._lock:
            if frame not in self._unpacked:
                self._awaited[number].add(frame)
        try:
            object_ = self._opened(number)
        except PagenetError as error:
            self._fail(error)
            return
        object_.want(columns.frame_offsets[frame], columns.frame_lengths[frame], class_)

    def holds(self, offset: int, length: int) -> bool:
        """As :meth:`is_here`, with what this host has of it already."""
        columns = self._index.columns
        for frame in self._frames.lacking(offset, length):
            if not isinstance(self._snapshot.objects, StoreObjects):
                self._unpack_file(frame)
                continue
            at, size = columns.frame_offsets[frame], columns.frame_lengths[frame]
            with suppress(PagenetError, LookupError):
                object_ = self._opened(columns.frame_objects[frame])
                if object_.holds(at, size):
                    self._frames.place(frame, object_.fd, at)
        return self.is_here(offset, length)

    def listen(self, heard: Callable[[], None]) -> None:
        """Call ``heard``, in a thread of ours, whenever frames have come or cannot come, until
        :meth:`hush`."""
        self._listeners.add(heard)

    def hush(self, heard: Callable[[], None]) -> None:
        """When this returns, ``heard`` is not called any more."""
        with self._lock:
            self._listeners.discard(heard)

    async def fetch(self, offset: int, length: int, class_: Class) -> None:
        """Return when these bytes can be read. For Trio. Raises :exc:`SourceLost`."""
        if self.is_here(offset, length):
            return
        came, token = trio.Event(), trio.lowlevel.current_trio_token()

        def heard() -> None:
            if self._has_failed() or self.is_here(offset, length):
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(came.set)

        self.listen(heard)
        try:
            self.want(offset, length, class_)
            await came.wait()
        finally:
            self.hush(heard)
        self.check()

    def _has_failed(self) -> bool:
        try:
            self.check()
        except PagenetError:
            return True
        return False

    def _opened(self, number: int) -> RemoteObject:
        """Nothing is asked of the store for it."""
        from ..objects import StoredObject, open_part

        with self._lock:
            object_ = self._objects.get(number)
            if object_ is None:
                objects, cache = self._snapshot.objects, self._cache
                assert isinstance(objects, StoreObjects)
                key = objects.store.key(self._index.objects[number])
                object_ = self._objects[number] = open_part(
                    StoredObject(objects.store.client.at(key)),
                    self._index.columns.object_sizes[number],
                    cache=cache.directory,
                    cache_size=cache.size,
                    deadline=cache.timeout,
                )
                object_.listen(partial(self._look, number, object_))
            return object_

    # ---- in threads of pagenet.objects, and in those that unpack ----

    def _look(self, number: int, object_: RemoteObject) -> None:
        """Bytes of an object have come, or it cannot be read."""
        columns = self._index.columns
        with self._lock:
            awaited = self._awaited[number]
            come = [
                frame
                for frame in awaited
                if object_.is_here(columns.frame_offsets[frame], columns.frame_lengths[frame])
            ]
            awaited.difference_update(come)
            self._unpacked.update(come)
        for frame in come:
            with suppress(RuntimeError):  # it is closed
                self._unpackers.submit(self._unpack, frame, object_)
        if self._has_failed():
            self._tell()

    def _unpack(self, frame: int, object_: RemoteObject) -> None:
        try:
            self._frames.place(frame, object_.fd, self._index.columns.frame_offsets[frame])
        except LookupError as error:
            self._fail(SourceLost(str(error)))
        with self._lock:
            self._unpacked.discard(frame)
        self._tell()

    def _bring(self, peers: PeeredFrames, frame: int, class_: Class) -> None:
        """A frame from peers, or else from its object."""
        try:
            pages = peers.read(frame)
            if pages is None:
                self._want(frame, class_)
            else:
                self._frames.put(frame, pages)
        except CancelledError:
            return  # they are closed
        except LookupError as error:
            self._fail(SourceLost(str(error)))
        self._tell()

    def _unpack_file(self, frame: int) -> None:
        """A frame from an object in a directory."""
        columns = self._index.columns
        name = self._index.objects[columns.frame_objects[frame]]
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = os.open(name, flags, dir_fd=self._snapshot.objects.fd)
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)
            why = f"object {name} is missing" if is_missing else f"object {name}: {error.strerror}"
            self._fail(self._snapshot.lost(why))
            return
        try:
            self._frames.place(frame, fd, columns.frame_offsets[frame])
        except LookupError as error:
            self._fail(SourceLost(str(error)))
        finally:
            os.close(fd)

    def _fail(self, error: PagenetError) -> None:
        self._failure = error
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            for heard in list(self._listeners):
                heard()
