"""Exports of NBD servers as sources: a real server, that goes away, comes back, or is another."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
import trio
from processes import (
    PAGE,
    Process,
    check_verified,
    pull_command,
    run,
    run_server,
    run_workload,
    serve_command,
    write_pattern,
)

import pagenet
from pagenet import Run, Source, SourceLost, Unsupported, system_packages
from pagenet.objects import _nbd
from pagenet.source.memory import open_source_in_thread
from pagenet.uffd import probe

SIZE = 16 << 20
PAGES = SIZE // PAGE
WORKLOAD = ("--size", SIZE, "--zero-every", 16)


@pytest.fixture(autouse=True, scope="module")
def libnbd() -> None:
    try:
        _nbd._load()
    except Unsupported as error:
        pytest.skip(str(error))
    if nbdkit() is None:
        pytest.skip("there is no nbdkit (Debian: nbdkit)")


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pattern(tmp_path_factory.mktemp("nbd") / "mem", SIZE, zero_every=16)


def nbdkit() -> str | None:
    return shutil.which("nbdkit", path=f"{os.environ['PATH']}:/usr/sbin")


@asynccontextmanager
async def nbd_server(
    socket: Path, file: Path, *options: str, about: tuple[str, ...] = ()
) -> AsyncIterator[Process]:
    """nbdkit, at :func:`uri_of` the socket. ``about``: parameters of its plugins."""
    program = nbdkit()
    assert program is not None
    socket.unlink(missing_ok=True)
    command = [program, "-f", "-U", str(socket), "--exit-with-parent", *options]
    async with run([*command, "file", str(file), *about]) as server:
        while not socket.exists():
            assert not server.has_ended, server.stderr
            await trio.sleep(0.005)
        yield server


def uri_of(socket: Path) -> str:
    return f"nbd+unix:///?socket={socket}"


async def read(source: Source, first: int = 0, count: int = PAGES) -> bytes:
    into = memoryview(bytearray(count * PAGE))
    await source.read_into(Run(first, count), into)
    return bytes(into)


async def test_an_owner_is_filled_from_an_export(lane: str, memory: Path, tmp_path: Path) -> None:
    probe()
    socket, nbd = tmp_path / "owner", tmp_path / "nbd"
    async with (
        nbd_server(nbd, memory, "-r"),
        run_server(uri_of(nbd), "--lane", lane) as (_, uri),
        run(pull_command(uri, "--uffd-socket", str(socket), lane=lane)) as pulling,
    ):
        await pulling.event("waiting")
        async with run_workload(socket, *WORKLOAD) as owner:
            await check_verified(owner, pages=PAGES)
        assert await pulling.wait() == 0


async def test_a_destination_reads_it_itself_over_tcp(memory: Path, tmp_path: Path) -> None:
    nbd, out = tmp_path / "nbd", tmp_path / "out"

    async def forward(client: trio.SocketStream) -> None:
        async with client, await trio.open_unix_socket(nbd) as server, trio.open_nursery() as both:
            both.start_soon(copy, client, server)
            await copy(server, client)
            both.cancel_scope.cancel()

    async def copy(one: trio.SocketStream, other: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async for part in one:
                await other.send_all(part)

    async with nbd_server(nbd, memory, "-r"), trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, forward, [listener])
        uri = "nbd://{}:{}/".format(*listener.socket.getsockname())
        async with run(pull_command(uri, "--into", str(out), lane="native")) as pulling:
            assert await pulling.wait() == 0
        nursery.cancel_scope.cancel()
    assert out.read_bytes() == memory.read_bytes()


async def test_a_server_that_comes_back(memory: Path, tmp_path: Path) -> None:
    nbd = tmp_path / "nbd"
    async with nbd_server(nbd, memory, "-r") as server:
        source = await open_source_in_thread(uri_of(nbd), store_timeout=30)
        with source:
            assert await read(source, 0, 1) == memory.read_bytes()[:PAGE]
            await server.kill()
            async with trio.open_nursery() as nursery:

                async def read_all() -> None:
                    assert await read(source) == memory.read_bytes()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(read_all)
                async with nbd_server(nbd, memory, "-r"):
                    await trio.sleep_forever()


async def test_a_server_that_stays_away(memory: Path, tmp_path: Path) -> None:
    nbd = tmp_path / "nbd"
    async with nbd_server(nbd, memory, "-r") as server:
        with await open_source_in_thread(uri_of(nbd), store_timeout=3) as source:
            await server.kill()
            with pytest.raises(SourceLost, match="the server has not answered for 3 s") as raised:
                await read(source)
            assert "\n" not in str(raised.value)


async def test_a_server_that_stands_still(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbd = tmp_path / "nbd"
    async with nbd_server(nbd, memory, "-r") as server:
        with await open_source_in_thread(uri_of(nbd), store_timeout=3) as source:
            monkeypatch.setattr(_nbd, "STALL", 0.2)
            server.send_signal(signal.SIGSTOP)
            with pytest.raises(SourceLost, match=r"sent nothing for|has broken"):
                await read(source)


async def test_another_export_in_its_place(memory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE // 2))
    nbd = tmp_path / "nbd"
    async with nbd_server(nbd, memory, "-r") as server:
        with await open_source_in_thread(uri_of(nbd)) as source:
            await server.kill()
            async with nbd_server(nbd, other, "-r"):
                with pytest.raises(SourceLost, match="another export than before"):
                    await read(source)


@pytest.mark.parametrize("error", ["EIO", "EINVAL"])
async def test_reads_that_fail(error: str, memory: Path, tmp_path: Path) -> None:
    """What may pass is tried again; what cannot is lost."""
    nbd, broken = tmp_path / "nbd", tmp_path / "broken"
    broken.touch()
    about = (f"error-file={broken}", "error-pread-rate=100%", f"error-pread={error}")
    async with nbd_server(nbd, memory, "-r", "--filter=error", about=about):
        with await open_source_in_thread(uri_of(nbd), store_timeout=30) as source:
            if error == "EINVAL":
                with pytest.raises(SourceLost, match="Invalid argument"):
                    await read(source)
                return
            broken.unlink()
            assert await read(source) == memory.read_bytes()


async def refused(*args: str, **options: str) -> tuple[int, str]:
    command = serve_command(*args, "--listen", "tcp://127.0.0.1:0")
    async with run(command, env={**os.environ, **options}) as server:
        code = await server.wait()
        (line,) = server.stderr.splitlines()
        return code, line


async def test_exports_that_cannot_be_served(memory: Path, tmp_path: Path) -> None:
    nbd = tmp_path / "nbd"
    soon = ("--store-timeout", "0.5")
    code, line = await refused(uri_of(nbd), *soon)
    assert (code, "No such file" in line) == (3, True), line
    code, line = await refused("nbd://127.0.0.1:1/mem", *soon)
    assert (code, "Connection refused" in line) == (3, True), line
    code, line = await refused("nbd://[::/mem")
    assert code == 2, line
    async with nbd_server(nbd, memory):
        code, line = await refused(uri_of(nbd))
        assert (code, "read-only" in line) == (2, True), line
    async with nbd_server(nbd, memory, "-r"):
        code, line = await refused(uri_of(nbd), "--cache", str(tmp_path / "cache"))
        assert (code, "--cache" in line) == (2, True), line


async def test_without_libnbd_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nbd.py").write_text("NOTHING = 1\n")
    code, line = await refused("nbd://127.0.0.1:1/mem", PYTHONPATH=str(tmp_path))
    assert (code, "apt install python3-libnbd" in line) == (7, True), line
    monkeypatch.setattr(system_packages, "SYSTEM_PACKAGES", "/nowhere")
    with patch.dict(sys.modules):
        for name in ("nbd", "libnbdmod"):
            sys.modules.pop(name, None)
        with pytest.raises(Unsupported, match="python3-libnbd"):
            pagenet.open_source("nbd://127.0.0.1:1/mem")
