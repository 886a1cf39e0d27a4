"""What the user may choose, and change while pages come, over RDMA: on lanes of both kinds, with
every byte right."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from combinations import check_moves, drawn
from forked import Command, run_workload
from processes import write_pattern

import pagenet
from pagenet import IntoFile, OwnMemory, Transfer, TransferStatistics, UsageError
from pagenet.background.recording import load_recording
from pagenet.cli import ctl
from pagenet.cli.pull import main as pull
from pagenet.cli.serve import main as serve
from pagenet.residency import State

MIB = 1 << 20
PAGE = 4096
SIZE = 2 * MIB
LISTEN = "rdma://127.0.0.1:0"
LANES = ["native", "trio"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_pattern(tmp_path / "source", SIZE)


@asynccontextmanager
async def transfer_of(
    source: Path, lane: str, **options: Any
) -> AsyncIterator[tuple[Transfer, OwnMemory]]:
    memory = OwnMemory(options.pop("memory", "memfd"))
    try:
        async with pagenet.serve(str(source), listen=LISTEN) as server:
            chosen: Any = {"lane": lane, "prefetch": (0, 0), **options}
            async with pagenet.pull(server.uri, memory, **chosen) as transfer:
                yield transfer, memory
    finally:
        memory.close()


async def until(transfer: Transfer, condition: Callable[[TransferStatistics], bool]) -> None:
    with trio.fail_after(60):
        while not condition(transfer.statistics()):  # noqa: ASYNC110 - nothing tells of single pages
            await trio.sleep(0.005)


def done_more_than(pages: int, now: TransferStatistics) -> bool:
    return now.done > pages


async def check(transfer: Transfer, memory: OwnMemory, source: Path) -> None:
    with trio.fail_after(60):
        await transfer.wait_complete()
    assert await memory.read(0, SIZE) == source.read_bytes()


# ---- orders and limits ----


@pytest.mark.parametrize("lane", LANES)
async def test_recorded_and_replayed(lane: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "touches"
    pages = random.Random(2).sample(range(SIZE // PAGE), 30)
    async with transfer_of(source, lane, background="off", record=path) as (transfer, memory):
        for page in pages:
            await memory.read(page * PAGE, 1)
        # the thread that reads goes on before its page is counted
        await until(transfer, partial(done_more_than, len(pages) - 1))
        assert transfer.statistics().done == len(pages)
        for name in ("follow", "linear"):
            transfer.set_background(name)
        await check(transfer, memory, source)
    assert list(load_recording(path).order) == pages
    async with transfer_of(source, lane, background=f"recorded={path}", max_bandwidth=1) as (
        transfer,
        memory,
    ):
        for step in range(8):  # one page, until a change of the limit lets the next one through
            await until(transfer, partial(done_more_than, step))
            transfer.set_max_bandwidth(1)
        done = transfer.statistics().done
        came = [transfer.filling.residency.state(page) is State.RESIDENT for page in pages]
        assert done <= came.count(True) < len(pages)
        assert came == sorted(came, reverse=True)
        transfer.set_max_bandwidth(None)
        await check(transfer, memory, source)


@pytest.mark.parametrize("lane", LANES)
async def test_hot_follows_the_faults_within_the_limit(lane: str, source: Path) -> None:
    """And a page that a thread waits for is not delayed by the limit."""
    rate, page = MIB // 2, 300
    async with transfer_of(source, lane, start_background="after=1000000", max_bandwidth=rate) as (
        transfer,
        memory,
    ):
        await memory.read(page * PAGE, 1)
        # The lane in C reports its faults a little later.
        with trio.fail_after(60):
            while not transfer._background._recent:  # noqa: ASYNC110
                await trio.sleep(0.005)
        began = time.monotonic()
        transfer.begin_background()
        await until(transfer, lambda now: now.background.pages > 0)
        first = transfer.filling.residency.find(State.RESIDENT, 0)
        assert first is not None
        assert page // 64 * 64 <= first
        for _ in range(100):
            await memory.read((transfer.statistics().done * 7 + 3) % (SIZE // PAGE) * PAGE, 1)
            # before the clock is read: it cannot be more than the time allowed for, and a chunk
            # that is paid for later
            asked = transfer.statistics().background.pages * PAGE
            assert asked <= rate * (time.monotonic() - began + 0.02) + (256 << 10)
        transfer.set_max_bandwidth(None)
        await check(transfer, memory, source)


@pytest.mark.parametrize("lane", LANES)
async def test_prefetch_auto(lane: str, source: Path) -> None:
    async with transfer_of(source, lane, background="off", prefetch=None) as (transfer, memory):
        assert await memory.read(0, SIZE) == source.read_bytes()
        await check(transfer, memory, source)
        now = transfer.statistics()
    assert now.prefetch.pages > now.demand.pages, "one page after the other is what it is for"


async def test_nothing_is_compressed(source: Path, tmp_path: Path) -> None:
    async with pagenet.serve(str(source), listen=LISTEN) as server:
        with pytest.raises(UsageError, match="leave --compress lz4 out"):
            async with pagenet.pull(server.uri, IntoFile(tmp_path / "copy"), compress="lz4"):
                raise AssertionError("not reached")


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 20))]
)
@pytest.mark.parametrize("memory", ["anonymous", "memfd"])
@pytest.mark.parametrize("lane", LANES)
async def test_drawn(lane: str, memory: str, seed: int, tmp_path: Path) -> None:
    """As tests/process/test_combinations.py, without what RDMA does not have."""
    number = 1000 + 10 * seed + 2 * LANES.index(lane) + (memory == "memfd")
    only = {
        "transport": "rdma",
        "lane": lane,
        "memory": memory,
        "background_lanes": 1,
        "compress": "auto",
    }
    await check_moves(drawn(number) | only, number, tmp_path)


# ---- pagenet-ctl ----


def pull_into_owner(uri: str, socket: Path, path: Path, lane: str) -> Command:
    options = ("--start-background", "after=1000000", "--lane", lane, "--control", path, "--json")
    return Command(pull, uri, "--uffd-socket", socket, *options)


def workload(socket: Path) -> Command:
    return Command(
        run_workload, "--socket", socket, "--size", SIZE, "--order", "none", "--wait-complete"
    )


@pytest.mark.parametrize("lane", LANES)
def test_ctl(lane: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, socket = tmp_path / "ctl", tmp_path / "uffd"

    def told(*arguments: str) -> dict[str, Any]:
        capfd.readouterr()
        assert ctl.main([str(path), *arguments, "--json"]) == 0
        answer: dict[str, Any] = json.loads(capfd.readouterr().out)
        return answer

    with Command(serve, source, "--listen", LISTEN, "--json") as server:
        uri = server.event("listening")["uri"]
        with pull_into_owner(uri, socket, path, lane) as pulling:
            pulling.event("waiting")
            with workload(socket):
                pulling.event("owner")
                told("stop")
                assert pulling.wait() == 128 + signal.SIGTERM
        with pull_into_owner(uri, socket, path, lane) as pulling:
            pulling.event("waiting")
            with workload(socket) as owner:
                pulling.event("owner")
                status = told("status")
                assert "rdma by rxe0" in status["lane"]
                assert (status["state"], status["begun"], status["pages_resident"]) == (
                    "running",
                    False,
                    0,
                )
                assert told("pause")["paused"] is True
                assert told("schedule", "linear")["schedule"] == "linear"
                assert told("bandwidth", "50M")["max_bandwidth"] == 50_000_000
                assert told("prefetch", "8,8")["prefetch"] == [8, 8]
                assert told("status")["pages_resident"] == 0
                resumed = told("resume")
                assert (resumed["begun"], resumed["paused"]) == (True, False)
                assert owner.event("verified")["bad"] == 0
            assert pulling.wait() == 0
