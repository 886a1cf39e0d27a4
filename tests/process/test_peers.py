"""Peers that are asked for what they hold before a store is: what they have is not fetched, and
whatever they do, no page is wrong or late."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from certificates import Authority
from hostile_source import Answer, hostile_source, say
from processes import PAGE, pull_command, run, serve_command, write_pattern
from stores import CHUNK, http_store

import pagenet
from pagenet import Run, Source, transport
from pagenet.objects import open_store
from pagenet.peers import _peers
from pagenet.protocol import Class, Encoding, content_identity
from pagenet.snapshot.creating import create_snapshot
from pagenet.snapshot.opened import open_snapshot
from pagenet.source.memory import open_source_in_thread

LISTEN = "tcp://127.0.0.1:0"
CHUNKS = 4
SIZE = CHUNKS * CHUNK
PAGES = SIZE // PAGE


async def read(source: Source, first: int = 0, count: int = PAGES) -> bytes:
    into = memoryview(bytearray(count * PAGE))
    await source.read_into(Run(first, count), into)
    return bytes(into)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer may be as slow as this machine."""
    monkeypatch.setattr(_peers, "_PATIENCE", 60.0)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is silent is left alone soon, and for the rest of the test."""
    monkeypatch.setattr(_peers, "_PATIENCE", 0.5)
    monkeypatch.setattr(_peers, "_FIRST_REST", 1000.0)


class Told:
    """Events, as they are told."""

    def __init__(self) -> None:
        self.events: list[dict[str, object]] = []

    def __call__(self, event: str, /, **fields: object) -> None:
        assert event == "peer"
        self.events.append(fields)


@pytest.fixture
def told() -> Told:
    return Told()


# ---- snapshots ----


@pytest.fixture
async def snapshot(tmp_path: Path) -> str:
    memory = write_pattern(tmp_path / "mem", SIZE, zero_every=16)
    (tmp_path / "here").mkdir()
    with pagenet.open_source(memory) as source:
        await create_snapshot(source, str(tmp_path / "here" / "snap"))
    return f"snapshot:{tmp_path}/here/snap"


@pytest.fixture
def index(snapshot: str, tmp_path: Path) -> str:
    """The snapshot without its objects."""
    (tmp_path / "there").mkdir()
    shutil.copy(tmp_path / "here" / "snap.snapshot", tmp_path / "there")
    return f"snapshot:{tmp_path}/there/snap"


@pytest.fixture
def content(tmp_path: Path) -> Callable[[], bytes]:
    return (tmp_path / "mem").read_bytes


async def test_a_snapshot_out_of_a_peer_alone(
    snapshot: str, index: str, content: Callable[[], bytes], told: Told
) -> None:
    async with pagenet.serve(snapshot, listen=LISTEN) as peer:
        source = await open_source_in_thread(index, peers=[peer.uri], on_event=told)
        with source:
            assert await read(source) == content()
        assert peer.statistics().asked >= PAGES * 15 // 16
    assert not told.events


async def test_a_layer_out_of_a_peer(tmp_path: Path, snapshot: str) -> None:
    """Frames of which the layer has every page; the others are read from their objects."""
    memory = bytearray((tmp_path / "mem").read_bytes())
    memory[5 * PAGE : 6 * PAGE] = b"x" * PAGE
    (tmp_path / "mem").write_bytes(memory)
    base, layer = f"{tmp_path}/here/snap", f"{tmp_path}/here/layer"
    with pagenet.open_source(tmp_path / "mem") as source:
        await create_snapshot(source, layer, base)
    spec = f"snapshot:{layer}"
    async with pagenet.serve(spec, listen=LISTEN) as peer:
        with await open_source_in_thread(spec, peers=[peer.uri]) as source:
            assert await read(source) == memory
        assert 0 < peer.statistics().asked < PAGES


def identity_of(spec: str) -> bytes:
    with open_snapshot(spec.removeprefix("snapshot:")) as snapshot:
        return content_identity(snapshot.identity)


async def silent(connection: transport.Connection, run: Run, number: int, class_: int) -> None:
    await trio.sleep_forever()


async def garbage(connection: transport.Connection, run: Run, number: int, class_: int) -> None:
    payload = random.Random(number).randbytes(run.count * PAGE)
    await say(Encoding.RAW, len(payload), payload, 0, connection, run, number, class_)


async def leaving(connection: transport.Connection, run: Run, number: int, class_: int) -> None:
    await say(Encoding.RAW, run.count * PAGE, bytes(PAGE + 1), 0, connection, run, number, class_)
    connection.close()


BAD: dict[str, tuple[Answer, str]] = {
    "lies": (garbage, "other pages than those of frame"),
    "says nothing": (silent, ""),
    "breaks off": (leaving, ""),
    "has nothing": (partial(say, Encoding.ABSENT, 0, b"", 0), ""),
    "says nonsense": (partial(say, 77, 0, b"", 0), "encoding 77"),
}


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_peer_of_a_snapshot(
    kind: str,
    snapshot: str,
    content: Callable[[], bytes],
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "says nothing":
        hurry(monkeypatch)
    answer, reason = BAD[kind]
    asked = 0

    async def counted(*request: Any) -> None:
        nonlocal asked
        asked += 1
        await answer(*request)

    async with hostile_source(counted, PAGES, identity_of(snapshot)) as uri:
        with await open_source_in_thread(snapshot, peers=[uri], on_event=told) as source:
            assert await read(source) == content()
    assert [reason in str(event["reason"]) for event in told.events] == [True] * bool(reason)
    if kind == "says nothing":  # it was left alone at once
        assert asked <= 1


async def test_a_lying_peer_beside_an_honest_one(
    snapshot: str, index: str, content: Callable[[], bytes], told: Told
) -> None:
    async with (
        hostile_source(garbage, PAGES, identity_of(snapshot)) as liar,
        pagenet.serve(snapshot, listen=LISTEN) as honest,
    ):
        peers = [liar, "tcp://127.0.0.1:1", honest.uri]
        with await open_source_in_thread(index, peers=peers, on_event=told) as source:
            assert await read(source) == content()
    (event,) = told.events
    assert event["uri"] == liar


async def test_a_peer_with_other_memory(
    snapshot: str, content: Callable[[], bytes], told: Told, tmp_path: Path
) -> None:
    other = write_pattern(tmp_path / "other", SIZE, seed=9)
    async with (
        pagenet.serve(str(other), listen=LISTEN) as one,
        hostile_source(garbage, PAGES // 2, identity_of(snapshot)) as smaller,
    ):
        peers = [one.uri, smaller]
        with await open_source_in_thread(snapshot, peers=peers, on_event=told) as source:
            assert await read(source) == content()
    assert {event["uri"] for event in told.events} == set(peers)


async def test_a_peer_that_comes_back(
    snapshot: str, content: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its rest it is asked again."""
    monkeypatch.setattr(_peers, "_FIRST_REST", 0.0)
    monkeypatch.setattr(_peers, "_LONGEST_REST", 0.0)
    async with pagenet.serve(snapshot, listen=LISTEN) as peer:
        uri = peer.uri
    with await open_source_in_thread(snapshot, peers=[uri]) as source:
        assert await read(source, 0, 1) == content()[:PAGE]
        async with pagenet.serve(snapshot, listen=uri) as peer:
            assert await read(source) == content()
            assert peer.statistics().asked


