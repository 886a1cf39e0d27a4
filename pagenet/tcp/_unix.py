"""``unix:PATH``: a socket file, who may use it, and what to do with one that is there already."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from typing import NamedTuple
from urllib.parse import SplitResult

import trio

from ..errors import SourceUnreachable, UsageError
from ._connection import SocketConnection, reason
from ._constants import BACKLOG, CONNECT_TIMEOUT, UNIX_BACKLOG_PAUSE, UNIX_SOCKET_MODE
from ._listener import SocketListener
from ._uri import check_unix_path_length, parse_unix, unix_uri

_ADVICE = {
    errno.ENOENT: "start the other side, or check the path",
    errno.ECONNREFUSED: "whoever listened is gone and left the file behind: start it again",
    errno.EACCES: "only the user who listens may connect: run as that user",
}

# struct ucred, as SO_PEERCRED fills it: pid, uid, gid.
_UCRED = struct.Struct("iII")


class _Inode(NamedTuple):
    device: int
    number: int


class UnixTransport:
    """A :class:`~pagenet.transport.Transport` over unix sockets. In a PATH, ``%XX`` stands for the byte XX."""

    async def dial(self, uri: SplitResult) -> SocketConnection:
        path = parse_unix(uri)
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                sock = await _connect(path)
        except trio.TooSlowError:
            why = f"the backlog stayed full for {CONNECT_TIMEOUT:g} s; the listener there hangs, or is overrun"
            raise SourceUnreachable(f"{uri.geturl()}: {why}") from None
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0, "check the path")
            raise SourceUnreachable(f"{uri.geturl()}: nothing answers: {reason(error)}; {advice}") from error
        return SocketConnection(trio.socket.from_stdlib_socket(sock), unix_uri(path))

    async def listen(self, uri: SplitResult) -> SocketListener:
        """Replaces the socket file of a listener that is gone; refuses if one answers, or if it is another file."""
        # Absolute, so that the file is found again at close, wherever the daemon has changed to by then.
        path = os.path.join(os.getcwd(), parse_unix(uri))
        check_unix_path_length(os.fsencode(path), uri)
        await trio.lowlevel.checkpoint()
        try:
            _clear(path, uri)
            sock, inode = _bind(path)
        except OSError as error:
            raise UsageError(f"{uri.geturl()}: cannot listen: {reason(error)}; choose another path") from error
        here = unix_uri(path)
        return SocketListener(
            trio.socket.from_stdlib_socket(sock),
            here,
            lambda accepted, _: SocketConnection(accepted, f"{here} ({_who(accepted)})"),
            lambda: _remove_own(path, inode),
        )

    def is_private(self, uri: SplitResult) -> bool:
        return True


def _stream() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


# Dialling


async def _connect(path: str) -> socket.socket:
    sock = _stream()
    try:
        await trio.lowlevel.checkpoint()
        # Where TCP says EINPROGRESS, a unix socket says EAGAIN and means that the backlog is full and that nothing has
        # begun. trio.socket's connect() would wait for writability, find it, and take the socket for connected.
        while True:
            if _connect_nowait(sock, path):
                return sock
            await trio.sleep(UNIX_BACKLOG_PAUSE)
    except BaseException:
        sock.close()
        raise


def _connect_nowait(sock: socket.socket, path: str) -> bool:
    """False if a listener is there, but its backlog is full."""
    try:
        sock.connect(path)
    except BlockingIOError:
        return False
    return True


# Listening


def _clear(path: str, uri: SplitResult) -> None:
    """Make room at ``path`` if what is there is a socket that nobody listens on."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise UsageError(f"{uri.geturl()}: the file there is no socket; remove it or choose another path")
    if _answers(path):
        raise UsageError(f"{uri.geturl()}: somebody listens there already; stop it or choose another path")
    # Two daemons that start on one leftover within these few microseconds can still remove each other's file; the
    # looser learns of it when nobody comes. A lock file would prevent that and be the next leftover.
    _remove_own(path, _Inode(found.st_dev, found.st_ino))


def _answers(path: str) -> bool:
    with _stream() as probe:
        try:
            _connect_nowait(probe, path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return True


def _bind(path: str) -> tuple[socket.socket, _Inode]:
    sock = _stream()
    try:
        # bind() gives the file the mode of the socket, less the umask. So the mode comes first, and there is no moment
        # in which the file exists and is open to others.
        os.fchmod(sock.fileno(), UNIX_SOCKET_MODE)
        sock.bind(path)
        made = os.lstat(path)
        sock.listen(BACKLOG)
        return sock, _Inode(made.st_dev, made.st_ino)
    except BaseException:
        sock.close()
        raise


def _remove_own(path: str, inode: _Inode) -> None:
    """Remove the file at ``path`` if it is still that one: another daemon may have put its own there."""
    try:
        found = os.lstat(path)
        if _Inode(found.st_dev, found.st_ino) == inode:
            os.unlink(path)
    except OSError:
        # Gone already, or in a directory that is: nothing is left behind that could be removed.
        return


def _who(sock: trio.socket.SocketType) -> str:
    pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return f"process {pid} of user {uid}"
