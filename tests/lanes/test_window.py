"""The prefetch window that adapts: what it asks for, over a residency map alone; and the same on
lanes of both kinds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import pagenet
from pagenet import Run, _native
from pagenet.residency import Residency, State
from pagenet.transport import LaneKind

PAGE = 4096
AREA = 64
MISSING, REQUESTED, OUTSIDE = State.MISSING, State.REQUESTED, State.OUTSIDE


class Memory:
    """Pages that come at once when they are asked for. ``fixed``: a window that does not adapt."""

    def __init__(self, pages: int, fixed: tuple[int, int] | None = None) -> None:
        self.residency = Residency(pages)
        self.window = _native.Window()
        self.fixed = fixed
        self.blocked = 0

    def touch(self, page: int) -> list[Run] | None:
        """Touch a page. Returns what is asked for around it, or None if it was resident."""
        residency = self.residency
        if not residency.claim(Run(page, 1), MISSING, REQUESTED):
            return None
        self.blocked += 1
        if self.fixed is not None:
            forward, backward = self.fixed
            residency.claim(
                Run(page + 1, min(forward, residency.pages - page - 1)), MISSING, REQUESTED
            )
            while backward and page and residency.claim(Run(page - 1, 1), MISSING, REQUESTED):
                page, backward = page - 1, backward - 1
            return []
        self.window.fault(residency.shared, page, 0, residency.pages, PAGE)
        return list(self.wanted())

    def wanted(self, most: int = 32 << 10) -> Iterator[Run]:
        while (found := self.window.next(self.residency.shared, most)) is not None:
            yield Run(*found)

    def touch_all(self, pages: Sequence[int]) -> int:
        """Touch pages. Returns how many were missing."""
        before = self.blocked
        for page in pages:
            self.touch(page)
        return self.blocked - before

    def close(self) -> None:
        self.residency.close()


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory(1 << 20)
    yield made
    made.close()


@pytest.mark.parametrize("way", [1, -1])
def test_it_grows_on_sequential_access(memory: Memory, way: int) -> None:
    pages = range(500_000, 500_000 + way * 30_000, way)
    assert memory.touch_all(pages[:20_000]) < 110
    asked = next(asked for page in pages[20_000:] if (asked := memory.touch(page)) is not None)
    assert sum(run.count for run in asked) == 256  # 1 MiB


@pytest.mark.parametrize("step", [100, 1000, -777])
def test_it_grows_on_equal_steps_and_asks_for_nothing_between(memory: Memory, step: int) -> None:
    pages = range(500_000, 500_000 + 400 * step, step)
    assert memory.touch_all(pages) < 30
    here = {
        page for run in runs_in(memory.residency, REQUESTED) for page in range(run.first, run.end)
    }
    assert len(here - set(pages)) < 3 * 8 + 32  # before it adapted, and ahead of the last page


@pytest.mark.parametrize("streams", [2, 4])
def test_several_lines_at_a_time(memory: Memory, streams: int) -> None:
    interleaved = [number * 200_000 + k for k in range(5000) for number in range(streams)]
    assert memory.touch_all(interleaved) < streams * 60


def test_it_shrinks_to_nothing_on_random_access() -> None:
    memory = Memory(1 << 26)
    pick = random.Random(1)
    try:
        memory.touch_all([pick.randrange(1 << 26) for _ in range(100)])
        asked = [memory.touch(pick.randrange(1 << 26)) or [] for _ in range(2000)]
        assert sum(run.count for runs in asked for run in runs) < 100
    finally:
        memory.close()


def neighbourhoods(touches: int, seed: int = 1) -> list[int]:
    """Zipf over 1300 areas, scattered over 1 GiB; within each, any page."""
    pick = random.Random(seed)
    areas = pick.sample(range(4096), 1300)
    shares = list(accumulate(1 / (rank + 1) ** 1.2 for rank in range(1300)))
    return [
        area * AREA + pick.randrange(AREA)
        for area in pick.choices(areas, cum_weights=shares, k=touches)
    ]


def test_a_fault_foretells_its_neighbourhood() -> None:
    """The counts of pagenet-bench's targets, with a link that takes no time."""
    trace = neighbourhoods(60_000)
    off, fixed, adapting = Memory(1 << 18, (0, 0)), Memory(1 << 18, (8, 8)), Memory(1 << 18)
    try:
        blocked = [memory.touch_all(trace) for memory in (off, fixed, adapting)]
        assert blocked[2] < blocked[0] / 8
        assert blocked[2] < blocked[1] / 2
        assert blocked[2] < 1.4 * len({page // AREA for page in trace})
    finally:
        for memory in (off, fixed, adapting):
            memory.close()


def test_what_saw_most_faults_is_asked_for_first_and_among_equals_the_newest(
    memory: Memory,
) -> None:
    def fault(page: int) -> None:
        assert memory.residency.claim(Run(page, 1), MISSING, REQUESTED)
        memory.window.fault(memory.residency.shared, page, 0, memory.residency.pages, PAGE)

    for area in (1000, 3000, 5000, 7000):  # too far apart for a line
        fault(area * 2 * AREA)
    for number, area in enumerate((1000, 3000, 1000)):
        fault(area * 2 * AREA + 40 + number)
    asked = [run.first // AREA // 2 for run in memory.wanted()]
    assert list(dict.fromkeys(asked)) == [1000, 3000, 7000, 5000]


def test_after_random_access_it_learns_again() -> None:
    memory = Memory(1 << 26)
    pick = random.Random(2)
    try:
        memory.touch_all([pick.randrange(1 << 26) for _ in range(1000)])
        assert memory.window.level < 16
        areas = [pick.randrange(1 << 20) for _ in range(200)]
        assert (
            memory.touch_all(
                [area * AREA + pick.randrange(AREA) for area in areas for _ in range(40)]
            )
            < 500
        )
    finally:
        memory.close()


@given(
    first=st.integers(0, 300),
    count=st.integers(1, 1000),
    page_size=st.sampled_from([4096, 65536, 2 << 20, 1 << 30]),
    faults=st.lists(st.integers(0, 999), max_size=60),
    most=st.sampled_from([1, PAGE, 32 << 10, 1 << 30]),
)
def test_it_asks_within_bounds_and_for_what_is_missing(
    first: int, count: int, page_size: int, faults: list[int], most: int
) -> None:
    memory = Memory(1400)
    residency = memory.residency
    residency.set(Run(0, first), OUTSIDE)
    residency.set(Run(first + count, 1400 - first - count), OUTSIDE)
    asked: set[int] = set()
    try:
        for page in (first + fault % count for fault in faults):
            if residency.claim(Run(page, 1), MISSING, REQUESTED):
                asked.add(page)
                memory.window.fault(residency.shared, page, first, first + count, page_size)
            for run in memory.wanted(most):
                assert run.count == 1 or run.count * page_size <= most
                pages = set(range(run.first, run.end))
                assert not pages & asked
                asked |= pages
                assert run.count * page_size <= 1 << 20
        assert asked == {page for page in range(1400) if residency.state(page) is REQUESTED}
        assert all(first <= page < first + count for page in asked)
    finally:
        memory.close()


def test_fixed_and_adapting_are_a_setting_away() -> None:
    window = _native.Window()
    assert window.fixed is None
    for fixed in ((0, 0), (8, 8), (256, 0), None):
        window.fix(fixed)
        assert window.fixed == fixed


@pytest.mark.parametrize("seed", range(3))
async def test_both_lanes_decide_alike(seed: int, tmp_path: Path) -> None:
    """One touch after the other, each once all pages that the previous one brought are resident."""
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(8 << 20))
    pick = random.Random(seed)
    pages: list[int] = []
    at = 0
    while len(pages) < 60:
        step, at = pick.choice([1, -1, 5, 100, 0]), pick.randrange(2048)
        pages += [
            page
            for k in range(pick.randrange(1, 8))
            if 0 <= (page := at + k * (step or pick.randrange(64))) < 2048
        ]
    native, trio_ = [await states(source, lane, pages) for lane in ("native", "trio")]
    assert native == trio_


async def states(source: Path, lane: LaneKind, pages: Sequence[int]) -> list[list[Run]]:
    """The missing pages after each touch."""
    memory = pagenet.OwnMemory("anonymous")
    seen = []
    try:
        async with (
            pagenet.serve(str(source), listen="tcp://127.0.0.1:0") as server,
            pagenet.pull(server.uri, memory, lane=lane, background="off") as transfer,
        ):
            for page in pages:
                await memory.read(page * PAGE, 1)
                with trio.fail_after(20):
                    while transfer.filling.window.pending or under_way(transfer.filling.residency):  # noqa: ASYNC110
                        await trio.sleep(0.001)
                seen.append(runs_in(transfer.filling.residency, MISSING))
            transfer.set_background("linear")
            await transfer.wait_complete()
    finally:
        memory.close()
    return seen


def under_way(residency: Residency) -> bool:
    return any(
        residency.find(state, 0) is not None for state in (REQUESTED, State.PLACING, State.READY)
    )


def runs_in(residency: Residency, state: State) -> list[Run]:
    runs, first = [], residency.find(state, 0)
    while first is not None:
        runs.append(Run(first, residency.span(Run(first, residency.pages - first), state)))
        first = residency.find(state, runs[-1].end)
    return runs
