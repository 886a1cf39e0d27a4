"""What the two sides of a guest's migration send to each other, and to a fake monitor: no QEMU is
needed."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import msgpack
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pagenet import ConnectionBroken, OwnerGone, PagenetError, RemoteProtocolError, UsageError
from pagenet.nurseries import open_failing_nursery, running_beside
from pagenet.qemu import MigrationRefused, connect_qmp
from pagenet.qemu._talk import DEVICES, TALK, Talk, give_to_qemu, which_stream
from pagenet.qemu.command_line import _parse_options, _parse_size, prepare_incoming
from pagenet.qemu.qmp import Qmp
from pagenet.session import receive_exactly
from pagenet.tcp._connection import SocketConnection
from pagenet.testing import memory_pair
from pagenet.transport import Connection

# ---- talk ----


async def heard(data: bytes, what: str = "ready", piece: int | None = None) -> dict[str, object]:
    """What the other side makes of ``data``, after which the connection ends. ``piece``: how many
    bytes are received at a time."""
    ours, theirs = memory_pair(max_receive=piece, capacity=1 << 20)
    await theirs.send(data)
    theirs.close()
    return await Talk(ours).hear(what)


def said(what: object, **fields: object) -> bytes:
    return bytes(msgpack.packb({"say": what, **fields}))


@pytest.mark.parametrize("piece", [None, 1, 7])
async def test_messages_in_any_pieces(piece: int | None) -> None:
    ours, theirs = memory_pair(max_receive=piece, capacity=1 << 20)
    await theirs.send(said("machine", ram=5) + said("stopped"))
    talk = Talk(ours)
    assert (await talk.hear("machine"))["ram"] == 5
    assert await talk.hear("stopped") == {"say": "stopped"}


async def test_both_directions() -> None:
    ours, theirs = memory_pair()
    await Talk(ours).say("running", time=1.5)
    assert (await Talk(theirs).hear("running"))["time"] == 1.5


async def test_silence() -> None:
    ours, _theirs = memory_pair()
    with pytest.raises(PagenetError, match=r"did not say 'serving' for 0\.01 s"):
        await Talk(ours).hear("serving", 0.01)


@pytest.mark.parametrize("end", range(len(said("ready"))))
async def test_cut_off(end: int) -> None:
    with pytest.raises(
        ConnectionBroken, match="closed the connection in the middle of a migration"
    ):
        await heard(said("ready")[:end])


@pytest.mark.parametrize(("data", "error", "message"), [
    (said("stopped"), RemoteProtocolError, "says 'stopped' where 'ready' was expected"),
    (said("refuse", reason="another\nmachine"), MigrationRefused, r"another\?machine"),
    (said("refuse"), MigrationRefused, "no reason given"),
    (said(7), RemoteProtocolError, "not a map with a 'say'"),
    (bytes(msgpack.packb(["ready"])), RemoteProtocolError, "not a map with a 'say'"),
    (bytes(msgpack.packb({1: 2})), RemoteProtocolError, "not msgpack"),
    (b"\xc1", RemoteProtocolError, "not msgpack"),
    (b"\xa1\xff", RemoteProtocolError, "not msgpack"),
    (bytes(msgpack.packb({"say": "x" * 100_000})), RemoteProtocolError,
        "longer than 65536 bytes|not msgpack"),
])  # fmt: skip
async def test_nonsense(data: bytes, error: type[PagenetError], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        await heard(data)
    assert "\n" not in str(raised.value)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    async def hear() -> None:
        with pytest.raises((RemoteProtocolError, ConnectionBroken)):
            await heard(data)

    trio.run(hear)


async def test_which_stream() -> None:
    for name in (TALK, DEVICES):
        ours, theirs = memory_pair()
        await theirs.send(name)
        assert await which_stream(ours) == name
    ours, theirs = memory_pair()
    await theirs.send(b"?")
    with pytest.raises(RemoteProtocolError, match="opens a stream for b'\\?'"):
        await which_stream(ours)


class Taker:
    """The part of a monitor that takes descriptors."""

    async def give(self, name: str, fd: int) -> None:
        self.name, self.sock = name, socket.socket(fileno=os.dup(fd))


def socket_pair() -> tuple[Connection, Connection]:
    near, far = trio.socket.socketpair()
    return SocketConnection(near, "far"), SocketConnection(far, "near")


@pytest.mark.parametrize("has_socket", [True, False])
async def test_a_connection_for_qemu(has_socket: bool) -> None:
    """QEMU gets the socket itself, or one behind which bytes are passed on until both sides have
    ended."""
    ours, theirs = socket_pair() if has_socket else memory_pair()
    qemu, buffer = Taker(), memoryview(bytearray(6))
    async with open_failing_nursery() as nursery:
        assert await give_to_qemu(cast(Qmp, qemu), ours, nursery) == f"fd:{qemu.name}"
        with qemu.sock as sock:
            assert os.get_blocking(sock.fileno())
            await trio.to_thread.run_sync(sock.sendall, b"state")
            await receive_exactly(theirs, buffer[:5])
            assert bytes(buffer[:5]) == b"state"
            await theirs.send(b"loaded")
            assert await trio.to_thread.run_sync(sock.recv, 6, socket.MSG_WAITALL) == b"loaded"
    theirs.close()


# ---- a fake monitor ----


@asynccontextmanager
async def answering(
    path: Path, answer: Callable[[trio.SocketStream], Awaitable[None]]
) -> AsyncIterator[None]:
    """The first client that connects to ``path`` is answered by ``answer``."""
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen()

        async def serve() -> None:
            sock, _ = await listener.accept()
            async with trio.SocketStream(sock) as stream:
                await answer(stream)

        async with running_beside(serve):
            yield


async def meet(path: Path, answer: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
    """Connect to a fake monitor on ``path`` that does ``answer``."""
    async with answering(path, answer), connect_qmp(path):
        raise AssertionError("not reached")


@pytest.mark.parametrize(("says", "error", "message"), [
    (b"", OwnerGone, "closed its monitor"),
    (b"hello\n", PagenetError, "is no QMP monitor: b'hello'"),
    (b"[1]\n", PagenetError, "is no QMP monitor"),
    (b"7\n", PagenetError, "is no QMP monitor"),
    (b'{"event": 1}\n', PagenetError, "is no QMP monitor"),
    (b'{"QMP": {}}\n{"id": 0, "error": {}}\n', PagenetError,
        "refuses qmp_capabilities: no reason given"),
    (b'{"QMP": {}}\n{"id": 0, "error": {"desc": "no\\n\\u001b[2J"}}\n', PagenetError,
        r"refuses qmp_capabilities: no\?\?\[2J"),
    (b'{"QMP": {}}\n{"id": 0, "error": "no"}\n', PagenetError, "is no QMP monitor"),
    (b'{"QMP": {}}\n{"id": 0}\n', PagenetError, "is no QMP monitor"),
    (b"[" * 100_000 + b"\n", PagenetError, "is no QMP monitor"),
    (b'{"event": "STOP", "data": 5, "timestamp": {"seconds": 1, "microseconds": 1}}\n',
        PagenetError, "is no QMP monitor"),
    (b'{"event": "STOP", "timestamp": {"seconds": 1%s, "microseconds": 1}}\n' % (b"0" * 400),
        PagenetError, "is no QMP monitor"),
    (b'{"QMP": {}}\n{"id": 0, "ret', OwnerGone, "closed its monitor"),
    (b"x" * (5 << 20), PagenetError, "is no QMP monitor: a line of"),
])  # fmt: skip
async def test_monitor_that_is_none(
    says: bytes, error: type[PagenetError], message: str, tmp_path: Path
) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(says)

    with pytest.raises(error, match=message) as raised:
        await meet(tmp_path / "monitor", answer)
    assert "\n" not in str(raised.value)


async def test_monitor_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's monitor is silent to its second client."""
    monkeypatch.setattr("pagenet.qemu.qmp.COMMAND_TIMEOUT", 0.05)

    async def answer(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    with pytest.raises(PagenetError, match="does another program hold the monitor"):
        await meet(tmp_path / "monitor", answer)


async def greeting(stream: trio.SocketStream) -> None:
    """As much of a monitor as a client needs to connect to it."""
    await stream.send_all(b'{"QMP": {}}\n{"id": 0, "return": {}}\n')
    await stream.receive_some(4096)
    await trio.sleep_forever()


async def test_error_of_a_block_that_is_cancelled_meanwhile(tmp_path: Path) -> None:
    """The error is the cause, and not one that followed from it."""
    path, errors = tmp_path / "monitor", []
    async with answering(path, greeting):
        with trio.CancelScope() as scope:
            try:
                async with connect_qmp(path):
                    scope.cancel()
                    raise UsageError("the cause")
            except UsageError as error:
                errors.append(str(error))
    assert errors == ["the cause"]


# ---- QEMU's command line ----


@pytest.mark.parametrize(("text", "size"), [
    ("4096", 4096), ("4096B", 4096), ("64K", 64 << 10), ("512M", 512 << 20), ("1.5G", 3 << 29),
    ("2t", 2 << 40),
])  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert _parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "0", "-1M", "1Q", "many"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        _parse_size(text)


def test_options() -> None:
    assert _parse_options("memory-backend-file,id=a,mem-path=/x,,y,share=on,prealloc") == {
        "": "memory-backend-file", "id": "a", "mem-path": "/x,y", "share": "on", "prealloc": "on",
    }  # fmt: skip
    assert _parse_options("type=pc,memory-backend=a") == {"type": "pc", "memory-backend": "a"}


@pytest.mark.parametrize("exists", [False, True])
def test_ram_file(exists: bool, tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    if exists:
        ram.touch()
    backend = f"memory-backend-file,id=r,size=1M,mem-path={ram},share=on"
    incoming = prepare_incoming(
        ["qemu", "-object", backend, "-machine", "pc,memory-backend=r"],
        tmp_path / "m",
        tmp_path / "u",
    )
    assert incoming.rams == [ram]
    assert ram.stat().st_size == 1 << 20
    monitor = f"unix:{tmp_path / 'm'},server=on,wait=off"
    assert incoming.command[5:] == incoming.added == ["-incoming", "defer", "-S", "-qmp", monitor]
    status = os.stat(ram)
    assert incoming.environment["PAGENET_UFFD_FILES"] == f"{status.st_dev}:{status.st_ino}"
    incoming.undo()
    assert ram.exists() == exists
    assert not exists or ram.stat().st_size == 0
