"""Memory is copied in rounds while its owner writes to it from several threads, and is frozen at a
random moment: every page that the destination then shows is the last version."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator

import pytest
import trio
from processes import HUGE_PAGE, PAGE, huge_pages, skip_without_tracking, wait_in_faults
from written import PATIENCE, Kind, Written, check_frozen, copying, freeze_after

import pagenet
from pagenet import OwnMemory, RemoteProtocolError, SourceLost, UsageError
from pagenet.protocol import TRACKED, Channel, Hello, Paused, Role
from pagenet.residency import State
from pagenet.session import MessageStream, greet
from pagenet.source.precopy import Precopy
from pagenet.transport import LaneKind, dial

LANES: list[LaneKind] = ["native", "trio"]
TRIES = 25


@pytest.fixture(autouse=True)
def kernel_can() -> None:
    skip_without_tracking()


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


@pytest.fixture
def enough_huge_pages() -> Iterator[None]:
    with huge_pages(16):
        yield


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
            limit = choose.choice([None, None, 20 << 20])
            async with copying(written, memory, lane, max_bandwidth=limit) as (rounds, transfer):
                await freeze_after(choose.random() * 0.05, precopy, written, rounds)
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
async def test_order_that_is_asked_for_in_a_round(
    lane: LaneKind, written: Written, memory: OwnMemory
) -> None:
    """It is that of the pages which are left at the freeze."""
    async with copying(written, memory, lane) as (rounds, transfer):
        with trio.fail_after(PATIENCE):
            await rounds.wait_over()
            transfer.set_background("follow")
            await rounds.look()
            await rounds.next()
            await rounds.wait_over()
            assert transfer.background == "linear"
            await rounds.pause()
            await rounds.freeze()
            await transfer.wait_frozen()
        assert transfer.background == "follow"
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
