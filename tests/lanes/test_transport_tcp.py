"""tcp:// beyond the contract: URIs, names and addresses, options, and what breaks a connection or
hinders an accept."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pagenet.errors import ConnectionBroken, ConnectionBusy, SourceUnreachable, UsageError
from pagenet.tcp import TcpTransport, _tcp, assume_near, tune
from pagenet.tcp._connection import SocketConnection
from pagenet.tcp._constants import TCP_RTO_MAX_MS
from pagenet.tcp._listener import SocketListener
from pagenet.transport import Detachable

tcp = TcpTransport()


async def listen(uri: str = "tcp://127.0.0.1:0") -> SocketListener:
    return await tcp.listen(urlsplit(uri))


async def dial(uri: str) -> SocketConnection:
    return await tcp.dial(urlsplit(uri))


async def connect() -> tuple[SocketConnection, SocketConnection]:
    with await listen() as listener:
        return await dial(listener.uri), await listener.accept()


def as_socket(connection: SocketConnection) -> socket.socket:
    return socket.socket(fileno=connection.detach().fd)


# URIs


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("tcp://127.0.0.1", "port is missing"),
        ("tcp://127.0.0.1:", "port is missing"),
        ("tcp://", "port is missing"),
        ("tcp:127.0.0.1:7000", "Say tcp://HOST:PORT"),
        ("tcp:/127.0.0.1:7000", "Say tcp://HOST:PORT"),
        ("tcp://127.0.0.1:7000/guest", "'/guest'"),
        ("tcp://127.0.0.1:65536", "0 to 65535"),
        ("tcp://127.0.0.1:-1", "0 to 65535"),
        ("tcp://127.0.0.1:http", "0 to 65535"),
        ("tcp://::1:7000", "in brackets"),
        ("tcp://127.0.0.1:7000?tls=1", "query"),
        ("tcp://127.0.0.1:7000#lane", "fragment"),
        ("tcp://root@127.0.0.1:7000", "user name"),
        ("tcp://root:secret@127.0.0.1:7000", "user name"),
    ],
)
async def test_senseless_uris(uri: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as dialling:
        await dial(uri)
    with pytest.raises(UsageError, match=complaint):
        await listen(uri)
    with pytest.raises(UsageError, match=complaint):
        tcp.is_private(urlsplit(uri))
    assert "\n" not in str(dialling.value)


@pytest.mark.parametrize("uri", ["tcp://127.0.0.1:0", "tcp://:7000"])
async def test_nowhere_to_dial(uri: str) -> None:
    with pytest.raises(UsageError, match="a host and a port"):
        await dial(uri)


@pytest.mark.parametrize(
    ("uri", "private"),
    [
        ("tcp://127.0.0.1:7000", True),
        ("tcp://127.8.9.10:7000", True),
        ("tcp://[::1]:7000", True),
        ("tcp://[::ffff:127.0.0.1]:7000", True),
        ("tcp://localhost:7000", True),
        ("tcp://LOCALHOST:7000/", True),
        ("tcp://127.1:7000", True),
        ("tcp://:7000", False),
        ("tcp://0.0.0.0:7000", False),
        ("tcp://0:7000", False),
        ("tcp://[::]:7000", False),
        ("tcp://[::ffff:0.0.0.0]:7000", False),
        ("tcp://10.0.0.1:7000", False),
        ("tcp://[fe80::1%25lo]:7000", False),
    ],
)
def test_is_private(uri: str, private: bool) -> None:
    assert tcp.is_private(urlsplit(uri)) is private


@pytest.mark.parametrize(
    ("addresses", "private"),
    [
        (["127.0.0.1"], True),
        (["127.0.0.1", "::1"], True),
        (["127.0.0.1", "10.0.0.1"], False),
        (["10.0.0.1"], False),
    ],
)
def test_a_name_is_private_if_all_its_addresses_are(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], private: bool
) -> None:
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (host, 7000)) for host in addresses]
    )
    assert tcp.is_private(urlsplit("tcp://guest-7.example:7000")) is private


def test_a_name_without_address_is_neither_private_nor_public(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UsageError, match="Name or service not known"):
        tcp.is_private(urlsplit("tcp://nowhere.example:7000"))


# Names and addresses


class Resolver(trio.abc.HostnameResolver):
    """Knows one name, ``guest-7.example``."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def getaddrinfo(self, host: Any, port: Any, *_: Any, **__: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if host != b"guest-7.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))
            for address in self.addresses
        ]

    async def getnameinfo(self, *_: Any) -> Any:
        raise NotImplementedError


