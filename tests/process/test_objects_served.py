"""Objects, served by the commands: out of a real S3 server, and out of stores that fail."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

import pytest
import trio
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
from stores import CHUNK, gcs_server, http_store

import pagenet

obstore = pytest.importorskip("obstore")

from pagenet.background.learned import learned_of  # noqa: E402
from pagenet.objects import open_object, open_store  # noqa: E402
from pagenet.protocol import Class  # noqa: E402

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SIZE = 16 << 20
SEED = 7
URI = "s3://bucket/snapshots/mem"


@pytest.fixture
def memory(s3: None, tmp_path: Path) -> bytes:
    """What the object has."""
    content = write_pattern(tmp_path / "mem", SIZE, seed=SEED, zero_every=16).read_bytes()
    upload(content)
    return content


def upload(content: bytes) -> None:
    with open_store("s3://bucket/snapshots", 60) as store:
        store.write("mem", content)
        assert store.size("mem") == len(content)


async def test_many_guests_are_restored_from_s3(memory: bytes, tmp_path: Path) -> None:
    """By one daemon without a source beside it. What they wait for is kept in the store, and the
    next daemon brings it."""
    path = tmp_path / "owners"
    options = ("--fill", "touched", "--prefetch", "0,0", "--learn", "s3://bucket/snapshots")
    command = pull_command(
        *(URI, "--uffd-socket", str(path), "--many", "--cache", str(tmp_path / "cache"), *options),
        lane="native",
    )
    touching = ("--size", SIZE, "--seed", SEED, "--zero-every", 16, "--order", "random")
    for restores in (1, 2):
        async with run(command) as daemon:
            await daemon.event("added")
            for kind in ("anonymous", "shared")[:restores]:
                words = ("--memory", kind, "--verify", "touched", "--touches", 100, *touching)
                async with run_workload(path, *words) as guest:
                    await check_verified(guest)
                await daemon.event("gone")
            daemon.send_signal(signal.SIGTERM)
            await daemon.wait()
        with open_store("s3://bucket/snapshots", 60) as store:
            name = "default.learned"
            known = learned_of(store.read(name, 0, store.size(name)), name)
        assert known.restores == (1, 3)[restores - 1]
        assert len(known.pages) == 100


async def test_a_guest_is_restored_from_s3(memory: bytes, lane: str, tmp_path: Path) -> None:
    socket = tmp_path / "owner"
    async with (
        run_server(URI, "--cache", str(tmp_path / "cache"), "--lane", lane) as (server, uri),
        run(pull_command(uri, "--uffd-socket", str(socket), lane=lane)) as pulling,
    ):
        await pulling.event("waiting")
        workload = ("--size", str(SIZE), "--seed", SEED, "--zero-every", 16)
        async with run_workload(socket, *workload) as owner:
            await check_verified(owner, pages=SIZE // PAGE)
        assert await pulling.wait() == 0
        server.send_signal(signal.SIGTERM)
        assert await server.wait() == 143
    with pagenet.open_source(URI, cache=tmp_path / "cache") as source:
        into = memoryview(bytearray(SIZE))
        await source.read_into(pagenet.Run(0, SIZE // PAGE), into)
        assert into == memory


async def test_the_cache_needs_each_byte_once(memory: bytes, tmp_path: Path) -> None:
    for fetched in (SIZE, 0):
        with open_object(URI, cache=tmp_path / "cache", deadline=60) as remote:
            await remote.fetch(0, SIZE, Class.BACKGROUND)
            assert os.pread(remote.fd, SIZE, 0) == memory
            assert remote.fetched == fetched


async def test_a_source_that_is_killed_comes_back(memory: bytes, tmp_path: Path) -> None:
    """The object is the same source; a part of it is in the cache."""
    cache, socket = ("--cache", str(tmp_path / "cache")), tmp_path / "owner"
    async with run_server(URI, *cache) as (server, uri):
        options = ("--uffd-socket", str(socket), "--max-bandwidth", "5M")  # killed in the middle
        async with run(pull_command(uri, *options, lane="native")) as pulling:
            await pulling.event("waiting")
            workload = ("--size", str(SIZE), "--seed", SEED, "--zero-every", 16)
            touches = ("--touches", 64, "--wait-complete")
            async with run_workload(socket, *workload, *touches) as owner:
                while not (await pulling.event("progress"))["bytes"]:
                    pass
                await server.kill()
                await pulling.event("disconnected")
                async with run_server(URI, *cache, listen=uri):
                    await pulling.event("reconnected")
                    await check_verified(owner, pages=SIZE // PAGE)
                    assert await pulling.wait() == 0


async def test_a_destination_without_a_source_that_is_killed(memory: bytes, tmp_path: Path) -> None:
    """Its guard starts it again, and it opens the object again."""
    socket, cache = tmp_path / "owner", ("--cache", str(tmp_path / "cache"))
    options = ("--uffd-socket", str(socket), *cache, "--max-bandwidth", "5M")
    async with run(pull_command(URI, *options, lane="native", guard=True)) as pulling:
        await pulling.event("waiting")
        workload = ("--size", str(SIZE), "--seed", SEED, "--zero-every", 16)
        async with run_workload(socket, *workload, "--touches", 64, "--wait-complete") as owner:
            while not (await pulling.event("progress"))["bytes"]:
                pass
            os.kill(pulling.pid, signal.SIGKILL)
            await pulling.event("complete")
            await check_verified(owner, pages=SIZE // PAGE)


async def test_an_object_that_is_replaced_ends_both_sides(memory: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    async with run_server(URI) as (server, uri):
        upload(memory[::-1])
        async with run(pull_command(uri, "--into", str(out), lane="native")) as pulling:
            assert await pulling.wait() == 4
            assert await server.wait() == 4
            for process in (pulling, server):
                assert f"{URI} is another object than before" in process.stderr
                assert len(process.stderr.splitlines()) == 1
    assert not out.exists()


async def test_google_cloud_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: None
) -> None:
    """Read, and another content under the same name is noticed."""
    content = os.urandom(5 * CHUNK // 2 // PAGE * PAGE)
    with gcs_server(tmp_path) as (url, environment):

        def put(content: bytes) -> None:
            where = f"{url}/upload/storage/v1/b/bucket/o?uploadType=media&name=snapshots/mem"
            headers = {"Content-Type": "application/octet-stream"}
            urlopen(Request(where, content, headers), timeout=60).close()

        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        put(content)
        for is_replaced in (False, True):
            with open_object("gs://bucket/snapshots/mem", deadline=60) as remote:
                await remote.fetch(0, PAGE, Class.DEMAND)
                if is_replaced:
                    put(content[::-1])
                    with pytest.raises(pagenet.SourceLost, match="another object than before"):
                        await remote.fetch(len(content) - PAGE, PAGE, Class.DEMAND)
                else:
                    await remote.fetch(0, len(content), Class.BACKGROUND)
                    assert os.pread(remote.fd, len(content), 0) == content


async def refused(*args: str, seconds: float = 30) -> tuple[int, str]:
    """Exit code and the one line of a source that does not begin."""
    command = serve_command(*args, "--listen", "tcp://127.0.0.1:0", "--store-timeout", "0.5")
    with trio.fail_after(seconds):
        async with run(command) as server:
            code = await server.wait()
            (line,) = server.stderr.splitlines()
            return code, line


@pytest.mark.usefixtures("memory")
async def test_objects_that_cannot_be_served() -> None:
    code, line = await refused("s3://bucket/none")
    assert (code, "s3://bucket/none: there is no such object" in line) == (2, True), line
    code, line = await refused("s3://none/mem")
    assert (code, "s3://none/mem: " in line) == (2, True), line
    code, line = await refused("http://127.0.0.1:1/mem")
    assert (code, "has not answered for 0.5 s" in line) == (3, True), line


async def test_cache_size_is_of_a_cache() -> None:
    code, line = await refused("s3://bucket/none", "--cache-size", "1G")
    assert (code, "--cache" in line) == (2, True)


async def test_without_obstore_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "obstore.py").write_text("raise ImportError('none')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = serve_command("s3://bucket/mem", "--listen", "tcp://127.0.0.1:0")
    async with run(command, env=environment) as server:
        assert await server.wait() == 7
        assert "pip install 'pagenet[objects]'" in server.stderr
        assert len(server.stderr.splitlines()) == 1


async def test_obstore_is_not_imported_where_no_object_is_served() -> None:
    code = (
        "import sys, pagenet, pagenet.cli.serve;"
        "print({'obstore', 'asyncio', 'pagenet.objects'} & set(sys.modules))"
    )
    async with run([sys.executable, "-c", code]) as process:
        assert await process.rest() == ["set()"]


async def test_ctrl_c_while_a_store_is_waited_for() -> None:
    with http_store(bytes(PAGE)) as store:
        store.lie = lambda _, answer: setattr(answer, "status", 503)
        async with run(serve_command(store.url, "--listen", "tcp://127.0.0.1:0")) as server:
            while not store.asked:  # noqa: ASYNC110
                await trio.sleep(0.001)
            server.send_signal(signal.SIGINT)
            with trio.fail_after(10):
                assert await server.wait() == 130


async def test_a_process_that_ends_right_after_a_request(s3: None) -> None:
    """It ends in good order, though threads of obstore have just done something."""
    code = (
        "from pagenet.objects import open_store\n"
        "with open_store('s3://bucket', 60) as store:\n"
        "    store.write('last', bytes(1000))"
    )
    ended: list[int] = []

    async def end() -> None:
        async with run([sys.executable, "-c", code]) as process:
            ended.append(await process.wait())

    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(end)
    assert ended == [0] * 12


# ---- what it costs ----


@pytest.mark.soak
async def test_a_page_in_the_store_beside_a_bare_get(
    memory: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first touch of a chunk's first and last page, beside obstore's own GET of a chunk. In
    turns, over two lanes and a socket of loopback."""
    bare: list[float] = []
    touched: dict[int, list[float]] = {0: [], CHUNK - PAGE: []}
    store: ObjectStore = obstore.store.from_url("s3://bucket", client_options={"allow_http": True})
    count = 64

    def get(chunk: int) -> None:
        obstore.get_range(store, "snapshots/mem", start=chunk * CHUNK, length=CHUNK)

    upload(os.urandom(count * CHUNK))
    for offset, times in touched.items():
        own = pagenet.OwnMemory("memfd")
        async with (
            pagenet.serve(URI, listen="tcp://127.0.0.1:0") as server,
            pagenet.pull(server.uri, own, background="off", prefetch=(0, 0)),
        ):
            for chunk in range(count):
                began = time.perf_counter()
                await trio.to_thread.run_sync(get, chunk)
                bare.append(time.perf_counter() - began)
                began = time.perf_counter()
                await own.read(chunk * CHUNK + offset, PAGE)
                times.append(time.perf_counter() - began)
        own.close()
    with capsys.disabled():
        print(f"\nbare GET of a chunk: p50 {median(bare) * 1e3:.2f} ms")
        for offset, times in touched.items():
            ratio = median(times) / median(bare)
            print(f"touch at byte {offset}: p50 {median(times) * 1e3:.2f} ms, {ratio:.2f}x")
