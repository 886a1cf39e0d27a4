"""Every backend against the conformance suite, and the seam in front of them."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pagenet import transport
from pagenet.errors import SourceUnreachable, UsageError
from pagenet.tcp import PairTransport, TcpTransport, UnixTransport
from pagenet.testing import MemoryTransport, check_transport


def _can_bind(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _can_bind("::1"), reason="no ::1 on the loopback interface")


@pytest.fixture
def unix_uri(tmp_path: Path) -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"unix:{tmp_path}/{next(numbers)}"


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"tcp": TcpTransport(), "unix": UnixTransport(), "memory": MemoryTransport()}
    monkeypatch.setattr(transport, "_transports", known)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "",
        pytest.param("[::1]", marks=needs_ipv6),
        pytest.param("[::]", marks=needs_ipv6),
    ],
)
async def test_tcp_conforms(host: str) -> None:
    await check_transport(TcpTransport(), lambda: f"tcp://{host}:0")


async def test_unix_conforms(unix_uri: Callable[[], str]) -> None:
    await check_transport(UnixTransport(), unix_uri)


async def test_pairs_conform() -> None:
    await check_transport(PairTransport(), lambda: "inside:s3%3A//bucket/mem")


@pytest.mark.parametrize("capacity", [4096, 1 << 20])
async def test_memory_conforms(capacity: int) -> None:
    await check_transport(MemoryTransport(capacity=capacity), lambda: "memory://")


async def test_memory_conforms_with_short_reads() -> None:
    await check_transport(MemoryTransport(max_receive=4093), lambda: "memory://")


# The seam


@pytest.mark.parametrize("uri", ["tcp://127.0.0.1:0", "tcp://localhost:0", "memory://"])
async def test_the_scheme_chooses_the_backend(uri: str) -> None:
    with await transport.listen(uri) as listener:
        dialled = await transport.dial(listener.uri)
        accepted = await listener.accept()
        await dialled.send(b"hello")
        assert await accepted.receive_into(memoryview(bytearray(8))) == 5
        dialled.close()
        accepted.close()


@pytest.mark.parametrize(
    "uri", ["carrier-pigeon://roof", "127.0.0.1:7000", "/run/pagenet", "", "tcp//127.0.0.1:7000"]
)
async def test_unknown_schemes(uri: str) -> None:
    with pytest.raises(UsageError, match="no transport of that name"):
        await transport.dial(uri)
    with pytest.raises(UsageError, match="memory:, tcp:, unix:"):
        await transport.listen(uri, plaintext=True)


async def test_what_is_no_uri_at_all() -> None:
    with pytest.raises(UsageError, match="is not a URI"):
        await transport.dial("tcp://[::1:7000")


@pytest.mark.parametrize(
    "uri", ["tcp://:0", "tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:0"]
)
async def test_listening_beyond_this_host_needs_a_word(uri: str) -> None:
    with pytest.raises(UsageError, match="--plaintext"):
        await transport.listen(uri)


async def test_and_with_that_word_it_listens() -> None:
    with await transport.listen("tcp://0.0.0.0:0", plaintext=True) as listener:
        assert listener.uri.startswith("tcp://0.0.0.0:")


async def test_dialling_other_hosts_needs_no_word() -> None:
    with await transport.listen("tcp://127.0.0.1:0") as listener:
        pass
    with pytest.raises(SourceUnreachable):
        await transport.dial(listener.uri.replace("127.0.0.1", "0.0.0.0"))