async def test_a_name_that_does_not_resolve() -> None:
    trio.socket.set_custom_hostname_resolver(Resolver())
    with pytest.raises(
        SourceUnreachable,
        match=r"tcp://nowhere\.example:7000.*Name or service not known.*check host",
    ):
        await dial("tcp://nowhere.example:7000")
    with pytest.raises(UsageError, match="Name or service not known"):
        await listen("tcp://nowhere.example:7000")


async def test_a_name_that_cannot_be_one() -> None:
    with pytest.raises(SourceUnreachable, match="no valid host name"):
        await dial(f"tcp://{'x' * 64}.example:7000")


async def test_a_resolver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Resolver):
        async def getaddrinfo(self, *_: Any, **__: Any) -> Any:
            await trio.sleep_forever()

    monkeypatch.setattr(_tcp, "CONNECT_TIMEOUT", 0.01)
    trio.socket.set_custom_hostname_resolver(Silent())
    with pytest.raises(SourceUnreachable, match=r"did not answer within 0\.01 s"):
        await dial("tcp://guest-7.example:7000")


async def test_addresses_are_tried_in_turn() -> None:
    trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.2", "127.0.0.1"))
    with await listen("tcp://127.0.0.1:0") as listener:
        port = urlsplit(listener.uri).port
        with (
            closing(await dial(f"tcp://guest-7.example:{port}")) as dialled,
            closing(await listener.accept()),
        ):
            assert dialled.peer == listener.uri


async def test_all_addresses_refuse() -> None:
    trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.2", "127.0.0.1"))
    with await listen("tcp://127.0.0.1:0") as listener:
        port = urlsplit(listener.uri).port
    with pytest.raises(SourceUnreachable) as caught:
        await dial(f"tcp://guest-7.example:{port}")
    assert (
        str(caught.value)
        == f"tcp://guest-7.example:{port}: nothing answers (tcp://127.0.0.2:{port}: Connection"
        f" refused, tcp://127.0.0.1:{port}: Connection refused); start the other side there, or"
        " check host, port and firewall"
    )


