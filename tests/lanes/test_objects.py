"""pagenet/objects/: stores that are slow, broken, or lie; the order of what is fetched; the cache
on disk."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme
from processes import PAGE
from stores import CHUNK, Answer, Asked, HttpStore, http_store, nothing_wrong

from pagenet import (
    IntoFile,
    OwnMemory,
    PagenetError,
    Run,
    Source,
    SourceLost,
    SourceUnreachable,
    UsageError,
    open_source,
    pull,
    serve,
)
from pagenet.objects import RemoteObject, open_object, open_store
from pagenet.protocol import Class

pytest.importorskip("obstore")

CHUNKS = 5
#: the last chunk is short, and its last piece too
SIZE = (CHUNKS - 1) * CHUNK + 5 * PAGE
CONTENT = random.Random(1).randbytes(CHUNK) + bytes(CHUNK)
CONTENT += random.Random(2).randbytes(SIZE - len(CONTENT))
PAGES = SIZE // PAGE


@pytest.fixture(autouse=True, scope="module")
def runtime() -> None:
    """obstore's runtime, and asyncio's, stay: they are no test's."""
    with http_store(bytes(PAGE)) as store, open_source(store.url):
        pass


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagenet.objects._store.FIRST_PAUSE", 0.01)


@pytest.fixture
def trouble(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stalled":
        monkeypatch.setattr("pagenet.objects._store.STALL", 0.5)
    return str(request.param)


@pytest.fixture
def store() -> Iterator[HttpStore]:
    with http_store(CONTENT) as store:
        yield store


async def read(source: Source, first: int = 0, count: int = PAGES) -> bytes:
    into = memoryview(bytearray(count * PAGE))
    await source.read_into(Run(first, count), into)
    return bytes(into)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.001)


async def fetch(remote: RemoteObject, chunk: int, class_: Class = Class.DEMAND) -> bytes:
    size = min(CHUNK, remote.size - chunk * CHUNK)
    await remote.fetch(chunk * CHUNK, size, class_)
    return os.pread(remote.fd, size, chunk * CHUNK)


def tiles(store: HttpStore) -> bool:
    """Whether every byte was asked for, once."""
    ranges = sorted(store.ranges())
    ends = [0, *(end for _, end in ranges)]
    return [start for start, _ in ranges] == ends[:-1] and ends[-1] == SIZE


# ---- what is asked of a store that is in order ----


async def test_chunks_are_whole_aligned_and_fetched_once(store: HttpStore) -> None:
    draw = random.Random(3)
    with open_source(store.url) as source:

        async def look() -> None:
            first = draw.randrange(PAGES - 8)
            assert await read(source, first, 8) == CONTENT[first * PAGE : (first + 8) * PAGE]

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(look)
        assert await read(source) == CONTENT
    assert tiles(store)
    assert max(store.fetched().values()) <= 4
    assert {one.if_match for one in store.asked if one.method == "GET"} == {'"first"'}


