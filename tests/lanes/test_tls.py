"""TLS 1.3 on every connection of a session: pages come, nobody without credentials gets any, and no
byte of them can be read on the way."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.parse import SplitResult, urlsplit

import pytest
import trio
from certificates import Authority, expired
from processes import PAGE, write_pattern
from tap import Tap
from tlslite.constants import KeyUpdateMessageType
from tlslite.errors import TLSRemoteAlert
from tlslite.handshakesettings import HandshakeSettings
from tlslite.tlsconnection import TLSConnection
from tlslite.utils.keyfactory import parsePEMKey
from tlslite.x509certchain import X509CertChain

import pagenet
from pagenet import OwnMemory, RemoteProtocolError, SourceLost, UsageError
from pagenet.errors import ConnectionBroken, Untrusted
from pagenet.nurseries import running_beside
from pagenet.protocol import Bye, Channel, Hello, MessageDecoder, Role, encode_message
from pagenet.session import MessageStream, greet
from pagenet.tcp import TcpTransport
from pagenet.tcp._listener import SocketListener
from pagenet.tcp._tls import TlsConnection
from pagenet.testing import check_transport
from pagenet.tls import Tls
from pagenet.transport import Connection, LaneKind, Listener, dial

SIZE = 600 * PAGE
LISTEN = "tcp://127.0.0.1:0"
LANES: list[LaneKind] = ["native", "trio"]
PATIENCE = 20.0


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def directory(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authority.write(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls(directory: Path) -> Tls:
    return Tls(directory)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_pattern(tmp_path / "source", SIZE, zero_every=7)


@pytest.fixture
def memory() -> Iterator[OwnMemory]:
    made = OwnMemory("memfd")
    yield made
    made.close()


class ShakingHands:
    """A listener whose connections have shaken hands, as those have that were dialled."""

    def __init__(self, listener: SocketListener) -> None:
        self._listener = listener
        self.uri, self.close = listener.uri, listener.close

    async def accept(self) -> Connection:
        while True:
            connection = await self._listener.accept()
            assert isinstance(connection, TlsConnection)
            try:
                await connection.handshake()
            except (Untrusted, ConnectionBroken):
                connection.close()
            else:
                return connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Encrypting:
    """A transport that always encrypts."""

    def __init__(self, tls: Tls) -> None:
        self._tcp, self._tls = TcpTransport(), tls

    async def dial(self, uri: SplitResult) -> Connection:
        return await self._tcp.dial_tls(uri, self._tls)

    async def listen(self, uri: SplitResult) -> Listener:
        return ShakingHands(await self._tcp.listen_tls(uri, self._tls))

    def is_private(self, uri: SplitResult) -> bool:
        return self._tcp.is_private(uri)


async def test_conformance(tls: Tls) -> None:
    await check_transport(Encrypting(tls), lambda: LISTEN)


# ---- pages ----


@pytest.mark.native
@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
@pytest.mark.parametrize("compress", ["none", "lz4"])
@pytest.mark.parametrize("dials", ["source", "destination"])
@pytest.mark.parametrize("lane", LANES)
async def test_pages_come(
    lane: LaneKind, dials: str, compress: str, kind: str, source: Path, tls: Tls
) -> None:
    memory, content = OwnMemory(kind), source.read_bytes()  # type: ignore[arg-type]
    options = {"lane": lane, "compress": compress, "tls": tls, "background_lanes": 2}
    try:
        async with session(source, memory, dials, tls, lane, options) as transfer:
            with trio.fail_after(PATIENCE):
                assert await memory.read(0, SIZE) == content
                await transfer.wait_complete()
        assert await memory.read(0, SIZE) == content
        assert transfer.lane.startswith(f"{lane}, TLS_AES_128_GCM_SHA256")
    finally:
        memory.close()


@asynccontextmanager
async def session(
    source: Path,
    memory: OwnMemory,
    dials: str,
    tls: Tls,
    lane: LaneKind,
    options: dict[str, object],
) -> AsyncIterator[pagenet.Transfer]:
    if dials == "destination":
        async with (
            pagenet.serve(str(source), listen=LISTEN, tls=tls, lane=lane) as server,
            pagenet.pull(server.uri, memory, **options) as transfer,  # type: ignore[arg-type]
        ):
            yield transfer
        return
    listening = trio.Event()
    where: list[str] = []

    def note(event: str, /, **fields: object) -> None:
        if event == "listening":
            where.append(str(fields["uri"]))
            listening.set()

    async def serve() -> None:
        await listening.wait()
        async with pagenet.serve(str(source), connect=where[0], tls=tls, lane=lane) as server:
            await server.wait_complete()

    async with running_beside(serve):
        pulled = pagenet.pull(LISTEN, memory, listen=True, on_event=note, **options)  # type: ignore[arg-type]
        async with pulled as transfer:
            yield transfer


async def test_keys_of_both_sides(source: Path, memory: OwnMemory, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_text(f"host-b:{32 * '0a'}\n")
    there.write_text(f"host-a:{32 * '0b'}\nhost-b:{32 * '0a'}\n")
    for path in (here, there):
        path.chmod(0o600)
    async with pagenet.serve(str(source), listen=LISTEN, tls=Tls(psk=there)) as server:
        async with pagenet.pull(server.uri, memory, tls=Tls(psk=here)) as transfer:
            with trio.fail_after(PATIENCE):
                await transfer.wait_complete()
        here.write_text(f"host-b:{32 * '0c'}\n")
        with pytest.raises(Untrusted):
            await dial(server.uri, Tls(psk=here))
        here.write_text(f"host-c:{32 * '0a'}\n")
        with pytest.raises(Untrusted):
            await dial(server.uri, Tls(psk=here))


# ---- who is trusted ----


async def refusal(uri: str, tls: Tls | None) -> Exception:
    """Why a destination does not get as far as a session."""
    memory = OwnMemory("anonymous")
    try:
        with trio.fail_after(PATIENCE):
            async with pagenet.pull(uri, memory, tls=tls):
                raise AssertionError("it was let in")
    except pagenet.PagenetError as error:
        return error
    finally:
        memory.close()


async def until(is_so: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE):
        while not is_so():  # noqa: ASYNC110
            await trio.sleep(0.001)


@pytest.fixture
def refused() -> list[str]:
    return []


@asynccontextmanager
async def serving(source: Path, tls: Tls, refused: list[str]) -> AsyncIterator[str]:
    def note(event: str, /, **fields: object) -> None:
        if event in ("refused", "lost"):
            refused.append(str(fields["reason"]))

    async with pagenet.serve(str(source), listen=LISTEN, tls=tls, on_event=note) as server:
        yield server.uri
        assert server.statistics().asked == 0
        assert server.sessions == 0


async def test_strange_authority(
    source: Path,
    tls: Tls,
    directory: Path,
    authority: Authority,
    tmp_path: Path,
    refused: list[str],
) -> None:
    """Each side refuses a certificate of an authority that it does not know."""
    stranger = Authority()
    theirs = stranger.write(tmp_path / "theirs", trusts=authority)
    async with serving(source, tls, refused) as uri:
        error = await refusal(uri, Tls(theirs))
        assert "does not know the authority of this side's certificate" in str(error)
        assert isinstance(error, Untrusted)
        assert error.exit_code == 8
        error = await refusal(uri, Tls(stranger.write(tmp_path / "strange")))
        assert "does not know the authority of the peer's certificate" in str(error)
        assert isinstance(error, Untrusted)
        await until(lambda: len(refused) == 2)
    assert "does not know the authority of the peer's certificate" in refused[0]


async def test_expired_certificate(
    source: Path, authority: Authority, directory: Path, tmp_path: Path, refused: list[str]
) -> None:
    """A peer shows one that has expired since it was started."""
    old = authority.write(tmp_path / "old", until=expired())
    context = client_context(old)
    async with serving(source, Tls(directory), refused) as uri:
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await trio.to_thread.run_sync(talk, uri, context)
    assert "has expired" in refused[0]


def client_context(directory: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if directory is not None:
        context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    return context


def talk(uri: str, context: ssl.SSLContext, words: bytes = b"hello") -> bytes:
    """What a source answers to a client that is none of ours."""
    where = urlsplit(uri)
    with (
        socket.create_connection((where.hostname, where.port), timeout=PATIENCE) as plain,
        context.wrap_socket(plain) as secure,
    ):
        secure.sendall(words)
        return secure.recv(1 << 16)


async def test_no_certificate(source: Path, tls: Tls, refused: list[str]) -> None:
    async with serving(source, tls, refused) as uri:
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await trio.to_thread.run_sync(talk, uri, client_context(None))
    assert "did not return a certificate" in refused[0]


async def test_old_version_of_tls(
    source: Path, tls: Tls, directory: Path, refused: list[str]
) -> None:
    context = client_context(directory)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with serving(source, tls, refused) as uri:
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await trio.to_thread.run_sync(talk, uri, context)
        await until(lambda: bool(refused))


async def test_another_host(
    source: Path, authority: Authority, directory: Path, tmp_path: Path, memory: OwnMemory
) -> None:
    elsewhere = Tls(authority.write(tmp_path / "elsewhere", "host-b.example"))
    async with pagenet.serve(str(source), listen=LISTEN, tls=elsewhere) as server:
        assert "--tls-hostname" in str(await refusal(server.uri, Tls(directory)))
        named = Tls(directory, hostname="host-b.example")
        async with pagenet.pull(server.uri, memory, tls=named) as transfer:
            with trio.fail_after(PATIENCE):
                await transfer.wait_complete()


async def test_name_that_is_a_uri(
    source: Path, authority: Authority, directory: Path, tmp_path: Path, memory: OwnMemory
) -> None:
    name = "spiffe://example.org/hypervisor/b"
    there = Tls(authority.write_uri(tmp_path / "there", name))
    async with pagenet.serve(str(source), listen=LISTEN, tls=there) as server:
        for other in ("spiffe://example.org/hypervisor/c", "hypervisor-b"):
            error = await refusal(server.uri, Tls(directory, hostname=other))
            assert "--tls-hostname" in str(error)
        named = Tls(directory, hostname=name, allow=["spiffe://example.org/hypervisor/*"])
        async with pagenet.pull(server.uri, memory, tls=named) as transfer:
            with trio.fail_after(PATIENCE):
                await transfer.wait_complete()


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_name_that_is_not_allowed(
    side: str, source: Path, authority: Authority, directory: Path, tmp_path: Path,
    refused: list[str],
) -> None:  # fmt: skip
    named = authority.write(tmp_path / "named", "127.0.0.1", common_name="spiffe-host")
    allow = {"source": ("other", "*.example"), "destination": ()}
    here = Tls(directory if side == "source" else named, allow=allow[side])
    there = Tls(named, allow=("other",) if side == "destination" else ())
    async with serving(source, here, refused) as uri:
        error = await refusal(uri, there)
    assert "--tls-authz" in str(error if side == "destination" else refused[0])


async def test_name_that_is_allowed(
    source: Path, authority: Authority, directory: Path, tmp_path: Path, memory: OwnMemory
) -> None:
    named = authority.write(tmp_path / "named", "127.0.0.1", common_name="host-b")
    async with (
        pagenet.serve(str(source), listen=LISTEN, tls=Tls(directory, allow=["host-*"])) as server,
        pagenet.pull(server.uri, memory, tls=Tls(named)) as transfer,
    ):
        with trio.fail_after(PATIENCE):
            await transfer.wait_complete()


async def test_lists_of_two_authorities(
    source: Path, authority: Authority, tmp_path: Path, refused: list[str], memory: OwnMemory
) -> None:
    """As while one authority takes over from another."""
    other = Authority()
    here, there, bad = tmp_path / "here", tmp_path / "there", tmp_path / "bad"
    authority.write(here)
    other.write(there, trusts=authority)
    other.write(bad, trusts=authority)
    (here / "ca-cert.pem").write_bytes(authority.pem + other.pem)
    authority.revoke(here, [])
    first = (here / "ca-crl.pem").read_bytes()
    other.revoke(here, [bad])
    (here / "ca-crl.pem").write_bytes(first + (here / "ca-crl.pem").read_bytes())
    async with serving(source, Tls(here), refused) as uri:
        assert "revoked" in str(await refusal(uri, Tls(bad)))
    async with (
        pagenet.serve(str(source), listen=LISTEN, tls=Tls(here)) as server,
        pagenet.pull(server.uri, memory, tls=Tls(there)) as transfer,
    ):
        with trio.fail_after(PATIENCE):
            await transfer.wait_complete()


async def test_revoked_certificate(
    source: Path, authority: Authority, tmp_path: Path, refused: list[str]
) -> None:
    good, bad = authority.write(tmp_path / "good"), authority.write(tmp_path / "bad")
    authority.revoke(good, [bad])
    async with serving(source, Tls(good), refused) as uri:
        error = await refusal(uri, Tls(bad))
        assert "revoked" in str(error)
    assert "revoked" in refused[0]


async def test_one_side_does_not_encrypt(source: Path, tls: Tls, refused: list[str]) -> None:
    async with serving(source, tls, refused) as uri:
        assert isinstance(await refusal(uri, None), (RemoteProtocolError, SourceLost))
    assert "say --tls-dir on both sides" in refused[0]
    async with pagenet.serve(str(source), listen=LISTEN) as server:
        error = await refusal(server.uri, tls)
        assert "say --tls-dir on both sides" in str(error)
        assert isinstance(error, Untrusted)


async def test_silent_peers_are_cut(
    source: Path, tls: Tls, refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that begins no handshake, or stops in the middle of one."""
    monkeypatch.setattr("pagenet.session.HELLO_TIMEOUT", 0.2)
    async with serving(source, tls, refused) as uri:
        where = urlsplit(uri)
        for words in (b"", b"\x16\x03\x01\x02\x00\x01"):
            stream = await trio.open_tcp_stream("127.0.0.1", where.port or 0)
            await stream.send_all(words or b"")
            with trio.fail_after(PATIENCE):
                while await stream.receive_some():
                    pass
            await stream.aclose()
    assert len(refused) == 2


