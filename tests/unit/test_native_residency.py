"""native/residency.c: the map of pages, alone and under several threads. A list of states is the
oracle."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagenet._pagenet import ffi, lib

pytestmark = pytest.mark.native

MISSING, REQUESTED, PLACING, RESIDENT, REMOVED, OUTSIDE, POISONED = STATES = range(7)
DONE = {RESIDENT, REMOVED, POISONED}
THREADS = 4


class Map:
    """A map of exactly its size, so that a sanitizer sees a step beyond it."""

    def __init__(self, pages: int, states: list[int] | None = None) -> None:
        self._memory = ffi.new("char[]", lib.pn_map_bytes(pages))
        self.map: Any = ffi.cast("struct pn_map *", self._memory)
        lib.pn_map_init(self.map, pages)
        for page, state in enumerate(states or []):
            lib.pn_map_set(self.map, page, 1, state)

    @property
    def states(self) -> list[int]:
        return [lib.pn_map_state(self.map, page) for page in range(self.map.pages)]

    def check_counts(self) -> None:
        states = self.states
        assert lib.pn_map_done(self.map) == self.map.done == sum(state in DONE for state in states)
        assert self.map.scope == sum(state != OUTSIDE for state in states)


def in_threads(work: Callable[[int], None]) -> None:
    """Run ``work(0)`` to ``work(THREADS - 1)`` at the same time. cffi drops the GIL around each
    call, so they do overlap."""
    start = threading.Barrier(THREADS)
    failures: list[BaseException] = []

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_states_are_those_of_the_header() -> None:
    names = ["MISSING", "REQUESTED", "PLACING", "RESIDENT", "REMOVED", "OUTSIDE", "POISONED"]
    assert [getattr(lib, f"PN_{name}") for name in names] == list(STATES)


@pytest.mark.parametrize("pages", [1, 7, 8, 9, 1000])
def test_new_map_is_all_missing(pages: int) -> None:
    new = Map(pages)
    assert new.states == [MISSING] * pages
    assert bytes(ffi.buffer(new.map.magic)) == bytes(8)
    lib.pn_map_publish(new.map)
    assert bytes(ffi.buffer(new.map.magic)) == b"pagenet4"
    assert (new.map.pages, new.map.scope, new.map.done) == (pages, pages, 0)


def test_claim_takes_all_that_match() -> None:
    pages = Map(10)
    assert lib.pn_map_claim(pages.map, 2, 5, MISSING, REQUESTED) == 5
    assert pages.states == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]


def test_claim_stops_at_the_first_mismatch() -> None:
    pages = Map(6, [0, 0, 1, 0, 0, 0])
    assert lib.pn_map_claim(pages.map, 0, 6, MISSING, PLACING) == 2
    assert pages.states == [2, 2, 1, 0, 0, 0]
    assert lib.pn_map_claim(pages.map, 2, 4, MISSING, PLACING) == 0
    assert pages.states == [2, 2, 1, 0, 0, 0]


def test_claim_of_nothing() -> None:
    pages = Map(1)
    assert lib.pn_map_claim(pages.map, 1, 0, MISSING, REQUESTED) == 0
    assert pages.states == [MISSING]


def test_replace_passes_over_mismatches() -> None:
    pages = Map(6, [1, 0, 1, 3, 1, 1])
    assert lib.pn_map_replace(pages.map, 0, 5, REQUESTED, MISSING) == 3
    assert pages.states == [0, 0, 0, 3, 0, 1]


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
@pytest.mark.parametrize("call", ["set", "claim", "replace"])
def test_every_transition_is_counted(before: int, after: int, call: str) -> None:
    pages = Map(3, [before, before, before])
    if call == "set":
        lib.pn_map_set(pages.map, 1, 1, after)
    else:
        assert getattr(lib, f"pn_map_{call}")(pages.map, 1, 1, before, after) == 1
    assert pages.states == [before, after, before]
    pages.check_counts()


def find_in(states: list[int], first: int, end: int, state: int) -> int:
    return next((page for page in range(first, end) if states[page] == state), end)


def span_in(states: list[int], first: int, end: int, state: int) -> int:
    return len(list(itertools.takewhile(lambda found: found == state, states[first:end])))


@pytest.mark.parametrize("needle", range(20))
def test_find_and_span_at_every_edge(needle: int) -> None:
    """The search goes in steps of eight: 20 pages have every alignment of first, end and needle to
    a step."""
    states = [MISSING] * 20
    states[needle] = RESIDENT
    pages = Map(20, states)
    for first, end in itertools.combinations_with_replacement(range(21), 2):
        assert lib.pn_map_find(pages.map, first, end, RESIDENT) == find_in(
            states, first, end, RESIDENT
        )
        assert lib.pn_map_span(pages.map, first, end, MISSING) == span_in(
            states, first, end, MISSING
        )


def test_find_and_span_of_what_is_not_there() -> None:
    pages = Map(20)
    assert lib.pn_map_find(pages.map, 3, 20, POISONED) == 20
    assert lib.pn_map_span(pages.map, 3, 20, POISONED) == 0


any_state = st.sampled_from(STATES)
# call, first page, pages (cut at the map's end), the state to change from (ignored by set), the
# state to change to
steps = st.tuples(
    st.sampled_from(["set", "claim", "replace"]),
    st.integers(0, 23),
    st.integers(0, 24),
    any_state,
    any_state,
)


def apply_to_list(
    states: list[int], call: str, first: int, count: int, from_: int, to: int
) -> int | None:
    affected = range(first, first + count)
    if call == "claim":
        affected = affected[: span_in(states, first, first + count, from_)]
    changed = [page for page in affected if call == "set" or states[page] == from_]
    for page in changed:
        states[page] = to
    return None if call == "set" else len(changed)


@given(st.lists(steps, max_size=30))
def test_any_sequence_against_the_oracle(sequence: list[tuple[str, int, int, int, int]]) -> None:
    pages, oracle = Map(24), [MISSING] * 24
    for call, first, wanted, from_, to in sequence:
        count = min(wanted, 24 - first)
        expected = apply_to_list(oracle, call, first, count, from_, to)
        states = (to,) if call == "set" else (from_, to)
        assert getattr(lib, f"pn_map_{call}")(pages.map, first, count, *states) == expected
    assert pages.states == oracle
    pages.check_counts()
    for state in STATES:
        assert lib.pn_map_find(pages.map, 0, 24, state) == find_in(oracle, 0, 24, state)


def test_no_page_is_claimed_twice() -> None:
    """Each thread claims all pages that are left, until another thread is faster with a page, and
    then goes on behind that page: so all threads are at the same page all the time."""
    size = 500_000
    pages = Map(size)
    won: list[list[range]] = [[] for _ in range(THREADS)]

    def claim_all(number: int) -> None:
        page = 0
        while page < size:
            taken = lib.pn_map_claim(pages.map, page, size - page, MISSING, REQUESTED)
            won[number].append(range(page, page + taken))
            page = lib.pn_map_find(pages.map, page + taken, size, MISSING)

    in_threads(claim_all)
    claimed = sorted((run.start, run.stop) for run in itertools.chain.from_iterable(won) if run)
    assert [0, *(stop for _, stop in claimed)] == [*(start for start, _ in claimed), size]
    assert lib.pn_map_span(pages.map, 0, size, REQUESTED) == size


def test_no_page_is_replaced_twice() -> None:
    """A thread that lags behind has less to do for each page, and catches up: all threads are at
    the same page all the time."""
    size = 1_000_000
    pages = Map(size)
    won = [0] * THREADS

    def replace_all(number: int) -> None:
        won[number] = lib.pn_map_replace(pages.map, 0, size, MISSING, REQUESTED)

    in_threads(replace_all)
    assert sum(won) == size


def test_counts_stay_exact_under_contention() -> None:
    """Runs that overlap, of every kind of call and into every state."""
    size = 20_000
    pages = Map(size)

    def change(number: int) -> None:
        chance = random.Random(number)
        for _ in range(100):
            first = chance.randrange(size)
            from_, to = chance.choices(STATES, k=2)
            lib.pn_map_set(pages.map, first, (size - first) // 4, to)
            lib.pn_map_claim(pages.map, first, size - first, to, from_)
            lib.pn_map_replace(pages.map, first, size - first, from_, to)

    in_threads(change)
    pages.check_counts()


def test_statistics_add_up_per_class_and_counter() -> None:
    pages = Map(1)
    for class_, counter in itertools.product(range(3), range(lib.PN_COUNTERS)):
        lib.pn_stats_add(pages.map, class_, counter, 10 * class_ + counter)
        lib.pn_stats_add(pages.map, class_, counter, 1 << 40)
    for class_ in range(3):
        counters = list(pages.map.classes[class_].counters)
        assert counters == [10 * class_ + counter + (1 << 40) for counter in range(lib.PN_COUNTERS)]


def test_statistics_lose_nothing_under_contention() -> None:
    pages = Map(1)

    def count(_: int) -> None:
        for value in range(2000):
            lib.pn_stats_add(pages.map, lib.PN_DEMAND, lib.PN_PAGES, 3)
            lib.pn_stats_latency(pages.map, lib.PN_DEMAND, value)

    in_threads(count)
    assert pages.map.classes[lib.PN_DEMAND].counters[lib.PN_PAGES] == THREADS * 2000 * 3
    assert sum(pages.map.classes[lib.PN_DEMAND].latency) == THREADS * 2000


def bucket_of(nanoseconds: int) -> int:
    """The bucket, as the header defines it."""
    if nanoseconds < 16:
        return nanoseconds
    octave = nanoseconds.bit_length() - 1
    return min(319, 8 * (octave - 2) + (nanoseconds >> octave - 3) % 8)


def bucket_found(nanoseconds: int) -> int:
    pages = Map(1)
    lib.pn_stats_latency(pages.map, lib.PN_PREFETCH, nanoseconds)
    assert sum(sum(pages.map.classes[class_].latency) for class_ in range(3)) == 1
    return list(pages.map.classes[lib.PN_PREFETCH].latency).index(1)


@pytest.mark.parametrize(
    ("nanoseconds", "bucket"),
    [
        (0, 0),
        (15, 15),
        (16, 16),
        (17, 16),
        (18, 17),
        (31, 23),
        (32, 24),
        (1 << 41, 312),
        ((1 << 42) - 1, 319),
    ],
)
def test_latency_bucket(nanoseconds: int, bucket: int) -> None:
    assert bucket_found(nanoseconds) == bucket_of(nanoseconds) == bucket


@pytest.mark.parametrize("nanoseconds", [1 << 42, 1 << 63, (1 << 64) - 1])
def test_latency_beyond_the_histogram_is_in_its_last_bucket(nanoseconds: int) -> None:
    assert bucket_found(nanoseconds) == 319


@given(st.integers(0, (1 << 64) - 1))
def test_latency_buckets_against_the_definition(nanoseconds: int) -> None:
    assert bucket_found(nanoseconds) == bucket_of(nanoseconds)


def test_latency_buckets_are_contiguous() -> None:
    """No bucket is skipped, and a larger value is never in a smaller bucket: percentiles may sum
    from the left."""
    found = [bucket_found(value) for value in range(5000)]
    assert found == sorted(found)
    assert set(found) == set(range(found[-1] + 1))
