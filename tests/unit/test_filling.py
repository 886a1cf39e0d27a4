"""What becomes of faults, pages and removals, in any order, on a memory that is not the
kernel's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagenet import Block, HandshakeError, Region, Run
from pagenet.destination.filling import Filling
from pagenet.protocol import Class
from pagenet.residency import Residency, State
from pagenet.target import Outcome
from pagenet.uffd import Event, Fault, Forked, Remapped, Removed, Unmapped

PAGE = 4096
BASE = 0x7000_0000
DEMAND, PREFETCH, BACKGROUND = Class.DEMAND, Class.PREFETCH, Class.BACKGROUND


def content(page: int) -> bytes:
    """What the source has in a page."""
    return bytes([1 + page % 255]) * PAGE


def contents(run: Run) -> memoryview:
    return memoryview(b"".join(content(page) for page in range(run.first, run.end)))


class FakeMemory:
    """An owner's memory that behaves as the kernel's: threads wait for pages, and a removal waits
    until its event is read; until then nothing can be placed. A :class:`~pagenet.target.Target`."""

    placement = "fake"
    event_fd = None

    def __init__(self, pages: int = 8, scope: Sequence[Run] | None = None) -> None:
        self.region = Region([Block("ram", pages * PAGE)])
        self._scope = [Run(0, pages)] if scope is None else scope
        self.there: dict[int, bytes] = {}
        self.unread: list[Event] = []
        #: pages that a thread waits for
        self.waiting: set[int] = set()
        self.removed: set[int] = set()
        #: called when a page is about to be placed
        self.before_placing: Callable[[int], None] = lambda page: None
        #: what was placed, in order
        self.placed: list[Run] = []
        self.settled: list[int] = []
        self.discarded: list[int] = []
        self.closed_with: list[list[Run]] = []

    # ---- what the owner does ----

    def touch(self, page: int) -> None:
        if page not in self.there:
            self.waiting.add(page)
            self.unread.append(fault(page))

    def give_up(self, run: Run) -> None:
        self.unread.append(Removed(BASE + run.first * PAGE, BASE + run.end * PAGE))

    # ---- what a target does ----

    def scope(self) -> Sequence[Run]:
        return self._scope

    def read_events(self) -> list[Event]:
        events, self.unread = self.unread[:3], self.unread[3:]
        for event in events:
            if isinstance(event, Removed):
                gone = {run.first for run in self.pages_between(event.start, event.end)}
                self.there = {page: data for page, data in self.there.items() if page not in gone}
                self.removed |= gone
        return events

    def pages_between(self, start: int, end: int) -> Sequence[Run]:
        first, past = (start - BASE) // PAGE, (end - BASE) // PAGE
        wanted = [
            page
            for run in self._scope
            for page in range(run.first, run.end)
            if first <= page < past
        ]
        return [Run(page, 1) for page in wanted]

    def page_of(self, fault: Fault) -> int:
        return (fault.address - BASE) // PAGE

    def piece_of(self, page: int) -> Run:
        (piece,) = [run for run in self._scope if run.first <= page < run.end]
        return piece

    def place(self, run: Run, data: memoryview | None) -> Outcome:
        self.placed.append(run)
        return self._put(run, bytes(run.count * PAGE) if data is None else data)

    def _put(self, run: Run, data: bytes | memoryview) -> Outcome:
        assert len(data) == run.count * PAGE
        placed = existed = 0
        for index, page in enumerate(range(run.first, run.end)):
            self.before_placing(page)
            if any(isinstance(event, Removed) for event in self.unread):
                return Outcome(placed, existed, again=True)
            existed += page in self.there
            placed += page not in self.there
            self.there.setdefault(page, bytes(data[index * PAGE : (index + 1) * PAGE]))
            self.waiting.discard(page)
        return Outcome(placed, existed)

    def settle(self, page: int | None, fault: Fault) -> bool:
        assert page == self.page_of(fault)
        self.settled.append(page)
        return not self._put(Run(page, 1), bytes(PAGE)).again

    def wake(self, run: Run) -> None:
        for page in set(range(run.first, run.end)) & self.waiting:
            self.waiting.discard(page)
            self.touch(page)

    def discard(self, run: Run) -> None:
        assert run.count == 1
        self.discarded.append(run.first)

    async def wait_gone(self) -> None:
        raise NotImplementedError

    def close(self, missing: Sequence[Run]) -> None:
        self.closed_with.append(list(missing))


def fault(page: int, minor: bool = False) -> Fault:
    return Fault(BASE + page * PAGE, write=False, minor=minor, thread=0)


class Filled:
    """A :class:`Filling` of fake memory, and the pages that it has asked for."""

    def __init__(self, memory: FakeMemory) -> None:
        self.memory = memory
        self.filling = Filling(memory)
        self._asked: list[tuple[Class, Run]] = []

    @property
    def asked(self) -> list[tuple[Class, Run]]:
        """All that it has asked for on the demand lane."""
        self._asked += self.filling.take_wanted()
        return self._asked

    @property
    def demanded(self) -> list[int]:
        """Pages asked for because a thread waits for them, one at a time."""
        assert all(run.count == 1 for class_, run in self.asked if class_ is DEMAND)
        return [run.first for class_, run in self.asked if class_ is DEMAND]

    @property
    def prefetched(self) -> list[Run]:
        return [run for class_, run in self.asked if class_ is PREFETCH]

    def touch(self, *pages: int) -> None:
        for page in pages:
            self.memory.touch(page)
        self.filling.read_events()

    def claim(self, first: int, count: int) -> list[Run]:
        """Claim pages, as the background does."""
        return list(self.filling.claim(Run(first, count)))

    def ask(self, first: int, count: int) -> Run:
        """Ask for pages that are all missing, as the background does."""
        run = Run(first, count)
        assert self.claim(first, count) == [run]
        return run

    def arrive(self, run: Run, class_: Class = BACKGROUND) -> None:
        self.filling.arrived(class_, run, contents(run), wire_bytes=100)

    def states(self) -> list[State]:
        return [self.filling.residency.state(page) for page in range(self.filling.region.pages)]


@pytest.fixture
def filled() -> Filled:
    return make_filled()


def make_filled(pages: int = 8, scope: Sequence[Run] | None = None) -> Filled:
    return Filled(FakeMemory(pages, scope))


@pytest.fixture(autouse=True)
def close_what_was_filled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made: list[Filling] = []
    original = Filling.__init__

    def init(self: Filling, target: FakeMemory) -> None:
        made.append(self)
        original(self, target)

    monkeypatch.setattr(Filling, "__init__", init)
    yield
    for filling in made:
        filling.close()


# ---- beginning and end ----


def test_begins_with_everything_missing(filled: Filled) -> None:
    assert filled.states() == [State.MISSING] * 8
    assert not filled.filling.completed.is_set()
    statistics = filled.filling.statistics()
    assert (statistics.pages, statistics.done, statistics.size, statistics.placement) == (
        8,
        0,
        8 * PAGE,
        "fake",
    )


def test_what_the_owner_does_not_map_is_outside() -> None:
    filled = make_filled(8, [Run(1, 2), Run(5, 1)])
    outside, missing = State.OUTSIDE, State.MISSING
    assert filled.states() == [
        outside,
        missing,
        missing,
        outside,
        outside,
        missing,
        outside,
        outside,
    ]
    for run in (Run(1, 2), Run(5, 1)):
        assert not filled.filling.completed.is_set()
        filled.arrive(filled.ask(run.first, run.count))
    assert filled.filling.completed.is_set()
    assert filled.filling.statistics().size == 3 * PAGE


def test_nothing_mapped_is_complete_at_once() -> None:
    assert make_filled(8, []).filling.completed.is_set()


def test_complete_with_the_last_page_and_not_before(filled: Filled) -> None:
    for page in (3, 0, 7, 1, 2, 6, 5):
        filled.arrive(filled.ask(page, 1))
        assert not filled.filling.completed.is_set()
    filled.touch(4)
    assert not filled.filling.completed.is_set()
    filled.arrive(Run(4, 1), DEMAND)
    assert filled.filling.completed.is_set()
    assert filled.filling.statistics().complete


def test_seconds_stop_when_it_is_complete(filled: Filled) -> None:
    filled.arrive(filled.ask(0, 8))
    assert filled.filling.statistics().seconds == filled.filling.statistics().seconds


def test_finish_lets_the_owner_go(filled: Filled) -> None:
    filled.arrive(filled.ask(0, 8))
    filled.filling.finish()
    assert filled.memory.closed_with == [[]]


def test_close_names_what_never_came(filled: Filled) -> None:
    filled.arrive(filled.ask(2, 2))
    filled.ask(6, 1)
    filled.memory.give_up(Run(7, 1))
    filled.filling.read_events()
    filled.filling.close()
    filled.filling.close()
    assert filled.memory.closed_with == [[Run(0, 2), Run(4, 2), Run(6, 1)]]
    assert filled.filling.statistics().done == 3


# ---- faults, by the state of their page ----


def test_missing_page_is_demanded(filled: Filled) -> None:
    filled.touch(5)
    assert filled.demanded == [5]
    assert filled.states()[5] is State.REQUESTED
    assert filled.filling.waiting_faults == 1
    filled.arrive(Run(5, 1), DEMAND)
    assert filled.memory.there == {5: content(5)}
    assert filled.states()[5] is State.RESIDENT
    assert not filled.memory.waiting
    assert filled.filling.waiting_faults == 0


def test_many_faults_on_one_page_are_one_demand(filled: Filled) -> None:
    filled.touch(5, 5)
    filled.touch(5)
    assert filled.demanded == [5]
    statistics = filled.filling.statistics().demand
    assert (statistics.faults, filled.filling.waiting_faults) == (3, 1)
    filled.arrive(Run(5, 1), DEMAND)
    assert filled.filling.statistics().fault_latency.count == 1


@pytest.mark.parametrize("background_first", [False, True])
def test_page_on_its_way_in_the_background_is_asked_for_once_more(
    filled: Filled, background_first: bool
) -> None:
    """The page stands in a queue, and the thread must not wait for that. The copy that comes second
    is dropped."""
    run = filled.ask(4, 4)
    assert filled.states()[4:] == [State.COMING] * 4
    filled.touch(5)
    filled.touch(5)
    assert filled.asked == [(DEMAND, Run(5, 1))]
    assert filled.states()[4:7] == [State.COMING, State.REQUESTED, State.COMING]
    arrivals = [(run, BACKGROUND), (Run(5, 1), DEMAND)]
    for arrival in arrivals if background_first else reversed(arrivals):
        filled.arrive(*arrival)
        assert not filled.memory.waiting
    filled.touch(5)
    assert filled.demanded == [5]
    assert filled.memory.there == {page: content(page) for page in range(4, 8)}
    statistics = filled.filling.statistics()
    assert (statistics.demand.faults, statistics.fault_latency.count) == (2, 1)
    came = [(of.pages, of.dropped) for of in (statistics.demand, statistics.background)]
    assert came == ([(0, 1), (4, 0)] if background_first else [(1, 0), (3, 1)])


# ---- prefetch ----


def prefetching(
    forward: int, backward: int, pages: int = 32, scope: Sequence[Run] | None = None
) -> Filled:
    filled = make_filled(pages, scope)
    filled.filling.prefetch = (forward, backward)
    return filled


def test_prefetch_asks_for_the_window_behind_then_before() -> None:
    filled = prefetching(3, 2)
    filled.touch(10)
    assert filled.asked == [(DEMAND, Run(10, 1)), (PREFETCH, Run(11, 3)), (PREFETCH, Run(8, 2))]
    assert filled.states()[7:15] == [State.MISSING, *[State.REQUESTED] * 6, State.MISSING]


def test_prefetch_follows_all_faulted_pages() -> None:
    filled = prefetching(1, 1)
    filled.touch(4, 20, 12)
    assert [class_ for class_, _ in filled.asked] == [DEMAND] * 3 + [PREFETCH] * 6
    assert filled.demanded == [4, 20, 12]
    assert filled.prefetched == [
        Run(5, 1),
        Run(3, 1),
        Run(21, 1),
        Run(19, 1),
        Run(13, 1),
        Run(11, 1),
    ]


def test_page_that_is_waited_for_is_no_prefetch_of_its_neighbours() -> None:
    filled = prefetching(4, 4)
    filled.touch(10, 12)
    assert filled.demanded == [10, 12]
    assert filled.prefetched == [Run(11, 1), Run(6, 4), Run(13, 4)]


def test_prefetch_ends_where_the_piece_does() -> None:
    filled = prefetching(8, 8, scope=[Run(4, 6), Run(10, 4), Run(16, 4)])
    filled.touch(11)
    assert filled.prefetched == [Run(12, 2), Run(10, 1)]
    filled.touch(9)
    assert filled.prefetched[2:] == [Run(4, 5)]
    filled.touch(16, 19)
    assert filled.prefetched[3:] == [Run(17, 2)]


@pytest.mark.parametrize("page", [0, 31])
def test_prefetch_ends_where_the_region_does(page: int) -> None:
    filled = prefetching(40, 40)
    filled.touch(page)
    assert filled.prefetched == [Run(1, 31) if page == 0 else Run(0, 31)]


@pytest.mark.parametrize(
    "state",
    [
        State.COMING,
        State.REQUESTED,
        State.PLACING,
        State.RESIDENT,
        State.REMOVED,
        State.OUTSIDE,
        State.POISONED,
    ],
)
def test_prefetch_ends_at_pages_that_are_not_missing(state: State) -> None:
    filled = prefetching(8, 8)
    for page in (7, 13):
        filled.filling.residency.set(Run(page, 1), state)
    filled.touch(10)
    assert filled.prefetched == [Run(11, 2), Run(8, 2)]


def test_page_that_was_known_already_is_no_reason_to_prefetch() -> None:
    filled = prefetching(2, 2)
    filled.ask(9, 3)
    filled.filling.residency.set(Run(20, 1), State.RESIDENT)
    filled.touch(10, 20)
    filled.touch(10)
    assert (filled.demanded, filled.prefetched) == ([10], [])


def test_prefetch_is_bounded_in_bytes() -> None:
    filled = prefetching(1 << 20, 1 << 20, pages=2048)
    filled.touch(1000)
    assert filled.prefetched == [Run(1001, 256), Run(744, 256)]


def test_huge_pages_are_not_prefetched() -> None:
    memory = FakeMemory()
    memory.region = Region([Block("ram", 16 << 20, 2 << 20)])
    filled = Filled(memory)
    filled.filling.prefetch = (8, 8)
    filled.touch(3)
    assert (filled.demanded, filled.prefetched) == ([3], [])


def test_prefetched_page_that_is_touched_is_not_asked_for_again() -> None:
    filled = prefetching(2, 0)
    filled.touch(10)
    filled.touch(11)
    assert filled.asked == [(DEMAND, Run(10, 1)), (PREFETCH, Run(11, 2))]
    filled.arrive(Run(11, 2), PREFETCH)
    assert filled.memory.waiting == {10}
    statistics = filled.filling.statistics()
    assert (
        statistics.demand.faults,
        statistics.fault_latency.count,
        statistics.prefetch.pages,
    ) == (2, 1, 2)


# ---- faults on pages that are being placed, or done with ----


@pytest.mark.parametrize("state", [State.RESIDENT, State.REMOVED, State.POISONED])
def test_page_that_is_done_with_is_settled(filled: Filled, state: State) -> None:
    """Resident: the fault is older than the page, whose wake it has missed."""
    filled.filling.residency.set(Run(5, 1), state)
    filled.touch(5)
    assert (filled.asked, filled.memory.settled) == ([], [5])
    assert not filled.memory.waiting
    assert filled.filling.waiting_faults == 0
    assert filled.states()[5] is state


def test_settling_reads_events_until_it_can(filled: Filled) -> None:
    filled.arrive(filled.ask(0, 8))
    filled.memory.unread += [fault(0), fault(1), fault(2), fault(3)]
    filled.memory.give_up(Run(6, 2))  # in the second batch
    filled.filling.read_events()
    assert set(filled.memory.settled) == {0, 1, 2, 3}
    assert filled.states()[6:] == [State.REMOVED] * 2
    assert not filled.memory.unread


def test_fault_while_its_page_is_being_placed(filled: Filled) -> None:
    """The fault is read because a removal elsewhere has to be read; it is answered all the same."""

    def interrupt(page: int) -> None:
        if page == 2 and not filled.memory.removed:
            filled.memory.give_up(Run(7, 1))
            filled.memory.touch(3)
            filled.memory.unread.append(fault(0))  # placed already

    run = filled.ask(0, 5)
    filled.memory.before_placing = interrupt
    filled.arrive(run)
    assert filled.memory.placed == [Run(0, 5), Run(2, 3)]
    assert filled.memory.there == {page: content(page) for page in range(5)}
    assert sorted(filled.memory.settled) == [0, 3]
    assert not filled.memory.waiting
    assert filled.filling.waiting_faults == 0
    assert filled.asked == []


def test_fault_on_another_missing_page_that_is_read_while_placing(filled: Filled) -> None:
    def interrupt(page: int) -> None:
        if page == 2 and not filled.memory.removed:
            filled.memory.give_up(Run(7, 1))
            filled.memory.touch(6)

    run = filled.ask(0, 5)
    filled.memory.before_placing = interrupt
    filled.arrive(run)
    assert filled.demanded == [6]
    assert filled.memory.waiting == {6}


def test_fault_outside_the_mappings(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is settled, as often as it takes, and no page is asked for."""
    settled: list[int | None] = []

    def settle(page: int | None, fault: Fault) -> bool:
        settled.append(page)
        return len(settled) > 1

    monkeypatch.setattr(filled.memory, "page_of", lambda fault: None)
    monkeypatch.setattr(filled.memory, "settle", settle)
    filled.touch(5)
    assert settled == [None, None]
    assert filled.asked == []
    demand = filled.filling.residency.statistics(DEMAND)
    assert (demand.faults, demand.outside_faults) == (1, 1)


