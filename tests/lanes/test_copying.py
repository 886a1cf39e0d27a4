"""Memory is copied in rounds while its owner writes to it from several threads, and is frozen at a
random moment: every page that the destination then shows is the last version."""

from __future__ import annotations

import ctypes
import os
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
import trio
from processes import HUGE_PAGE, PAGE, huge_pages, skip_without_tracking, wait_in_faults

import pagenet
from pagenet import (
    Block,
    OwnMemory,
    Region,
    RemoteProtocolError,
    SourceLost,
    Transfer,
    UsageError,
    WriteTracker,
    _native,
)
from pagenet.nurseries import running_beside
from pagenet.protocol import TRACKED, Channel, Hello, Paused, Role
from pagenet.residency import State
from pagenet.session import MessageStream, greet
from pagenet.source.precopy import Precopy
from pagenet.source.rounds import Rounds
from pagenet.transport import LaneKind, dial
from pagenet.uffd import Mapping

Kind = Literal["memfd", "hugetlb"]
LANES: list[LaneKind] = ["native", "trio"]
WRITERS = 3
PATIENCE = 30.0
TRIES = 25


@pytest.fixture(autouse=True)
def kernel_can() -> None:
    skip_without_tracking()


class Written:
    """Shared memory that threads of this process write to, and a tracker of it."""

    def __init__(self, kind: Kind, size: int, seed: int) -> None:
        flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB if kind == "hugetlb" else 0)
        self.page_size = HUGE_PAGE if kind == "hugetlb" else PAGE
        self.fd, self.size, self._seed = os.memfd_create("written", flags), size, seed
        os.ftruncate(self.fd, size)
        self._mapped = _native.Mapped(size, self.fd, alignment=self.page_size)
        self.address = self._mapped.address
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(number,)) for number in range(WRITERS)
        ]

    @property
    def spec(self) -> str:
        return f"/proc/self/fd/{self.fd}"

    def track(self) -> WriteTracker:
        mapping = Mapping(self.address, self.size, 0, self.page_size)
        return WriteTracker(os.getpid(), [mapping], Region([Block("x", self.size, PAGE)]))

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def _write(self, number: int) -> None:
        """Write parts of pages, most of them in a few; zeros now and then."""
        choose = random.Random(self._seed * WRITERS + number)
        pages = self.size // PAGE
        while not self._stop.is_set():
            hot = choose.random() < 0.7
            page = choose.randrange(max(1, pages // 16) if hot else pages)
            whole = choose.random() < 0.1
            at, size = (0, PAGE) if whole else (choose.randrange(PAGE - 64), 64)
            byte = choose.randrange(256) if choose.random() < 0.8 else 0
            ctypes.memset(self.address + page * PAGE + at, byte, size)

    def freeze(self) -> None:
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def content(self) -> bytes:
        return ctypes.string_at(self.address, self.size)

    def close(self) -> None:
        self.freeze()
        self._mapped.close()
        os.close(self.fd)


@asynccontextmanager
async def copying(
    written: Written, memory: OwnMemory, lane: LaneKind, **options: Any
) -> AsyncIterator[tuple[Rounds, Transfer]]:
    """A transfer of memory that is being written."""
    tracker = await trio.to_thread.run_sync(written.track)
    try:
        async with pagenet.serve(
            written.spec, listen="tcp://127.0.0.1:0", lane=lane, tracked=tracker
        ) as server:
            pulled = pagenet.pull(server.uri, memory, lane=lane, **options)
            async with pulled as transfer:
                rounds = await server.wait_rounds()
                assert rounds is not None
                yield rounds, transfer
    finally:
        tracker.close()


@pytest.fixture
def written() -> Iterator[Written]:
    made = Written("memfd", 64 * PAGE, 0)
    yield made
    made.close()


@pytest.fixture
def memory() -> Iterator[OwnMemory]:
    made = OwnMemory("memfd")
    yield made
    made.close()


async def check_frozen(written: Written, memory: OwnMemory, transfer: Transfer) -> None:
    """Read all of the memory at once, while it lacks what is stale, and once more in the end."""
    with trio.fail_after(PATIENCE):
        await transfer.wait_frozen()
        assert await memory.read(0, written.size) == written.content()
        await transfer.wait_complete()
    assert await memory.read(0, written.size) == written.content()
    statistics = transfer.statistics()
    assert statistics.complete
    by_class = (statistics.demand, statistics.prefetch, statistics.background)
    assert sum(each.pages for each in by_class) == statistics.pages


@pytest.fixture
def enough_huge_pages() -> Iterator[None]:
    with huge_pages(16):
        yield


async def switch_after(precopy: Precopy, seconds: float) -> None:
    await trio.sleep(seconds)
    precopy.switch()


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("to", ["memfd", "hugetlb"])
@pytest.mark.parametrize("from_", ["memfd", "hugetlb"])
async def test_random_moments(
    from_: Kind, to: Kind, lane: LaneKind, request: pytest.FixtureRequest
) -> None:
    """``TRIES`` transfers of each kind, so 200 in all."""
    if "hugetlb" in (from_, to):
        request.getfixturevalue("enough_huge_pages")
    for seed in range(TRIES):
        choose = random.Random(seed)
        unit = HUGE_PAGE if "hugetlb" in (from_, to) else PAGE
        size = choose.randint(1, 3) * unit if unit > PAGE else choose.randint(1, 1500) * PAGE
        precopy = Precopy(choose.choice(["auto", 0, 1, 2, 3, 5]))
        written, memory = Written(from_, size, seed), OwnMemory(to)
        try:
            written.begin()
            limit = choose.choice([None, None, 20 << 20])
            async with copying(written, memory, lane, max_bandwidth=limit) as (rounds, transfer):
                with trio.fail_after(PATIENCE):
                    async with running_beside(switch_after, precopy, choose.random() * 0.05):
                        await precopy.run(rounds, lambda *_, **__: None)
                    await rounds.pause()
                    await trio.to_thread.run_sync(written.freeze)
                    await rounds.freeze()
                await check_frozen(written, memory, transfer)
        finally:
            written.close()
            memory.close()


@pytest.mark.parametrize("lane", LANES)
async def test_faults_wait_for_the_freeze(lane: LaneKind) -> None:
    """Threads that touch memory too early, before a page has come or after that, wait, and get the
    last version."""
    written, memory = Written("memfd", 64 * PAGE, 0), OwnMemory("memfd")
    got: dict[int, bytes] = {}
    try:
        ctypes.memset(written.address, 1, written.size)
        async with (
            copying(written, memory, lane) as (rounds, transfer),
            trio.open_nursery() as tasks,
        ):

            async def touch(page: int) -> None:
                got[page] = await memory.read(page * PAGE, PAGE)

            tasks.start_soon(touch, 0)
            with trio.fail_after(PATIENCE):
                await rounds.wait_over()
                assert transfer.filling.residency.state(1) is State.COPIED
                tasks.start_soon(touch, 1)
                await wait_in_faults(os.getpid(), 2)
            assert transfer.round == 1
            ctypes.memset(written.address, 2, 2 * PAGE)
            assert not got
            await rounds.pause()
            assert await rounds.freeze() == 2
            await check_frozen(written, memory, transfer)
            assert transfer.round is None
        assert got == {0: b"\2" * PAGE, 1: b"\2" * PAGE}
    finally:
        written.close()
        memory.close()


@pytest.mark.parametrize("lane", LANES)
async def test_hot_pages_wait(lane: LaneKind, written: Written, memory: OwnMemory) -> None:
    """A page that was written in two rounds, one after the other, is not sent in the next."""
    async with copying(written, memory, lane) as (rounds, transfer):
        for number, (count, left) in enumerate([(64, 2), (2, 1), (0, 1), (1, 0)], 1):
            with trio.fail_after(PATIENCE):
                await rounds.wait_over()
            if number <= 2:
                ctypes.memset(written.address + 3 * PAGE, number, PAGE)
            if number == 1:
                ctypes.memset(written.address + 5 * PAGE, number, PAGE)
            over = await rounds.look()
            assert (over.number, over.pages, over.left) == (number, count, left)
            if number < 4:
                await rounds.next()
        ctypes.memset(written.address + 7 * PAGE, 1, PAGE)
        await rounds.pause()
        assert await rounds.freeze() == 1
        await check_frozen(written, memory, transfer)


@pytest.mark.parametrize("lane", LANES)
async def test_hot_page_is_named_in_the_end(
    lane: LaneKind, written: Written, memory: OwnMemory
) -> None:
    async with copying(written, memory, lane) as (rounds, transfer):
        for number in (1, 2):
            with trio.fail_after(PATIENCE):
                await rounds.wait_over()
            ctypes.memset(written.address + 3 * PAGE, number, PAGE)
            await rounds.look()
            await rounds.next()
        with trio.fail_after(PATIENCE):
            await rounds.wait_over()
        assert await rounds.freeze() == 1
        await check_frozen(written, memory, transfer)


async def test_private_memory_is_refused() -> None:
    written, memory = Written("memfd", 64 * PAGE, 0), OwnMemory("anonymous")
    try:
        with pytest.raises(UsageError, match="cannot take a page twice"):
            async with copying(written, memory, "native"):
                raise AssertionError("not reached")
    finally:
        written.close()
        memory.close()


async def leaving_source(uri: str, memory: OwnMemory, leave: trio.Event) -> None:
    async with pagenet.pull(uri, memory, max_bandwidth=1 << 20) as transfer:
        leave.set()
        with trio.fail_after(PATIENCE):
            await transfer.wait_complete()


async def test_source_killed_in_a_round() -> None:
    """Nothing was shown, and nothing is complete."""
    written, memory = Written("memfd", 512 * PAGE, 0), OwnMemory("memfd")
    tracker = written.track()
    leave = trio.Event()
    try:
        async with trio.open_nursery() as nursery:
            uris: list[str] = []
            there = trio.Event()

            async def serve() -> None:
                async with pagenet.serve(
                    written.spec, listen="tcp://127.0.0.1:0", tracked=tracker
                ) as server:
                    uris.append(server.uri)
                    there.set()
                    await leave.wait()

            nursery.start_soon(serve)
            await there.wait()
            with pytest.raises(SourceLost):
                await leaving_source(uris[0], memory, leave)
    finally:
        tracker.close()
        written.close()
        memory.close()


@pytest.mark.parametrize(
    ("features", "says"), [(frozenset(), "bring it up to date"), (frozenset({TRACKED}), "")]
)
async def test_destination_of_another_release(features: frozenset[str], says: str) -> None:
    written = Written("memfd", 64 * PAGE, 0)
    tracker = written.track()
    try:
        async with pagenet.serve(
            written.spec, listen="tcp://127.0.0.1:0", tracked=tracker
        ) as server:
            connection = await dial(server.uri)
            stream = MessageStream(connection)
            ours = Hello(Role.DESTINATION, Channel.CONTROL, features=features)
            if says:
                with pytest.raises(RemoteProtocolError, match=says):
                    await greet(stream, ours)
            else:
                assert TRACKED in (await greet(stream, ours)).features
                await stream.send(Paused(2, 0))  # round 1 is not over
                told = await stream.receive()
                assert "ends round 2" in getattr(told, "text", "")
            connection.close()
    finally:
        tracker.close()
        written.close()
