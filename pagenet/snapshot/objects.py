"""Where the objects of a snapshot are."""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import Protocol, Self
from urllib.parse import unquote, urlsplit

from ..errors import UsageError

__all__ = ["OBJECT_NAME", "Directory", "Objects", "locate", "open_objects"]

#: names that are safe in a directory and in every object store
OBJECT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_INDEX = ".snapshot"
# so that the index's own name is an object's name too
_LONGEST = 64 - len(_INDEX)


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


def locate(spec: str) -> tuple[str, str]:
    """The directory, and the name of the index in it, of the snapshot ``DIR/NAME`` or
    ``file:///DIR/NAME``. The name of the index's file, ``DIR/NAME.snapshot``, will do too.

    :exc:`UsageError` if it can be none.
    """
    path = spec
    if "://" in spec:
        url = urlsplit(spec)
        if url.scheme != "file" or url.netloc not in ("", "localhost"):
            raise UsageError(f"snapshot {spec}: name it as DIR/NAME or file:///DIR/NAME")
        path = unquote(url.path)
    directory, name = os.path.split(path)
    name = name.removesuffix(_INDEX)
    if not OBJECT_NAME.fullmatch(name) or len(name) > _LONGEST:
        raise UsageError(
            f"snapshot {spec}: a name has at most {_LONGEST} letters, digits, '.', '_' and '-',"
            " and begins with a letter or digit"
        )
    return directory or ".", name + _INDEX


def open_objects(directory: str) -> Objects:
    """The objects beside a snapshot's index. :exc:`UsageError` if there is no such place."""
    return Directory(directory)