async def test_stolen_session(
    source: Path, authority: Authority, directory: Path, tmp_path: Path
) -> None:
    """The number of a session is worth nothing to another peer."""
    thief = Tls(authority.write(tmp_path / "thief", "127.0.0.1", common_name="thief"))
    async with pagenet.serve(str(source), listen=LISTEN, tls=Tls(directory)) as server:
        control = await dial(server.uri, Tls(directory))
        hello = await greet(MessageStream(control), Hello(Role.DESTINATION, Channel.CONTROL))
        for tls, is_let_in in ((thief, False), (Tls(directory), True)):
            lane = await dial(server.uri, tls)
            ours = Hello(Role.DESTINATION, Channel.DEMAND, hello.session)
            with trio.fail_after(PATIENCE):
                if is_let_in:
                    await greet(MessageStream(lane), ours)
                else:
                    with pytest.raises(RemoteProtocolError, match="does not exist"):
                        await greet(MessageStream(lane), ours)
            lane.close()
        control.close()


# ---- on the way ----


@pytest.mark.parametrize("encrypted", [True, False])
@pytest.mark.parametrize("lane", LANES)
async def test_nothing_can_be_read_on_the_way(
    lane: LaneKind, encrypted: bool, source: Path, tls: Tls, memory: OwnMemory
) -> None:
    """The same tap finds every page where nothing is encrypted."""
    used = tls if encrypted else None
    content = source.read_bytes()
    pages = {content[at : at + PAGE] for at in range(0, SIZE, PAGE)} - {bytes(PAGE)}
    async with (
        pagenet.serve(str(source), listen=LISTEN, tls=used, lane=lane) as server,
        trio.open_nursery() as nursery,
    ):
        tap = Tap(server.uri)
        uri = await nursery.start(tap.run)
        async with pagenet.pull(uri, memory, compress="none", lane=lane, tls=used) as transfer:
            with trio.fail_after(PATIENCE):
                await transfer.wait_complete()
        nursery.cancel_scope.cancel()
    seen = b"".join(tap.seen)
    assert sum(page in seen for page in pages) == (0 if encrypted else len(pages))
    assert (b"control" in seen) is not encrypted


