"""The transport interface: what pagenet needs of anything that carries bytes between two hosts.

A backend is a :class:`Transport`: it dials a URI and listens on one. Both give a
:class:`Connection`, an ordered, reliable stream of bytes in both directions. A connection sends
from and receives into the caller's buffers, so that page bytes pass by reference. Features that
only some backends have are separate interfaces: :class:`Detachable` gives away the file descriptor
underneath, for loops in C that drive it themselves. With some connections the destination reads the
source's memory itself: each side defines what it needs of those (``source/lanes.py``,
``destination/lanes.py``).

Backends register under their URI scheme; :func:`dial` and :func:`listen` pick one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, Self, runtime_checkable
from urllib.parse import SplitResult, urlsplit

from . import _native
from .errors import UsageError
from .tls import Tls

__all__ = [
    "Authenticated",
    "Buffer",
    "Connection",
    "Detachable",
    "DetachedSocket",
    "InnerTransport",
    "LaneKind",
    "Listener",
    "StreamHandler",
    "TlsTransport",
    "Transport",
    "dial",
    "has_no_link",
    "identity_of",
    "is_near",
    "listen",
    "register",
    "resumes_at_once",
    "schemes",
    "security_of",
]

Buffer = bytes | bytearray | memoryview
#: which lanes drive a connection: loops in C, tasks in Trio, or (``auto``) loops in C where
#: possible
LaneKind = Literal["auto", "native", "trio"]


class Connection(Protocol):
    """A reliable, ordered stream of bytes in both directions.

    One task may send while another receives; a second task in the same direction gets
    :exc:`~pagenet.errors.ConnectionBusy`. After :meth:`close` each method raises
    :exc:`~pagenet.errors.ConnectionClosed`; when the peer or the network has broken the connection,
    :exc:`~pagenet.errors.ConnectionBroken`.
    """

    @property
    def peer(self) -> str:
        """The other end, for people to read."""
        ...

    async def send(self, *buffers: Buffer) -> None:
        """Send all bytes of all ``buffers``, in order.

        If it is cancelled, an unknown number of bytes has been sent: the connection can then only
        be closed.
        """
        ...

    async def receive_into(self, buffer: memoryview) -> int:
        """Receive at least one byte into ``buffer`` (not empty) and return how many; 0 once the
        peer has closed."""
        ...

    def close(self) -> None:
        """Close both directions at once. Idempotent; wakes tasks that wait in :meth:`send` or
        :meth:`receive_into`."""
        ...


class DetachedSocket(NamedTuple):
    """A non-blocking socket, and TLS on it, if there is any."""

    fd: int
    tls: _native.Tls | None


#: what is called with each stream that the other side opens
StreamHandler = Callable[[Connection], Awaitable[None]]


@runtime_checkable
class Detachable(Protocol):
    """A connection whose bytes travel over a socket that a loop in C may drive."""

    @property
    def peer(self) -> str:
        """As :attr:`Connection.peer`."""
        ...

    @property
    def is_encrypted(self) -> bool:
        """Whether its bytes are not what goes over the socket."""
        ...

    def detach(self) -> DetachedSocket:
        """Give the socket to the caller, who closes TLS and then the descriptor. The connection is
        then closed."""
        ...


@runtime_checkable
class Authenticated(Protocol):
    """A connection that knows who the peer is, after its first byte has come."""

    @property
    def identity(self) -> tuple[str, ...]:
        """The peer's names, as its certificate has them; none if nothing vouches for them."""
        ...

    @property
    def security(self) -> str:
        """How its bytes are encrypted, for people to read; empty if they are not."""
        ...


@runtime_checkable
class Resuming(Protocol):
    """A connection that knows what it does after its path was down."""

    @property
    def resumes_at_once(self) -> bool:
        """Whether what was lost is sent again within a second after the path is back."""
        ...

    @property
    def is_near(self) -> bool:
        """Whether a round trip takes less than ten milliseconds."""
        ...


def is_near(connection: Connection) -> bool:
    return not isinstance(connection, Resuming) or connection.is_near


def resumes_at_once(connection: Connection) -> bool:
    return not isinstance(connection, Resuming) or connection.resumes_at_once


def security_of(connection: Connection) -> str:
    return connection.security if isinstance(connection, Authenticated) else ""


def identity_of(connection: Connection) -> tuple[str, ...]:
    return connection.identity if isinstance(connection, Authenticated) else ()


