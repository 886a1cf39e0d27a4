"""``tcp://HOST:PORT``: names and addresses, dialling addresses in turn, and the options that every
connection gets."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult

import trio

from ..errors import SourceUnreachable, Untrusted, UsageError
from ..tls import Tls
from ._connection import SocketConnection, reason
from ._constants import (
    BACKLOG,
    CONNECT_TIMEOUT,
    HANDSHAKE_TIMEOUT,
    KEEPALIVE_IDLE,
    KEEPALIVE_INTERVAL,
    KEEPALIVE_PROBES,
    NEAR_CONGESTION_CONTROL,
    NEAR_US,
    PACING_CONGESTION_CONTROL,
    RTO_MAX_MS,
    TCP_RTO_MAX_MS,
    UNACKNOWLEDGED_TIMEOUT,
    UNSENT_BYTES,
)
from ._listener import SocketListener
from ._tls import TlsConnection, client, server
from ._uri import HostPort, parse_tcp, tcp_uri

_ADVICE = "start the other side there, or check host, port and firewall"

_RTT_AT = 68  # tcpi_rtt in struct tcp_info, us


C = TypeVar("C", bound=SocketConnection)
#: makes a connection of a socket and the peer's address
Make = Callable[[trio.socket.SocketType, str], C]


class _Address(NamedTuple):
    family: int
    sockaddr: Any  # what the kernel takes: (host, port) or (host, port, flow, scope)

    @property
    def uri(self) -> str:
        return tcp_uri(HostPort(self.sockaddr[0], self.sockaddr[1]))


class TcpTransport:
    """A :class:`~pagenet.transport.Transport` over TCP, IPv4 and IPv6.

    A host is a name, an address, or ``[an IPv6 address]``. To a listener, no host means every
    address of this host, and port 0 a free port. ``localhost`` is 127.0.0.1, then ::1, whatever the
    resolver returns for it.
    """

    async def dial(self, uri: SplitResult) -> SocketConnection:
        """Try the host's addresses in turn, for :data:`CONNECT_TIMEOUT` seconds in all."""
        return await self._dial(uri, SocketConnection)

    async def dial_tls(self, uri: SplitResult, tls: Tls) -> TlsConnection:
        """As :meth:`dial`, and shake hands."""
        connection = await self._dial(uri, client(tls, parse_tcp(uri).host))
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                await connection.handshake()
        except trio.TooSlowError:
            connection.close()
            raise Untrusted(
                f"{uri.geturl()} does not answer a TLS handshake for {HANDSHAKE_TIMEOUT:g} s: does"
                " it speak TLS?"
            ) from None
        except BaseException:
            connection.close()
            raise
        return connection

    async def _dial(self, uri: SplitResult, make: Make[C]) -> C:
        where = parse_tcp(uri)
        if not where.host or not where.port:
            raise UsageError(
                f"{uri.geturl()}: dialling needs a host and a port other than 0: say"
                " tcp://HOST:PORT"
            )
        try:
            addresses = await _resolve(where)
        except OSError as error:
            why = f"{where.host!r} has no address: {reason(error)}"
            raise SourceUnreachable(f"{uri.geturl()}: {why}; {_ADVICE}") from error
        return await _dial_in_turn(uri, addresses, make)

    async def listen(self, uri: SplitResult) -> SocketListener:
        """Listen on the first of the host's addresses that can be bound."""
        return await self._listen(uri, SocketConnection)

    async def listen_tls(self, uri: SplitResult, tls: Tls) -> SocketListener:
        """As :meth:`listen`. The connections shake hands before their first byte."""
        return await self._listen(uri, server(tls))

    async def _listen(self, uri: SplitResult, make: Make[SocketConnection]) -> SocketListener:
        where = parse_tcp(uri)
        try:
            addresses = await _resolve(where)
        except OSError as error:
            raise _no_address(uri, where, error) from error
        return _listen_in_turn(uri, addresses, make)

    def is_private(self, uri: SplitResult) -> bool:
        """Whether every address of the host is a loopback address. Where the host is a name, this
        may ask the resolver, and block."""
        where = parse_tcp(uri)
        hosts = _known_hosts(where)
        if hosts is None:
            try:
                found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                raise _no_address(uri, where, error) from error
            hosts = [str(sockaddr[0]) for *_, sockaddr in found]
        return all(_is_loopback(host) for host in hosts)


def _no_address(uri: SplitResult, where: HostPort, error: OSError | UnicodeError) -> UsageError:
    why = reason(error) if isinstance(error, OSError) else str(error)
    return UsageError(
        f"{uri.geturl()}: {where.host!r} has no address to listen on: {why}; name one of this"
        " host's"
    )


# Names to addresses


def _known_hosts(where: HostPort) -> Sequence[str] | None:
    """The addresses that need no resolver; None if only the resolver knows."""
    if not where.host:
        return ["::", "0.0.0.0"]
    # A listener on localhost counts as private, so an entry in a hosts file must not give it
    # another address.
    if where.host == "localhost":
        return ["127.0.0.1", "::1"]
    try:
        ipaddress.ip_address(where.host)
    except ValueError:
        return None
    return [where.host]


def _is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


