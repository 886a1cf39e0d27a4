"""What goes wrong: the same errors as over TCP, soon, with no wrong page; and the source goes on serving others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from forked import Server, forked_workload
from processes import write_pattern

from pagenet import PagenetError, RemoteProtocolError, SourceLost, UffdSocket, pull, serve
from pagenet.rdma import _memory
from pagenet.rdma._memory import RegisteredMemory
from pagenet.rdma._wire import Answer, Endpoint, encode_key, encode_word
from pagenet.region import Run

MIB = 1 << 20
PAGE = 4096
SIZE = 3 * MIB
#: more than is asked for ahead
LARGE = 16 * MIB
LISTEN = "rdma://127.0.0.1:0"
LANES = ["native", "trio"]
#: what an error may take that the network must be asked about; an emulated processor is given some more
SOON = 10.0


@pytest.fixture
def source(request: pytest.FixtureRequest) -> Iterator[str]:
    path = Path("/dev/shm/source")
    yield str(write_pattern(path, LARGE if "shrinks" in request.node.name else SIZE))
    path.unlink()


async def fail(
    uri: str, path: Path, lane: str, cause: Callable[[], object] | None = None, size: int = SIZE
) -> tuple[PagenetError, float]:
    """What a transfer ends with, and how many seconds after ``cause``, which is called in the midst of it."""
    began = time.monotonic()

    async def bring() -> None:
        nonlocal began
        async with pull(uri, owner, lane=lane, max_bandwidth=MIB) as transfer:
            if cause is not None:
                while transfer.statistics().done < 64:  # noqa: ASYNC110 - nothing tells of single pages
                    await trio.sleep(0.01)
                began = time.monotonic()
                cause()
            await transfer.wait_complete()

    owner = UffdSocket(path)
    await owner.listen()
    try:
        async with forked_workload(path, "--wait-complete", "--size", size, "--memory", "memfd"):
            with trio.fail_after(60):
                try:
                    await bring()
                except PagenetError as error:
                    return error, time.monotonic() - began
    finally:
        owner.close()
    raise AssertionError("it did not fail")


async def check_still_serving(uri: str, path: Path) -> None:
    owner = UffdSocket(path)
    await owner.listen()
    async with forked_workload(path, "--wait-complete", "--size", SIZE) as workload:
        async with pull(uri, owner) as transfer:
            await transfer.wait_complete()
        await workload.verified()
    owner.close()


@pytest.fixture
def server(source: str) -> Iterator[Server]:
    server = Server(source)
    yield server
    server.close()


@pytest.mark.parametrize("lane", LANES)
async def test_source_killed(lane: str, server: Server, tmp_path: Path) -> None:
    error, took = await fail(server.uri, tmp_path / "uffd.sock", lane, lambda: server.kill(signal.SIGKILL))
    assert isinstance(error, SourceLost)
    assert "the source" in str(error)
    assert took < SOON


@contextmanager
def instead(name: str, replacement: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RegisteredMemory, name, replacement)
        yield


@pytest.mark.parametrize("lane", LANES)
async def test_wrong_key(lane: str, source: str, tmp_path: Path) -> None:
    take = RegisteredMemory.take

    async def wrong(self: RegisteredMemory, run: Run, held: int) -> tuple[bytes, bool]:
        _, has_key = await take(self, run, held)
        return encode_key(run, 1 << 40, 0xBAD, b""), has_key

    async with serve(source, listen=LISTEN) as server:
        with instead("take", wrong):
            error, took = await fail(server.uri, tmp_path / "uffd.sock", lane)
        assert isinstance(error, SourceLost)
        assert "READ of its memory failed" in str(error)
        assert took < SOON
        await check_still_serving(server.uri, tmp_path / "uffd.sock")


@pytest.mark.parametrize("lane", LANES)
async def test_chunk_deregistered(lane: str, source: str, tmp_path: Path) -> None:
    take = RegisteredMemory.take

    async def too_short(self: RegisteredMemory, run: Run, held: int) -> tuple[bytes, bool]:
        answer, has_key = await take(self, run, held)
        if run.first:
            self._chunks[run].close()
        return answer, has_key

    async with serve(source, listen=LISTEN) as server:
        with instead("take", too_short):
            error, _ = await fail(server.uri, tmp_path / "uffd.sock", lane)
        assert isinstance(error, SourceLost)
        assert "READ of its memory failed" in str(error)
        await check_still_serving(server.uri, tmp_path / "uffd.sock")


@pytest.mark.parametrize("lane", LANES)
async def test_host_gone_without_a_word(lane: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing answers READs, and the connection beside them is none the wiser."""
    queue_pair = _memory._queue_pair

    @contextmanager
    def elsewhere(*args: Any) -> Iterator[Endpoint]:
        with queue_pair(*args) as ours:
            yield replace(ours, number=ours.number ^ 1 << 20)

    async with serve(source, listen=LISTEN) as server:
        with monkeypatch.context() as patch:
            patch.setattr(_memory, "_queue_pair", elsewhere)
            error, took = await fail(server.uri, tmp_path / "uffd.sock", lane)
        assert isinstance(error, SourceLost)
        assert took < SOON


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (encode_key(Run(256, 256), 4096, 1, b""), "was not asked for"),
        (encode_key(Run(0, 255), 4096, 1, b""), "was not asked for"),
        (encode_key(Run(1 << 40, 256), 4096, 1, b""), "is for a page that there is not"),
        (encode_word(Answer.REFUSED, Run(0, 256), "text"), "makes no sense"),
    ],
    ids=["another chunk", "a part", "no page", "a refusal with a text"],
)
async def test_senseless_answers(answer: bytes, complaint: str, source: str, tmp_path: Path) -> None:
    async def senseless(self: RegisteredMemory, run: Run, held: int) -> tuple[bytes, bool]:
        return answer, False

    async with serve(source, listen=LISTEN) as server:
        with instead("take", senseless):
            error, _ = await fail(server.uri, tmp_path / "uffd.sock", "native")
        assert isinstance(error, RemoteProtocolError)
        assert complaint in str(error)


@pytest.mark.parametrize("lane", LANES)
async def test_source_that_shrinks(lane: str, server: Server, source: str, tmp_path: Path) -> None:
    """What it has registered can be read still; the next key is refused, and the reason told."""
    error, took = await fail(server.uri, tmp_path / "uffd.sock", lane, lambda: os.truncate(source, PAGE), size=LARGE)
    assert isinstance(error, SourceLost)
    assert "the source" in str(error)
    assert took < SOON