class Listener(Protocol):
    @property
    def uri(self) -> str:
        """The address that was bound, as a URI that a peer can dial."""
        ...

    async def accept(self) -> Connection:
        """The next connection."""
        ...

    def close(self) -> None:
        """Stop listening and leave nothing behind. Idempotent; connections already accepted live
        on."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Transport(Protocol):
    async def dial(self, uri: SplitResult) -> Connection:
        """Connect. :exc:`~pagenet.errors.SourceUnreachable` if nothing answers,
        :exc:`~pagenet.errors.UsageError` for a URI that cannot be dialled."""
        ...

    async def listen(self, uri: SplitResult) -> Listener:
        """Listen. :exc:`~pagenet.errors.UsageError` if the address cannot be bound."""
        ...

    def is_private(self, uri: SplitResult) -> bool:
        """Whether a listener on ``uri`` can be reached from this host alone."""
        ...


@runtime_checkable
class InnerTransport(Protocol):
    """A transport within one process: there is no link on which what is in flight delays what comes
    behind it. How long an answer takes is the source's affair."""

    has_no_link: bool


@runtime_checkable
class TlsTransport(Protocol):
    """A transport that can encrypt."""

    async def dial_tls(self, uri: SplitResult, tls: Tls) -> Connection:
        """As :meth:`Transport.dial`. :exc:`~pagenet.errors.Untrusted` if one side does not trust
        the other."""
        ...

    async def listen_tls(self, uri: SplitResult, tls: Tls) -> Listener:
        """As :meth:`Transport.listen`. A connection raises :exc:`~pagenet.errors.Untrusted` where
        its first byte is sent or received, if one side does not trust the other."""
        ...


_transports: dict[str, Transport | Callable[[], Transport]] = {}


def register(scheme: str, transport: Transport | Callable[[], Transport]) -> None:
    """Make ``scheme://...`` mean ``transport`` from now on: one, or a function that makes it when
    it is first used."""
    _transports[scheme] = transport


def schemes() -> Sequence[str]:
    return sorted(_transports)


def _transport_for(uri: str) -> tuple[Transport, SplitResult]:
    try:
        split = urlsplit(uri)
    except ValueError as error:
        raise UsageError(f"{uri!r} is not a URI: {error}") from None
    if split.scheme not in _transports:
        known = ", ".join(f"{scheme}:" for scheme in schemes())
        raise UsageError(
            f"{uri!r}: no transport of that name (there are {known}; for example"
            " tcp://127.0.0.1:7000)"
        )
    found = _transports[split.scheme]
    if callable(found):
        found = _transports[split.scheme] = found()
    return found, split


def has_no_link(uri: str) -> bool:
    """Whether connections to ``uri`` stay within this process (:class:`InnerTransport`).
    :exc:`UsageError` if there is no such transport."""
    transport, _ = _transport_for(uri)
    return isinstance(transport, InnerTransport) and transport.has_no_link


async def dial(uri: str, tls: Tls | None = None) -> Connection:
    transport, split = _transport_for(uri)
    if tls is None:
        return await transport.dial(split)
    return await _encrypting(transport, uri).dial_tls(split, tls)


async def listen(uri: str, *, plaintext: bool = False, tls: Tls | None = None) -> Listener:
    """Listen on ``uri``. :exc:`~pagenet.errors.UsageError` if other hosts could connect, and
    there is no ``tls``, and ``plaintext`` is not set."""
    transport, split = _transport_for(uri)
    if tls is not None:
        return await _encrypting(transport, uri).listen_tls(split, tls)
    if not plaintext and not transport.is_private(split):
        raise _exposed(uri)
    listener = await transport.listen(split)
    # The address that was bound decides, not the name that was given: the resolver may have
    # answered differently a moment ago.
    if not plaintext and not transport.is_private(urlsplit(listener.uri)):
        listener.close()
        raise _exposed(listener.uri)
    return listener


def _encrypting(transport: Transport, uri: str) -> TlsTransport:
    if not isinstance(transport, TlsTransport):
        raise UsageError(f"{uri}: TLS is for tcp:// and rdma://")
    return transport


def _exposed(uri: str) -> UsageError:
    return UsageError(
        f"{uri} can be reached from other hosts, and memory would cross the network unencrypted and"
        " to anyone who asks: say --tls-dir, listen on loopback or a unix socket, or say"
        " --plaintext if the network is yours alone"
    )
