"""unix: beyond the contract: paths, socket files and their permissions, leftovers, full
backlogs."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pagenet.errors import ConnectionBroken, SourceUnreachable, UsageError
from pagenet.tcp import UnixTransport, _unix
from pagenet.tcp._connection import SocketConnection
from pagenet.tcp._listener import SocketListener

unix = UnixTransport()


async def listen(uri: str) -> SocketListener:
    return await unix.listen(urlsplit(uri))


async def dial(uri: str) -> SocketConnection:
    return await unix.dial(urlsplit(uri))


async def require_connects(uri: str, listener: SocketListener) -> None:
    with closing(await dial(uri)) as dialled, closing(await listener.accept()) as accepted:
        await dialled.send(b"hello")
        assert await accepted.receive_into(memoryview(bytearray(8))) == 5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lane"


@pytest.fixture
def leftover(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
    return path


# URIs


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("unix:", "path is missing"),
        ("unix://", "path is missing"),
        ("unix://run/pagenet", "two slashes make 'run' a host"),
        ("unix://localhost/run/pagenet", "two slashes"),
        ("unix:/run/pagenet?mode=0666", "query"),
        ("unix:/run/pagenet#1", "%23"),
        ("unix://root@/run/pagenet", "user name"),
        ("unix:%00abstract", "zero bytes"),
        ("unix:/" + "x" * 107, "108 bytes"),
        ("unix:/" + "%C3%A4" * 54, "109 bytes"),
    ],
)
async def test_senseless_uris(uri: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as dialling:
        await dial(uri)
    with pytest.raises(UsageError, match=complaint):
        await listen(uri)
    assert "\n" not in str(dialling.value)


@pytest.mark.parametrize("shape", ["unix:{}", "unix://{}"])
async def test_both_ways_to_write_it(shape: str, path: Path) -> None:
    uri = shape.format(path)
    with await listen(uri) as listener:
        assert listener.uri == f"unix:{path}"
        assert unix.is_private(urlsplit(uri))
        await require_connects(uri, listener)


async def test_the_longest_path(tmp_path: Path) -> None:
    path = tmp_path / ("x" * (107 - len(os.fsencode(tmp_path)) - 1))
    with await listen(f"unix:{path}") as listener:
        await require_connects(listener.uri, listener)


@pytest.mark.parametrize("name", [b"100% #1?", b"\xff\xfe", "Gr\u00fc\u00dfe".encode()])
async def test_any_file_name(tmp_path: Path, name: bytes) -> None:
    escaped = "".join(f"%{byte:02X}" for byte in name)
    with await listen(f"unix:{tmp_path}/{escaped}") as listener:
        assert os.listdir(os.fsencode(tmp_path)) == [name]
        await require_connects(listener.uri, listener)


async def test_a_relative_path_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with await listen("unix:lane") as listener:
        await require_connects("unix:lane", listener)
        monkeypatch.chdir("/")
        assert listener.uri == f"unix:{tmp_path}/lane"
        await require_connects(listener.uri, listener)
    assert not list(tmp_path.iterdir())


# Dialling


async def test_nothing_there(path: Path) -> None:
    with pytest.raises(
        SourceUnreachable, match=f"unix:{path}: nothing answers: No such file.*start the other side"
    ):
        await dial(f"unix:{path}")


async def test_nobody_there_any_more(leftover: Path) -> None:
    with pytest.raises(SourceUnreachable, match=r"Connection refused.*left the file behind"):
        await dial(f"unix:{leftover}")


async def test_something_else_there(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(path))
        with pytest.raises(SourceUnreachable, match="wrong type for socket"):
            await dial(f"unix:{path}")
        with pytest.raises(UsageError, match="wrong type for socket"):
            await listen(f"unix:{path}")


@contextmanager
def overrun(path: Path) -> Iterator[socket.socket]:
    """A listener whose backlog is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(0)
        filler = stack.enter_context(socket.socket(socket.AF_UNIX))
        filler.connect(str(path))
        yield listener