@pytest.mark.native
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("how", ["spoils", "cuts"])
async def test_bytes_that_are_changed_or_cut(
    how: str, lane: LaneKind, source: Path, tls: Tls, memory: OwnMemory
) -> None:
    """No page is placed of what somebody has changed, and an end that nobody has signed is a
    loss."""
    async with (
        pagenet.serve(str(source), listen=LISTEN, tls=tls, lane=lane) as server,
        trio.open_nursery() as nursery,
    ):
        tap = Tap(server.uri)
        uri = await nursery.start(tap.run)
        with pytest.raises((SourceLost, RemoteProtocolError)):
            await pull_spoilt(uri, memory, tls, lane, tap, how)
        nursery.cancel_scope.cancel()


async def pull_spoilt(
    uri: str, memory: OwnMemory, tls: Tls, lane: LaneKind, tap: Tap, how: str
) -> None:
    """Some pages, and then what is changed or cut."""
    with trio.fail_after(PATIENCE):
        async with pagenet.pull(
            uri, memory, max_bandwidth=1 << 20, compress="none", lane=lane, tls=tls
        ) as transfer:
            await until(lambda: transfer.filling.residency.done > 0)
            setattr(tap, how, True)
            await transfer.wait_complete()


def converse(
    uri: str, directory: Path, act: Callable[[TLSConnection], None], padding: int = 0
) -> Hello:
    """Exchange hellos on the control connection by another implementation of TLS, which may do what
    ours does not. ``act``: what it does before its hello. ``padding``: of each record, in bytes."""
    where, settings = urlsplit(uri), HandshakeSettings()
    settings.minVersion = settings.maxVersion = (3, 4)
    settings.certificate_compression_send = []  # which it would do without being asked to
    if padding:
        settings.padding_cb = lambda length, kind, most: min(padding, most)
    chain, decoder = X509CertChain(), MessageDecoder()
    chain.parsePemList((directory / "client-cert.pem").read_text())
    key = parsePEMKey((directory / "client-key.pem").read_text(), private=True)
    with socket.create_connection((where.hostname, where.port), timeout=PATIENCE) as plain:
        connection = TLSConnection(plain)
        connection.handshakeClientCert(chain, key, settings=settings)
        act(connection)
        connection.send(encode_message(Hello(Role.DESTINATION, Channel.CONTROL)))
        while (message := decoder.next()) is None:
            data = connection.recv(1 << 14)
            assert data, "it has closed"
            decoder.feed(memoryview(bytes(data)))
        act(connection)
        connection.send(encode_message(Bye(False)))
        # the other side closes, perhaps before its own KeyUpdate is answered
        with suppress(TLSRemoteAlert):
            while connection.recv(1 << 14):
                pass
    assert isinstance(message, Hello)
    return message


