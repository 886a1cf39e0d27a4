"""A connection with TLS over a TCP socket."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from .. import _native
from ..errors import ConnectionBroken, Untrusted
from ..tls import Tls
from ..transport import DetachedSocket
from ._connection import SocketConnection

__all__ = ["TlsConnection", "client", "server"]

#: makes TLS of a socket's descriptor
Start = Callable[[int], _native.Tls]


class TlsConnection(SocketConnection):
    """Shakes hands before its first byte is sent or received: see :meth:`handshake`."""

    def __init__(
        self, sock: trio.socket.SocketType, peer: str, start: Start, tls: Tls, uri: str = ""
    ) -> None:
        """``uri``: a name that the peer's certificate has to have."""
        super().__init__(sock, peer)
        self._uri = uri
        self._start, self._policy = start, tls
        self._tls: _native.Tls | None = None
        self._identity: tuple[str, ...] | None = None
        self._shaking = trio.Lock()

    @property
    def is_encrypted(self) -> bool:
        return True

    @property
    def identity(self) -> tuple[str, ...]:
        """The peer's names, each with its kind in front. Known after the handshake."""
        return self._identity or ()

    @property
    def security(self) -> str:
        """How it is encrypted, for people to read."""
        if self._tls is None:
            return ""
        sends, receives = self._tls.kernel
        who = {(True, True): "by the kernel", (True, False): "sent by the kernel"}
        return f"{self._tls.cipher}, {who.get((sends, receives), 'by OpenSSL')}"

    async def handshake(self) -> None:
        """Return when each side trusts the other, as far as this side knows.

        :exc:`~pagenet.errors.Untrusted` if one does not, or the peer does not speak TLS;
        :exc:`~pagenet.errors.ConnectionBroken` if the peer has gone, or an earlier attempt has
        failed.
        """
        async with self._shaking:
            self._check_open()
            if self._broken is not None:
                raise ConnectionBroken(self._broken)
            if self._identity is None:
                await self._shake_hands()

    async def _shake_hands(self) -> None:
        with self._translated():
            if self._tls is None:
                self._tls = self._start(self._socket.fileno())
            await trio.lowlevel.checkpoint()
            while not self._try(self._tls.handshake):
                await self._wait(self._tls)
            names = self._tls.names()
        if not names or not self._policy.allows(names):
            self._refuse(
                f"its certificate is for {', '.join(names) or 'nobody'}, and this side was not told"
                " to trust that name (--tls-authz)"
            )
        if self._uri and f"URI:{self._uri}" not in names:
            self._refuse(_in_words(f"hostname mismatch: {', '.join(names)}, not {self._uri}"))
        self._identity = tuple(names)

    def _try(self, act: Callable[[], bool]) -> bool:
        try:
            return act()
        except _native.TlsRefused as error:
            self._refuse(_in_words(str(error)))
            raise AssertionError from None  # it has raised

    def _refuse(self, why: str) -> None:
        self._broken = f"TLS with {self._peer} failed: {why}"
        raise Untrusted(self._broken) from None

    async def _wait(self, tls: _native.Tls) -> None:
        if tls.wants_to_send:
            await trio.lowlevel.wait_writable(self._socket)
        else:
            await trio.lowlevel.wait_readable(self._socket)

    async def _send_views(self, views: list[memoryview]) -> None:
        await self.handshake()
        await trio.lowlevel.checkpoint()
        data = memoryview(views[0] if len(views) == 1 else b"".join(views))
        sent = 0
        while sent < len(data):
            act = partial(_native.Tls.send, data=data[sent:])
            sent += await self._whenever(act, trio.lowlevel.wait_writable)

    async def _receive_some(self, buffer: memoryview) -> int:
        await self.handshake()
        await trio.lowlevel.checkpoint()
        act = partial(_native.Tls.receive, into=buffer)
        return await self._whenever(act, trio.lowlevel.wait_readable)

    async def _whenever(
        self,
        act: Callable[[_native.Tls], int | None],
        wait: Callable[[trio.socket.SocketType], Awaitable[None]],
    ) -> int:
        """Do it as soon as the socket lets."""
        with self._translated():
            while True:
                self._check_open()
                assert self._tls is not None
                try:
                    done = act(self._tls)
                except _native.TlsRefused as error:
                    self._refuse(_in_words(str(error)))
                    raise
                except OSError:
                    self._look_for_alert(self._tls)
                    raise
                if done is not None:
                    return done
                await wait(self._socket)

    def _look_for_alert(self, tls: _native.Tls) -> None:
        """The connection broke. If the peer has said why before it closed, raise
        :exc:`~pagenet.errors.Untrusted`: a peer that does not trust this side says so only after
        this side's handshake is over."""
        rest = memoryview(bytearray(1 << 14))
        try:
            while tls.receive(rest):
                pass
        except _native.TlsRefused as error:
            self._refuse(_in_words(str(error)))
        except OSError:
            return

    def close(self) -> None:
        if not self._closed and self._tls is not None:
            self._tls.close()
        super().close()

    def detach(self) -> DetachedSocket:
        self._check_open()
        tls = self._tls
        if tls is None or self._identity is None:
            raise ConnectionBroken(f"TLS with {self._peer}: the handshake is not over")
        fd = self._detach_socket()
        self._tls = None
        return DetachedSocket(fd, tls)


def client(tls: Tls, host: str) -> Callable[[trio.socket.SocketType, str], TlsConnection]:
    """Makes connections to a listener on ``host``. :exc:`~pagenet.errors.UsageError` if the
    credentials cannot be used."""
    credentials, name = tls.credentials(listens=False), tls.hostname or host
    uri = name if "://" in name else ""  # OpenSSL compares names of hosts alone

    def secure(sock: trio.socket.SocketType, peer: str) -> TlsConnection:
        def start(fd: int) -> _native.Tls:
            return credentials.context.connection(fd, None if uri else name)

        return TlsConnection(sock, peer, start, tls, uri)

    return secure


def server(tls: Tls) -> Callable[[trio.socket.SocketType, str], TlsConnection]:
    """Makes connections of sockets that a listener has accepted."""
    credentials = tls.credentials(listens=True)

    def secure(sock: trio.socket.SocketType, peer: str) -> TlsConnection:
        return TlsConnection(sock, peer, lambda fd: credentials.context.connection(fd, None), tls)

    return secure


def _in_words(reason: str) -> str:
    """What OpenSSL says, and what it means."""
    for part, meaning in _MEANINGS.items():
        if part in reason:
            return f"{meaning} ({reason})"
    return reason


_MEANINGS = {
    "alert certificate required": "the peer asks for a certificate",
    "alert unknown ca": "the peer does not know the authority of this side's certificate",
    "alert bad certificate": "the peer does not trust this side's certificate",
    "alert certificate expired": "this side's certificate has expired",
    "alert certificate revoked": "this side's certificate was revoked",
    "wrong version number": "the peer does not speak TLS: say --tls-dir on both sides, or on none",
    "alert": "the peer refused",
    "self-signed certificate": "this side does not know the authority of the peer's certificate",
    "unable to get local issuer": "this side does not know the authority of the peer's certificate",
    "ostname mismatch": "the peer's certificate is for another host: --tls-hostname names it",
    "IP address mismatch": "the peer's certificate is for another host: --tls-hostname names it",
}