async def test_a_full_backlog_may_empty(path: Path) -> None:
    async def accept_both() -> None:
        await wait_all_tasks_blocked()
        for _ in range(2):
            await trio.lowlevel.wait_readable(listener)
            listener.accept()[0].close()
        trio.lowlevel.notify_closing(listener)

    with overrun(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_both)
            with closing(await dial(f"unix:{path}")) as dialled:
                # A socket that was taken for connected and is not would raise here.
                assert await dialled.receive_into(memoryview(bytearray(1))) == 0


async def test_a_full_backlog_may_not_empty(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_unix, "CONNECT_TIMEOUT", 0.05)
    with overrun(path), pytest.raises(SourceUnreachable, match=r"stayed full for 0\.05 s"):
        await dial(f"unix:{path}")


async def test_a_full_backlog_is_somebody_listening(path: Path) -> None:
    with overrun(path), pytest.raises(UsageError, match="another process listens there already"):
        await listen(f"unix:{path}")


# Listening


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o177])
async def test_only_this_user_may_connect(
    path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    real_listen = socket.socket.listen

    def listen_later(sock: socket.socket, backlog: int) -> None:
        modes.append(stat.S_IMODE(path.stat().st_mode))  # between bind() and listen()
        real_listen(sock, backlog)

    monkeypatch.setattr(socket.socket, "listen", listen_later)
    before = os.umask(umask)
    try:
        listener = await listen(f"unix:{path}")
    finally:
        os.umask(before)
    with listener:
        modes.append(stat.S_IMODE(path.stat().st_mode))
    assert modes == [0o600, 0o600]


async def test_a_leftover_is_replaced(leftover: Path) -> None:
    with await listen(f"unix:{leftover}") as listener:
        await require_connects(listener.uri, listener)
    assert not leftover.exists()


async def test_a_listener_is_not_replaced(path: Path) -> None:
    with await listen(f"unix:{path}") as listener:
        with pytest.raises(UsageError, match="another process listens there already"):
            await listen(f"unix:{path}")
        (await listener.accept()).close()  # the connection that probed the socket
        await require_connects(listener.uri, listener)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
async def test_another_file_is_not_replaced(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    with pytest.raises(UsageError, match="no socket"):
        await listen(f"unix:{path}")
    assert path.is_symlink() or path.exists()


async def test_no_directory_for_it(path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory; choose another path"):
        await listen(f"unix:{path}/deeper")


async def test_close_removes_the_file(path: Path) -> None:
    listener = await listen(f"unix:{path}")
    assert path.is_socket()
    listener.close()
    assert not path.exists()


async def test_close_removes_nobody_elses_file(path: Path) -> None:
    with await listen(f"unix:{path}"):
        path.unlink()
        with await listen(f"unix:{path}") as successor:
            pass
        path.write_text("precious")
    assert path.read_text() == "precious"
    assert "closed" in repr(successor)


async def test_close_without_a_directory(path: Path) -> None:
    path.parent.joinpath("gone").mkdir()
    listener = await listen(f"unix:{path.parent}/gone/lane")
    (path.parent / "gone" / "lane").unlink()
    (path.parent / "gone").rmdir()
    listener.close()


# Connections


async def test_peers_have_names(path: Path) -> None:
    with await listen(f"unix:{path}") as listener:
        dialled, accepted = await dial(listener.uri), await listener.accept()
    with closing(dialled), closing(accepted):
        assert dialled.peer == f"unix:{path}"
        assert accepted.peer == f"unix:{path} (process {os.getpid()} of user {os.getuid()})"


async def test_unread_bytes_reset_the_peer(path: Path) -> None:
    """Closing with bytes unread is a reset, not an end: what the peer had not received yet is lost,
    and the connection stays broken."""
    with await listen(f"unix:{path}") as listener:
        near, far = await dial(listener.uri), await listener.accept()
    with closing(near):
        await near.send(b"never read")
        far.close()
        for _ in range(2):
            with pytest.raises(ConnectionBroken, match="Connection reset by peer"):
                await near.receive_into(memoryview(bytearray(1)))
