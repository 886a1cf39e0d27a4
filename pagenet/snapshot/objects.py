"""Where the objects of a snapshot are: in a directory, or in a store."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar
from urllib.parse import unquote, urlsplit

import trio

from ..errors import PagenetError, SourceLost, UsageError
from ..nurseries import open_failing_nursery

__all__ = [
    "FRAMES",
    "INDEX",
    "OBJECT_NAME",
    "STORE_TIMEOUT",
    "Directory",
    "Entry",
    "Objects",
    "StoreObjects",
    "giving_up",
    "is_store",
    "locate",
    "open_objects",
]

T = TypeVar("T")

#: names that are safe in a directory and in every object store
OBJECT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: what the names of indexes, and of objects with frames, end with
INDEX, FRAMES = ".snapshot", ".frames"
# so that the index's own name is an object's name too
_LONGEST = 64 - len(INDEX)
#: Seconds for which a store that does not answer is asked again.
STORE_TIMEOUT = 60.0
# An index is larger than this only if it has more runs than one may have.
_MOST_INDEX_BYTES = 256 << 20
_STORE = re.compile(r"(s3|gs|az|https?)://")


@dataclass(frozen=True, slots=True)
class Entry:
    """An object that is there. ``modified``: in seconds since 1970."""

    name: str
    size: int
    modified: float


class Objects(Protocol):
    """Objects by name, which never change once they are there. Any thread may read."""

    @property
    def fd(self) -> int:
        """The directory that has them as files, or -1."""
        ...

    def read(self, name: str, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on; fewer, or none, where the object ends before.

        Blocks: call it in a thread. :exc:`OSError` if the object cannot be read, ENOENT if there is
        none; :exc:`~pagenet.errors.PagenetError` where a store has more to say.
        """
        ...

    def entries(self) -> list[Entry]:
        """All objects whose names are such as a snapshot's. Blocks."""
        ...

    def remove(self, name: str) -> None:
        """Remove an object, if it is there. Blocks."""
        ...

    def refresh(self, names: Iterable[str]) -> None:
        """Have these objects be as if they were written now, where that is possible. Blocks."""
        ...

    def give_up(self) -> None:
        """Have what other threads wait for end now, with an error. Only :meth:`close` may
        follow."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class Directory:
    """:class:`Objects` that are the files of a directory. :exc:`UsageError` if there is no such
    directory."""

    def __init__(self, path: str) -> None:
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot open {path}: {_reason(error)}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str, offset: int, length: int) -> bytes:
        # Non-blocking: opening a FIFO would wait for its writer.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        fd = os.open(name, flags, dir_fd=self.fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            return _read(fd, offset, length)
        finally:
            os.close(fd)

    def entries(self) -> list[Entry]:
        try:
            return list(self._entries())
        except OSError as error:
            raise UsageError(f"cannot read the directory: {error.strerror}") from None

    def _entries(self) -> Iterator[Entry]:
        with os.scandir(self.fd) as found:
            for one in found:
                with suppress(FileNotFoundError):  # it was removed meanwhile
                    if OBJECT_NAME.fullmatch(one.name) and one.is_file(follow_symlinks=False):
                        status = one.stat(follow_symlinks=False)
                        yield Entry(one.name, status.st_size, status.st_mtime)

    def remove(self, name: str) -> None:
        try:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.fd)
        except OSError as error:
            raise UsageError(f"cannot remove {name}: {error.strerror}") from None

    def refresh(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError):  # another user's; or it is missing, as who reads it will see
                os.utime(name, dir_fd=self.fd, follow_symlinks=False)

    def give_up(self) -> None:
        pass  # a disk answers

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _read(fd: int, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    while len(data) < length and (more := os.pread(fd, length - len(data), offset + len(data))):
        data += more
    return data


class StoreObjects:
    """:class:`Objects` in a store: ``uri``, ``s3://BUCKET/PREFIX`` or the like, a slash, and their
    names. An index is read once, whole."""

    fd = -1

    def __init__(self, uri: str, deadline: float = STORE_TIMEOUT) -> None:
        from ..objects import open_store  # not where snapshots are in directories: it takes a while

        self.store = open_store(uri, deadline)
        self._index: tuple[str, bytes] = ("", b"")

    def read(self, name: str, offset: int, length: int) -> bytes:
        if not name.endswith(INDEX):
            return self._read(name, offset, length)
        if self._index[0] != name:
            size = self._asked(lambda: self.store.size(name))
            if size > _MOST_INDEX_BYTES:
                raise OSError(errno.EFBIG, "it is larger than a snapshot's index may be")
            self._index = name, self._read(name, 0, size)
        return self._index[1][offset : offset + length]

    def _read(self, name: str, offset: int, length: int) -> bytes:
        return self._asked(lambda: self.store.read(name, offset, length))

    def _asked(self, what: Callable[[], T]) -> T:
        try:
            return what()
        except SourceLost:
            raise FileNotFoundError(errno.ENOENT, "there is no such object") from None

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Make, or replace, an object. Blocks."""
        self.store.write(name, data)

    def entries(self) -> list[Entry]:
        return [Entry(*one) for one in self.store.list() if OBJECT_NAME.fullmatch(one[0])]

    def remove(self, name: str) -> None:
        self.store.remove(name)

    def refresh(self, names: Iterable[str]) -> None:
        pass  # a store has no way but to write them again

    def give_up(self) -> None:
        self.store.give_up()

    def close(self) -> None:
        self.store.close()


def is_store(spec: str) -> bool:
    """Whether it names a place in a store, or something there."""
    return _STORE.match(spec) is not None


def locate(spec: str) -> tuple[str, str]:
    """The directory, or the place in a store, and the name of the index there, of the snapshot
    ``DIR/NAME``, ``file:///DIR/NAME`` or ``s3://BUCKET/PREFIX/NAME``. The index's own name,
    ``DIR/NAME.snapshot``, will do too.

    :exc:`UsageError` if it can be none.
    """
    path = spec
    if "://" in spec and not is_store(spec):
        url = urlsplit(spec)
        if url.scheme != "file" or url.netloc not in ("", "localhost"):
            raise UsageError(
                f"snapshot {spec}: name it as DIR/NAME, file:///DIR/NAME or s3://BUCKET/PREFIX/NAME"
            )
        path = unquote(url.path)
    directory, name = os.path.split(path)
    if is_store(spec) and not is_store(f"{directory}/"):
        raise UsageError(f"snapshot {spec}: name it as s3://BUCKET/PREFIX/NAME")
    name = name.removesuffix(INDEX)
    if not OBJECT_NAME.fullmatch(name) or len(name) > _LONGEST:
        raise UsageError(
            f"snapshot {spec}: a name has at most {_LONGEST} letters, digits, '.', '_' and '-',"
            " and begins with a letter or digit"
        )
    return directory or ".", name + INDEX


def open_objects(where: str, deadline: float = STORE_TIMEOUT) -> Objects:
    """The objects of a directory, or of a place in a store, of which nothing is asked yet.
    ``deadline``: seconds for which a store is asked again. :exc:`UsageError` if there is no such
    place, :exc:`~pagenet.errors.Unsupported` without obstore."""
    return StoreObjects(where, deadline) if is_store(where) else Directory(where)


@asynccontextmanager
async def giving_up(objects: Objects) -> AsyncIterator[None]:
    """If the block is cancelled while threads of it wait for a store, these give up."""
    is_over = False

    async def watch() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if not is_over:
                objects.give_up()

    async with open_failing_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            yield
        except PagenetError:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise
        finally:
            is_over = True
        nursery.cancel_scope.cancel()
