"""How much is in flight, and at which rate: native/pace.c on a simulated link, in virtual time.
Nothing here depends on how fast the machine is."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from math import log
from random import Random

import pytest

from pagenet._native._declarations import pn_pace, pn_pace_shared
from pagenet._native._library import ffi, lib, new_struct

PAGE = 4096
MS = 1_000_000  # ns
SECOND = 1000 * MS
DEMAND, PREFETCH, BACKGROUND = lib.PN_DEMAND, lib.PN_PREFETCH, lib.PN_BACKGROUND
TUNABLES = lib.pn_tunables
NARROW, WIDE = 64 * PAGE, 256 * PAGE


@dataclass
class Link:
    """Two loops of one destination (demand, background) at the end of a link with a rate (bytes a
    second) and a round trip. The source answers in the order in which it was asked."""

    rate: int = 125_000_000
    trip: int = MS // 5
    window: tuple[int, int, int] = (TUNABLES.window_least, TUNABLES.window_min, TUNABLES.window_max)
    chunk: int = 256 << 10
    limit: int = 0
    #: ns of the source's processor for each request
    request: int = 0
    #: the source loses a time slice of 3 ms before one request in that many; 0: never
    loses: int = 0
    #: whether pages around those that are waited for are prefetched
    prefetches: bool = False
    now: int = 10 * SECOND
    shared: pn_pace_shared = field(default_factory=lambda: new_struct(pn_pace_shared))
    #: (time, number, what) of what is in flight, to the source or from it
    _events: list[tuple[int, int, tuple[int, int, int, int]]] = field(default_factory=list)
    _number: int = 0
    _free: int = 0
    came: dict[int, int] = field(
        default_factory=lambda: dict.fromkeys((DEMAND, PREFETCH, BACKGROUND), 0)
    )
    #: (time, bytes) of background that was asked for
    asked: list[tuple[int, int]] = field(default_factory=list)
    largest: int = 0

    def __post_init__(self) -> None:
        self._slices = Random(2)
        self.demand, self.background = self._pace(), self._pace()
        self.set_limit(self.limit)

    def _pace(self) -> pn_pace:
        pace = new_struct(pn_pace)
        pace.window_least, pace.window_min, pace.window_max = self.window
        pace.chunk = self.chunk
        lib.pn_pace_init(pace, self.shared)
        return pace

    def set_limit(self, rate: int) -> None:
        lib.pn_pace_limit(self.shared, rate, self.now)

    @property
    def in_flight(self) -> int:
        return int(self.background.background.in_flight)

    def ask(self, class_: int, size: int) -> None:
        """``size`` bytes are on the wire after half a round trip, one request after the other, and
        at the destination after the other half."""
        lib.pn_pace_sent(self.background if class_ == BACKGROUND else self.demand, class_, size)
        start = max(self.now + self.trip // 2, self._free) + self.request
        if self.loses and not self._slices.randrange(self.loses):
            start += 3 * MS
        self._free = start + size * SECOND // self.rate
        first = start + self.trip // 2 - self.now
        self._number += 1
        heapq.heappush(
            self._events,
            (self._free + self.trip // 2, self._number, (class_, size, self.now, first)),
        )

    def feed(self) -> int:
        """The background asks for what it may. Returns the ns until it may ask again by its
        rate."""
        lib.pn_pace_look(self.background, self.now, self.prefetches)
        wait = ffi.new("uint64_t *", 2**64 - 1)
        while lib.pn_pace_room(self.background, BACKGROUND):
            wanted = lib.pn_pace_request_pages(self.background, PAGE) * PAGE
            granted = lib.pn_pace_grant(self.shared, self.now, wanted, PAGE, wait)
            if not granted:
                break
            self.asked.append((self.now, granted))
            self.ask(BACKGROUND, granted)
        self.largest = max(self.largest, self.in_flight)
        return int(wait[0])

    def step(self, until: int) -> bool:
        """Feed the background, and go on to the next event. Returns False if there is none before
        ``until``."""
        again = self.now + self.feed()
        due = self._events[0][0] if self._events else 2**64
        if min(due, again) > until:
            self.now = until
            return False
        self.now = min(due, again)
        if due <= again:
            self._take(*heapq.heappop(self._events)[2])
        return True

    def _take(self, class_: int, size: int, asked: int, first: int) -> None:
        pace = self.background if class_ == BACKGROUND else self.demand
        if class_ == BACKGROUND:
            lib.pn_pace_response(pace, first, size)
        if class_ == DEMAND:
            lib.pn_pace_in_place(self.shared, self.now - asked)
            lib.pn_pace_waited(pace, self.now - asked, self.now)
        lib.pn_pace_wire(pace, class_, size, size)
        lib.pn_pace_came(pace, class_, size, self.now)
        self.came[class_] += size

    def run(self, time: int) -> None:
        until = self.now + time
        while self.step(until):
            pass

    def touch(self) -> int:
        """A thread touches a missing page. Returns for how many ns it waits."""
        began, before = self.now, self.came[DEMAND]
        lib.pn_pace_faulted(self.shared, self.now)
        self.ask(DEMAND, PAGE)
        while self.came[DEMAND] == before:
            self.step(2**63)
        return self.now - began

    def touches(self, count: int, pause: int = 0) -> list[int]:
        """``count`` touches, one after the other, with ``pause`` ns between them."""
        found = []
        for _ in range(count):
            found.append(self.touch())
            self.run(pause)
        return found


def test_background_stays_in_its_window_before_the_first_reply() -> None:
    link = Link(window=(NARROW, NARROW, WIDE))
    lib.pn_pace_faulted(link.shared, link.now)
    link.feed()
    assert link.in_flight == NARROW


def test_window_opens_while_nobody_faults_and_closes_again() -> None:
    link = Link(window=(NARROW, NARROW, WIDE), limit=2**64 - 1)
    link.touch()  # from here on it is known how long a page takes at best
    link.set_limit(0)
    link.run(SECOND)
    assert link.largest == WIDE
    link.touch()
    asked = len(link.asked)
    while link.in_flight > NARROW:
        assert len(link.asked) == asked, "asked for more than the closed window has room for"
        assert link.step(2**63)
    link.touches(60, 5 * MS)
    assert link.background.search.window == NARROW
    link.largest = 0
    link.touches(20, 5 * MS)
    assert link.largest <= 2 * NARROW + NARROW // 2, "a trial at most, and one request"


def test_window_holds_what_a_long_path_holds() -> None:
    """A guest that only waits, with a round trip of 20 ms: the smallest window would be asked for
    once in each round trip."""
    link = Link(trip=20 * MS, window=(NARROW, NARROW, WIDE))
    link.touches(100)
    assert link.largest == WIDE


def test_who_only_waits_finds_little_before_its_page_on_a_near_path() -> None:
    link = Link(trip=MS // 10)
    link.touches(400)
    late = link.touches(100)
    alone = MS // 10 + PAGE * SECOND // link.rate
    path = int(link.rate * 1.5 * link.shared.best / SECOND)
    assert link.background.starved
    assert max(late) <= alone + (max(path, link.window[0]) + link.chunk // 2) * SECOND // link.rate


@pytest.mark.parametrize(("waits", "prefetches"), [(True, True), (True, False), (False, True)])
def test_background_that_is_held_to_a_rate_leaves_the_link_to_who_waits(
    waits: bool, prefetches: bool
) -> None:
    """Only beside an owner that waits, and only if something is prefetched. At this rate, 0.15 ms
    of it are less than a page."""
    link = Link(
        trip=20 * MS, limit=80 * PAGE * 50, prefetches=prefetches, window=(NARROW, NARROW, WIDE)
    )
    link.shared.best = MS // 10
    link.demand.demand.window = 0
    lib.pn_pace_faulted(link.shared, link.now)
    link.background.waiting = 0.5 if waits else 0.0
    link.background.looked = link.now
    lib.pn_pace_look(link.background, link.now, prefetches)
    window = link.background.background.window
    assert window <= 8 * PAGE if waits and prefetches else window >= 32 * PAGE


def test_who_only_waits_gets_more_at_a_time_where_the_background_leaves_room() -> None:
    def window(limit: int) -> int:
        pace, shared = new_struct(pn_pace), new_struct(pn_pace_shared)
        lib.pn_pace_init(pace, shared)
        lib.pn_pace_limit(shared, limit, 10 * SECOND)
        now = 10 * SECOND
        for number in range(500):
            latency = 4 * MS if number > 20 else MS // 10
            now += latency
            lib.pn_pace_wire(pace, PREFETCH, 64 * PAGE, 64 * PAGE)
            lib.pn_pace_in_place(shared, latency)
            lib.pn_pace_waited(pace, latency, now)
        return int(lib.pn_pace_room(pace, PREFETCH))

    assert 4 << 10 <= window(0) <= 16 << 10
    assert window(0) < window(1 << 30) <= 64 << 10


def test_window_of_what_is_prefetched_grows_while_pages_come_as_fast_as_at_best() -> None:
    link = Link()
    lib.pn_pace_limit(link.shared, 2**64 - 1, link.now)
    link.touches(200)
    assert link.demand.demand.window == TUNABLES.prefetch_most
    link.set_limit(0)
    for _ in range(100):
        lib.pn_pace_waited(link.demand, 3 * int(link.shared.best), link.now)
    assert link.demand.demand.window == TUNABLES.prefetch_least


# ---- the search for the window ----


def move(link: Link, size: int, work: int) -> tuple[int, int]:
    """An owner touches random pages of a memory of ``size`` bytes, each after ``work`` ns, until
    all of it has come: ns that it waited, and ns in all."""
    pick, began, stall = Random(1), link.now, 0
    while (missing := size - sum(link.came.values())) > 0:
        touches = int(log(1 - pick.random()) / log(1 - min(missing / size, 0.999999))) + 1
        link.run(min(touches * work, SECOND // 100) if work else 0)
        if work and touches * work > SECOND // 100:
            continue
        stall += link.touch()
    return stall, link.now - began


LADDER = [1 << shift for shift in range(14, 25)]


@pytest.mark.parametrize("work", [0, MS // 20], ids=["waits", "works"])
@pytest.mark.parametrize("trip", [MS // 20, MS, 20 * MS], ids=["near", "1 ms", "20 ms"])
@pytest.mark.parametrize("rate", [12_500_000, 125_000_000, 1_250_000_000])
def test_window_is_as_good_as_the_best_of_a_ladder(rate: int, trip: int, work: int) -> None:
    """Except for the time that learning takes: the window doubles in each round trip."""
    size = max(16 << 20, rate // 2)
    learning = 12 * trip + 50 * MS

    def moved(least: int, low: int, most: int) -> tuple[int, int]:
        return move(Link(rate, trip, window=(least, low, most)), size, work)

    ours = moved(TUNABLES.window_least, TUNABLES.window_min, TUNABLES.window_max)
    ladder = [moved(window, window, window) for window in LADDER]
    for mine, best in zip(
        ours, (min(figures) for figures in zip(*ladder, strict=True)), strict=True
    ):
        assert mine <= 1.05 * best + learning


@pytest.mark.parametrize("work", [0, MS // 20], ids=["waits", "works"])
@pytest.mark.parametrize("loses", [0, 300], ids=["busy", "busy, and loses time slices"])
def test_window_where_requests_cost_more_than_the_path(loses: int, work: int) -> None:
    """As over loopback: the window is larger than what the path holds."""

    def moved(least: int, low: int, most: int) -> int:
        window = (least, low, most)
        link = Link(1_500_000_000, MS // 20, window, request=MS // 25, loses=loses)
        return move(link, 256 << 20, work)[0]

    ours = moved(TUNABLES.window_least, TUNABLES.window_min, TUNABLES.window_max)
    ladder = {window: moved(window, window, window) for window in LADDER}
    assert ours <= 1.25 * min(ladder.values()) + 30 * MS
    assert ours < ladder[128 << 10], "about what the path holds, and what a request costs"


def test_window_follows_a_path_that_changes() -> None:
    link = Link(trip=MS)

    def window_at(rate: int) -> float:
        """As multiples of what the path holds."""
        link.rate = rate
        until = link.now + 3 * SECOND
        while link.now < until:
            link.touch()
            link.run(MS // 10)
        return float(link.background.search.window * SECOND / (rate * link.trip))

    assert 0.5 <= window_at(125_000_000) <= 6
    assert 0.5 <= window_at(1_250_000_000) <= 6
    assert 0.5 <= window_at(12_500_000) <= 40, "as little as samples can tell apart at that rate"
    assert 0.5 <= window_at(125_000_000) <= 6


# ---- rates ----


@pytest.mark.parametrize("lost", [0, 20 * MS], ids=["on time", "20 ms lost every 100"])
def test_rate_is_kept_smoothly(lost: int) -> None:
    """A loop that gets no processor for a while makes up for it, and no 10 ms see twice the
    rate."""
    rate = 8_000_000
    link = Link(limit=rate)
    for _ in range(20):
        link.run(100 * MS - lost)
        link.now += lost
    link.run(50 * MS)
    first, last = link.asked[0][0], link.asked[-1][0]
    total = sum(size for _, size in link.asked)
    assert 0.99 <= total / (rate * (last - first) / SECOND) <= 1.01
    for start, _ in link.asked:
        within = sum(size for at, size in link.asked if start <= at < start + 10 * MS)
        assert within <= 2 * rate * 10 * MS / SECOND


def test_rate_changes_while_it_runs() -> None:
    link = Link(limit=4_000_000)
    link.run(SECOND)
    slow = sum(size for _, size in link.asked)
    link.asked.clear()
    link.set_limit(20_000_000)
    link.run(SECOND)
    assert sum(size for _, size in link.asked) == pytest.approx(5 * slow, rel=0.02)


def test_a_rate_that_was_next_to_nothing_is_forgotten() -> None:
    """At a byte a second, the page that was asked for last would have been paid for an hour
    later."""
    link = Link(limit=1)
    link.run(SECOND)
    assert [size for _, size in link.asked] == [PAGE]
    link.set_limit(200_000_000)
    before = link.now
    link.feed()
    assert link.asked[-1][0] == before


def test_no_background_at_all() -> None:
    link = Link(limit=2**64 - 1)
    link.run(SECOND)
    assert link.asked == []
    assert link.feed() == 2**64 - 1, "it looks again when it is told to"


def test_what_takes_nothing_on_the_wire_does_not_count() -> None:
    shared, wait = new_struct(pn_pace_shared), ffi.new("uint64_t *")
    now = 10 * SECOND
    lib.pn_pace_limit(shared, 1_000_000, now)
    granted = lib.pn_pace_grant(shared, now, 1 << 20, PAGE, wait)
    assert not lib.pn_pace_grant(shared, now, PAGE, PAGE, wait)
    lib.pn_pace_refund(shared, granted)
    assert lib.pn_pace_grant(shared, now, PAGE, PAGE, wait) == PAGE


# ---- the wire ----


def test_zeros_take_little_room_and_bytes_take_it_back_at_once() -> None:
    link = Link()
    pace = link.background
    window = int(lib.pn_pace_room(pace, BACKGROUND))
    for expected in (2, 4, 8, 16, 16):
        assert lib.pn_pace_wire(pace, BACKGROUND, 64 * PAGE, 24) == 64 * PAGE - 24
        assert lib.pn_pace_room(pace, BACKGROUND) == expected * window
    assert lib.pn_pace_wire(pace, BACKGROUND, PAGE, PAGE + 24) == 0
    assert lib.pn_pace_room(pace, BACKGROUND) == window


def test_what_is_waited_for_always_has_room() -> None:
    link = Link()
    lib.pn_pace_sent(link.demand, DEMAND, 1 << 30)
    assert lib.pn_pace_room(link.demand, DEMAND) == 2**64 - 1
    assert lib.pn_pace_room(link.demand, PREFETCH) == 0
    lib.pn_pace_came(link.demand, DEMAND, 1 << 30, link.now)
    assert lib.pn_pace_room(link.demand, PREFETCH) == TUNABLES.prefetch_least


def test_one_loop_for_both_flows_keeps_them_apart() -> None:
    """As in the loop over RDMA."""
    pace = Link().background
    lib.pn_pace_sent(pace, PREFETCH, PAGE)
    lib.pn_pace_sent(pace, BACKGROUND, 3 * PAGE)
    assert (pace.demand.in_flight, pace.background.in_flight) == (PAGE, 3 * PAGE)
    lib.pn_pace_came(pace, BACKGROUND, 3 * PAGE, 10 * SECOND)
    lib.pn_pace_came(pace, PREFETCH, PAGE, 10 * SECOND)
    assert (pace.demand.in_flight, pace.background.in_flight) == (0, 0)


def test_spins_only_with_processors_to_spare() -> None:
    assert [lib.pn_pace_spin(count) for count in (1, 2, 3, 4)] == [0, 0, 0, TUNABLES.spin_ns]