@pytest.mark.usefixtures("s3")
async def test_a_snapshot_in_a_store_out_of_a_peer(tmp_path: Path, told: Told) -> None:
    """It answers with what it holds, and the store is asked for nothing that it holds."""
    memory = write_pattern(tmp_path / "mem", SIZE, zero_every=16)
    spec = "s3://bucket/clones/snap"
    with pagenet.open_source(memory) as source:
        await create_snapshot(source, spec)
    half = PAGES // 2
    async with pagenet.serve(f"snapshot:{spec}", listen=LISTEN) as peer:
        await peer._source.fetch(Run(0, half), Class.DEMAND)
        source = await open_source_in_thread(f"snapshot:{spec}", peers=[peer.uri], on_event=told)
        with source:
            assert await read(source) == memory.read_bytes()
        assert peer.statistics().asked
        source = await open_source_in_thread(f"snapshot:{spec}", peers=[peer.uri])
        with source, open_store("s3://bucket/clones", 60) as store:
            for name, _, _ in store.list():
                store.remove(name)
            assert await read(source, 0, half) == memory.read_bytes()[: half * PAGE]
    assert not told.events


# ---- objects ----


@pytest.fixture(scope="module")
def runtime() -> None:
    """obstore's runtime, and asyncio's, stay: they are no test's."""
    pytest.importorskip("obstore")
    with http_store(bytes(PAGE)) as store, pagenet.open_source(store.url):
        pass


@pytest.fixture
def tls(tmp_path: Path) -> pagenet.Tls:
    return pagenet.Tls(Authority().write(tmp_path / "tls"))