# ---- pages that are not wanted (any more) ----


def test_page_that_comes_twice_is_placed_once(filled: Filled) -> None:
    run = filled.ask(0, 2)
    filled.arrive(run)
    filled.arrive(run, DEMAND)
    assert filled.memory.placed == [Run(0, 2)]
    statistics = filled.filling.statistics()
    assert (statistics.background.pages, statistics.background.dropped) == (2, 0)
    assert (statistics.demand.pages, statistics.demand.dropped) == (0, 2)
    assert statistics.done == 2


def test_page_that_nobody_asked_for_is_not_placed(filled: Filled) -> None:
    filled.arrive(Run(0, 2))
    assert filled.memory.placed == []
    assert filled.states()[:2] == [State.MISSING] * 2
    assert filled.filling.statistics().background.dropped == 2


def test_only_what_is_wanted_is_placed(filled: Filled) -> None:
    filled.arrive(filled.ask(1, 1))
    filled.arrive(filled.ask(4, 1))
    for page in (0, 2, 3, 5, 7):
        filled.ask(page, 1)
    filled.memory.placed.clear()
    filled.arrive(Run(0, 8))
    assert filled.memory.placed == [Run(0, 1), Run(2, 2), Run(5, 1), Run(7, 1)]
    assert filled.memory.there == {page: content(page) for page in (0, 1, 2, 3, 4, 5, 7)}
    assert filled.states()[6] is State.MISSING
    background = filled.filling.statistics().background
    assert (background.pages, background.dropped, background.runs) == (7, 3, 3)


