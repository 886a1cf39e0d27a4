"""How fast the background is, and when it begins, for lanes in Trio. In virtual time: nothing here
depends on how fast the machine is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from pagenet import UsageError
from pagenet.background.pacing import CATCH_UP, MAKE_UP, PEAK, TURN, Background
from pagenet.background.start import Start, begin_background

PAGE = 4096
Asked = list[tuple[float, int]]


def never() -> float:
    return 0.0


async def ask(background: Background, seconds: float, pause: Callable[[], float] = never) -> Asked:
    """What a lane asks for within ``seconds``: when (s), and how much (bytes). ``pause``: how long
    it gets no processor before a request."""
    asked: Asked = []
    with trio.move_on_after(seconds):
        while True:
            await background.wait_turn()
            await trio.sleep(pause())
            size = max(PAGE, background.turn_bytes // PAGE * PAGE)
            asked.append((trio.current_time(), size))
            background.pay(size)
    return asked


def total(asked: Asked) -> int:
    return sum(size for _, size in asked)


class Lost:
    """A lane's pauses: ``length`` once in each ``every`` seconds."""

    def __init__(self, length: float, every: float) -> None:
        self._length, self._every = length, every
        self._next = 0.0

    def __call__(self) -> float:
        if trio.current_time() < self._next:
            return 0.0
        self._next = trio.current_time() + self._every
        return self._length


@pytest.mark.parametrize("lost", [0.0, 0.02], ids=["on time", "20 ms lost every 100"])
async def test_rate_is_kept_smoothly(lost: float, autojump_clock: MockClock) -> None:
    """A lane that gets no processor for a while makes up for it, and no 10 ms see twice the
    rate."""
    rate = 8_000_000
    background = Background(None)
    background.set_max_bandwidth(rate)
    asked = await ask(background, 2.0, Lost(lost, 0.1))
    # A lane begins as if it had missed as much as may be made up for.
    steady = [(at, size) for at, size in asked if at >= MAKE_UP / (PEAK - 1)]
    assert 0.98 <= total(steady) / (rate * (2.0 - steady[0][0])) <= 1.02
    for start, _ in asked:
        within = sum(size for at, size in asked if start <= at < start + 0.01)
        assert within <= 2 * rate * 0.01


async def test_a_long_pause_is_not_made_up_for(autojump_clock: MockClock) -> None:
    rate = 8_000_000
    background = Background(None)
    background.set_max_bandwidth(rate)
    await ask(background, 0.1)
    await trio.sleep(10)
    began = trio.current_time()
    asked = await ask(background, 0.5)
    assert total(asked) <= 1.1 * rate * 0.5 + rate * 0.05
    at_once = sum(size for at, size in asked if at == began)
    assert at_once <= rate * (CATCH_UP * PEAK + TURN) + PAGE


async def test_rate_changes_while_it_runs(autojump_clock: MockClock) -> None:
    background = Background(None)
    background.set_max_bandwidth(4_000_000)
    slow = await ask(background, 1.0)
    background.set_max_bandwidth(20_000_000)
    fast = await ask(background, 1.0)
    assert total(fast) == pytest.approx(5 * total(slow), rel=0.03)


async def test_a_rate_that_was_next_to_nothing_is_forgotten(autojump_clock: MockClock) -> None:
    """At a byte a second, the page that was asked for last would have been paid for an hour later.
    A lane that waits for that goes on at once."""
    background = Background(None)
    background.set_max_bandwidth(1)
    asked: list[Asked] = []

    async def ask_for_a_while() -> None:
        asked.append(await ask(background, 101.0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_for_a_while)
        await trio.sleep(100)
        background.set_max_bandwidth(200_000_000)
        changed = trio.current_time()
    before = [at for at, _ in asked[0] if at < changed]
    assert len(before) == 1
    assert asked[0][1][0] == changed


async def test_what_is_not_on_the_wire_does_not_count(autojump_clock: MockClock) -> None:
    """Half of each request comes back, as it does if pages compress well."""
    rate = 8_000_000
    background = Background(None)
    background.set_max_bandwidth(rate)
    size = 0
    with trio.move_on_after(1.0):
        while True:
            await background.wait_turn()
            background.pay(4 * PAGE)
            background.refund(2 * PAGE)
            size += 4 * PAGE
    assert size == pytest.approx(2 * rate * (1.0 + MAKE_UP), rel=0.01)


async def test_no_limit_waits_for_nothing(autojump_clock: MockClock) -> None:
    background = Background(None)
    for _ in range(1000):
        await background.wait_turn()
        background.pay(background.turn_bytes)
    assert trio.current_time() == 0


@pytest.mark.parametrize("rate", [0, -1])
def test_no_rate(rate: int) -> None:
    with pytest.raises(UsageError, match="bytes a second"):
        Background(None).set_max_bandwidth(rate)


# ---- when it begins ----


@asynccontextmanager
async def beginning(start: Start, count_faults: Callable[[], int]) -> AsyncIterator[Background]:
    background = Background(None, begun=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(begin_background, background, start, count_faults)
        await wait_all_tasks_blocked()
        yield background
        nursery.cancel_scope.cancel()


async def jump(clock: MockClock, steps: int) -> None:
    """``steps`` steps of 10 ms: a task that sleeps in between is woken at its time."""
    for _ in range(steps):
        clock.jump(0.01)
        await wait_all_tasks_blocked()


async def test_begins_after_a_while(mock_clock: MockClock) -> None:
    async with beginning(Start(after=0.3), lambda: 0) as background:
        await jump(mock_clock, 29)
        assert not background.begun
        await jump(mock_clock, 2)
        assert background.begun


async def test_begins_once_the_faults_become_few(mock_clock: MockClock) -> None:
    """Four within each second are too many, and three are not."""
    faults = 0
    async with beginning(Start(rate=4), lambda: faults) as background:
        for period, few in ((20, False), (24, False), (34, True)):
            assert not background.begun
            for _ in range(20):
                await jump(mock_clock, period)
                faults += 1
            assert background.begun == few
