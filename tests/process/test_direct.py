"""Sources that the destination's own process serves: files, snapshots, and objects in stores."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from processes import PAGE, check_verified, pull_command, run, run_workload, write_pattern
from stores import Answer, Asked, http_store

import pagenet
from pagenet import IntoFile, OwnMemory, SourceLost, SourceUnreachable, direct, transport
from pagenet.direct import direct_source
from pagenet.uffd import Feature, probe

SIZE = 16 << 20
WORKLOAD = ("--size", SIZE, "--zero-every", 16)


@pytest.fixture(autouse=True)
def uffd_permitted() -> None:
    probe()


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pattern(tmp_path_factory.mktemp("direct") / "mem", SIZE, zero_every=16)


async def make_snapshot(memory: Path, spec: str) -> None:
    command = [*pull_command(lane="native")[:2], "pagenet.cli.snapshot"]
    async with run([*command, "create", str(memory), spec]) as process:
        assert await process.wait_end() == 0


@pytest.mark.parametrize("kind", ["file", "snapshot"])
async def test_an_owner_is_filled_without_a_server(
    kind: str, lane: str, memory: Path, tmp_path: Path
) -> None:
    socket, source = tmp_path / "owner", str(memory)
    if kind == "snapshot":
        await make_snapshot(memory, f"{tmp_path}/snap")
        source = f"snapshot:{tmp_path}/snap"
    async with run(pull_command(source, "--uffd-socket", str(socket), lane=lane)) as pulling:
        await pulling.event("waiting")
        async with run_workload(socket, *WORKLOAD) as owner:
            await check_verified(owner, pages=SIZE // PAGE)
        assert await pulling.wait() == 0
        (connected,) = (one for one in pulling.events if one["event"] == "connected")
        assert connected["peer"] == source


def changed(asked: Asked, answer: Answer) -> None:
    if asked.method == "GET":
        answer.status, answer.body = 412, b""


async def test_a_lost_object_is_the_loss_of_a_source(memory: Path, tmp_path: Path) -> None:
    """Every page that the owner lacks is poisoned, and one line says why."""
    pytest.importorskip("obstore")
    if Feature.POISON not in probe():
        pytest.skip("the kernel has no UFFDIO_POISON")
    socket = tmp_path / "owner"
    with http_store(memory.read_bytes()) as store:
        options = ("--uffd-socket", str(socket), "--background", "off", "--on-loss", "poison")
        async with run(pull_command(store.url, *options, lane="native")) as pulling:
            await pulling.event("waiting")
            store.lie = changed
            async with run_workload(socket, *WORKLOAD) as owner:
                assert await pulling.wait() == 4
                assert (await owner.event("verified"))["poisoned"] == SIZE // PAGE
            told = [event["event"] for event in pulling.events]
            assert told[-3:] == ["missing", "poisoned", "error"]
            (line,) = pulling.stderr.splitlines()
            assert f"{store.url} is another object than before" in line


async def refused(*args: str) -> tuple[int, str]:
    async with run(pull_command(*args, lane="native")) as pulling:
        code = await pulling.wait_end()
        (line,) = pulling.stderr.splitlines()
        return code, line


async def test_sources_that_cannot_be_opened(memory: Path, tmp_path: Path) -> None:
    into = ("--into", str(tmp_path / "out"))
    code, line = await refused(str(tmp_path / "none"), *into)
    assert (code, "cannot open source" in line) == (2, True), line
    code, line = await refused("tpc://127.0.0.1:1", *into)
    assert (code, "no transport of that name" in line) == (2, True), line
    code, line = await refused("inside:mem", *into)
    assert code == 2, line
    code, line = await refused("http://127.0.0.1:1/mem", *into, "--store-timeout", "0.5")
    assert (code, "has not answered for 0.5 s" in line) == (3, True), line
    code, line = await refused(str(memory), *into, "--cache-size", "1G")
    assert (code, "--cache" in line) == (2, True), line
    code, line = await refused(str(memory), *into, "--listen")
    assert (code, "--listen" in line) == (2, True), line
    assert not (tmp_path / "out").exists()


# ---- as a library ----


async def test_many_destinations_of_one(memory: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"copy.{number}" for number in range(3)]
    async with direct_source(str(memory)) as uri:

        async def copy(path: Path) -> None:
            async with pagenet.pull(uri, IntoFile(path)) as transfer:
                await transfer.wait_complete()

        async with trio.open_nursery() as nursery:
            for path in paths:
                nursery.start_soon(copy, path)
    assert {path.read_bytes() for path in paths} == {memory.read_bytes()}
    with pytest.raises(SourceUnreachable, match="mem"):
        await pagenet.pull(uri, IntoFile(paths[0])).__aenter__()


async def test_only_a_source_in_this_process_is_without_a_link(memory: Path) -> None:
    async with direct_source(str(memory)) as uri:
        assert transport.has_no_link(uri)
    assert not any(map(transport.has_no_link, ("tcp://127.0.0.1:1", "unix:/x")))


async def test_a_source_that_listens_elsewhere_is_itself() -> None:
    for elsewhere in ("tcp://192.0.2.1:1", "rdma://192.0.2.1:1", "unix:/nowhere", "none://1"):
        async with direct_source(elsewhere) as uri:
            assert uri == elsewhere


async def test_a_block_that_goes_on_after_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_PARTING", 0.0)
    file = tmp_path / "mem"
    file.write_bytes(bytes(4 * PAGE))
    own = OwnMemory("memfd")

    async def pull_and_change(uri: str) -> None:
        async with pagenet.pull(uri, own, background="off") as transfer:
            file.write_bytes(b"other" + bytes(4 * PAGE - 5))
            await transfer.wait_complete()

    async def go_on() -> None:
        async with direct_source(str(file)) as uri:
            with pytest.raises(SourceLost):
                await pull_and_change(uri)
            await trio.sleep_forever()

    with pytest.raises(SourceLost, match="was changed"):
        await go_on()
    own.close()