def test_claim_leaves_out_what_is_somebody_elses(filled: Filled) -> None:
    filled.touch(3)
    filled.filling.residency.set(Run(6, 1), State.RESIDENT)
    assert filled.claim(1, 6) == [Run(1, 2), Run(4, 2)]
    assert filled.claim(1, 6) == []
    assert filled.claim(0, 8) == [Run(0, 1), Run(7, 1)]
    assert filled.states() == [
        *[State.COMING] * 3,
        State.REQUESTED,
        *[State.COMING] * 2,
        State.RESIDENT,
        State.COMING,
    ]


def test_claim_takes_one_part_at_a_time(filled: Filled) -> None:
    """A lane that claims part by part leaves to other lanes what it has not claimed yet."""
    parts = filled.filling.claim(Run(0, 8))
    filled.filling.residency.set(Run(2, 1), State.REMOVED)
    assert next(parts) == Run(0, 2)
    filled.touch(4)
    assert list(parts) == [Run(3, 1), Run(5, 3)]


def test_page_that_was_there_already_is_counted(filled: Filled) -> None:
    filled.memory.there[1] = b"older"
    filled.arrive(filled.ask(0, 3))
    background = filled.filling.statistics().background
    assert (background.pages, background.existed) == (3, 1)
    assert filled.memory.there[1] == b"older"


