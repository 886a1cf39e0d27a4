"""A file that gets its name whole or not at all.

Bytes go into a fresh file of this writer's own, in the directory of the name. The file takes the
name when it is whole. Two writers of one name at once do not disturb each other, and the last to
finish has the name. A file or link that has the name already is neither opened nor followed.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import threading
from contextlib import ExitStack, suppress
from typing import Self

import trio

from .errors import PagenetError, UsageError

__all__ = ["OWNER_ONLY", "WholeFile", "read_whole"]

OWNER_ONLY = 0o600

# The errors of a file system that has no files without a name: old kernels take the flag for a
# directory to be written.
_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)


class WholeFile:
    """A file that is to become ``path``. ``what``: a noun for it in errors. ``mode``: that of the
    new file, less the umask.

    :exc:`UsageError` if no file can be made under that name: there is no such directory, the name
    is not a regular file (nor is a symbolic link one, wherever it leads), or only another user may
    replace it. Later :exc:`PagenetError` if there is no room. Each is one line. An older file is
    then left as it was, and no new one is left.
    """

    def __init__(self, path: str | os.PathLike[str], what: str, mode: int = OWNER_ONLY) -> None:
        self.path = os.fspath(path)
        self._what = what
        directory, self._name = os.path.split(self.path)
        #: removed at the end if it never got its name; empty while the file has none
        self._made = ""
        self._fd = -1
        try:
            # The directory is kept open and used instead of its name: a user who may rename what is
            # above it cannot redirect this file.
            self._directory = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unusable(error) from None
        try:
            self._check_name()
            self._fd = self._create(mode)
        except OSError as error:
            self.close()
            raise self._unusable(error) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unusable(self, error: OSError) -> UsageError:
        return UsageError(f"cannot write the {self._what} {self.path}: {error.strerror}")

    def _failed(self, error: OSError) -> PagenetError:
        kept = "what was there before is as it was"
        return PagenetError(f"cannot write the {self._what} {self.path}: {error.strerror}; {kept}")

    def _check_name(self) -> None:
        if self._name in ("", ".", ".."):
            raise UsageError(f"cannot write the {self._what} {self.path}: that is a directory")
        try:
            found = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISLNK(found.st_mode):
            raise UsageError(
                f"{self.path} is a symbolic link: name the {self._what} itself, or remove the link"
            )
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(
                f"{self.path} is not a regular file: choose another name for the {self._what}"
            )
        around = os.stat(self._directory)
        if around.st_mode & stat.S_ISVTX and os.geteuid() not in (0, found.st_uid, around.st_uid):
            # rename() would fail too, but only after everything was written
            raise UsageError(
                f"{self.path} is another user's, in a directory where only that one may replace it"
            )

    def _create(self, mode: int) -> int:
        try:
            # A file without a name is gone if this process is killed.
            return os.open(
                ".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode, dir_fd=self._directory
            )
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
        name = self._fresh_name()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, mode, dir_fd=self._directory)
        self._made = name
        return fd

    def _fresh_name(self) -> str:
        return f".pagenet-{secrets.token_hex(8)}"

    def resize(self, size: int) -> None:
        """Set the size in bytes. :exc:`UsageError` if there can be no file of that size here."""
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise UsageError(
                f"cannot make {self.path} {size} bytes long: {error.strerror}"
            ) from None

    def write(self, data: bytes | memoryview, offset: int = 0) -> None:
        rest = memoryview(data)
        try:
            while rest:
                written = os.pwrite(self._fd, rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            raise self._failed(error) from None

    def commit(self) -> None:
        """The file is whole: give it its name, in place of an older file. Waits for the disk, and
        blocks. :exc:`PagenetError` if that fails."""
        try:
            os.fsync(self._fd)
            self._take_name()
        except OSError as error:
            raise self._failed(error) from None

    async def wait_committed(self) -> None:
        """As :meth:`commit`, but without blocking Trio while the disk writes."""
        try:
            sync = _Sync(os.dup(self._fd))
            try:
                await trio.to_thread.run_sync(sync.run, abandon_on_cancel=True)
            finally:
                sync.abandon()
            self._take_name()
        except OSError as error:
            raise self._failed(error) from None

    def _take_name(self) -> None:
        self._check_name()
        if not self._made:
            # rename() needs a name, so the file gets one for a moment.
            name = self._fresh_name()
            os.link(f"/proc/self/fd/{self._fd}", name, dst_dir_fd=self._directory)
            self._made = name
        os.rename(self._made, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._made = ""

    def close(self) -> None:
        """Idempotent. A file that was not committed is gone."""
        if self._directory < 0:
            return
        if self._made:
            with suppress(OSError):
                os.unlink(self._made, dir_fd=self._directory)
        if self._fd >= 0:
            os.close(self._fd)
        os.close(self._directory)
        self._directory = self._fd = -1


class _Sync:
    """An fsync by a thread, on a descriptor of its own. The task that waits for the thread may
    abandon it at any moment, even before the thread has begun."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._is_taken = False

    def _take(self) -> bool:
        """Whether the caller must close the descriptor: true for the first caller only."""
        with self._lock:
            was_taken, self._is_taken = self._is_taken, True
        return not was_taken

    def run(self) -> None:
        if self._take():
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)

    def abandon(self) -> None:
        if self._take():
            os.close(self._fd)


def read_whole(path: str | os.PathLike[str], most: int, what: str) -> bytes:
    """All of a regular file of at most ``most`` bytes. :exc:`UsageError` for anything else;
    ``what`` is a noun for the file in errors.

    It never waits for another process: a FIFO, or a device, is refused unread. Links are followed,
    as everywhere in reading.
    """
    name = os.fspath(path)
    try:
        with ExitStack() as cleanup:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            cleanup.callback(os.close, fd)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"cannot read the {what} {name}: it is not a regular file")
            body = b"" if status.st_size > most else _read(fd, most + 1)
    except OSError as error:
        raise UsageError(f"cannot read the {what} {name}: {error.strerror}") from None
    if max(status.st_size, len(body)) > most:
        raise UsageError(f"{name} is not a {what}: it is too long")
    return body


def _read(fd: int, most: int) -> bytes:
    """Read to the end, which may have moved, but at most ``most`` bytes."""
    with open(fd, "rb", closefd=False) as file:
        return file.read(most)