def renew(connection: TLSConnection) -> None:
    for kind in (KeyUpdateMessageType.update_requested, KeyUpdateMessageType.update_not_requested):
        for _ in connection.send_keyupdate_request(kind):
            pass


@pytest.mark.parametrize(("act", "padding"), [(renew, 0), (lambda _: None, 1000), (renew, 5000)])
async def test_records_that_are_no_data(
    act: Callable[[TLSConnection], None], padding: int, source: Path, tls: Tls, directory: Path
) -> None:
    """KeyUpdate, with an answer asked for and without, and padded records."""
    left = trio.Event()

    def note(event: str, /, **_: object) -> None:
        if event == "left":
            left.set()

    async with pagenet.serve(str(source), listen=LISTEN, tls=tls, on_event=note) as server:
        hello = await trio.to_thread.run_sync(converse, server.uri, directory, act, padding)
        assert hello.region == server.region
        with trio.fail_after(PATIENCE):
            await left.wait()


async def test_unix_sockets_are_not_encrypted(source: Path, tls: Tls, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"TLS is for tcp:// and rdma://"):
        async with pagenet.serve(str(source), listen=f"unix:{tmp_path / 'socket'}", tls=tls):
            raise AssertionError("not reached")


async def test_any_address_with_tls(source: Path, tls: Tls) -> None:
    """Other hosts may connect: --plaintext is not needed."""
    async with pagenet.serve(str(source), listen="tcp://:0", tls=tls) as server:
        assert server.uri


async def test_half_a_handshake_is_no_connection(source: Path, tls: Tls) -> None:
    async with pagenet.serve(str(source), listen=LISTEN, tls=tls) as server:
        connection = await TcpTransport().dial_tls(urlsplit(server.uri), tls)
        assert connection.identity
        assert connection.security.startswith("TLS_AES_128_GCM_SHA256")
        connection.close()
        with pytest.raises((ConnectionBroken, pagenet.ConnectionClosed)):
            await connection.send(b"x")