@pytest.mark.usefixtures("runtime")
async def test_an_object_out_of_trusted_peers(tls: pagenet.Tls, told: Told) -> None:
    """What a peer holds does not come from the store, and what it does not hold it does not
    fetch for others."""
    memory = random.Random(4).randbytes(SIZE)
    with http_store(memory) as store:
        async with pagenet.serve(store.url, listen=LISTEN, tls=tls) as peer:
            half = SIZE // 2 // PAGE
            await peer._source.fetch(Run(0, half), Class.DEMAND)
            before = len(store.ranges())
            source = await open_source_in_thread(
                store.url, peers=[peer.uri], tls=tls, on_event=told
            )
            with source:
                assert await read(source, 0, half) == memory[: SIZE // 2]
                assert len(store.ranges()) == before
                assert await read(source) == memory
            ranges = store.ranges()[before:]
            assert sum(end - start for start, end in ranges) == SIZE // 2
            assert min(start for start, _ in ranges) == SIZE // 2
            assert not peer._source.is_here(Run(half, 1))
    assert not told.events


@pytest.mark.usefixtures("runtime")
async def test_what_other_processes_of_its_host_have_fetched(
    tls: pagenet.Tls, tmp_path: Path
) -> None:
    """A peer holds what is in its host's cache."""
    memory = random.Random(4).randbytes(SIZE)
    with http_store(memory) as store:
        cache = tmp_path / "cache"
        with pagenet.open_source(store.url, cache=cache) as opened:
            async with pagenet.serve(opened, listen=LISTEN, tls=tls) as peer:
                with await open_source_in_thread(store.url, cache=cache) as other:
                    assert await read(other) == memory
                fetched = len(store.ranges())
                source = await open_source_in_thread(store.url, peers=[peer.uri], tls=tls)
                with source:
                    assert await read(source) == memory
                assert len(store.ranges()) == fetched


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("kind", ["says nothing", "breaks off", "says nonsense"])
async def test_the_store_answers_where_a_peer_does_not(
    kind: str, tls: pagenet.Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = random.Random(4).randbytes(SIZE)
    if kind == "says nothing":
        hurry(monkeypatch)
    dial = transport.dial

    async def without_tls(uri: str, tls: pagenet.Tls | None = None) -> transport.Connection:
        return await dial(uri)

    monkeypatch.setattr(transport, "dial", without_tls)
    with http_store(memory) as store:
        with pagenet.open_source(store.url) as source:
            identity = source.identity
        async with hostile_source(BAD[kind][0], PAGES, identity) as uri:
            source = await open_source_in_thread(store.url, peers=[uri], tls=tls)
            with source:
                assert await read(source) == memory
        assert sorted(store.fetched()) == list(range(CHUNKS))


# ---- the commands ----


async def refused(*args: str) -> tuple[int, str]:
    async with run(args) as process:
        code = await process.wait_end()
        (line,) = process.stderr.splitlines()
        return code, line


async def test_peers_that_are_refused(snapshot: str, tmp_path: Path) -> None:
    memory, listen = str(tmp_path / "mem"), ("--listen", LISTEN)
    into = ("--into", str(tmp_path / "out"))
    peer = ("--peer", "tcp://127.0.0.1:1")
    for words, reason in (
        (serve_command("http://127.0.0.1:1/mem", *peer, *listen), "no checksums"),
        (pull_command("http://127.0.0.1:1/mem", *peer, *into, lane="native"), "no checksums"),
        (serve_command(memory, *peer, *listen), "for objects and snapshots"),
        (serve_command("tcp://127.0.0.1:1", *peer, *listen), "for objects and snapshots"),
        (serve_command(snapshot, "--peer", "rdma://127.0.0.1:1", *listen), "tcp:// or unix:"),
        (pull_command("tcp://127.0.0.1:1", *peer, *into, lane="native"), "--peer"),
    ):
        code, line = await refused(*words)
        assert (code, reason in line) == (2, True), line


@pytest.mark.usefixtures("runtime")
async def test_a_destination_with_trusted_peers(tls: pagenet.Tls, tmp_path: Path) -> None:
    memory = random.Random(4).randbytes(SIZE)
    with http_store(memory) as store:
        async with pagenet.serve(store.url, listen=LISTEN, tls=tls) as peer:
            await peer._source.fetch(Run(0, PAGES), Class.DEMAND)
            options = ("--peer", peer.uri, "--tls-dir", str(tmp_path / "tls"))
            into = ("--into", str(tmp_path / "out"))
            async with run(pull_command(store.url, *options, *into, lane="native")) as pulling:
                assert await pulling.wait() == 0
            assert (tmp_path / "out").read_bytes() == memory
            assert peer.statistics().asked


async def test_a_clone_by_a_peer(snapshot: str, tmp_path: Path) -> None:
    async with pagenet.serve(snapshot, listen=LISTEN) as peer:
        options = ("--peer", peer.uri, "--into", str(tmp_path / "out"))
        async with run(pull_command(snapshot, *options, lane="native")) as pulling:
            assert await pulling.wait() == 0
        assert peer.statistics().asked
    assert (tmp_path / "out").read_bytes() == (tmp_path / "mem").read_bytes()
