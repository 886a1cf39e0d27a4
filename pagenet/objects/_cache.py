"""A file that an object is fetched into, chunk by chunk, once for all processes of the host.

In a directory, it is two files. ``NAME.data`` is the object, sparse. ``NAME.map`` has a header of
one page (JSON: the object, and the boot of the host) and a byte for each chunk, 1 once the chunk is
whole. NAME is made of the object's URI, size and ETag.

Locks are those of open file descriptions, which end with their process, however it ends:

- ``lock``, the file: while files are made, looked through, or removed
- byte 0 of a map, shared: the object is in use
- the byte of a chunk: somebody fetches it

A killed process leaves whole chunks, and parts of chunks that do not count. A host that stops
without writing everything to its disk could leave a map that is ahead of the data: files from
before the boot begin anew.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import UsageError
from ..protocol import printable
from ._constants import CHUNK

__all__ = ["CacheFile", "open_cache", "open_temporary"]

_HEADER = 4096
_FORMAT = 1


class CacheFile:
    """The file, and which chunks of it are whole."""

    def __init__(self, fd: int, size: int, map_fd: int | None = None) -> None:
        self.fd = fd
        self._map_fd = map_fd
        self._whole = bytearray(-(-size // CHUNK))
        if map_fd is not None:
            self._whole[:] = os.pread(map_fd, len(self._whole), _HEADER)

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            if self._map_fd is not None:
                os.close(self._map_fd)
            self.fd = -1

    def whole(self) -> list[int]:
        """The chunks that were there when it was opened, or are known to have come since."""
        return [chunk for chunk, is_whole in enumerate(self._whole) if is_whole == 1]

    def is_whole(self, chunk: int) -> bool:
        """Whether the chunk is there. Raises :exc:`OSError`."""
        if self._whole[chunk] != 1 and self._map_fd is not None:
            self._whole[chunk] = os.pread(self._map_fd, 1, _HEADER + chunk) == b"\1"
        return self._whole[chunk] == 1

    def claim(self, chunk: int) -> bool:
        """Whether it is this process that may fetch the chunk now, until :meth:`release`."""
        return self._map_fd is None or _lock(self._map_fd, fcntl.F_WRLCK, _HEADER + chunk)

    def release(self, chunk: int) -> None:
        if self._map_fd is not None:
            _lock(self._map_fd, fcntl.F_UNLCK, _HEADER + chunk)

    def write(self, offset: int, data: memoryview) -> None:
        """Raises :exc:`OSError`."""
        while data:
            count = os.pwrite(self.fd, data, offset)
            data, offset = data[count:], offset + count

    def finish(self, chunk: int) -> None:
        """Say that the chunk is whole. Raises :exc:`OSError`."""
        if self._map_fd is not None:
            os.pwrite(self._map_fd, b"\1", _HEADER + chunk)
        self._whole[chunk] = 1


def open_temporary(size: int) -> CacheFile:
    """A file without a name, which ends with the process. Raises :exc:`OSError`."""
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return CacheFile(fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 0), size)


def open_cache(
    directory: str | os.PathLike[str], uri: str, etag: str, size: int, limit: int | None = None
) -> CacheFile:
    """The file of an object in ``directory``, which is made if it is not there. ``limit``: bytes
    that all its files may take; objects that are not in use are removed for that, the longest
    unused first.

    Raises :exc:`UsageError`.
    """
    try:
        with ExitStack() as undo, _locked(directory) as place:
            content = {"uri": uri, "etag": etag, "size": size, "chunk": CHUNK, "format": _FORMAT}
            text = json.dumps(content, sort_keys=True)
            base = place / hashlib.sha256(text.encode()).hexdigest()[:32]
            header = json.dumps({**content, "boot": _boot_id()}, sort_keys=True).encode()
            if len(header) > _HEADER:
                raise UsageError(f"{printable(uri)[:100]}...: the name is too long for a cache")
            fds = []
            for suffix in (".data", ".map"):
                fds.append(_open(base.with_suffix(suffix)))
                undo.callback(os.close, fds[-1])
            data, map_ = fds
            if not _is_valid(data, map_, header, size):
                _begin(data, map_, header, size)
            if not _lock(map_, fcntl.F_RDLCK, 0):
                raise OSError(errno.EAGAIN, "it is in use")
            os.utime(map_)
            if limit is not None:
                _make_room(place, base.name, size, limit)
            file = CacheFile(data, size, map_)
            undo.pop_all()
            return file
    except OSError as error:
        raise UsageError(
            f"cannot use cache {printable(os.fspath(directory))}: {error.strerror}"
        ) from None


@contextmanager
def _locked(directory: str | os.PathLike[str]) -> Iterator[Path]:
    place = Path(directory)
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.geteuid():
        raise OSError(errno.EPERM, "it is another user's")
    fd = _open(place / "lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield place
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(fd)
        raise OSError(errno.EPERM, f"{path.name} is not a file of this user")
    return fd


def _is_valid(data: int, map_: int, header: bytes, size: int) -> bool:
    return (
        os.pread(map_, _HEADER, 0).rstrip(b"\0") == header
        and os.fstat(map_).st_size == _HEADER + -(-size // CHUNK)
        and os.fstat(data).st_size == size
    )


def _begin(data: int, map_: int, header: bytes, size: int) -> None:
    if not _lock(map_, fcntl.F_WRLCK, 0):
        raise OSError(errno.EBUSY, "files in it were damaged, and are in use")
    os.ftruncate(map_, 0)  # first: a map without a header says nothing about the data
    os.ftruncate(data, 0)
    os.ftruncate(data, size)
    os.ftruncate(map_, _HEADER + -(-size // CHUNK))
    os.pwrite(map_, header, 0)


def _make_room(place: Path, ours: str, size: int, limit: int) -> None:
    """Remove files that are not in use until all fit in ``limit`` bytes. What is in use counts as
    if it were whole."""
    used, free = size, []
    for path in place.glob("*.map"):
        data = path.with_suffix(".data")
        if path.stem == ours or not data.exists():
            continue
        if _is_in_use(path):
            used += data.stat().st_size
        else:
            free.append((path.stat().st_mtime_ns, data.stat().st_blocks * 512, path, data))
    for _, blocks, path, data in sorted(free, reverse=True):
        if used + blocks > limit:
            path.unlink()
            data.unlink()
        else:
            used += blocks
    if used > limit:
        raise UsageError(
            f"the cache {printable(str(place))} may have {limit} bytes, and what is in use of it,"
            f" with this object, takes {used}: allow more (--cache-size)"
        )


def _is_in_use(path: Path) -> bool:
    fd = _open(path)
    try:
        return not _lock(fd, fcntl.F_WRLCK, 0)
    finally:
        os.close(fd)


def _lock(fd: int, kind: int, byte: int) -> bool:
    """Set, or take away, the lock of one byte. False: another has it."""
    flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
