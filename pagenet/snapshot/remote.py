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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from .. import _native
from ..errors import PagenetError, SourceLost
from ..protocol import Class
from .index import Index
from .objects import STORE_TIMEOUT, StoreObjects

if TYPE_CHECKING:
    from ..objects import RemoteObject

__all__ = ["Cache", "RemoteFrames"]

# Threads that unpack.
_UNPACKERS = 2


@dataclass(frozen=True, slots=True)
class Cache:
    """Where objects are kept, how much of them, and how long their store is waited for: see
    :func:`~pagenet.open_source`."""

    directory: str | os.PathLike[str] | None = None
    size: int | None = None
    timeout: float = STORE_TIMEOUT


class RemoteFrames:
    """The frames of a snapshot whose ``objects`` are in a store. Methods may be called from any
    thread, but for :meth:`fetch`. Close it before ``frames``."""

    def __init__(
        self, index: Index, frames: _native.Frames, objects: StoreObjects, cache: Cache
    ) -> None:
        self._index, self._frames, self._store, self._cache = index, frames, objects.store, cache
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
        self._unpackers.shutdown(cancel_futures=True)  # they read the objects' files
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
        columns = self._index.columns
        for frame in sorted(self._frames.lacking(offset, length)):
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
        self._tell()  # it may all be there

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
        from ..objects import open_part

        with self._lock:
            object_ = self._objects.get(number)
            if object_ is None:
                store, cache = self._store, self._cache
                object_ = self._objects[number] = open_part(
                    store.client.at(store.key(self._index.objects[number])),
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

    def _fail(self, error: PagenetError) -> None:
        self._failure = error
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            for heard in list(self._listeners):
                heard()