async def _resolve(where: HostPort) -> list[_Address]:
    """The addresses of ``where``. Raises OSError if a name has none, or if the resolver takes
    longer than CONNECT_TIMEOUT."""
    addresses: list[_Address] = []
    try:
        with trio.fail_after(CONNECT_TIMEOUT):
            for host in _known_hosts(where) or [where.host]:
                found = await trio.socket.getaddrinfo(host, where.port, type=socket.SOCK_STREAM)
                addresses += [_Address(family, sockaddr) for family, _, _, _, sockaddr in found]
    except trio.TooSlowError:
        raise OSError(None, f"the resolver did not answer within {CONNECT_TIMEOUT:g} s") from None
    except UnicodeError as error:
        raise OSError(None, f"no valid host name: {error}") from error
    return addresses


# Dialling


async def _dial_in_turn(uri: SplitResult, addresses: Sequence[_Address], make: Make[C]) -> C:
    deadline = trio.current_time() + CONNECT_TIMEOUT
    failures = []
    for tried, address in enumerate(addresses):
        # An equal share of the time that is left: a first address that swallows packets must not
        # use up the time of the second.
        share = (deadline - trio.current_time()) / (len(addresses) - tried)
        try:
            with trio.fail_after(max(share, 0)):
                return await _connect(address, make)
        except trio.TooSlowError:
            failures.append(f"{address.uri}: no answer within {share:.1f} s")
        except OSError as error:
            failures.append(f"{address.uri}: {reason(error)}")
    raise SourceUnreachable(f"{uri.geturl()}: nothing answers ({', '.join(failures)}); {_ADVICE}")


async def _connect(address: _Address, make: Make[C]) -> C:
    sock = trio.socket.socket(address.family, socket.SOCK_STREAM)
    try:
        host_control = assume_near(sock)
        await sock.connect(address.sockaddr)
        # When nothing listens on a port that is dialled, the kernel may choose that same port for
        # this side's end. TCP then connects the socket to itself. A process that dials a dead
        # source over and over will see this.
        if sock.getsockname() == sock.getpeername():
            raise OSError(errno.ECONNREFUSED, "connected to itself")
        tune(sock, host_control)
        return make(sock, address.uri)
    except BaseException:
        sock.close()
        raise


def tune(sock: trio.socket.SocketType | socket.socket, host_control: bytes) -> None:
    """Set the options of a connection that pages go over. ``host_control``: the result of
    :func:`assume_near`."""
    # The request for a faulted page is small, and a thread stands still until it is answered: it
    # must not wait for more bytes to be sent with it.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_TIMEOUT * 1000)
    with suppress(OSError):  # not in this kernel
        sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, RTO_MAX_MS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    if _is_pacing(host_control) and _round_trip_us(sock) >= NEAR_US:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, host_control)


def assume_near(sock: trio.socket.SocketType | socket.socket) -> bytes:
    """If the host's congestion control paces, give ``sock`` one that does not. Call this before it
    connects or listens.

    A connection that has begun to pace goes on pacing, whatever congestion control takes over
    (Linux 6.18), so this cannot wait for the first round trip.

    Returns the host's congestion control, which connections to far peers get back. It is read here,
    from a socket that exists already: a listener that has no file descriptor to spare would
    otherwise lose each connection that it accepts.
    """
    host_control = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
    if _is_pacing(host_control):
        for better in NEAR_CONGESTION_CONTROL:
            with suppress(OSError):  # not in this kernel, or not permitted to all users
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, better)
                break
    return host_control


def _is_pacing(congestion_control: bytes) -> bool:
    return congestion_control.startswith(PACING_CONGESTION_CONTROL)


def _round_trip_us(sock: trio.socket.SocketType | socket.socket) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT_AT + 4)
    return int.from_bytes(info[_RTT_AT:], sys.byteorder)


# Listening


def _listen_in_turn(
    uri: SplitResult, addresses: Sequence[_Address], make: Make[SocketConnection]
) -> SocketListener:
    failures = []
    for address in addresses:
        try:
            sock, host_control = _bind(address)
        except OSError as error:
            failures.append(f"{address.uri}: {reason(error)}")
        else:
            bound = _Address(address.family, sock.getsockname())
            return SocketListener(sock, bound.uri, partial(_welcome, make, host_control))
    raise UsageError(
        f"{uri.geturl()}: cannot listen ({', '.join(failures)}); choose another address or port"
    )


def _bind(address: _Address) -> tuple[trio.socket.SocketType, bytes]:
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        # Without this option, a daemon that is started again waits a minute for its predecessor's
        # connections to leave TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            # [::] takes IPv4 peers too, whatever net.ipv6.bindv6only is: without a host we promise
            # every address.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        host_control = assume_near(sock)
        sock.bind(address.sockaddr)
        sock.listen(BACKLOG)
        return trio.socket.from_stdlib_socket(sock), host_control
    except BaseException:
        sock.close()
        raise


def _welcome(
    make: Make[SocketConnection],
    host_control: bytes,
    sock: trio.socket.SocketType,
    sockaddr: Any,
) -> SocketConnection:
    tune(sock, host_control)
    return make(sock, _Address(sock.family, sockaddr).uri)
