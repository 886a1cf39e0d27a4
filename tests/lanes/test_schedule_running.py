"""The background is switched, paused, resumed and limited while it runs, on lanes of both kinds."""

from __future__ import annotations

import random
import select
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import pagenet
from pagenet import Transfer, UsageError, _native
from pagenet.residency import State
from pagenet.transport import LaneKind

LANES: list[LaneKind] = ["native", "trio"]
SIZE = 8 << 20
PAGE = 4096


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@asynccontextmanager
async def transfer_of(
    source: Path, lane: LaneKind, background: str, **options: Any
) -> AsyncIterator[tuple[Transfer, pagenet.OwnMemory]]:
    memory = pagenet.OwnMemory("anonymous")
    try:
        async with pagenet.serve(str(source), listen="tcp://127.0.0.1:0") as server:
            plan = pagenet.pull(
                server.uri, memory, lane=lane, background=background, prefetch=(0, 0), **options
            )
            async with plan as transfer:
                yield transfer, memory
    finally:
        memory.close()


async def wait_until(condition: Callable[[], bool], what: str) -> None:
    with trio.move_on_after(20):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)
        return
    pytest.fail(f"in vain: {what}")


async def check(transfer: Transfer, memory: pagenet.OwnMemory, source: Path) -> None:
    with trio.fail_after(30):
        await transfer.wait_complete()
    assert await memory.read(0, SIZE) == source.read_bytes()


def brought(transfer: Transfer) -> int:
    return transfer.statistics().background.pages


@pytest.mark.parametrize("lane", LANES)
async def test_switched_while_it_runs(lane: LaneKind, source: Path) -> None:
    async with transfer_of(source, lane, "off") as (transfer, memory):
        assert transfer.background == "off"
        await memory.read(0, 1)
        transfer.set_background("follow")
        await wait_until(lambda: brought(transfer) > 0, "a switched-on background brings pages")
        for name in ("linear", "hot"):
            transfer.set_background(name)
            assert transfer.background == name
        with pytest.raises(UsageError, match="sideways"):
            transfer.set_background("sideways")
        await check(transfer, memory, source)


@pytest.mark.parametrize("lane", LANES)
async def test_a_schedule_that_takes_over_knows_the_latest_faults(
    lane: LaneKind, source: Path
) -> None:
    async with transfer_of(source, lane, "off") as (transfer, memory):
        page = 1500
        await memory.read(page * PAGE, 1)
        transfer.pause_background()
        # The lane in C reports its faults a little later.
        await wait_until(lambda: len(transfer._background._recent) == 1, "the fault is heard of")
        transfer.set_background("hot")
        transfer.set_max_bandwidth(1 << 20)
        transfer.resume_background()
        await wait_until(lambda: brought(transfer) > 0, "pages come")
        residency = transfer.filling.residency
        first = residency.find(State.RESIDENT, 0)
        assert first is not None
        assert page // 64 * 64 <= first
        transfer.set_max_bandwidth(None)
        await check(transfer, memory, source)


@pytest.mark.parametrize("lane", LANES)
async def test_paused_and_resumed(lane: LaneKind, source: Path) -> None:
    async with transfer_of(source, lane, "linear", max_bandwidth=4 << 20) as (transfer, memory):
        await wait_until(lambda: brought(transfer) > 0, "the background brings pages")
        transfer.pause_background()
        assert transfer.background_paused
        transfer.set_max_bandwidth(None)
        asked = transfer.statistics().background.requests
        await wait_until(
            lambda: transfer.statistics().background.runs >= asked, "what was asked for comes"
        )
        before = brought(transfer)
        # demand goes on, and there is time enough
        for offset in range(SIZE - PAGE, SIZE - 20 * PAGE, -PAGE):
            await memory.read(offset, 1)
        # what a lane in Trio had been given already
        assert brought(transfer) <= before + 4 * (256 << 10) // PAGE
        assert not transfer.statistics().complete
        transfer.resume_background()
        await check(transfer, memory, source)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("lane", LANES)
async def test_the_limit_is_kept_and_changes(lane: LaneKind, lanes: int, source: Path) -> None:
    rate = 2 << 20
    async with transfer_of(source, lane, "hot", max_bandwidth=rate, background_lanes=lanes) as (
        transfer,
        memory,
    ):
        began = time.monotonic()
        await wait_until(lambda: brought(transfer) > 0, "pages come")
        for _ in range(25):
            await trio.sleep(0.02)
            # before the clock is read: it cannot be more than the time allowed for
            asked = brought(transfer) * PAGE
            # a chunk of each lane is asked for before it is paid for
            assert asked <= rate * (time.monotonic() - began + 0.02) + lanes * (256 << 10) + (
                256 << 10
            )
        with pytest.raises(UsageError, match="0 bytes a second"):
            transfer.set_max_bandwidth(0)
        assert transfer.max_bandwidth == rate
        transfer.set_max_bandwidth(None)
        await check(transfer, memory, source)


def test_the_log_of_faults_keeps_order_and_counts_what_it_drops() -> None:
    log = _native.FaultLog()
    try:
        room = log.ROOM
        for page in range(room + 5):
            log.write(page)
        assert log.read() == list(range(room))
        assert log.dropped == 5
        assert log.read() == []  # and from now on the reader sleeps
        watch = select.poll()
        watch.register(log.fd, select.POLLIN)
        assert not watch.poll(0)
        log.write(7)
        assert watch.poll(0)
        assert log.read() == [7]
    finally:
        log.close()


def test_no_wakeup_is_lost_between_reading_and_sleeping() -> None:
    log = _native.FaultLog()
    total = 20_000
    got: list[int] = []

    def write() -> None:
        for page in range(total):
            log.write(page)

    writer = threading.Thread(target=write)
    watch = select.poll()
    watch.register(log.fd, select.POLLIN)
    try:
        writer.start()
        while len(got) + log.dropped < total:
            pages = log.read()
            got += pages
            if not pages:
                assert watch.poll(10_000) or len(got) + log.dropped == total
    finally:
        writer.join()
        log.close()
    assert got == sorted(got)