def test_page_without_a_mapping_is_done_with(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        filled.memory, "place", lambda run, data: Outcome(placed=run.count - 1, absent=1)
    )
    filled.arrive(filled.ask(0, 8))
    assert filled.filling.completed.is_set()


def test_zeros_come_without_bytes(filled: Filled) -> None:
    run = filled.ask(0, 8)
    filled.filling.arrived(BACKGROUND, run, None, wire_bytes=32)
    assert filled.memory.there == {page: bytes(PAGE) for page in range(8)}
    statistics = filled.filling.statistics()
    assert (statistics.zero_pages, statistics.background.pages, statistics.wire_bytes) == (8, 8, 32)
    assert statistics.complete


def test_pages_of_two_sizes() -> None:
    memory = FakeMemory()
    memory.region = Region([Block("rom", 2 * PAGE), Block("ram", 4 << 20, 2 << 20)])
    memory._scope = [Run(0, 2), Run(2, 2)]
    filling = Filling(memory)
    taken: list[tuple[Run, int]] = []

    def place(run: Run, data: memoryview | None) -> Outcome:
        assert data is not None
        taken.append((run, len(data)))
        return Outcome(placed=1)

    memory.place = place  # type: ignore[method-assign]
    for run in (Run(0, 2), Run(2, 2)):
        size = sum(filling.region.size_of(part) for part in filling.claim(run))
        filling.arrived(BACKGROUND, run, memoryview(bytes(size)), wire_bytes=size)
    assert taken == [
        (Run(0, 2), 2 * PAGE),
        (Run(1, 1), PAGE),
        (Run(2, 2), 4 << 20),
        (Run(3, 1), 2 << 20),
    ]
    assert filling.completed.is_set()
    assert filling.statistics().size == 2 * PAGE + (4 << 20)


