"""Where a new snapshot goes: its frames, in new objects, and last its index."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from typing import Protocol

import trio

from ..errors import PagenetError
from ..whole_file import WholeFile
from .objects import FRAMES, StoreObjects, giving_up, is_store

__all__ = ["Sink", "open_sink"]

# Bytes of frames in an object of a store. It is in memory until it is whole, and is sent again from
# its beginning if that fails. A directory gets one object.
_OBJECT_BYTES = 32 << 20


class Sink(Protocol):
    """What was not committed is gone when it is closed, but for objects that a store has already
    and does not remove."""

    #: bytes of new objects, by their names
    sizes: dict[str, int]

    async def append(self, stored: bytes) -> tuple[str, int]:
        """Store a frame: the name of the object, and where in it."""
        ...

    async def commit(self, index: bytes) -> None:
        """Store the index, after the objects that it needs."""
        ...

    async def close(self) -> None:
        """Idempotent."""
        ...


def _new_name() -> str:
    """Of an object. New for each: it never changes."""
    return secrets.token_hex(16) + FRAMES


class _DirectorySink:
    def __init__(self, directory: str, name: str) -> None:
        self.sizes: dict[str, int] = {}
        self._object_name = _new_name()
        self._path = os.path.join(directory, self._object_name)
        self._object: WholeFile | None = None
        self._index = WholeFile(os.path.join(directory, name), "snapshot")

    async def append(self, stored: bytes) -> tuple[str, int]:
        if self._object is None:
            self._object = WholeFile(self._path, "snapshot's object")
        offset = self.sizes.get(self._object_name, 0)
        self._object.write(stored, offset)
        self.sizes[self._object_name] = offset + len(stored)
        return self._object_name, offset

    async def commit(self, index: bytes) -> None:
        if self._object is not None:
            await self._object.wait_committed()
        try:
            self._index.write(index)
            await self._index.wait_committed()
        except BaseException:
            with suppress(OSError):
                os.unlink(self._path)
            raise

    async def close(self) -> None:
        if self._object is not None:
            self._object.close()
        self._index.close()


class _StoreSink:
    def __init__(self, uri: str, name: str) -> None:
        self.sizes: dict[str, int] = {}
        self._objects, self._name = StoreObjects(uri), name
        self._object_name, self._waiting = _new_name(), bytearray()
        #: names of objects that are there, without an index
        self._sent: list[str] = []

    async def append(self, stored: bytes) -> tuple[str, int]:
        if len(self._waiting) + len(stored) > _OBJECT_BYTES:
            await self._send()
        offset = len(self._waiting)
        self._waiting += stored
        self.sizes[self._object_name] = len(self._waiting)
        return self._object_name, offset

    async def _send(self) -> None:
        if self._waiting:
            self._sent.append(self._object_name)
            await self._write(self._object_name, memoryview(self._waiting))
            self._object_name, self._waiting = _new_name(), bytearray()

    async def _write(self, name: str, data: bytes | memoryview) -> None:
        async with giving_up(self._objects):
            await trio.to_thread.run_sync(self._objects.write, name, data)

    async def commit(self, index: bytes) -> None:
        await self._send()
        await self._write(self._name, index)
        self._sent.clear()

    async def close(self) -> None:
        try:
            # The store has given up where this was cancelled.
            with suppress(PagenetError):
                async with giving_up(self._objects):
                    for name in self._sent:
                        await trio.to_thread.run_sync(self._objects.remove, name)
        finally:
            self._objects.close()


def open_sink(where: str, name: str) -> Sink:
    """For a snapshot whose index is ``name`` in a directory, or in a place in a store.
    :exc:`~pagenet.errors.UsageError` if there can be none."""
    return _StoreSink(where, name) if is_store(where) else _DirectorySink(where, name)
