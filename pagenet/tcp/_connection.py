"""A connection over a stream socket, and the one place where its errno becomes an error of
pagenet's."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from ..errors import ConnectionBroken, ConnectionBusy, ConnectionClosed
from ..one_task import OneTask
from ..transport import Buffer, DetachedSocket
from ._constants import IOV_MAX, MIN_RTT_AT, SHORT_US, TCP_RTO_MAX_MS


class SocketConnection:
    """A :class:`~pagenet.transport.Connection` that is :class:`~pagenet.transport.Detachable`. It
    owns the socket."""

    def __init__(self, sock: trio.socket.SocketType, peer: str) -> None:
        self._socket = sock
        self._peer = peer
        self._closed = False
        self._broken: str | None = None
        self._sending = OneTask(f"sending to {peer}")
        self._receiving = OneTask(f"receiving from {peer}")

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._broken or "open"
        return f"<SocketConnection to {self._peer}: {state}>"

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def local_host(self) -> str:
        """The address of this end, without the port; empty for a unix socket."""
        self._check_open()
        address = self._socket.getsockname()
        return str(address[0]) if isinstance(address, tuple) else ""

    async def send(self, *buffers: Buffer) -> None:
        self._check_open()
        with self._sending:
            views = _byte_views(buffers)
            # An exported view pins the mmap under it, and an exception's traceback would keep our
            # views: so they are released by hand.
            try:
                await self._send_views(views)
            finally:
                for view in views:
                    view.release()

    async def _send_views(self, views: list[memoryview]) -> None:
        await trio.lowlevel.checkpoint()
        first = 0
        while first < len(views):
            with self._translated():
                sent = await self._socket.sendmsg(
                    views[first : first + IOV_MAX], [], socket.MSG_NOSIGNAL
                )
            first = _skip(views, first, sent)

    async def receive_into(self, buffer: memoryview) -> int:
        self._check_open()
        if not buffer.nbytes:
            raise ValueError(
                "an empty buffer receives nothing, and nothing would look like the end of the"
                " stream"
            )
        with self._receiving:
            count = await self._receive_some(buffer)
            # The kernel reports a reset once, to whichever direction asks first. From then on,
            # receiving looks like the end of a stream that was closed in good order. So the reset
            # is remembered.
            if not count and self._broken is not None:
                raise ConnectionBroken(self._broken)
            return count

    async def _receive_some(self, buffer: memoryview) -> int:
        with self._translated():
            return await self._socket.recv_into(buffer)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._socket.close()

    @property
    def is_encrypted(self) -> bool:
        return False

    @property
    def resumes_at_once(self) -> bool:
        """False over TCP where the kernel repeats a lost packet ever more seldom."""
        if self._socket.family == socket.AF_UNIX:
            return True
        try:
            self._socket.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS)
        except OSError:
            return False
        return True

    @property
    def is_near(self) -> bool:
        if self._socket.family == socket.AF_UNIX:
            return True
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, MIN_RTT_AT + 4)
        return int.from_bytes(info[MIN_RTT_AT:], sys.byteorder) < SHORT_US

    def detach(self) -> DetachedSocket:
        """As :meth:`pagenet.transport.Detachable.detach`. :exc:`~pagenet.errors.ConnectionBusy`
        while a task is sending or receiving: part of its bytes may be in flight."""
        return DetachedSocket(self._detach_socket(), None)

    def _detach_socket(self) -> int:
        self._check_open()
        if self._sending.held or self._receiving.held:
            raise ConnectionBusy(
                f"another task is using the connection to {self._peer}: it cannot be detached now"
            )
        self._closed = True
        # Trio must forget the file descriptor now: it may still watch it, and would never learn
        # that it is closed.
        trio.lowlevel.notify_closing(self._socket)
        return self._socket.detach()

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed_error()

    def _closed_error(self) -> ConnectionClosed:
        return ConnectionClosed(f"the connection to {self._peer} is closed on this side")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except trio.ClosedResourceError:
            raise self._closed_error() from None
        except OSError as error:
            if self._closed:
                raise self._closed_error() from None
            # EFAULT is about the caller's buffer (a file truncated under its mapping, a poisoned
            # page), not about the connection: it would come again after reconnecting.
            if error.errno == errno.EFAULT:
                raise
            self._broken = self._broken or f"the connection to {self._peer} broke: {reason(error)}"
            raise ConnectionBroken(self._broken) from error


def reason(error: OSError) -> str:
    """The system's text for ``error``, without what Python and Trio add. Resolver errors have a
    text of their own."""
    if isinstance(error, socket.gaierror) or error.errno is None:
        return error.strerror or str(error)
    return os.strerror(error.errno)


def _byte_views(buffers: Sequence[Buffer]) -> list[memoryview]:
    """One view of bytes for each buffer that is not empty. Raises TypeError for a buffer that is
    not contiguous."""
    # Empty buffers cannot be cast; and without them, 0 bytes sent never have to be skipped.
    return [memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes]


def _skip(views: list[memoryview], first: int, sent: int) -> int:
    """Drop ``sent`` bytes from the front of ``views[first:]`` without copying; returns the new
    ``first``."""
    while first < len(views) and sent >= len(views[first]):
        sent -= len(views[first])
        first += 1
    if sent:
        whole = views[first]
        views[first] = whole[sent:]
        whole.release()
    return first