# ---- removals ----


@pytest.mark.parametrize("event", [Removed, Unmapped])
def test_removed_before_it_was_asked_for(
    filled: Filled, event: type[Removed] | type[Unmapped]
) -> None:
    filled.memory.unread.append(event(BASE + 2 * PAGE, BASE + 5 * PAGE))
    filled.filling.read_events()
    assert filled.states()[2:5] == [State.REMOVED] * 3
    assert filled.claim(0, 8) == [Run(0, 2), Run(5, 3)]
    assert filled.filling.statistics().done == 3


def test_removed_while_it_is_on_its_way(filled: Filled) -> None:
    run = filled.ask(0, 4)
    filled.memory.give_up(Run(1, 2))
    filled.filling.read_events()
    filled.arrive(run)
    assert filled.memory.there == {0: content(0), 3: content(3)}
    assert filled.memory.discarded == [], "nothing was written there but by the owner, since"
    background = filled.filling.statistics().background
    assert (background.pages, background.dropped) == (2, 2)


def test_removed_while_somebody_waits_for_it(filled: Filled) -> None:
    filled.touch(1)
    filled.memory.give_up(Run(1, 1))
    filled.filling.read_events()  # wakes the thread, which faults again, and finds its page removed
    assert filled.memory.there == {1: bytes(PAGE)}
    assert filled.memory.settled == [1]
    assert filled.filling.waiting_faults == 0
    filled.arrive(Run(1, 1), DEMAND)
    assert filled.memory.there == {1: bytes(PAGE)}


def test_removed_while_it_is_being_placed(filled: Filled) -> None:
    def interrupt(page: int) -> None:
        if page == 2 and not filled.memory.removed:
            filled.memory.give_up(Run(0, 1))
            filled.memory.give_up(Run(3, 2))

    run = filled.ask(0, 6)
    filled.memory.before_placing = interrupt
    filled.arrive(run)
    assert filled.memory.placed == [Run(0, 6), Run(2, 1), Run(5, 1)]
    assert filled.memory.there == {page: content(page) for page in (1, 2, 5)}
    assert filled.memory.discarded == [3, 4]
    background = filled.filling.statistics().background
    assert (background.pages, background.dropped) == (4, 2), "two pages came and were never placed"
    assert filled.filling.statistics().done == 6


def test_removed_after_it_was_placed(filled: Filled) -> None:
    filled.arrive(filled.ask(0, 8))
    filled.memory.give_up(Run(3, 1))
    filled.filling.read_events()
    assert filled.states()[3] is State.REMOVED
    assert filled.filling.statistics().done == 8
    filled.touch(3)
    assert filled.memory.there[3] == bytes(PAGE)
    filled.arrive(Run(3, 1))
    assert filled.memory.there[3] == bytes(PAGE)


def test_removal_of_the_last_missing_page_completes(filled: Filled) -> None:
    filled.arrive(filled.ask(0, 7))
    filled.memory.give_up(Run(7, 1))
    filled.filling.read_events()
    assert filled.filling.completed.is_set()


def test_removal_of_all_the_rest_while_placing_completes(filled: Filled) -> None:
    run = filled.ask(0, 1)
    filled.memory.before_placing = lambda page: (
        None if filled.memory.removed else filled.memory.give_up(Run(1, 7))
    )
    filled.arrive(run)
    assert filled.filling.completed.is_set()


def test_removal_reaches_no_further_than_the_mappings() -> None:
    filled = make_filled(8, [Run(2, 4)])
    filled.memory.give_up(Run(0, 8))
    filled.filling.read_events()
    assert filled.states() == [State.OUTSIDE] * 2 + [State.REMOVED] * 4 + [State.OUTSIDE] * 2


