"""A listening unix socket and its file: its permissions, a file that is there already, and its
removal."""

from __future__ import annotations

import os
import socket
import stat
from typing import NamedTuple

import trio

from .errors import UsageError

__all__ = ["UnixSocketFile", "check_path_length"]

# struct sockaddr_un has 108 bytes for the path; the last one holds the terminating zero.
_PATH_MAX = 107

# Only the user that the daemon runs as, and root, may connect: a peer may ask for memory.
_MODE = 0o600


class _Inode(NamedTuple):
    device: int
    number: int


class UnixSocketFile:
    """A stream socket that listens on ``path``. Owns the socket and the file.

    Replaces the socket file of a listener that is gone. :exc:`~pagenet.errors.UsageError`, which
    begins with ``name``, if a process listens there, if it is another file, or if no socket can be
    made there.
    """

    def __init__(self, path: str, name: str, backlog: int, listener: int | None = None) -> None:
        """``listener``: the socket that listens there already, left by a process like this one."""
        #: absolute, so that close finds the file even if the daemon has changed its directory
        self.path = os.path.join(os.getcwd(), path)
        check_path_length(os.fsencode(self.path), name)
        self._closed = False
        if listener is not None:
            sock = socket.socket(fileno=listener)
            sock.setblocking(False)
            self._inode = _inode_at(self.path)
            self.socket = trio.socket.from_stdlib_socket(sock)
            return
        try:
            _clear(self.path, name)
            sock, self._inode = _bind(self.path, backlog)
        except OSError as error:
            raise UsageError(
                f"{name}: cannot listen: {error.strerror or error}; choose another path"
            ) from error
        self.socket = trio.socket.from_stdlib_socket(sock)

    def close(self) -> None:
        """Idempotent. Wakes a task that waits in accept."""
        if not self._closed:
            self._closed = True
            # In this order. While the socket is open, its file keeps its inode, so no other file
            # can have the same number; and it answers, so no other daemon takes the file for a
            # leftover. A file that has our inode is therefore ours.
            _remove_own(self.path, self._inode)
            self.socket.close()


def check_path_length(path: bytes, name: str) -> None:
    if len(path) > _PATH_MAX:
        raise UsageError(
            f"{name}: the path has {len(path)} bytes, and the kernel takes {_PATH_MAX} at most"
        )


def _stream() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


def _clear(path: str, name: str) -> None:
    """Remove what is at ``path`` if it is a socket that no process listens on. :exc:`UsageError` if
    it is anything else."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise UsageError(f"{name}: the file there is no socket; remove it or choose another path")
    if _answers(path):
        raise UsageError(
            f"{name}: another process listens there already; stop it or choose another path"
        )
    # Two daemons that start on one leftover within these few microseconds can still remove each
    # other's file; the loser notices only that no peer connects. A lock file would prevent that,
    # and be the next leftover.
    _remove_own(path, _Inode(found.st_dev, found.st_ino))


def _answers(path: str) -> bool:
    with _stream() as probe:
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # its backlog is full
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


def _bind(path: str, backlog: int) -> tuple[socket.socket, _Inode]:
    sock = _stream()
    try:
        # bind() gives the file the mode of the socket, less the umask. The mode is set first, so
        # the file is never open to others.
        os.fchmod(sock.fileno(), _MODE)
        sock.bind(path)
        made = os.lstat(path)
        sock.listen(backlog)
        return sock, _Inode(made.st_dev, made.st_ino)
    except BaseException:
        sock.close()
        raise


def _inode_at(path: str) -> _Inode:
    try:
        found = os.lstat(path)
    except OSError:
        return _Inode(0, 0)
    return _Inode(found.st_dev, found.st_ino)


def _remove_own(path: str, inode: _Inode) -> None:
    """Remove the file at ``path`` if it still has that inode: another daemon may have put its own
    there."""
    try:
        found = os.lstat(path)
        if _Inode(found.st_dev, found.st_ino) == inode:
            os.unlink(path)
    except OSError:
        # The file, or its directory, is gone already: there is nothing left to remove.
        return
