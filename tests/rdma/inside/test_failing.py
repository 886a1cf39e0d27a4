"""Failures: the same errors as over TCP, soon, with no wrong page; and the source continues to
serve others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import trio
from forked import Server, forked_workload
from processes import write_pattern

from pagenet import PagenetError, RemoteProtocolError, SourceLost, UffdSocket, pull, serve
from pagenet.rdma import _memory, default_path
from pagenet.rdma._constants import RETRIES, TIMEOUT
from pagenet.rdma._memory import RegisteredMemory
from pagenet.rdma._read_lanes import _Buffer, _Device
from pagenet.rdma._wire import Answer, Endpoint, encode_key, encode_word
from pagenet.region import Run
from pagenet.transport import LaneKind

MIB = 1 << 20
PAGE = 4096
SIZE = 3 * MIB
#: more than may be in flight
LARGE = 16 * MIB
LISTEN = "rdma://127.0.0.1:0"
LANES = ["native", "trio"]


@pytest.fixture
def source(request: pytest.FixtureRequest) -> Iterator[str]:
    path = Path("/dev/shm/source")
    yield str(write_pattern(path, LARGE if "shrinks" in request.node.name else SIZE))
    path.unlink()


@dataclass
class Failed:
    """The error that a transfer ends with, and when, on the clock of time.monotonic()."""

    error: PagenetError
    at: float


async def fail(
    uri: str,
    path: Path,
    lane: LaneKind,
    cause: Callable[[], object] | None = None,
    size: int = SIZE,
) -> Failed:
    """Run a transfer in the middle of which ``cause`` is called."""
    at = 0.0

    async def bring() -> None:
        nonlocal at
        async with pull(uri, owner, lane=lane, max_bandwidth=MIB) as transfer:
            try:
                if cause is not None:
                    while transfer.statistics().done < 64:  # noqa: ASYNC110 - nothing tells of single pages
                        await trio.sleep(0.01)
                    cause()
                await transfer.wait_complete()
            finally:
                at = time.monotonic()

    owner = UffdSocket(path)
    await owner.listen()
    try:
        async with forked_workload(path, "--wait-complete", "--size", size, "--memory", "memfd"):
            with trio.fail_after(60):
                try:
                    await bring()
                except PagenetError as error:
                    return Failed(error, at)
    finally:
        owner.close()
    raise AssertionError("it did not fail")


class BareRead:
    """A READ through a queue pair without a peer, beside the transfer under test, on the same busy
    machine. It fails after :data:`RETRIES` retries, which take less than 2 s of the device's own
    time."""

    def __init__(self) -> None:
        self._begin = trio.Event()
        self._began = self._took = inf

    def begin(self) -> None:
        """Post the READ now. Only the first call counts."""
        if not self._begin.is_set():
            self._began = time.monotonic()
            self._begin.set()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        path = default_path()
        with ExitStack() as stack:
            device = _Device(path, stack)
            device.join(replace(device.ours, number=device.ours.number ^ 1 << 20))
            buffer = _Buffer(device.domain, PAGE)
            stack.callback(buffer.close)
            task_status.started()
            await self._begin.wait()
            with pytest.raises(SourceLost, match="does not answer READs"):
                await device.read(buffer.mr, buffer.address, 0, 1, PAGE)
            self._took = time.monotonic() - self._began

    def check_no_later(self, failed: Failed) -> None:
        """Check that the transfer has failed within 1.5 times the time that this READ took to
        fail."""
        assert self._began < failed.at <= self._began + 1.5 * self._took


@asynccontextmanager
async def bare_read() -> AsyncIterator[BareRead]:
    assert (RETRIES + 1) * 4.096e-6 * 2**TIMEOUT < 2
    bare = BareRead()
    async with trio.open_nursery() as nursery:
        await nursery.start(bare.run)
        yield bare
        nursery.cancel_scope.cancel()


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
async def test_source_killed(lane: LaneKind, server: Server, tmp_path: Path) -> None:
    async with bare_read() as bare:

        def kill() -> None:
            server.kill(signal.SIGKILL)
            bare.begin()

        failed = await fail(server.uri, tmp_path / "uffd.sock", lane, kill)
        bare.check_no_later(failed)
    assert isinstance(failed.error, SourceLost)
    assert "the source" in str(failed.error)


@contextmanager
def instead(name: str, replacement: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RegisteredMemory, name, replacement)
        yield


@pytest.mark.parametrize("lane", LANES)
async def test_wrong_key(lane: LaneKind, source: str, tmp_path: Path) -> None:
    take = RegisteredMemory.take

    async def wrong(self: RegisteredMemory, run: Run, held: int) -> tuple[bytes, bool]:
        _, has_key = await take(self, run, held)
        bare.begin()
        return encode_key(run, 1 << 40, 0xBAD, b""), has_key

    async with serve(source, listen=LISTEN, lane="trio") as server:
        async with bare_read() as bare:
            with instead("take", wrong):
                failed = await fail(server.uri, tmp_path / "uffd.sock", lane)
            bare.check_no_later(failed)
        assert isinstance(failed.error, SourceLost)
        assert "READ of its memory failed" in str(failed.error)
        await check_still_serving(server.uri, tmp_path / "uffd.sock")


@pytest.mark.parametrize("lane", LANES)
async def test_chunk_deregistered(lane: LaneKind, source: str, tmp_path: Path) -> None:
    take = RegisteredMemory.take

    async def too_short(self: RegisteredMemory, run: Run, held: int) -> tuple[bytes, bool]:
        answer, has_key = await take(self, run, held)
        if run.first:
            self._chunks[run].close()
        return answer, has_key

    async with serve(source, listen=LISTEN, lane="trio") as server:
        with instead("take", too_short):
            failed = await fail(server.uri, tmp_path / "uffd.sock", lane)
        assert isinstance(failed.error, SourceLost)
        assert "READ of its memory failed" in str(failed.error)
        await check_still_serving(server.uri, tmp_path / "uffd.sock")


@pytest.mark.parametrize("lane", LANES)
async def test_host_gone_without_a_word(
    lane: LaneKind, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No device answers READs, and the connection beside them notices nothing."""
    queue_pair = _memory._queue_pair

    @contextmanager
    def elsewhere(*args: Any) -> Iterator[Endpoint]:
        with queue_pair(*args) as ours:
            yield replace(ours, number=ours.number ^ 1 << 20)

    take = RegisteredMemory.take

    async def taking(self: RegisteredMemory, run: Run, held: int) -> tuple[bytes, bool]:
        bare.begin()
        return await take(self, run, held)

    async with serve(source, listen=LISTEN, lane="trio") as server, bare_read() as bare:
        monkeypatch.setattr(_memory, "_queue_pair", elsewhere)
        with instead("take", taking):
            failed = await fail(server.uri, tmp_path / "uffd.sock", lane)
        bare.check_no_later(failed)
    assert isinstance(failed.error, SourceLost)
    assert str(failed.error).startswith("the source is gone: ")


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
async def test_senseless_answers(
    answer: bytes, complaint: str, source: str, tmp_path: Path
) -> None:
    async def senseless(self: RegisteredMemory, run: Run, held: int) -> tuple[bytes, bool]:
        return answer, False

    async with serve(source, listen=LISTEN, lane="trio") as server:
        with instead("take", senseless):
            failed = await fail(server.uri, tmp_path / "uffd.sock", "native")
        assert isinstance(failed.error, RemoteProtocolError)
        assert complaint in str(failed.error)


@pytest.mark.parametrize("lane", LANES)
async def test_source_that_shrinks(
    lane: LaneKind, server: Server, source: str, tmp_path: Path
) -> None:
    """Memory that the source has registered can still be read. The next key is refused, with the
    reason."""
    failed = await fail(
        server.uri, tmp_path / "uffd.sock", lane, lambda: os.truncate(source, PAGE), size=LARGE
    )
    assert isinstance(failed.error, SourceLost)
    assert "the source" in str(failed.error)