def test_again_without_an_event_is_asked_again(
    filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event was read, but the owner has not finished the removal yet."""
    outcomes = [Outcome(1, again=True), Outcome(0, again=True), Outcome(0, again=True), Outcome(2)]
    asked: list[Run] = []

    def place(run: Run, data: memoryview | None) -> Outcome:
        asked.append(run)
        assert data == contents(run)
        return outcomes.pop(0)

    monkeypatch.setattr(filled.memory, "place", place)
    filled.arrive(filled.ask(1, 3))
    assert asked == [Run(1, 3), Run(2, 2), Run(2, 2), Run(2, 2)]
    assert filled.states()[1:4] == [State.RESIDENT] * 3


def test_remap_is_refused(filled: Filled) -> None:
    filled.memory.unread.append(Remapped(BASE, BASE + PAGE, PAGE))
    with pytest.raises(HandshakeError, match="moved memory"):
        filled.filling.read_events()


def test_fork_is_refused_and_its_descriptor_left_alone(filled: Filled) -> None:
    """The kernel reports no forks here. What says so may be the owner, which can write to the map
    that events are read into, and the descriptor any of ours."""
    read_end, write_end = os.pipe()
    filled.memory.unread.append(Forked(write_end))
    with pytest.raises(HandshakeError, match="forked"):
        filled.filling.read_events()
    os.write(write_end, b"x")
    assert os.read(read_end, 1) == b"x"
    os.close(read_end)
    os.close(write_end)


# ---- while the source's owner still runs ----


class FakeSharedMemory(FakeMemory):
    """Memory whose bytes are written first and become visible later. A touch of a page that has
    bytes, and is not visible, is a minor fault."""

    placement = "continue"

    def __init__(self, pages: int = 8, scope: Sequence[Run] | None = None) -> None:
        super().__init__(pages, scope)
        self.behind: dict[int, bytes] = {}

    def open_residency(self, source: bytes) -> Residency:
        return Residency(self.region.pages)

    def write(self, run: Run, data: memoryview | None) -> bool:
        size = self.region.page_size_at(run.first)
        pages = bytes(run.count * size) if data is None else bytes(data)
        for index, page in enumerate(range(run.first, run.end)):
            self.behind[page] = pages[index * size : (index + 1) * size]
        return True

    def publish(self, run: Run, *, again: bool = False) -> Outcome:
        return self._put(run, b"".join(self.behind[page] for page in range(run.first, run.end)))

    def settle(self, page: int | None, fault: Fault) -> bool:
        assert page is not None
        if page not in self.behind or page in self.removed:
            return super().settle(page, fault)
        self.settled.append(page)
        return not self.publish(Run(page, 1)).again


@pytest.fixture
def withheld() -> Filled:
    filled = Filled(FakeSharedMemory())
    filled.filling.withhold(True)
    return filled


def bits_of(*pages: int, size: int = 1) -> bytes:
    return sum(1 << page for page in set(pages)).to_bytes(size, "little")


def drop(filled: Filled, *pages: int) -> None:
    filled.filling.drop_stale(filled.filling.region, 0, bits_of(*pages))


def release(filled: Filled) -> None:
    """What happens at the freeze."""
    filled.filling.keep_copied()
    filled.filling.withhold(False)
    filled.filling.read_events()


def test_withheld_pages_are_copied_and_seen_by_nobody(withheld: Filled) -> None:
    withheld.arrive(withheld.ask(1, 4))
    assert withheld.states() == [State.MISSING, *[State.COPIED] * 4, *[State.MISSING] * 3]
    assert withheld.memory.there == {}
    statistics = withheld.filling.statistics()
    assert (statistics.done, statistics.background.pages) == (0, 4)


def test_withheld_pages_are_not_complete(withheld: Filled) -> None:
    withheld.arrive(withheld.ask(0, 8))
    assert not withheld.filling.completed.is_set()
    withheld.filling.keep_copied()
    assert withheld.states() == [State.RESIDENT] * 8
    assert withheld.filling.completed.is_set()
    assert withheld.filling.statistics().complete


def test_zeros_are_withheld_too(withheld: Filled) -> None:
    run = withheld.ask(0, 8)
    withheld.filling.arrived(BACKGROUND, run, None, wire_bytes=32)
    assert withheld.states() == [State.COPIED] * 8
    assert withheld.memory.there == {}


def test_faults_are_not_answered_and_come_again(withheld: Filled) -> None:
    withheld.arrive(withheld.ask(0, 4))
    withheld.touch(2, 6)
    assert withheld.asked == []
    assert withheld.memory.settled == []
    assert withheld.states()[6] is State.MISSING
    assert withheld.filling.statistics().demand.faults == 0
    withheld.filling.keep_copied()
    withheld.filling.withhold(False)
    withheld.filling.read_events()
    assert withheld.memory.there == {2: content(2)}
    assert withheld.demanded == [6]
    withheld.arrive(Run(6, 1), DEMAND)
    assert not withheld.memory.waiting
    assert withheld.filling.statistics().demand.faults == 2


def test_stale_pages_are_missing_again_and_no_others(withheld: Filled) -> None:
    withheld.arrive(withheld.ask(0, 6))
    drop(withheld, 1, 4, 7)  # 7 has never come
    missing, copied = State.MISSING, State.COPIED
    assert withheld.states() == [copied, missing, copied, copied, missing, copied, missing, missing]
    background = withheld.filling.statistics().background
    assert (background.pages, background.dropped) == (4, 2)
    drop(withheld, 1, 4)
    assert withheld.filling.statistics().background.dropped == 2


def test_stale_page_comes_again_and_its_last_version_is_seen(withheld: Filled) -> None:
    withheld.arrive(withheld.ask(0, 8))
    drop(withheld, 3, 5)
    newer = bytes([77]) * PAGE
    run = withheld.ask(3, 1)
    withheld.filling.arrived(BACKGROUND, run, memoryview(newer), wire_bytes=100)
    release(withheld)
    assert withheld.states()[3:6] == [State.RESIDENT, State.RESIDENT, State.MISSING]
    withheld.touch(3, 4, 5)
    assert withheld.memory.there == {3: newer, 4: content(4)}
    assert withheld.demanded == [5], "only what was stale is fetched after the freeze"
    withheld.arrive(Run(5, 1), DEMAND)
    assert withheld.filling.completed.is_set()


def test_only_copied_pages_are_stale(withheld: Filled) -> None:
    """In a map that its owner has written to, or for a source that names what it has not sent."""
    states = list(State)
    for page, state in enumerate(states[:8]):
        withheld.filling.residency.set(Run(page, 1), state)
    drop(withheld, *range(8))
    assert withheld.states() == [
        State.MISSING if state is State.COPIED else state for state in states[:8]
    ]


def test_page_that_was_given_up_is_not_stale(withheld: Filled) -> None:
    withheld.arrive(withheld.ask(0, 8))
    withheld.memory.give_up(Run(2, 1))
    withheld.filling.read_events()
    drop(withheld, 2, 3)
    release(withheld)
    assert withheld.states()[2:4] == [State.REMOVED, State.MISSING]
    withheld.touch(2)
    assert withheld.memory.there == {2: bytes(PAGE)}


def test_page_that_was_given_up_while_it_was_in_flight(withheld: Filled) -> None:
    run = withheld.ask(0, 3)
    withheld.memory.give_up(Run(1, 1))
    withheld.filling.read_events()
    withheld.arrive(run)
    assert withheld.states()[:3] == [State.COPIED, State.REMOVED, State.COPIED]


def test_pages_placed_after_the_freeze_are_visible(withheld: Filled) -> None:
    withheld.arrive(withheld.ask(0, 4))
    release(withheld)
    withheld.arrive(withheld.ask(4, 4))
    assert withheld.memory.there == {page: content(page) for page in range(4, 8)}
    assert withheld.filling.completed.is_set()


def test_bits_behind_the_last_page_mean_nothing(withheld: Filled) -> None:
    withheld.arrive(withheld.ask(0, 8))
    region = withheld.filling.region
    withheld.filling.drop_stale(region, 0, b"\x80" + b"\xff" * 1000)
    assert withheld.states() == [*[State.COPIED] * 7, State.MISSING]
    withheld.filling.drop_stale(region, 6, b"\xfd")
    assert withheld.states() == [*[State.COPIED] * 6, State.MISSING, State.MISSING]
    withheld.filling.drop_stale(region, 7, b"\xff")
    withheld.filling.drop_stale(region, 8, b"\xff")
    withheld.filling.drop_stale(region, 2**64 - 1, b"\xff")
    assert withheld.states() == [*[State.COPIED] * 6, State.MISSING, State.MISSING]


# three pages, two huge ones, and five pages; on the wire all of them are small
OWNERS = Region([Block("a", 3 * PAGE), Block("b", 4 << 20, 2 << 20), Block("c", 5 * PAGE)])
WIRE = Region([Block("a", 3 * PAGE), Block("b", 4 << 20), Block("c", 5 * PAGE)])


def with_larger_pages() -> Filled:
    memory = FakeSharedMemory()
    memory.region = OWNERS
    memory._scope = [Run(0, 3), Run(3, 2), Run(5, 5)]
    filled = Filled(memory)
    filled.filling.withhold(True)
    filled.filling.residency.set(Run(0, 10), State.COPIED)
    return filled


def missing(filled: Filled) -> set[int]:
    return {page for page, state in enumerate(filled.states()) if state is State.MISSING}


@pytest.mark.parametrize(
    ("stale", "owners"),
    [
        ([0, 2], {0, 2}),
        ([3], {3}),
        ([514], {3}),
        ([515], {4}),
        ([1026], {4}),
        ([514, 515], {3, 4}),
        (range(3, 1027), {3, 4}),
        ([1027, 1031], {5, 9}),
        (range(1032), set(range(10))),
    ],
)
def test_owners_pages_that_are_larger_than_the_wires(
    stale: Sequence[int], owners: set[int]
) -> None:
    """One page that has changed makes all of a huge page stale."""
    filled = with_larger_pages()
    filled.filling.drop_stale(WIRE, 0, bits_of(*stale, size=129))
    assert missing(filled) == owners
    assert filled.filling.statistics().background.dropped == len(owners)


@given(st.sets(st.integers(0, 1031)), st.lists(st.integers(0, 1031), max_size=4))
def test_stale_pages_in_any_pieces(stale: set[int], cuts: list[int]) -> None:
    """A piece may begin in the middle of a byte, a huge page, or a block."""
    filled = with_larger_pages()
    all_ = sum(1 << page for page in stale)
    ends = sorted({0, *cuts, 1032})
    for first, end in pairwise(ends):
        part = all_ >> first & (1 << end - first) - 1
        filled.filling.drop_stale(WIRE, first, part.to_bytes(-(-(end - first) // 8), "little"))
    owners = {
        page if page < 3 else 3 + (page - 3) // 512 if page < 1027 else page - 1022
        for page in stale
    }
    assert missing(filled) == owners


# ---- latency ----


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1_000_000)
    time = SimpleNamespace(monotonic_ns=lambda: clock.now, monotonic=lambda: clock.now / 1e9)
    monkeypatch.setattr("pagenet.destination.filling.time", time)
    return clock


def test_latency_is_from_the_first_fault_to_the_placing(clock: SimpleNamespace) -> None:
    filled = make_filled()
    filled.touch(1)
    clock.now += 100_000
    filled.touch(1)
    clock.now += 100_000
    filled.arrive(Run(1, 1), DEMAND)
    latency = filled.filling.statistics().fault_latency
    assert latency.count == 1
    assert latency.microseconds(0.5) == pytest.approx(200, rel=0.07)
    filled.arrive(filled.ask(2, 6))
    assert filled.filling.statistics().fault_latency.count == 1, "nobody waited for those"


def test_latency_of_each_page_of_a_run(clock: SimpleNamespace) -> None:
    filled = make_filled(64)
    run = filled.ask(0, 60)
    filled.touch(*range(10, 50))
    filled.touch(60)
    clock.now += 1_000_000
    filled.arrive(run)
    assert filled.filling.statistics().fault_latency.count == 40
    assert filled.filling.waiting_faults == 1


def test_removed_page_has_no_latency(clock: SimpleNamespace) -> None:
    filled = make_filled()
    filled.touch(1)
    filled.memory.give_up(Run(1, 1))
    filled.filling.read_events()
    filled.arrive(Run(1, 1), DEMAND)
    assert filled.filling.statistics().fault_latency.count == 0


# ---- any order ----

_PAGES = 6
_runs = st.tuples(st.integers(0, _PAGES - 1), st.integers(1, _PAGES)).map(
    lambda t: Run(t[0], min(t[1], _PAGES - t[0]))
)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("touch"), st.integers(0, _PAGES - 1)),
        st.tuples(st.just("read"), st.none()),
        st.tuples(st.just("ask"), _runs),
        st.tuples(st.just("arrive"), st.integers(0, 9)),
        st.tuples(st.just("give up"), _runs),
        st.tuples(st.just("give up while placing"), _runs),
        st.tuples(st.just("prefetch"), st.tuples(st.integers(0, 3), st.integers(0, 3))),
    ),
    max_size=40,
)


class Play:
    """Steps in any order, and then the end of all that is outstanding."""

    def __init__(self) -> None:
        self.filled = make_filled(_PAGES)
        self.outstanding: list[tuple[Class, Run]] = []
        self.asked: list[tuple[Class, int]] = []
        self.interruptions: list[Run] = []
        self.filled.memory.before_placing = self.interrupt

    def ask(self, class_: Class, run: Run) -> None:
        assert run.count
        self.outstanding.append((class_, run))
        self.asked += [(class_, page) for page in range(run.first, run.end)]

    def interrupt(self, page: int) -> None:
        if self.interruptions:
            self.filled.memory.give_up(self.interruptions.pop())

    def step(self, what: str, argument: object) -> None:
        memory, filling = self.filled.memory, self.filled.filling
        match what, argument:
            case "touch", int(page):
                memory.touch(page)
            case "read", _:
                filling.read_events()
            case "ask", Run() as run:
                for part in filling.claim(run):
                    self.ask(BACKGROUND, part)
            case "arrive", int(index) if self.outstanding:
                class_, run = self.outstanding.pop(index % len(self.outstanding))
                self.filled.arrive(run, class_)
            case "prefetch", (int(forward), int(backward)):
                filling.prefetch = (forward, backward)
            case "give up", Run() as run:
                memory.give_up(run)
            case "give up while placing", Run() as run:
                self.interruptions.append(run)
        for wanted in filling.take_wanted():
            self.ask(*wanted)
        assert filling.completed.is_set() == filling.residency.complete

    def finish(self) -> None:
        self.step("read", None)
        for page in range(_PAGES):
            self.step("ask", Run(page, 1))
        while self.outstanding:
            self.step("arrive", 0)
        self.step("read", None)


@given(_steps)
def test_any_order(steps: list[tuple[str, object]]) -> None:
    play = Play()
    for what, argument in steps:
        play.step(what, argument)
    play.finish()
    memory, filling = play.filled.memory, play.filled.filling
    assert filling.completed.is_set()
    assert not memory.waiting, "a thread was forgotten"
    assert filling.waiting_faults == 0
    for page in range(_PAGES):
        if page in memory.removed:
            assert memory.there.get(page, bytes(PAGE)) == bytes(PAGE)
        else:
            assert memory.there[page] == content(page)
    once = {class_: [page for asked, page in play.asked if asked is class_] for class_ in Class}
    for pages in (once[DEMAND] + once[PREFETCH], once[BACKGROUND]):
        assert len(pages) == len(set(pages)), "a page was asked for twice"
    for class_ in Class:
        came = filling.residency.statistics(class_)
        assert came.pages + came.dropped == len(once[class_])
    filling.close()
