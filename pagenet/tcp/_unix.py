"""``unix:PATH``: dialling a socket file, and listening on one."""

from __future__ import annotations

import errno
import socket
import struct
from urllib.parse import SplitResult

import trio

from ..errors import SourceUnreachable
from ..unix_socket import UnixSocketFile
from ._connection import SocketConnection, reason
from ._constants import BACKLOG, CONNECT_TIMEOUT, UNIX_BACKLOG_PAUSE
from ._listener import SocketListener
from ._uri import parse_unix, unix_uri

_ADVICE = {
    errno.ENOENT: "start the other side, or check the path",
    errno.ECONNREFUSED: "its listener is gone and left the file behind: start it again",
    errno.EACCES: "only the user who listens may connect: run as that user",
}

# struct ucred, as SO_PEERCRED fills it: pid, uid, gid.
_UCRED = struct.Struct("iII")


class UnixTransport:
    """A :class:`~pagenet.transport.Transport` over unix sockets. In a PATH, ``%XX`` stands for the
    byte XX."""

    async def dial(self, uri: SplitResult) -> SocketConnection:
        path = parse_unix(uri)
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                sock = await _connect(path)
        except trio.TooSlowError:
            why = (
                f"the backlog stayed full for {CONNECT_TIMEOUT:g} s; the listener there hangs, or"
                " is overrun"
            )
            raise SourceUnreachable(f"{uri.geturl()}: {why}") from None
        except OSError as error:
            advice = _ADVICE.get(error.errno or 0, "check the path")
            raise SourceUnreachable(
                f"{uri.geturl()}: nothing answers: {reason(error)}; {advice}"
            ) from error
        return SocketConnection(trio.socket.from_stdlib_socket(sock), unix_uri(path))

    async def listen(self, uri: SplitResult) -> SocketListener:
        """Listen on the path of ``uri``.

        The socket file of a listener that is gone is replaced. Raises
        :exc:`~pagenet.errors.UsageError` if a listener answers there, or the path is another kind
        of file.
        """
        path = parse_unix(uri)
        await trio.lowlevel.checkpoint()
        file = UnixSocketFile(path, uri.geturl(), BACKLOG)
        here = unix_uri(file.path)
        return SocketListener(
            file.socket,
            here,
            lambda accepted, _: SocketConnection(accepted, f"{here} ({_who(accepted)})"),
            file.close,
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
        # Where connect() of a TCP socket fails with EINPROGRESS, that of a unix socket fails with
        # EAGAIN, which means that the backlog is full and that nothing has begun. trio.socket's
        # connect() would wait for writability, find it, and take the socket for connected.
        while True:
            if _connect_nowait(sock, path):
                return sock
            await trio.sleep(UNIX_BACKLOG_PAUSE)
    except BaseException:
        sock.close()
        raise


def _connect_nowait(sock: socket.socket, path: str) -> bool:
    """Connect ``sock``. False: there is a listener, but its backlog is full."""
    try:
        sock.connect(path)
    except BlockingIOError:
        return False
    return True


def _who(sock: trio.socket.SocketType) -> str:
    pid, uid, _gid = _UCRED.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    return f"process {pid} of user {uid}"