async def test_zeros_stay_holes(store: HttpStore) -> None:
    with open_source(store.url) as source:
        assert await read(source, 0, PAGES) == CONTENT
        assert not await source.read_into(Run(CHUNK // PAGE, 16), memoryview(bytearray(16 * PAGE)))


def test_identity_is_that_of_the_content(store: HttpStore) -> None:
    def identity() -> bytes:
        with open_source(store.url) as source:
            return source.identity

    first = identity()
    assert identity() == first
    store.etag = '"second"'
    assert identity() != first


async def test_a_file_and_an_object_are_one_region(store: HttpStore, tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(CONTENT[:PAGE])
    with open_source(tmp_path / "ram", f"vram={store.url}", store.url) as source:
        assert [block.name for block in source.region.blocks] == ["ram", "vram", "mem"]
        assert await read(source, PAGES, 1) == CONTENT[-PAGE:]
        assert await read(source, 0, 1) == CONTENT[:PAGE]


# ---- transfers ----


async def test_transfer(store: HttpStore, lane: str) -> None:
    memory = OwnMemory("memfd")
    async with serve(store.url, listen="tcp://127.0.0.1:0", lane=lane) as server:  # type: ignore[arg-type]
        async with pull(server.uri, memory, lane=lane) as transfer:  # type: ignore[arg-type]
            await transfer.wait_complete()
        assert await memory.read(0, SIZE) == CONTENT
    memory.close()
    assert store.fetched() == dict.fromkeys(range(CHUNKS), 1)


async def test_a_page_that_is_here_does_not_wait_for_one_that_is_not(
    store: HttpStore, lane: str
) -> None:
    gate = threading.Event()

    def hold(asked: Asked, answer: Answer) -> None:
        if asked.method == "GET" and asked.start < CHUNK:
            answer.gate = gate
            answer.before_gate = len(answer.body) // 2

    store.lie = hold
    memory = OwnMemory("memfd")
    async with (
        serve(store.url, listen="tcp://127.0.0.1:0", lane=lane) as server,  # type: ignore[arg-type]
        pull(server.uri, memory, lane=lane, background="off", prefetch=(0, 0)) as transfer,  # type: ignore[arg-type]
        trio.open_nursery() as nursery,
    ):
        late: list[bytes] = []

        async def touch_last_of_first_chunk() -> None:
            late.append(await memory.read(CHUNK - PAGE, PAGE))

        assert await memory.read(0, PAGE) == CONTENT[:PAGE]
        nursery.start_soon(touch_last_of_first_chunk)
        # another chunk, and the same chunk's pages that have come
        for offset in (3 * CHUNK, PAGE):
            assert await memory.read(offset, PAGE) == CONTENT[offset : offset + PAGE]
        assert not late
        gate.set()
        await until(lambda: bool(late))
        assert late == [CONTENT[CHUNK - PAGE : CHUNK]]
        del transfer
    memory.close()
    assert sorted(store.ranges())[0][0] == 0
    assert store.fetched().keys() == {0, 3}


async def test_a_destination_is_told_why_pages_are_missing(
    store: HttpStore, lane: str, tmp_path: Path
) -> None:
    def replace(asked: Asked, answer: Answer) -> None:
        if asked.start >= 2 * CHUNK:
            store.etag = '"second"'

    store.lie = replace
    text = "another object than before"

    async def copy(uri: str) -> None:
        async with pull(uri, IntoFile(tmp_path / "out")) as transfer:
            await transfer.wait_complete()

    async def serve_it() -> None:
        async with serve(store.url, listen="tcp://127.0.0.1:0", lane=lane) as server:  # type: ignore[arg-type]
            with pytest.raises(SourceLost, match=text):
                await copy(server.uri)
            await trio.sleep_forever()

    with pytest.raises(SourceLost, match=text):
        await serve_it()
    assert not (tmp_path / "out").exists()


# ---- stores in trouble: what passes ----


def status(code: int, answer: Answer) -> None:
    answer.status, answer.body = code, b"<Error><Code>SlowDown</Code></Error>"
    answer.headers.pop("Content-Range", None)


def reset(answer: Answer) -> None:
    answer.cut = 0


def truncate(answer: Answer) -> None:
    answer.cut = len(answer.body) // 2


def promise_less(answer: Answer) -> None:
    answer.body = answer.body[: len(answer.body) // 2]


def stall(answer: Answer) -> None:
    answer.gate, answer.before_gate = threading.Event(), len(answer.body) // 2


PASSING: dict[str, Callable[[Answer], None]] = {
    **{str(code): partial(status, code) for code in (408, 425, 429, 500, 502, 503, 504)},
    "reset": reset,
    "truncated": truncate,
    "short, and says so": promise_less,
    "stalled": stall,
}


@pytest.mark.parametrize("trouble", PASSING, indirect=True)
async def test_trouble_that_passes(store: HttpStore, trouble: str) -> None:
    seen: set[int] = set()

    def lie(asked: Asked, answer: Answer) -> None:
        chunk = asked.start // CHUNK
        if asked.method == "GET" and chunk not in seen:
            seen.add(chunk)
            PASSING[trouble](answer)

    store.lie = lie
    with open_source(store.url) as source:
        assert await read(source) == CONTENT
    assert max(store.fetched().values()) == 2


async def test_a_request_that_was_cut_off_goes_on_where_it_ended(store: HttpStore) -> None:
    def lie(asked: Asked, answer: Answer) -> None:
        if asked.method == "GET" and asked.start % CHUNK == 0:
            answer.cut = CHUNK // 2

    store.lie = lie
    with open_source(store.url) as source:
        assert await read(source, 0, CHUNK // PAGE) == CONTENT[:CHUNK]
    (_, first_end), (again, last_end) = store.ranges()
    assert 0 < again <= CHUNK // 2
    assert first_end == last_end == CHUNK


# ---- and what does not ----


def claim_elsewhere(answer: Answer) -> None:
    if "Content-Range" in answer.headers:
        answer.headers["Content-Range"] = f"bytes {PAGE}-{PAGE + len(answer.body) - 1}/{SIZE}"


def send_all(answer: Answer) -> None:
    answer.status, answer.body = 200, CONTENT
    del answer.headers["Content-Range"]


def send_more(answer: Answer) -> None:
    answer.body += bytes(PAGE)


def claim_size(answer: Answer) -> None:
    place = answer.headers["Content-Range"].partition("/")[0]
    answer.headers["Content-Range"] = f"{place}/{SIZE + PAGE}"


def claim_etag(etag: str | None, answer: Answer) -> None:
    answer.headers.pop("ETag")
    if etag is not None:
        answer.headers["ETag"] = etag


LASTING: dict[str, tuple[Callable[[Answer], None], str]] = {
    "400": (partial(status, 400), "the store answers 400 Bad Request, SlowDown"),
    "401": (partial(status, 401), r"the store refuses access \(401 Unauthorized, SlowDown\)"),
    "403": (partial(status, 403), "the store refuses access"),
    "404": (partial(status, 404), "there is no such object"),
    "412": (partial(status, 412), "is another object than before"),
    "416": (partial(status, 416), "the store answers 416"),
    "another range": (claim_elsewhere, "other bytes than asked for"),
    "all of it": (send_all, "does not serve ranges"),
    "another size": (claim_size, "another object than before"),
    "If-Match ignored": (partial(claim_etag, '"second"'), "another object than before"),
    "no ETag": (partial(claim_etag, None), "another object than before"),
}


@pytest.mark.parametrize("trouble", LASTING, indirect=True)
async def test_trouble_that_lasts(store: HttpStore, trouble: str) -> None:
    change, text = LASTING[trouble]

    def lie(asked: Asked, answer: Answer) -> None:
        if asked.method == "GET":
            change(answer)

    store.lie = lie
    with open_source(store.url) as source:
        with pytest.raises(SourceLost, match=text) as caught:
            await read(source, 0, 1)
        assert "\n" not in str(caught.value)
        with pytest.raises(SourceLost, match=text):
            source.check_unchanged()
    assert len(store.ranges()) == 1


@pytest.mark.parametrize("trouble", ["500", "reset", "stalled"], indirect=True)
async def test_trouble_is_waited_out_until_the_deadline(store: HttpStore, trouble: str) -> None:
    def lie(asked: Asked, answer: Answer) -> None:
        if asked.method == "GET":
            PASSING[trouble](answer)
            answer.before_gate = 0

    store.lie = lie
    with (
        open_source(store.url, store_timeout=1.2) as source,
        pytest.raises(SourceLost, match=r"the store has not answered for 1\.2 s: "),
    ):
        await read(source, 0, 1)
    assert len(store.ranges()) > 1


async def test_bytes_behind_the_range_are_not_taken(store: HttpStore, tmp_path: Path) -> None:
    store.lie = lambda asked, answer: send_more(answer) if asked.start == CHUNK * 2 else None
    with open_source(store.url, cache=tmp_path) as source, suppress(SourceLost):
        assert await read(source) == CONTENT
    store.lie = nothing_wrong
    with open_source(store.url, cache=tmp_path) as source:
        assert await read(source) == CONTENT


async def test_closing_does_not_wait_for_the_store(store: HttpStore) -> None:
    store.lie = lambda asked, answer: stall(answer) if asked.method == "GET" else None
    with open_source(store.url) as source:
        with trio.move_on_after(0.1):
            await read(source)
        assert store.ranges()


def open_it(store: HttpStore) -> PagenetError:
    with pytest.raises(PagenetError) as caught:
        open_source(store.url, store_timeout=0.5).close()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("etag", "code", "kind", "text"),
    [
        (None, 200, UsageError, "no strong ETag"),
        ('W/"1"', 200, UsageError, "no strong ETag"),
        ('"1"', 403, UsageError, "refuses access"),
        ('"1"', 404, UsageError, "no such object"),
        ('"1"', 503, SourceUnreachable, "not answered for 0.5 s: the store answers 503"),
    ],
)
def test_objects_that_are_refused(
    store: HttpStore, etag: str | None, code: int, kind: type[PagenetError], text: str
) -> None:
    store.etag = etag
    store.lie = lambda _, answer: setattr(answer, "status", code)
    error = open_it(store)
    assert isinstance(error, kind)
    assert text in str(error)


def test_objects_of_part_of_a_page_are_refused() -> None:
    with http_store(bytes(PAGE + 1)) as store:
        assert "4097 bytes long" in str(open_it(store))
    with http_store(b"") as store:
        assert "0 bytes long" in str(open_it(store))


def test_a_store_that_is_not_there(store: HttpStore) -> None:
    store.url = "http://127.0.0.1:1/x"
    error = open_it(store)
    assert isinstance(error, SourceUnreachable)
    assert "Connection refused" in str(error)


async def test_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    with http_store(CONTENT, certificate=authority.issue_cert("localhost")) as store:
        error = open_it(store)
        assert isinstance(error, UsageError)
        assert "not valid (UnknownIssuer): SSL_CERT_FILE" in str(error)
        authority.cert_pem.write_to_path(str(tmp_path / "authority"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority"))
        with open_source(store.url) as source:
            assert await read(source) == CONTENT


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("s3://", "not a URI"),
        ("s3:///key", "not a URI"),
        ("s3://bucket", "names no object"),
        ("s3://bucket/", "names no object"),
        ("s3://bucket/../b", "not the name of an object"),
        ("http://example.com/x", "use https://"),
        ("https://example.com/x?signature=1", "presigned"),
        ("https://user:secret@example.com/x", "not supported"),
        ("s3://bucket/a//b", "not the name of an object"),
    ],
)
def test_uris_that_are_refused(uri: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    with pytest.raises(UsageError, match=text) as caught:
        open_source(uri, store_timeout=1)
    assert "secret" not in str(caught.value)
    assert "signature" not in str(caught.value)


# ---- what goes first ----


async def test_a_chunk_is_fetched_from_the_page_on_that_a_thread_waits_for(
    store: HttpStore,
) -> None:
    gate = threading.Event()

    def hold(asked: Asked, answer: Answer) -> None:
        if asked.method == "GET" and asked.start == 0:
            answer.gate = gate

    store.lie = hold
    with open_object(store.url, deadline=30) as remote:
        await remote.fetch(CHUNK - PAGE, PAGE, Class.DEMAND)
        assert os.pread(remote.fd, PAGE, CHUNK - PAGE) == CONTENT[CHUNK - PAGE : CHUNK]
        assert not remote.is_here(0, PAGE)
        gate.set()
        assert await fetch(remote, 0) == CONTENT[:CHUNK]
    last = CHUNK - (64 << 10)
    assert store.ranges() == [(last, CHUNK), (0, last)]


async def test_what_a_thread_waits_for_goes_first() -> None:
    gates = [threading.Event() for _ in range(40)]
    with http_store(bytes(40 * CHUNK)) as store:

        def hold(asked: Asked, answer: Answer) -> None:
            if asked.method == "GET":
                answer.gate = gates[asked.start // CHUNK]

        def order() -> list[int]:
            return [start // CHUNK for start, _ in store.ranges()]

        store.lie = hold
        with open_object(store.url, deadline=30) as remote:
            for chunk in range(20):
                remote.want(chunk * CHUNK, CHUNK, Class.BACKGROUND)
            await until(lambda: len(order()) >= 12)
            for chunk in (35, 34, 33, 32, 31):
                remote.want(chunk * CHUNK, PAGE, Class.DEMAND)
            remote.want(19 * CHUNK, PAGE, Class.PREFETCH)
            await until(lambda: len(order()) >= 16)
            gates[0].set()
            await until(lambda: len(order()) >= 17)
            gates[1].set()
            await until(lambda: len(order()) >= 18)
            assert set(order()[:12]) == set(range(12))
            assert set(order()[12:16]) == {35, 34, 33, 32}
            assert order()[16:] == [31, 19]
            for gate in gates:
                gate.set()
            await remote.fetch(0, 20 * CHUNK, Class.BACKGROUND)
        assert max(store.fetched().values()) == 1


async def test_the_background_is_read_ahead_of() -> None:
    with http_store(bytes(40 * CHUNK)) as store, open_object(store.url, deadline=30) as remote:
        await fetch(remote, 3, Class.BACKGROUND)
        await until(lambda: len(store.ranges()) >= 9)
        await fetch(remote, 30, Class.DEMAND)
        assert store.fetched() == dict.fromkeys([*range(3, 12), 30], 1)


async def test_what_is_read_ahead_and_refused_is_not_asked_for_again() -> None:
    """Nobody waits for it."""

    def refuse(asked: Asked, answer: Answer) -> None:
        if asked.method == "GET" and asked.start >= CHUNK:
            answer.status = 403

    with http_store(bytes(8 * CHUNK)) as store:
        store.lie = refuse
        with open_object(store.url, deadline=30) as remote:
            await remote.fetch(0, CHUNK, Class.BACKGROUND)
            await until(lambda: len(store.ranges()) >= 8)
            await trio.sleep(0.2)
            assert max(store.fetched().values()) == 1


async def test_what_the_background_reads_here_and_there_comes_alone() -> None:
    """As a recording has it. What goes on with that is a stream."""
    piece = 64 << 10
    content = os.urandom(8 * CHUNK)
    with http_store(content) as store, open_object(store.url, deadline=30) as remote:
        for number in (100, 7, 101, 9):
            await remote.fetch(number * piece, piece, Class.BACKGROUND)
            assert os.pread(remote.fd, piece, number * piece) == content[number * piece :][:piece]
        apart = [(number * piece, (number + 1) * piece) for number in (100, 7)]
        assert store.ranges()[:2] == apart
        assert not remote.is_here(8 * piece, piece)
        await remote.fetch(0, len(content), Class.DEMAND)
        assert os.pread(remote.fd, len(content), 0) == content
        assert sum(end - start for start, end in store.ranges()) == len(content)


@pytest.mark.parametrize("seed", range(8))
async def test_reads_of_every_kind_at_once(seed: int, tmp_path: Path) -> None:
    """Every byte comes once, whatever is asked for in which order."""
    draw = random.Random(seed)
    content = draw.randbytes(6 * CHUNK + 5000)
    with (
        http_store(content) as store,
        open_object(store.url, cache=tmp_path / "cache", deadline=30) as remote,
    ):
        async with trio.open_nursery() as nursery:
            for _ in range(60):
                offset = draw.randrange(len(content))
                length = min(draw.choice([1, PAGE, 64 << 10, CHUNK]), len(content) - offset)
                class_ = draw.choice([Class.DEMAND, Class.PREFETCH, *[Class.BACKGROUND] * 3])
                nursery.start_soon(remote.fetch, offset, length, class_)
                if draw.random() < 0.3:
                    await trio.sleep(0.005)
        await remote.fetch(0, len(content), Class.DEMAND)
        assert os.pread(remote.fd, len(content), 0) == content
        assert sum(end - start for start, end in store.ranges()) == len(content)
        with open_object(store.url, cache=tmp_path / "cache", deadline=30) as another:
            assert another.is_here(0, len(content))


# ---- the cache on disk ----


def names(cache: Path) -> list[str]:
    return sorted(path.suffix for path in cache.iterdir())


async def test_a_cache_outlives_its_process(store: HttpStore, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with open_source(store.url, cache=cache) as source:
        assert await read(source, 0, CHUNK // PAGE) == CONTENT[:CHUNK]
    with open_source(store.url, cache=cache) as source:
        assert await read(source) == CONTENT
    with open_source(store.url, cache=cache) as source:
        assert await read(source) == CONTENT
    assert store.fetched() == dict.fromkeys(range(CHUNKS), 1)
    assert names(cache) == ["", ".data", ".map"]


async def test_another_content_is_another_file(store: HttpStore, tmp_path: Path) -> None:
    with open_source(store.url, cache=tmp_path) as source:
        assert await read(source) == CONTENT
    store.content, store.etag = CONTENT[::-1], '"second"'
    with open_source(store.url, cache=tmp_path) as source:
        assert await read(source) == CONTENT[::-1]


async def test_a_chunk_is_fetched_once_a_host(store: HttpStore, tmp_path: Path) -> None:
    with (
        open_source(store.url, cache=tmp_path) as one,
        open_source(store.url, cache=tmp_path) as other,
    ):
        results: list[bytes] = []

        async def read_all(source: Source) -> None:
            results.append(await read(source))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_all, one)
            nursery.start_soon(read_all, other)
        assert results == [CONTENT, CONTENT]
    assert store.fetched() == dict.fromkeys(range(CHUNKS), 1)


KILLED = """
import sys, trio
from pagenet import Run, open_source
source = open_source(sys.argv[1], cache=sys.argv[2])
async def main():
    await source.read_into(Run(0, 512), memoryview(bytearray(4096 * 512)))
    print("here", flush=True)
    await source.read_into(Run(512 * 3, 512), memoryview(bytearray(4096 * 512)))
trio.run(main)
"""


async def test_a_killed_process_leaves_whole_chunks(store: HttpStore, tmp_path: Path) -> None:
    gate = threading.Event()

    def hold(asked: Asked, answer: Answer) -> None:
        if asked.start == 3 * CHUNK:
            answer.gate, answer.before_gate = gate, CHUNK // 2

    store.lie = hold
    await trio.to_thread.run_sync(_run_and_kill, store.url, tmp_path)
    gate.set()
    with open_source(store.url, cache=tmp_path) as source:
        assert await read(source) == CONTENT
    assert store.fetched()[0] == 1
    assert store.fetched()[3] == 2


def _run_and_kill(url: str, cache: Path) -> None:
    """Kill a process that has one chunk, and half of another."""
    command = [sys.executable, "-c", KILLED, url, str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        (data,) = cache.glob("*.data")
        with data.open("rb") as file:
            while not os.pread(file.fileno(), PAGE, 3 * CHUNK).strip(b"\0"):
                time.sleep(0.001)
        process.send_signal(signal.SIGKILL)


async def test_a_cache_from_before_the_boot_begins_anew(store: HttpStore, tmp_path: Path) -> None:
    with open_source(store.url, cache=tmp_path) as source:
        assert await read(source) == CONTENT
    (data,), (map_,) = tmp_path.glob("*.data"), tmp_path.glob("*.map")
    data.write_bytes(bytes(SIZE))  # it was not written to the disk
    text = map_.read_bytes()
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    assert boot in text
    map_.write_bytes(text.replace(boot, boot[::-1]))
    with open_source(store.url, cache=tmp_path) as source:
        assert await read(source) == CONTENT
    assert store.fetched() == dict.fromkeys(range(CHUNKS), 2)


@pytest.mark.parametrize("suffix", [".data", ".map"])
@pytest.mark.parametrize("length", [0, 1, SIZE - PAGE])
async def test_a_damaged_cache_begins_anew(
    store: HttpStore, tmp_path: Path, suffix: str, length: int
) -> None:
    with open_source(store.url, cache=tmp_path) as source:
        assert await read(source) == CONTENT
    (path,) = tmp_path.glob(f"*{suffix}")
    os.truncate(path, length)
    with open_source(store.url, cache=tmp_path) as source:
        assert await read(source) == CONTENT


async def test_a_cache_is_bounded(store: HttpStore, tmp_path: Path) -> None:
    async def read_named(name: str, limit: int) -> None:
        url = store.url.replace("mem", name)
        with open_source(url, cache=tmp_path, cache_size=limit) as source:
            assert await read(source) == CONTENT

    await read_named("a", 2 * SIZE)
    await read_named("b", 2 * SIZE)
    await read_named("a", 2 * SIZE)
    assert len(store.ranges()) == 2 * CHUNKS
    await read_named("c", 2 * SIZE)  # in place of b
    assert len(list(tmp_path.glob("*.data"))) == 2
    await read_named("a", 2 * SIZE)
    assert len(store.ranges()) == 3 * CHUNKS
    with (
        open_source(store.url, cache=tmp_path),
        pytest.raises(UsageError, match=r"allow more \(--cache-size\)"),
    ):
        await read_named("d", 2 * SIZE - PAGE)
    with pytest.raises(UsageError, match="allow more"):
        await read_named("e", SIZE - PAGE)


def test_caches_that_are_refused(store: HttpStore, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "lock").symlink_to(tmp_path / "file")
    for name in ("file", "none/none", "linked"):
        with pytest.raises(UsageError, match="cannot use cache"):
            open_source(store.url, cache=tmp_path / name)


async def test_what_is_cached_is_here_at_once(store: HttpStore, tmp_path: Path) -> None:
    with open_source(store.url, cache=tmp_path) as source:
        assert await read(source, PAGES - 1, 1) == CONTENT[-PAGE:]
    with open_source(store.url, cache=tmp_path) as source:
        assert source.is_here(Run(PAGES - 1, 1))
        assert not source.is_here(Run(0, 1))


async def test_a_disk_that_is_full(store: HttpStore, tmp_path: Path) -> None:
    """One line, and no wrong page."""
    with open_source(store.url, cache=tmp_path) as source:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3 * CHUNK, hard))
            with pytest.raises(SourceLost, match=r"cannot keep what .* has sent: File too large"):
                await read(source, 3 * CHUNK // PAGE, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)


# ---- a store, by name ----


def test_store_by_name() -> None:
    with http_store(CONTENT) as http, open_store(http.url.removesuffix("mem"), 30) as store:
        assert store.size("mem") == SIZE
        assert store.read("mem", 5, 10) == CONTENT[5:15]
        assert store.read("mem", 5, 0) == b""
        http.lie = lambda _, answer: status(404, answer)
        with pytest.raises(SourceLost, match="no such object"):
            store.read("none", 0, 1)
