"""How fast the background is, and when it begins: on lanes of both kinds, by the machine's clock.
In virtual time: unit/test_pacing.py."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from processes import (
    LANES,
    PAGE,
    check_verified,
    pull,
    pull_command,
    run,
    run_server,
    run_workload,
    write_pattern,
)
from trio.testing import MockClock, wait_all_tasks_blocked

import pagenet
from pagenet import Transfer, UsageError
from pagenet.background.start import Start, parse_start
from pagenet.cli import pull as pull_cli
from pagenet.cli._rates import parse_rate, rate_words

SIZE = 128 << 20
LOOK_EVERY = 0.01  # s


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pattern(tmp_path_factory.mktemp("limits") / "source", SIZE))


@pytest.fixture
def small(tmp_path: Path) -> str:
    return str(write_pattern(tmp_path / "small", 4 << 20))


# ---- rates ----


@pytest.mark.parametrize(("text", "rate"), [
    ("60M", 60_000_000),
    ("60MB", 60_000_000),
    ("1.5G", 1_500_000_000),
    ("1000", 1000),
    ("1", 1),
    ("8k", 8000),
    ("8K", 8000),
    ("64Mi", 64 << 20),
    ("64MiB", 64 << 20),
    ("800Mbit", 100_000_000),
    ("1Gbit", 125_000_000),
    ("8bit", 1),
    ("0.5k", 500),
])  # fmt: skip
def test_rate(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text",
    [
        "", "M", "-1", "0", "0.0", "0.9", "fast", "60 M", "60Mb", "60m", "60T", "1e9", "inf",
        "nan", "5i", "7bit", "1,5M", "60M/s", "\u0661", "9" * 19, "9" * 5000, "1.", ".5M",
    ],
)  # fmt: skip
def test_no_rate(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="is no rate"):
        parse_rate(text)
    with pytest.raises(SystemExit) as caught:
        pull_cli.main(["tcp://127.0.0.1:1", "--into", "f", f"--max-bandwidth={text}"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is no rate" in line


@pytest.mark.parametrize(
    ("rate", "words"),
    [(0, "0 B/s"), (999, "999 B/s"), (1500, "1.5 kB/s"), (6e7, "60.0 MB/s"), (2e9, "2.0 GB/s")],
)
def test_rate_in_words(rate: float, words: str) -> None:
    assert rate_words(rate) == words


# ---- the limit ----


@asynccontextmanager
async def pulled(
    uri: str, lane: str, **options: Any
) -> AsyncIterator[tuple[Transfer, pagenet.OwnMemory]]:
    memory = pagenet.OwnMemory("anonymous")
    try:
        async with pull(
            uri, memory, lane=lane, background="linear", compress="none", **options
        ) as transfer:
            yield transfer, memory
    finally:
        memory.close()


@asynccontextmanager
async def transfer_of(
    source: str, lane: str, **options: Any
) -> AsyncIterator[tuple[Transfer, pagenet.OwnMemory]]:
    async with (
        pagenet.serve(source, listen="tcp://127.0.0.1:0") as server,
        pulled(server.uri, lane, **options) as (transfer, memory),
    ):
        yield transfer, memory


class Allowance:
    """What may have come since ``transfer`` was limited to ``rate``. :meth:`check` is right at any
    moment: the clock is read after the pages were counted, which can only allow more."""

    # s: how much lost time is made up for
    MAKE_UP = 0.05
    # Bytes that lanes had asked for before, and that each may ask for at a time.
    ON_ITS_WAY = 256 << 10

    def __init__(self, transfer: Transfer, rate: int) -> None:
        self._transfer, self.rate = transfer, rate
        self._began, self._before = time.monotonic(), self._pages()

    def _pages(self) -> int:
        return self._transfer.statistics().background.pages

    def check(self) -> int:
        """Check the limit. Returns how many bytes have come."""
        came = (self._pages() - self._before) * PAGE
        assert came <= self.at(self.rate) + self.ON_ITS_WAY
        return came

    def at(self, rate: int) -> float:
        """The allowance if the rate were another."""
        return rate * (time.monotonic() - self._began + self.MAKE_UP)


async def until(is_so: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not is_so():  # noqa: ASYNC110 - nothing tells of single pages
            await trio.sleep(LOOK_EVERY)


@pytest.mark.parametrize(("lane", "lanes"), [("native", 1), ("native", 2), ("trio", 1)])
async def test_kept(lane: str, lanes: int, source: str) -> None:
    """All lanes together keep the limit. That the rate is smooth, and not lower, is checked in
    virtual time."""
    rate = 8_000_000
    async with (
        run_server(source) as (_, uri),
        pulled(uri, lane, max_bandwidth=rate, background_lanes=lanes) as (transfer, _),
    ):
        allowance = Allowance(transfer, rate)
        await until(lambda: allowance.check() >= rate // 2)


@pytest.mark.parametrize("lane", LANES)
async def test_changed_while_it_runs(lane: str, source: str) -> None:
    """A limit five times as high lets more through than the former one, and no more than itself."""
    slow, fast = 1_000_000, 5_000_000
    async with transfer_of(source, lane, max_bandwidth=slow) as (transfer, _):
        allowance = Allowance(transfer, slow)
        await until(lambda: allowance.check() >= slow // 4)
        transfer.set_max_bandwidth(fast)
        faster = Allowance(transfer, fast)
        await until(lambda: faster.check() > 2 * faster.at(slow) + faster.ON_ITS_WAY)
        transfer.set_max_bandwidth(slow)
        slower = Allowance(transfer, slow)
        await until(lambda: slower.check() >= slow // 4)


@pytest.mark.parametrize("lane", LANES)
async def test_a_limit_that_was_next_to_nothing_is_forgotten(lane: str, source: str) -> None:
    """At a byte a second, the page that was asked for last would have been paid for an hour
    later."""
    async with transfer_of(source, lane, max_bandwidth=1) as (transfer, memory):
        await until(lambda: transfer.statistics().background.pages > 0)
        for page in range(
            100
        ):  # demand goes on, which takes time enough for more background, if more came
            await memory.read(SIZE - (page + 1) * PAGE, 1)
        asked = transfer.statistics().background.pages
        assert asked <= 2
        transfer.set_max_bandwidth(200_000_000)
        await until(lambda: transfer.statistics().background.pages >= asked + 100)


@pytest.mark.parametrize("lane", LANES)
async def test_what_is_not_on_the_wire_does_not_count(lane: str, tmp_path: Path) -> None:
    source, rate = tmp_path / "source", 500_000
    words = b"".join(b"%d " % number for number in range(200_000))  # which LZ4 halves, at least
    source.write_bytes(words[: 1 << 20] + bytes(3 << 20))
    async with pagenet.serve(str(source), listen="tcp://127.0.0.1:0") as server:
        memory = pagenet.OwnMemory("anonymous")
        try:
            async with pull(
                server.uri,
                memory,
                lane=lane,
                background="linear",
                compress="lz4",
                max_bandwidth=rate,
            ) as transfer:
                with trio.fail_after(60):
                    await transfer.wait_complete()
                done = transfer.statistics()
        finally:
            memory.close()
    assert done.wire_bytes <= rate * (done.seconds + 0.1)
    assert done.size >= 2 * rate * done.seconds


@pytest.mark.parametrize("lane", LANES)
async def test_demand_is_never_held_up(lane: str, small: str, tmp_path: Path) -> None:
    socket = tmp_path / "owner"
    async with run_server(small) as (_, uri):
        command = pull_command(uri, "--uffd-socket", str(socket), "--max-bandwidth", "1", lane=lane)
        async with run(command) as puller:
            await puller.event("waiting")
            async with run_workload(socket, "--size", 4 << 20) as workload:
                await check_verified(workload)
            complete = await puller.event("complete")
            assert await puller.wait() == 0
    # a page may come before there is a debt, on each side of a change
    assert complete["demand"] >= (4 << 20) // PAGE - 2


# ---- when it begins ----


@pytest.mark.parametrize(("text", "start"), [
    ("after=0", Start()),
    ("after=2.5", Start(after=2.5)),
    ("rate=100", Start(rate=100)),
    ("rate=0.5", Start(rate=0.5)),
])  # fmt: skip
def test_start(text: str, start: Start) -> None:
    assert parse_start(text) == start


@pytest.mark.parametrize(
    "text",
    [
        "",
        "after",
        "after=",
        "after=-1",
        "after=x",
        "after=inf",
        "after=nan",
        "rate=0",
        "rate=-3",
        "soon=1",
        "2",
    ],
)
def test_no_start(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="is neither after=SECONDS nor rate=N"):
        parse_start(text)
    with pytest.raises(SystemExit) as caught:
        pull_cli.main(["tcp://127.0.0.1:1", "--into", "f", f"--start-background={text}"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is neither after=SECONDS nor rate=N" in line


@pytest.mark.parametrize("lane", LANES)
async def test_begins_after_a_while(lane: str, small: str, mock_clock: MockClock) -> None:
    """The clock advances only when the test advances it."""
    async with transfer_of(small, lane, start_background="after=0.3") as (transfer, memory):
        await memory.read(PAGE, 1)  # demand does not wait
        await jump(mock_clock, 0.29)
        assert not transfer.background_begun
        assert transfer.statistics().background.requests == 0
        await jump(mock_clock, 0.02)
        assert transfer.background_begun
        await transfer.wait_complete()
        assert transfer.statistics().demand.pages == 1


async def test_begins_once_the_faults_become_few(small: str, mock_clock: MockClock) -> None:
    async with transfer_of(small, "native", start_background="rate=4") as (transfer, memory):
        for page in range(150):  # ten a second
            await memory.read(page * PAGE, 1)
            await jump(mock_clock, 0.1)
        assert not transfer.background_begun
        assert transfer.statistics().background.pages == 0
        for _ in range(20):  # and none
            await jump(mock_clock, 0.1)
        assert transfer.background_begun
        await transfer.wait_complete()


async def jump(clock: MockClock, seconds: float) -> None:
    """Advance the clock: tasks that sleep until then resume."""
    clock.jump(seconds)
    await wait_all_tasks_blocked()


@pytest.mark.parametrize("lane", LANES)
async def test_begins_when_it_is_told_to(lane: str, small: str) -> None:
    async with transfer_of(small, lane, start_background="after=1000000") as (transfer, _):
        transfer.pause_background()
        transfer.resume_background()
        assert not transfer.background_begun
        transfer.begin_background()
        assert transfer.background_begun
        with trio.fail_after(20):
            await transfer.wait_complete()