@contextmanager
def swallowing(address: str) -> Iterator[int]:
    """A port that answers no SYN: the queue of its listener is full."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind((address, 0))
        full.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield full.getsockname()[1]


async def test_an_address_that_swallows_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tcp, "CONNECT_TIMEOUT", 0.1)
    with (
        swallowing("127.0.0.2") as port,
        pytest.raises(SourceUnreachable, match=r"no answer within 0\.1 s"),
    ):
        await dial(f"tcp://127.0.0.2:{port}")


async def test_an_address_that_swallows_packets_leaves_time_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_tcp, "CONNECT_TIMEOUT", 0.4)
    trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.2", "127.0.0.1"))
    with swallowing("127.0.0.2") as port, await listen(f"tcp://127.0.0.1:{port}") as listener:
        dialled = await dial(f"tcp://guest-7.example:{port}")
        assert dialled.peer == listener.uri
        dialled.close()


async def test_a_socket_connected_to_itself_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    with await listen() as listener:
        port = urlsplit(listener.uri).port

    def on_that_port(family: int, kind: int) -> trio.socket.SocketType:
        sock = socket.socket(family, kind)
        sock.bind(("127.0.0.1", port))
        return trio.socket.from_stdlib_socket(sock)

    monkeypatch.setattr(trio.socket, "socket", on_that_port)
    with pytest.raises(SourceUnreachable, match="Connection refused"):
        await dial(listener.uri)


# Listening


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:"),
        ("tcp://localhost:0", "tcp://127.0.0.1:"),
        ("tcp://0.0.0.0:0", "tcp://0.0.0.0:"),
        ("tcp://[::1]:0", "tcp://[::1]:"),
        ("tcp://:0", "tcp://[::]:"),
    ],
)
async def test_the_uri_is_numeric_and_has_the_real_port(asked: str, got: str) -> None:
    if "[" in got and not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    with await listen(asked) as listener:
        address, port = listener.uri.rsplit(":", 1)
        assert address + ":" == got
        assert int(port) > 0


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
async def test_every_address_includes_the_old_ones() -> None:
    with await listen("tcp://:0") as listener:
        port = urlsplit(listener.uri).port
        for host in ("127.0.0.1", "[::1]"):
            with closing(await dial(f"tcp://{host}:{port}")), closing(await listener.accept()):
                pass


async def test_an_address_that_is_taken() -> None:
    with (
        await listen() as listener,
        pytest.raises(UsageError, match=r"Address already in use.*choose another"),
    ):
        await listen(listener.uri)


async def test_an_address_of_another_host() -> None:
    with pytest.raises(UsageError, match="Cannot assign requested address"):
        await listen("tcp://192.0.2.1:0")


async def test_listening_again_while_old_connections_live() -> None:
    with await listen() as listener:
        dialled, accepted = await dial(listener.uri), await listener.accept()
    accepted.close()  # now in FIN_WAIT: without SO_REUSEADDR the address would be taken
    with await listen(listener.uri):
        dialled.close()


class Accepting:
    """Stands in for a listening socket whose accept() fails in turn with ``errors``, and then
    works."""

    def __init__(self, sock: trio.socket.SocketType, *errors: int) -> None:
        self.sock = sock
        self.errors = list(errors)

    async def accept(self) -> Any:
        if self.errors:
            await trio.lowlevel.checkpoint()
            raise OSError(self.errors.pop(0), "")
        return await self.sock.accept()

    def close(self) -> None:
        self.sock.close()


async def test_accept_outlives_connections_that_die_early() -> None:
    with await listen() as listener:
        listener._socket = Accepting(listener._socket, errno.ECONNABORTED, errno.EPROTO)  # type: ignore[assignment]
        with closing(await dial(listener.uri)), closing(await listener.accept()):
            pass


async def test_accept_does_not_outlive_what_it_does_not_know() -> None:
    with await listen() as listener:
        listener._socket = Accepting(listener._socket, errno.EINVAL)  # type: ignore[assignment]
        with pytest.raises(ConnectionBroken, match="Invalid argument"):
            await listener.accept()


@contextmanager
def no_file_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        probe = os.open(os.devnull, os.O_RDONLY)
        stack.callback(os.close, probe)
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 16, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        try:
            while True:
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
        yield


async def test_accept_takes_one_file_descriptor() -> None:
    """If a second one were needed for a moment, each peer would be accepted and then reset."""
    with await listen() as listener, closing(await dial(listener.uri)) as near:
        spare = os.open(os.devnull, os.O_RDONLY)
        with no_file_descriptor_left():
            os.close(spare)
            far = await listener.accept()
        with closing(far):
            await near.send(b"x")
            assert await far.receive_into(memoryview(bytearray(1))) == 1


async def test_accept_waits_for_file_descriptors() -> None:
    accepted = trio.Event()

    async def accept(listener: SocketListener) -> None:
        (await listener.accept()).close()
        accepted.set()

    async with trio.open_nursery() as nursery:
        with await listen() as listener, closing(await dial(listener.uri)):
            with no_file_descriptor_left():
                nursery.start_soon(accept, listener)
                await wait_all_tasks_blocked()
                assert not accepted.is_set()
            await accepted.wait()


# Connections


async def test_options() -> None:
    for connection in await connect():
        with as_socket(connection) as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 256 << 10
            with suppress(OSError):  # Linux 6.15
                assert sock.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS) == 1000
            idle, interval, probes = (
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + interval * probes == 10


async def test_congestion_control_does_not_pace_near_by() -> None:
    """The pace would survive a later change of congestion control: the choice must be made before
    the connection is."""
    with socket.socket() as plain:
        host = congestion_control(plain)
    for connection in await connect():
        with as_socket(connection) as sock:
            assert congestion_control(sock) in (
                {b"cubic", b"reno"} if host.startswith(b"bbr") else {host}
            )


def test_far_peers_get_the_congestion_control_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tcp, "NEAR_US", 0)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as near:
        host = congestion_control(near)
        host_control = assume_near(near)
        assert host_control == host
        near.connect(listener.getsockname())
        tune(near, host_control)
        assert congestion_control(near) == host


def congestion_control(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


def reset(connection: SocketConnection) -> None:
    with as_socket(connection) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def test_a_reset_breaks_both_directions_and_stays() -> None:
    near, far = await connect()

    async def send() -> None:
        with pytest.raises(ConnectionBroken, match=near.peer):
            await near.send(*[bytes(1 << 20)] * 64)

    async def receive() -> None:
        with pytest.raises(ConnectionBroken, match=near.peer):
            await near.receive_into(memoryview(bytearray(1)))

    with closing(near):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            reset(far)
        for _ in range(2):
            await send()
            await receive()


async def test_a_reset_lets_through_what_came_before() -> None:
    near, far = await connect()
    with closing(near):
        await far.send(b"last words")
        reset(far)
        buffer = bytearray(16)
        assert await near.receive_into(memoryview(buffer)) == 10
        for _ in range(2):
            with pytest.raises(ConnectionBroken, match="Connection reset by peer"):
                await near.receive_into(memoryview(buffer))


async def test_peers_have_names() -> None:
    with await listen() as listener:
        dialled, accepted = await dial(listener.uri), await listener.accept()
    assert dialled.peer == listener.uri
    with as_socket(dialled) as sock:
        host, port = sock.getsockname()
    assert accepted.peer == f"tcp://{host}:{port}"
    assert repr(accepted) == f"<SocketConnection to tcp://{host}:{port}: open>"
    assert "closed" in repr(dialled)
    accepted.close()


async def test_a_bad_buffer_is_not_the_connections_fault() -> None:
    near, far = await connect()
    with closing(near), closing(far), tempfile.TemporaryFile() as file:
        file.truncate(8192)
        memory = mmap.mmap(file.fileno(), 8192)
        file.truncate(0)
        with memoryview(memory) as view, pytest.raises(OSError, match="Bad address") as caught:
            await near.send(view)
        assert caught.value.errno == errno.EFAULT
        memory.close()  # BufferError if the traceback in `caught` kept a view
        await near.send(b"fine")
        assert await far.receive_into(memoryview(bytearray(8))) == 4


async def test_an_empty_buffer_receives_nothing() -> None:
    near, far = await connect()
    with closing(near), closing(far), pytest.raises(ValueError, match="empty buffer"):
        await near.receive_into(memoryview(b""))


async def test_only_contiguous_buffers_travel() -> None:
    near, far = await connect()
    with closing(far):
        with pytest.raises(TypeError, match="contiguous"):
            await near.send(b"not even this", memoryview(b"abcdef")[::2])
        near.close()
        assert await far.receive_into(memoryview(bytearray(8))) == 0


async def test_a_connection_in_use_cannot_be_detached() -> None:
    near, far = await connect()
    assert isinstance(near, Detachable)

    async def receive() -> None:
        assert await near.receive_into(memoryview(bytearray(8))) == 5

    with closing(far):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            with pytest.raises(ConnectionBusy, match="cannot be detached"):
                near.detach()
            await far.send(b"still")
        os.close(near.detach().fd)
