"""A source that serves what it gets from another source."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
from certificates import Authority
from hostile_source import PAYLOAD, Answer, hostile_source, say
from processes import (
    PAGE,
    check_verified,
    pull_command,
    run,
    run_server,
    run_workload,
    serve_command,
    write_pattern,
)

import pagenet
from pagenet import IntoFile, Run, Source, SourceLost, transport
from pagenet.protocol import Encoding
from pagenet.source.memory import open_source_in_thread
from pagenet.uffd import probe

SIZE = 16 << 20
PAGES = SIZE // PAGE
SOON = ("--store-timeout", "0.5")
WORKLOAD = ("--size", SIZE, "--zero-every", 16)


@pytest.fixture(autouse=True)
def uffd_permitted() -> None:
    probe()


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pattern(tmp_path_factory.mktemp("relay") / "mem", SIZE, zero_every=16)


async def copy(uri: str, path: Path, tls: pagenet.Tls | None = None) -> bytes:
    async with pagenet.pull(uri, IntoFile(path), tls=tls) as transfer:
        await transfer.wait_complete()
    return path.read_bytes()


async def read(source: Source, first: int = 0, count: int = PAGES) -> bytes:
    into = memoryview(bytearray(count * PAGE))
    await source.read_into(Run(first, count), into)
    return bytes(into)


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_owners_get_their_pages_by_a_relay(
    scheme: str, lane: str, memory: Path, tmp_path: Path
) -> None:
    """Each page crosses the way to the first source once."""
    listen = "tcp://127.0.0.1:0" if scheme == "tcp" else f"unix:{tmp_path}/first"
    cache = ("--cache", str(tmp_path / "cache"), "--lane", lane)
    async with (
        pagenet.serve(str(memory), listen=listen) as first,
        run_server(first.uri, *cache, listen=f"unix:{tmp_path}/relay") as (_, uri),
    ):
        for number in range(2):
            socket = tmp_path / f"owner.{number}"
            async with run(pull_command(uri, "--uffd-socket", str(socket), lane=lane)) as pulling:
                await pulling.event("waiting")
                async with run_workload(socket, *WORKLOAD) as owner:
                    await check_verified(owner, pages=PAGES)
                assert await pulling.wait() == 0
        assert first.statistics().asked == PAGES
        async with run_server(first.uri, *cache, listen=f"unix:{tmp_path}/again") as (_, uri):
            assert await copy(uri, tmp_path / "out") == memory.read_bytes()
        assert first.statistics().asked == PAGES


async def test_blocks_and_identity_stay(memory: Path, tmp_path: Path) -> None:
    """So that a destination may go on with either."""
    other = write_pattern(tmp_path / "other", 3 * PAGE, seed=2)
    specs = [f"ram={memory}", f"rom={other}"]
    async with pagenet.serve(specs, listen="tcp://127.0.0.1:0") as first:
        with await open_source_in_thread(first.uri) as source:
            assert source.region.blocks == first.region.blocks
            assert source.identity == first.identity
            assert await read(source, PAGES, 3) == other.read_bytes()
            assert await read(source) == memory.read_bytes()
        with await open_source_in_thread(f"guest={first.uri}", str(other)) as source:
            assert [block.name for block in source.region.blocks] == ["guest", "guest#2", "other"]
            assert source.identity != first.identity
    assert first.sessions == 0


async def test_compressed_on_the_way(tmp_path: Path) -> None:
    content = b"".join(bytes([number % 251]) * 100 for number in range(SIZE // 100 + 1))[:SIZE]
    (tmp_path / "mem").write_bytes(content)
    async with pagenet.serve(str(tmp_path / "mem"), listen="tcp://127.0.0.1:0") as first:
        with await open_source_in_thread(first.uri) as source:
            assert await read(source) == content


async def test_with_certificates(memory: Path, tmp_path: Path) -> None:
    authority = Authority()
    directory = authority.write(tmp_path / "tls")
    tls = pagenet.Tls(directory)
    options = ("--tls-dir", str(directory))
    async with pagenet.serve(str(memory), listen="tcp://127.0.0.1:0", tls=tls) as first:
        async with run_server(first.uri, *options) as (_, uri):
            assert await copy(uri, tmp_path / "out", tls) == memory.read_bytes()
        code, line = await refused(first.uri, *SOON)
        assert code == 3, line
        stranger = ("--tls-dir", str(Authority().write(tmp_path / "stranger")))
        code, line = await refused(first.uri, *stranger)
        assert code == 8, line


# ---- a source that goes away ----


async def test_a_source_that_comes_back(memory: Path, tmp_path: Path) -> None:
    listen, socket = f"unix:{tmp_path}/first", tmp_path / "owner"
    async with (
        run_server(str(memory), listen=listen) as (first, _),
        run_server(listen) as (_, uri),
    ):
        options = ("--uffd-socket", str(socket), "--max-bandwidth", "5M")
        async with run(pull_command(uri, *options, lane="native")) as pulling:
            await pulling.event("waiting")
            touches = ("--touches", 64, "--wait-complete")
            async with run_workload(socket, *WORKLOAD, *touches) as owner:
                while not (await pulling.event("progress"))["bytes"]:
                    pass
                await first.kill()
                async with run_server(str(memory), listen=listen):
                    await check_verified(owner, pages=PAGES)
                    assert await pulling.wait() == 0
            names = {event["event"] for event in pulling.events}
            assert "disconnected" not in names


async def refused(*args: str) -> tuple[int, str]:
    command = serve_command(*args, "--listen", "tcp://127.0.0.1:0")
    async with run(command) as server:
        code = await server.wait()
        (line,) = server.stderr.splitlines()
        return code, line


async def test_sources_that_cannot_be_had(tmp_path: Path) -> None:
    code, line = await refused(f"unix:{tmp_path}/none", *SOON)
    assert (code, "has not answered for 0.5 s" in line) == (3, True), line
    code, line = await refused("rdma://127.0.0.1:1")
    assert (code, "over tcp:// or unix:" in line) == (2, True), line


async def test_a_source_that_stays_away(memory: Path, tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/first"
    async with (
        run_server(str(memory), listen=listen) as (first, _),
        run_server(listen, "--store-timeout", "3") as (relay, uri),
    ):
        await first.kill()
        async with run(pull_command(uri, "--into", f"{tmp_path}/out", lane="native")) as puller:
            assert await puller.wait() == 4
        assert await relay.wait() == 4
        assert f"{listen}: the source has not answered for 3 s" in relay.stderr


async def test_another_source_in_its_place(memory: Path, tmp_path: Path) -> None:
    listen, other = f"unix:{tmp_path}/first", write_pattern(tmp_path / "other", SIZE, seed=3)
    async with (
        run_server(str(memory), listen=listen) as (first, _),
        run_server(listen) as (relay, uri),
    ):
        await first.kill()
        async with run_server(str(other), listen=listen):
            command = pull_command(uri, "--into", f"{tmp_path}/out", lane="native")
            async with run(command) as pulling:
                assert await pulling.wait() == 4
            assert await relay.wait() == 4
            assert "another source answers" in relay.stderr


# ---- a hostile source ----

LIES: dict[str, Answer] = {
    "other pages": partial(say, Encoding.RAW, 4 * PAGE, PAYLOAD, 1),
    "fewer bytes": partial(say, Encoding.RAW, 3 * PAGE, PAYLOAD[PAGE:], 0),
    "absent": partial(say, Encoding.ABSENT, 0, b"", 0),
    "unknown": partial(say, 77, 0, b"", 0),
    "compressed garbage": partial(say, Encoding.LZ4, 100, PAYLOAD[:100], 0),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_source_that_lies(lie: str) -> None:
    async with hostile_source(LIES[lie]) as uri:
        with (
            await open_source_in_thread(uri, store_timeout=5) as source,
            pytest.raises(SourceLost, match=re.escape(uri)),
        ):
            await read(source, 0, 4)


async def test_a_reply_that_breaks_off_is_asked_for_again() -> None:
    turns = 0

    async def answer(connection: transport.Connection, run: Run, number: int, class_: int) -> None:
        nonlocal turns
        turns += 1
        if turns == 1:
            await say(
                Encoding.RAW, 4 * PAGE, PAYLOAD[: PAGE + 1], 0, connection, run, number, class_
            )
            connection.close()
        else:
            await say(Encoding.RAW, 4 * PAGE, PAYLOAD, 0, connection, run, number, class_)

    async with hostile_source(answer) as uri:
        with await open_source_in_thread(uri, store_timeout=20) as source:
            assert await read(source, 0, 4) == PAYLOAD
    assert turns == 2
