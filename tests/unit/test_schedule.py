"""The order of the background: the policy alone, over a residency map."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagenet import Block, Region, Run, UsageError
from pagenet.background._heat import Ranking
from pagenet.background._hot import MOST_AREAS, Hot
from pagenet.background.schedule import SCHEDULES, Schedule, make_schedule
from pagenet.residency import Residency, State

MIB = 1 << 20
AREA = 64
ORDERS = [name for name in SCHEDULES if name != "off"]


class Bed:
    """A region of which a schedule names the missing pages, which never come."""

    def __init__(self, name: str, *sizes: int, page_size: int = 4096) -> None:
        self.region = Region(
            Block(str(number), size, page_size) for number, size in enumerate(sizes)
        )
        self.residency = Residency(self.region.pages)
        schedule = make_schedule(name, self.region, self.residency)
        assert schedule is not None
        self.schedule: Schedule = schedule
        self.now = 0.0

    def fault(self, *pages: int, after: float = 0.001) -> None:
        for page in pages:
            self.now += after
            self.residency.claim(Run(page, 1), State.MISSING, State.REQUESTED)
            self.schedule.note_faults([page], self.now)

    def take(self, max_bytes: int = 4 * MIB) -> Run | None:
        """The next run, which is marked as a lane does it."""
        run = self.schedule.next_run(max_bytes)
        if run is not None:
            assert self.region.contains(run)
            assert run.count == 1 or self.region.size_of(run) <= max_bytes
            self.residency.replace(run, State.MISSING, State.COMING)
        return run

    def taken(self, runs: int, max_bytes: int = 4 * MIB) -> list[Run]:
        return [run for run in (self.take(max_bytes) for _ in range(runs)) if run is not None]


@pytest.fixture
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    made = Bed(*request.param)
    yield made
    made.residency.close()


def on(name: str, *sizes: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bed", [(name, *sizes)], indirect=True)


def test_names() -> None:
    region = Region([Block("ram", MIB)])
    with Residency(region.pages) as residency:
        assert make_schedule("off", region, residency) is None
        with pytest.raises(UsageError, match="hot, follow, linear, off"):
            make_schedule("sideways", region, residency)


@given(
    name=st.sampled_from(ORDERS),
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    page_size=st.sampled_from([4096, 2 * MIB]),
    seed=st.integers(0, 1000),
    max_pages=st.integers(1, 100),
)
def test_every_page_is_named_once_whatever_is_faulted_on(
    name: str, sizes: list[int], page_size: int, seed: int, max_pages: int
) -> None:
    pick = random.Random(seed)
    bed = Bed(name, *[size * page_size for size in sizes], page_size=page_size)
    named = 0
    try:
        while True:
            if pick.random() < 0.5:
                first, step = pick.randrange(bed.region.pages), pick.choice([1, -1, 3, 70, -80])
                bed.fault(
                    *[page for k in range(5) if 0 <= (page := first + k * step) < bed.region.pages]
                )
            missing = bed.residency.find(State.MISSING, 0)
            run = bed.schedule.next_run(max_pages * page_size)
            assert (run is None) == (missing is None)
            if run is None:
                break
            took = bed.residency.replace(run, State.MISSING, State.COMING)
            assert took  # it never names pages that a lane has taken
            named += took
        asked = sum(
            bed.residency.state(page) is State.REQUESTED for page in range(bed.region.pages)
        )
        assert named + asked == bed.region.pages
    finally:
        bed.residency.close()


@on("linear", MIB, MIB)
def test_linear_goes_from_the_first_page_to_the_last(bed: Bed) -> None:
    bed.fault(300)
    assert bed.taken(9, MIB // 2) == [
        Run(0, 128),
        Run(128, 128),
        Run(256, 44),
        Run(301, 128),
        Run(429, 83),
    ]


@on("linear", MIB)
def test_what_is_missing_again_is_named_again(bed: Bed) -> None:
    assert bed.taken(9) == [Run(0, 256)]
    bed.residency.set(Run(7, 2), State.MISSING)
    assert bed.taken(9) == [Run(7, 2)]


@on("follow", MIB, MIB)
def test_follow_goes_on_behind_the_last_fault_and_round(bed: Bed) -> None:
    assert bed.take(MIB // 4) == Run(0, 64)
    bed.fault(400, 200)
    behind = [Run(201, 55), Run(256, 64), Run(320, 64), Run(384, 16), Run(401, 64), Run(465, 47)]
    assert bed.taken(9, MIB // 4) == [*behind, Run(64, 64), Run(128, 64), Run(192, 8)]
    bed.fault(511)
    assert bed.take() is None


@on("hot", 64 * MIB)
def test_hot_without_faults_is_linear(bed: Bed) -> None:
    assert bed.taken(3) == [Run(0, 1024), Run(1024, 1024), Run(2048, 1024)]


@on("hot", 64 * MIB)
def test_hot_brings_the_area_with_most_faults_first_then_those_beside_it(bed: Bed) -> None:
    bed.fault(100 * AREA + 5, 50 * AREA, 50 * AREA + 63)
    first, second, third = bed.taken(3)
    assert first == Run(50 * AREA + 1, 62)
    assert (second, third) == (Run(100 * AREA, 5), Run(100 * AREA + 6, 58))
    beside = {run.first // AREA for run in bed.taken(4)}
    assert beside == {49, 51, 99, 101}
    assert bed.take() == Run(0, 1024)


@on("hot", 64 * MIB)
def test_heat_decays(bed: Bed) -> None:
    bed.fault(50 * AREA, 50 * AREA + 2, 50 * AREA + 4)
    bed.fault(100 * AREA, after=1.0)
    run = bed.take()
    assert run is not None
    assert run.first // AREA == 100


@on("hot", 512 * MIB)
def test_a_phase_change_is_followed_at_once(bed: Bed) -> None:
    """Even if hundreds of areas are still to come in the old place."""
    pick = random.Random(1)
    old, new = range(500), range(1000, 1500)
    for _ in range(2000):
        bed.fault(pick.choice(old) * AREA + pick.randrange(AREA), after=0.0003)
        if pick.random() < 0.1:
            bed.take()
    places = []
    for _ in range(600):  # 180 ms at the same rate of faults
        bed.fault(pick.choice(new) * AREA + pick.randrange(AREA), after=0.0003)
        if pick.random() < 0.1 and (run := bed.take()):
            places.append(run.first // AREA in new)
    late = places[len(places) // 2 :]
    assert late.count(True) > 0.9 * len(late)


@pytest.mark.parametrize("step", [AREA, 2 * AREA, -AREA, 1, -1, 17])
@on("hot", 512 * MIB)
def test_hot_runs_ahead_of_a_stream(bed: Bed, step: int) -> None:
    first = 1000 * AREA
    bed.fault(*[first + k * step for k in range(0, 1 + 5 * AREA // min(AREA, abs(step)))])
    last = first + 5 * AREA // min(AREA, abs(step)) * step
    ahead = {page for run in bed.taken(8, MIB) for page in range(run.first, run.end)}
    way = 1 if step > 0 else -1
    assert {last + way * k for k in range(1, 4 * AREA)} <= ahead


@pytest.mark.parametrize("step", [1000, -1000, 300])
@on("hot", 512 * MIB)
def test_hot_runs_ahead_of_equal_steps(bed: Bed, step: int) -> None:
    bed.fault(*[60_000 + k * step for k in range(4)])
    assert bed.taken(8) == [Run(60_000 + k * step, 1) for k in range(4, 12)]


@on("hot", 512 * MIB)
def test_random_faults_make_no_stream(bed: Bed) -> None:
    pick = random.Random(2)
    pages = [pick.randrange(bed.region.pages) for _ in range(300)]
    bed.fault(*pages)
    areas = {page // AREA for page in pages}
    named = bed.taken(300)
    assert sum(run.first // AREA in areas for run in named) > 290


@on("hot", 4 * MIB)
def test_an_area_is_handed_out_once_until_a_fault_says_otherwise(bed: Bed) -> None:
    """Runs wait in a ring before a lane takes them: their pages are MISSING all that time."""
    bed.fault(130)
    first = bed.schedule.next_run(MIB // 8)
    second = bed.schedule.next_run(MIB // 8)
    assert (first, second) == (Run(128, 2), Run(131, 32))


def test_regions_of_a_billion_pages_cost_what_is_in_use() -> None:
    """4 TiB. What a schedule remembers does not grow with the faults either."""
    bed = Bed("hot", 4 << 40)
    pick = random.Random(3)
    try:
        for _ in range(20):
            bed.fault(*[pick.randrange(bed.region.pages) for _ in range(1000)], after=1e-5)
            bed.taken(5)
        hot = bed.schedule
        assert isinstance(hot, Hot)
        for ranking in (hot._within, hot._beside):
            assert len(ranking) <= MOST_AREAS
            assert len(ranking._heap) <= 4 * MOST_AREAS + 1
        assert len(hot._cursors) <= MOST_AREAS
    finally:
        bed.residency.close()


@on("linear", 2_000_000 * 4096)
def test_a_region_of_a_million_runs(bed: Bed) -> None:
    """Every other page is resident. Only missing pages are named, each once, those near the faults
    first."""
    for page in range(0, bed.region.pages, 2):
        bed.residency.set(Run(page, 1), State.RESIDENT)
    pick, named = random.Random(5), set[int]()
    for name in ("linear", "follow", "hot"):
        bed.schedule = make_schedule(name, bed.region, bed.residency) or bed.schedule
        for _ in range(500):
            page = pick.randrange(10_000, bed.region.pages - 1000) | 1
            bed.fault(page)
            runs = bed.taken(4)
            assert all(run.count == 1 and run.first % 2 for run in runs)
            named |= {run.first for run in runs}
            assert name == "linear" or any(abs(run.first - page) < 2 * AREA for run in runs)
    assert len(named) == 3 * 500 * 4


def test_a_ranking_is_the_sum_of_decayed_heat() -> None:
    ranking = Ranking(half_life=1.0, most=100)
    warmed = [
        (pick.randrange(8), number * 0.3) for pick in [random.Random(4)] for number in range(200)
    ]
    for key, now in warmed:
        ranking.warm(key, now)
    heat = {key: sum(0.5 ** (60 - now) for k, now in warmed if k == key) for key in range(8)}
    order = []
    while (hottest := ranking.hottest()) is not None:
        order.append(hottest)
        ranking.unrank(hottest)
    assert order == sorted(heat, key=lambda key: -heat[key])
    ranking.warm(order[-1], 60.0)
    assert ranking.hottest() == order[-1]
    assert len(ranking) == 8
