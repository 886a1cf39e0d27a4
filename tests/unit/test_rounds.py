"""Precopy's rounds in virtual time: what each round names, when the owner is frozen, how many there
are, and what a hostile destination may say."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from pagenet import Block, Region, RemoteProtocolError, UsageError
from pagenet.protocol import MAX_STALE_BYTES, Message, Pause, Paused, Stale
from pagenet.source import precopy as policy
from pagenet.source.precopy import MAX_ROUNDS, Precopy, is_worth_another
from pagenet.source.rounds import Round, Rounds, _in_pages_of, _spans

PAGE, HUGE = 4096, 2 << 20
PAGES = 100
EVERYTHING = set(range(PAGES))


def region_of(pages: int = PAGES) -> Region:
    return Region([Block("ram", pages * PAGE)])


def bits_of(pages: Iterable[int], size: int = PAGES) -> bytearray:
    bits = bytearray(-(-size // 8))
    for page in pages:
        bits[page // 8] |= 1 << page % 8
    return bits


def pages_in(bits: bytes | bytearray, first: int = 0) -> set[int]:
    found = [at for at, byte in enumerate(bits) if byte]
    return {first + 8 * at + bit for at in found for bit in range(8) if bits[at] >> bit & 1}


class Writes:
    """A tracker of pages that a test says were written. ``steady``: those written before each scan
    beside them."""

    def __init__(self, region: Region | None = None) -> None:
        self.region = region or region_of()
        self.steady: set[int] = set()
        self.scans = 0
        self.checks = 0
        #: how often each page was written
        self.versions: Counter[int] = Counter()
        self._written: set[int] = set()

    def write(self, *pages: int) -> None:
        self._written.update(pages)
        self.versions.update(pages)

    def mark(self, bits: bytearray) -> None:
        self.scans += 1
        assert len(bits) == -(-self.region.pages // 8)
        for page in self._written | self.steady:
            bits[page // 8] |= 1 << page % 8
        self._written.clear()

    def check(self) -> None:
        self.checks += 1


class Peer:
    """A destination: what was sent to it, and, if ``rate`` (pages/s) is given, its answers.

    ``lacks``: the pages that it does not have.
    """

    def __init__(self, writes: Writes, rate: float | None = None) -> None:
        self.sent: list[Message] = []
        self.named: list[set[int]] = []
        self.lacks = set(EVERYTHING)
        #: the version of each page as it came
        self.versions: dict[int, int] = {}
        self._writes, self._rate = writes, rate
        self._parts: set[int] = set()
        self._number, self._paused = 1, False
        self._news = trio.Event()
        self.rounds = Rounds(writes.region, writes, self.send)

    async def send(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append(message)
        match message:
            case Pause():
                self._paused = True
            case Stale():
                self._hear(message)
        self._news.set()
        self._news = trio.Event()

    def _hear(self, stale: Stale) -> None:
        assert stale.round == self._number
        assert 0 < len(stale.bits) <= MAX_STALE_BYTES
        self._parts |= pages_in(stale.bits, stale.first)
        if not stale.more:
            self.named.append(self._parts)
            self.lacks |= self._parts
            self._parts, self._paused = set(), False
            self._number += 1

    def end_round(self, missing: int = 0) -> None:
        """Say that the round is over."""
        if not missing:
            self.lacks.clear()
        self.rounds.hear(Paused(self.rounds.number, missing))

    async def answer(self) -> None:
        """Bring pages at ``rate``, one after the other, until the owner is frozen."""
        assert self._rate is not None
        while not self.rounds.is_frozen:
            while self.lacks and not self._paused:
                with trio.move_on_after(1 / self._rate):
                    await self._news.wait()
                    continue
                page = self.lacks.pop()
                self.versions[page] = self._writes.versions[page]
            self.rounds.hear(Paused(self._number, len(self.lacks)))
            number = self._number
            while number == self._number:
                await self._news.wait()


@pytest.fixture(autouse=True)
def scans_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual time does not wait for a thread."""

    async def run(what: Callable[..., None], *args: bytearray) -> None:
        await trio.lowlevel.checkpoint()
        what(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run)


@pytest.fixture
def writes() -> Writes:
    return Writes()


@pytest.fixture
async def peer(writes: Writes) -> Peer:
    return Peer(writes)


def stales(peer: Peer) -> list[Stale]:
    return [message for message in peer.sent if isinstance(message, Stale)]


async def one_round(peer: Peer) -> Round:
    """End the round, look at it, and begin the next one."""
    peer.end_round()
    await peer.rounds.wait_over()
    last = await peer.rounds.look()
    await peer.rounds.next()
    return last


# ---- what a round names ----


async def test_next_round_brings_what_was_written(writes: Writes, peer: Peer) -> None:
    writes.write(3, 7, 99)
    assert (await one_round(peer)).left == 3
    assert peer.named == [{3, 7, 99}]
    assert stales(peer) == [Stale(1, 0, bytes(bits_of({3, 7, 99})), more=False, frozen=False)]
    assert peer.rounds.number == 2
    assert (await one_round(peer)).pages == 3
    assert peer.named[1] == set()


async def test_hot_pages_wait_for_the_end(writes: Writes, peer: Peer) -> None:
    """What was written in each of the last two rounds is not sent again; what was written in one of
    them is."""
    writes.steady = {1, 2}
    writes.write(10)
    first = await one_round(peer)
    writes.write(20)
    second = await one_round(peer)
    third = await one_round(peer)
    assert peer.named == [{1, 2, 10}, {20}, set()]
    assert [(one.pages, one.written, one.left) for one in (first, second, third)] == [
        (PAGES, 3, 3),
        (3, 3, 3),  # 1, 2 and 20
        (1, 2, 2),  # 1 and 2, which were not named, are still to be sent
    ]
    peer.end_round()
    await peer.rounds.pause()
    assert await peer.rounds.freeze() == 2
    assert peer.named[-1] == {1, 2}


async def test_page_that_cools_down_is_sent_again(writes: Writes, peer: Peer) -> None:
    writes.steady = {5}
    await one_round(peer)
    await one_round(peer)
    writes.steady = set()
    await one_round(peer)  # written in round 2, not in 3
    assert peer.named == [{5}, set(), {5}]
    await one_round(peer)
    assert peer.named[-1] == set()
    peer.end_round()
    assert await peer.rounds.freeze() == 0


async def test_page_that_is_written_in_every_other_round(writes: Writes, peer: Peer) -> None:
    for number in range(6):
        if not number % 2:
            writes.write(9)
        await one_round(peer)
    assert peer.named == [{9}, set()] * 3


async def test_freeze_names_what_was_written_last_and_what_was_kept(
    writes: Writes, peer: Peer
) -> None:
    writes.steady = {1}
    await one_round(peer)
    await one_round(peer)
    writes.steady = set()
    peer.end_round()
    await peer.rounds.pause()
    writes.write(50)  # after the pause, before the owner stands still
    assert await peer.rounds.freeze() == 2
    assert peer.named[-1] == {1, 50}
    assert [stale.frozen for stale in stales(peer)] == [False, False, True]
    assert peer.rounds.is_frozen
    assert writes.checks == writes.scans == 3, "each scan is checked"
    assert Pause() not in peer.sent, "the round was over"


async def test_look_before_the_freeze_loses_nothing(writes: Writes, peer: Peer) -> None:
    writes.write(4)
    peer.end_round()
    assert (await peer.rounds.look()).written == 1
    await peer.rounds.freeze()
    assert peer.named == [{4}]


async def test_two_looks_at_one_round(writes: Writes, peer: Peer) -> None:
    peer.end_round()
    writes.write(4)
    await peer.rounds.look()
    writes.write(6)
    assert (await peer.rounds.look()).written == 2
    await peer.rounds.next()
    assert peer.named == [{4, 6}]


async def test_freeze_with_nothing_written(peer: Peer) -> None:
    peer.end_round()
    assert await peer.rounds.freeze() == 0
    assert stales(peer) == [Stale(1, 0, bytes(1), more=False, frozen=True)]


async def test_freeze_when_what_was_written_is_not_known(writes: Writes, peer: Peer) -> None:
    """The destination is told before that is noticed; the caller must not let it go on."""
    peer.end_round()

    def fail() -> None:
        raise UsageError("something else is mapped there")

    writes.check = fail  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="something else"):
        await peer.rounds.freeze()
    assert stales(peer)[-1].frozen
    with pytest.raises(UsageError, match="something else"):
        await peer.rounds.look()


async def test_seconds_are_those_of_the_round(
    autojump_clock: MockClock, writes: Writes, peer: Peer
) -> None:
    await trio.sleep(3)
    first = await one_round(peer)
    await trio.sleep(0.5)
    second = await one_round(peer)
    assert (first.seconds, second.seconds) == (3, 0.5)
    assert (first.number, second.number) == (1, 2)


# ---- the pause ----


async def test_what_is_named_early_is_not_named_at_the_freeze(
    autojump_clock: MockClock, writes: Writes
) -> None:
    writes.steady = {1}
    async with answering(writes) as peer:
        with trio.move_on_after(0.5):
            await peer.rounds.wait_over()
        writes.write(2, 3)
        await peer.rounds.pause()
        await peer.rounds.name_early()
        assert peer.named == [{1, 2, 3}]
        writes.steady = set()
        writes.write(3, 4)
        lacks = peer.lacks | {3, 4}
        assert peer.sent[-1] == Pause()
        await peer.rounds.freeze()
        assert peer.named == [{1, 2, 3}, {3, 4}]
        assert peer.lacks == lacks
    assert trio.current_time() == 0.5


async def test_pause_in_the_middle_of_a_round(writes: Writes, peer: Peer) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.rounds.pause)
        await wait_all_tasks_blocked()
        assert peer.sent == [Pause()]
        peer.lacks = set(range(60, 100))
        peer.rounds.hear(Paused(1, 40))
    writes.write(1, 2)
    assert await peer.rounds.freeze() == 42
    assert peer.named == [{1, 2}]


async def test_pause_that_crosses_the_end_of_the_round(peer: Peer) -> None:
    """The destination ends the round before it hears that it is to."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.rounds.pause)
        await wait_all_tasks_blocked()
        peer.end_round()
    await peer.rounds.pause()
    assert peer.sent == [Pause()]
    assert await peer.rounds.freeze() == 0


async def test_round_that_was_ended_early_counts_what_is_missing(
    writes: Writes, peer: Peer
) -> None:
    writes.write(0)
    peer.end_round(missing=30)
    assert (await peer.rounds.look()).left == 31


# ---- what a hostile destination may say ----


@pytest.mark.parametrize(
    ("paused", "reason"),
    [
        (Paused(0, 0), "ends round 0, which is not the last"),
        (Paused(2, 0), "ends round 2, which is not the last"),
        (Paused(2**64 - 1, 0), "which is not the last"),
        (Paused(1, PAGES + 1), "misses 101 pages"),
        (Paused(1, 2**64 - 1), "misses 18446744073709551615 pages"),
    ],
)
async def test_hostile_paused(paused: Paused, reason: str, peer: Peer) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        peer.rounds.hear(paused)
    peer.rounds.hear(Paused(1, PAGES))  # which is not over because of that


async def test_paused_twice(peer: Peer) -> None:
    peer.end_round()
    with pytest.raises(RemoteProtocolError, match="ends round 1"):
        peer.rounds.hear(Paused(1, 0))


async def test_paused_of_the_round_before(peer: Peer) -> None:
    await one_round(peer)
    with pytest.raises(RemoteProtocolError, match="ends round 1"):
        peer.rounds.hear(Paused(1, 0))
    peer.rounds.hear(Paused(2, 0))


async def test_paused_after_the_freeze(peer: Peer) -> None:
    peer.end_round()
    await peer.rounds.freeze()
    for number in (1, 2):
        with pytest.raises(RemoteProtocolError, match=f"ends round {number}"):
            peer.rounds.hear(Paused(number, 0))


async def test_destination_that_ends_each_round_at_once(writes: Writes, peer: Peer) -> None:
    """It costs a scan for each round, and there are no more than were wanted."""
    writes.steady = EVERYTHING
    precopy = Precopy(MAX_ROUNDS)
    async with trio.open_nursery() as nursery:

        async def lie() -> None:
            while True:
                peer.rounds.hear(Paused(peer.rounds.number, 0))
                number = peer.rounds.number
                while number == peer.rounds.number:
                    await trio.lowlevel.checkpoint()

        nursery.start_soon(lie)
        await precopy.run(peer.rounds, lambda *_, **__: None)
        await peer.rounds.pause()
        nursery.cancel_scope.cancel()
    assert writes.scans == len(precopy.over) == MAX_ROUNDS


# ---- the bits ----


async def test_more_bits_than_a_message_may_have() -> None:
    pages = 8 * MAX_STALE_BYTES * 2 + 8 * 100 + 3
    writes = Writes(Region([Block("ram", pages * PAGE)]))
    peer = Peer(writes)
    last = 8 * MAX_STALE_BYTES
    written = {0, 7, last - 1, last, 2 * last - 1, 2 * last, pages - 1}
    writes.write(*written)
    await one_round(peer)
    assert peer.named == [written]
    assert [(stale.first, len(stale.bits), stale.more) for stale in stales(peer)] == [
        (0, 1024, True),
        (last - 8192, 2048, True),
        (2 * last - 8192, 1024 + 101, False),
    ]
    writes.write(*range(pages))
    peer.end_round()
    await peer.rounds.freeze()
    assert peer.named[-1] == set(range(pages))
    frozen = stales(peer)[3:]
    assert [(stale.first, len(stale.bits), stale.more) for stale in frozen] == [
        (0, MAX_STALE_BYTES, True),
        (last, MAX_STALE_BYTES, True),
        (2 * last, 101, False),
    ]
    assert all(stale.frozen for stale in frozen)
    assert [stale.round for stale in stales(peer)] == [1, 1, 1, 2, 2, 2]


async def test_as_many_bits_as_a_message_may_have() -> None:
    writes = Writes(region_of(8 * MAX_STALE_BYTES))
    writes.write(*range(0, 8 * MAX_STALE_BYTES, 8 * 1024))
    peer = Peer(writes)
    peer.end_round()
    await peer.rounds.freeze()
    (stale,) = stales(peer)
    assert (len(stale.bits), stale.more) == (MAX_STALE_BYTES, False)


@given(st.sets(st.integers(0, 8 * 5000 - 1), max_size=20), st.integers(1, 5000))
def test_spans_have_every_bit(pages: set[int], size: int) -> None:
    bits = bits_of({page for page in pages if page < 8 * size}, 8 * size)
    spans = _spans(bytes(bits))
    found = bytearray(len(bits))
    for at, part in spans:
        assert part
        found[at : at + len(part)] = part
    assert found == bits
    assert all(one[0] + len(one[1]) < other[0] for one, other in pairwise(spans))


OURS = Region([Block("a", 3 * PAGE), Block("b", 2 * HUGE), Block("c", 5 * PAGE)])
THEIRS = Region([Block("a", 3 * PAGE), Block("b", 2 * HUGE, HUGE), Block("c", 5 * PAGE)])


def test_in_pages_of_the_same_size() -> None:
    assert _in_pages_of(OURS, OURS, bits_of({0, 700}, OURS.pages)) == 1 | 1 << 700


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (set(), set()),
        ({0, 2}, {0, 2}),
        ({3}, set(range(3, 515))),
        ({4}, set(range(515, 1027))),
        ({5, 9}, {1027, 1031}),
        (set(range(10)), set(range(1032))),
    ],
)
def test_in_pages_that_are_smaller(theirs: set[int], ours: set[int]) -> None:
    """A huge page that was written is stale as a whole."""
    assert THEIRS.pages == 10
    assert OURS.pages == 1032
    found = _in_pages_of(OURS, THEIRS, bits_of(theirs, THEIRS.pages))
    assert pages_in(found.to_bytes(129, "little")) == ours


def test_in_pages_of_a_gigabyte() -> None:
    ours = Region([Block("rom", PAGE), Block("ram", 2 << 30)])
    theirs = Region([Block("rom", PAGE), Block("ram", 2 << 30, 1 << 30)])
    found = _in_pages_of(ours, theirs, bits_of({2}, theirs.pages))
    assert found == ((1 << (1 << 18)) - 1) << (1 + (1 << 18))


@given(st.sets(st.integers(0, 9)))
def test_in_pages_of_any(theirs: set[int]) -> None:
    found = _in_pages_of(OURS, THEIRS, bits_of(theirs, THEIRS.pages))
    expected = 0
    for page in theirs:
        block = THEIRS.block_index(page)
        offset = (page - THEIRS.first_pages[block]) * THEIRS.blocks[block].page_size
        first = OURS.first_pages[block] + offset // PAGE
        expected |= ((1 << THEIRS.blocks[block].page_size // PAGE) - 1) << first
    assert found == expected


@pytest.mark.parametrize("way", ["wait_over", "pause"])
async def test_round_ends_when_keys_are_given_back(autojump_clock: MockClock, way: str) -> None:
    """What a destination reads by a key that it still has is of this round."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    back = trio.Event()
    rounds = Rounds(OURS, Writes(THEIRS), send, given_back=back.wait)
    rounds.hear(Paused(1, 0))
    over = trio.Event()

    async def end() -> None:
        await getattr(rounds, way)()
        over.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        await trio.sleep(1)
        assert not over.is_set()
        back.set()
        await over.wait()
    assert sent == []


async def test_huge_page_that_was_written_is_named_whole() -> None:
    writes = Writes(THEIRS)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    rounds = Rounds(OURS, writes, send)
    writes.write(4)
    rounds.hear(Paused(1, 0))
    assert (await rounds.look()).written == 512
    assert await rounds.freeze() == 512
    (stale,) = sent
    assert isinstance(stale, Stale)
    assert pages_in(stale.bits) == set(range(515, 1027))


# ---- how many rounds ----


def round_of(left: int, seconds: float = 1.0, pages: int = 1000, written: int = 0) -> Round:
    return Round(1, seconds, pages, 0, written, left, seconds, written)


@pytest.mark.parametrize(
    ("lefts", "more"),
    [
        ([500], True),
        ([1000], True),  # it may be that it writes less in a shorter round
        ([0], False),
        ([500, 300], True),
        ([500, 449], True),
        ([500, 450], False),
        ([500, 500], False),
        ([500, 600], False),
        ([1000, 1000], False),
        ([500, 100, 20], False),  # 20 ms of the link
        ([500, 100, 21], True),
    ],
)
def test_is_worth_another(lefts: list[int], more: bool) -> None:
    assert is_worth_another([round_of(left) for left in lefts]) is more


@pytest.mark.parametrize(
    ("recent_seconds", "recently_written", "more"),
    [
        (0.1, 500, False),  # the next round takes 0.5 s, and all of it is written again
        (0.1, 91, False),
        (0.1, 90, True),
        (0.1, 0, True),
        (1.0, 500, True),  # it was written once in the whole round
    ],
)
def test_what_is_written_again_in_a_shorter_time(
    recent_seconds: float, recently_written: int, more: bool
) -> None:
    last = Round(1, 1.0, 1000, 0, 500, 500, recent_seconds, recently_written)
    assert is_worth_another([last]) is more


def test_zeros_say_nothing_about_the_next_round() -> None:
    """900 of 1,000 pages were zero: the next round, of 500 that are not, takes five times as long
    as this one, and leaves as much."""
    last = Round(1, 1.0, 1000, 900, 500, 500, 1.0, 100)
    assert not is_worth_another([last])
    assert is_worth_another([replace(last, zeros=0)])
    assert policy.about_round(last)["rest_seconds"] == 5.0
    assert policy.about_round(last)["bytes_per_s"] == 100 * PAGE


async def test_zeros_of_a_round_are_counted(writes: Writes) -> None:
    zeros = 7
    peer = Peer(writes)
    peer.rounds = Rounds(writes.region, writes, peer.send, zeros=lambda: zeros)
    zeros = 47
    assert (await one_round(peer)).zeros == 40
    assert (await one_round(peer)).zeros == 0


async def test_look_late(writes: Writes) -> None:
    """What was written before and after the look is all there, and the part after it is known."""
    asked = 0
    async with trio.open_nursery() as nursery:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        rounds = Rounds(writes.region, writes, send, lambda: asked)
        nursery.start_soon(rounds.look_late)
        writes.write(1, 2, 3)
        await trio.sleep(0.02)
        assert not writes.scans
        asked = PAGES
        with trio.fail_after(20):
            while not writes.scans:  # noqa: ASYNC110
                await trio.sleep(0.001)
    writes.write(3, 4)
    rounds.hear(Paused(1, 0))
    over = await rounds.look()
    assert (over.written, over.left, over.recently_written) == (4, 4, 2)
    assert 0 < over.recent_seconds < over.seconds


def test_little_is_what_the_link_carries_in_20_ms() -> None:
    assert not is_worth_another([round_of(left=200, seconds=0.1)])
    assert is_worth_another([round_of(left=201, seconds=0.1)])
    assert is_worth_another([round_of(left=2, seconds=100, pages=9_999)])
    assert not is_worth_another([round_of(left=2, seconds=100, pages=10_000)])


def test_rounds_end_even_if_each_is_better_than_the_last() -> None:
    rounds = [round_of(left=10**9 >> number) for number in range(9)]
    assert is_worth_another(rounds)
    assert not is_worth_another([*rounds, round_of(left=10**9 >> 9)])


@given(
    st.lists(
        st.builds(
            Round,
            st.just(1),
            st.floats(0, 1e6),
            st.integers(0, 10**9),
            st.integers(0, 10**9),
            st.integers(0, 10**9),
            st.integers(0, 10**9),
            st.floats(0, 1e6),
            st.integers(0, 10**9),
        ),
        min_size=10,
        max_size=12,
    )
)
def test_ten_rounds_at_most(rounds: list[Round]) -> None:
    assert not is_worth_another(rounds)


# ---- a whole precopy, in virtual time ----


@asynccontextmanager
async def answering(writes: Writes, rate: float = 100.0) -> AsyncIterator[Peer]:
    peer = Peer(writes, rate)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.answer)
        yield peer
        nursery.cancel_scope.cancel()


class Told:
    def __init__(self) -> None:
        self.rounds: list[dict[str, Any]] = []

    def __call__(self, event: str, /, **fields: Any) -> None:
        assert event == "round"
        self.rounds.append(fields)


async def test_guest_at_rest_has_one_round(autojump_clock: MockClock, writes: Writes) -> None:
    told = Told()
    async with answering(writes) as peer:
        await Precopy().run(peer.rounds, told)
        await peer.rounds.pause()
        assert trio.current_time() == pytest.approx(1.0)
        assert await peer.rounds.freeze() == 0
    assert told.rounds == [
        {
            "round": 1,
            "seconds": 1.0,
            "pages": 100,
            "zeros": 0,
            "written": 0,
            "left": 0,
            "bytes_left": 0,
            "bytes_per_s": 409600,
            "dirty_bytes_per_s": 0,
            "rest_seconds": 0.0,
        }
    ]
    assert Pause() not in peer.sent


async def test_guest_that_writes_everything_has_one_round(
    autojump_clock: MockClock, writes: Writes
) -> None:
    """Nothing makes what is left smaller, as the end of the first round shows."""
    told = Told()
    writes.steady = EVERYTHING
    async with answering(writes) as peer:
        await Precopy().run(peer.rounds, told)
        await peer.rounds.pause()
        assert await peer.rounds.freeze() == PAGES
    assert [fields["left"] for fields in told.rounds] == [PAGES]
    assert told.rounds[0]["dirty_bytes_per_s"] == told.rounds[0]["bytes_per_s"] == 409600
    assert told.rounds[0]["rest_seconds"] == pytest.approx(1.0)
    assert peer.named == [EVERYTHING]


async def test_guest_with_a_hot_part(autojump_clock: MockClock, writes: Writes) -> None:
    """The hot part is sent twice before the switch, and once after it."""
    told = Told()
    writes.steady = set(range(10))
    writes.write(*range(50, 90))
    async with answering(writes) as peer:
        await Precopy().run(peer.rounds, told)
        await peer.rounds.pause()
        assert await peer.rounds.freeze() == 10
    assert [fields["left"] for fields in told.rounds] == [50, 10, 10]
    assert peer.named == [{*range(10), *range(50, 90)}, set(), set(range(10))]


@pytest.mark.parametrize("seed", range(20))
async def test_it_always_ends_and_nothing_is_lost(autojump_clock: MockClock, seed: int) -> None:
    """Whatever the owner writes, and however fast: what the destination has in the end is the last
    version."""
    pick = random.Random(seed)
    writes = Writes()
    share = pick.choice([0.0, 0.05, 0.5, 1.0])

    def write() -> None:
        writes.write(*(page for page in EVERYTHING if pick.random() < share * pick.random()))

    async def write_forever() -> None:
        while True:
            await trio.sleep(pick.choice([0.01, 0.1, 1.0]))
            write()

    precopy = Precopy(pick.choice(["auto", "auto", 0, 1, 2, 7]))
    async with answering(writes, pick.choice([20.0, 100.0, 1000.0])) as peer:
        async with trio.open_nursery() as owner:
            owner.start_soon(write_forever)
            if pick.random() < 0.3:
                owner.start_soon(switch_after, pick.random() * 5, precopy)
            await precopy.run(peer.rounds, lambda *_, **__: None)
            await peer.rounds.pause()
            if pick.random() < 0.5:
                await peer.rounds.name_early()
            owner.cancel_scope.cancel()
        write()
        await peer.rounds.freeze()
    assert len(precopy.over) <= 10
    for page in EVERYTHING - peer.lacks:
        assert peer.versions[page] == writes.versions[page]


async def switch_after(seconds: float, precopy: Precopy) -> None:
    await trio.sleep(seconds)
    precopy.switch()


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_number_of_rounds(autojump_clock: MockClock, writes: Writes, count: int) -> None:
    precopy = Precopy(count)
    async with answering(writes) as peer:
        await precopy.run(peer.rounds, lambda *_, **__: None)
        await peer.rounds.pause()
        await peer.rounds.freeze()
    assert len(precopy.over) == count
    assert len(peer.named) == count


async def test_no_rounds(autojump_clock: MockClock, writes: Writes) -> None:
    """The destination is paused at once, and gets everything after the switch."""
    precopy = Precopy(0)
    async with answering(writes) as peer:
        await precopy.run(peer.rounds, lambda *_, **__: None)
        await peer.rounds.pause()
        assert peer.sent == [Pause()]
        assert await peer.rounds.freeze() == PAGES
    assert trio.current_time() == 0
    assert precopy.over == []


async def leave(precopy: Precopy, rounds: Rounds) -> None:
    await precopy.run(rounds, lambda *_, **__: None)
    await rounds.pause()


@pytest.mark.parametrize("at", [0.0, 0.5, 1.5])
async def test_switch_in_the_middle_of_a_round(
    autojump_clock: MockClock, writes: Writes, at: float
) -> None:
    writes.steady = EVERYTHING
    precopy = Precopy(MAX_ROUNDS)
    async with answering(writes) as peer, trio.open_nursery() as nursery:
        nursery.start_soon(leave, precopy, peer.rounds)
        await trio.sleep(at)
        await wait_all_tasks_blocked()
        precopy.switch()
        await wait_all_tasks_blocked()
        assert peer.sent[-1] == Pause()
    assert trio.current_time() == at
    assert len(precopy.over) == int(at)


async def test_number_that_changes_while_a_round_runs(
    autojump_clock: MockClock, writes: Writes
) -> None:
    writes.steady = EVERYTHING
    precopy = Precopy(MAX_ROUNDS)
    async with answering(writes) as peer, trio.open_nursery() as nursery:
        nursery.start_soon(leave, precopy, peer.rounds)
        await trio.sleep(1.5)
        precopy.set_rounds(2)
    assert len(precopy.over) == 2
    assert Pause() not in peer.sent, "the second round was over before there were enough"


async def test_number_that_is_reached_already(autojump_clock: MockClock, writes: Writes) -> None:
    writes.steady = EVERYTHING
    precopy = Precopy(MAX_ROUNDS)
    async with answering(writes) as peer, trio.open_nursery() as nursery:
        nursery.start_soon(leave, precopy, peer.rounds)
        await trio.sleep(1.5)
        precopy.set_rounds(1)
        await wait_all_tasks_blocked()
        assert peer.sent[-1] == Pause()
    assert trio.current_time() == 1.5


async def test_number_becomes_auto(autojump_clock: MockClock, writes: Writes) -> None:
    writes.steady = EVERYTHING
    precopy = Precopy(MAX_ROUNDS)
    async with answering(writes) as peer, trio.open_nursery() as nursery:
        nursery.start_soon(leave, precopy, peer.rounds)
        await trio.sleep(0.5)
        precopy.set_rounds("auto")
    assert len(precopy.over) == 1


@pytest.mark.parametrize("rounds", [-1, MAX_ROUNDS + 1, 10**9])
def test_absurd_number_of_rounds(rounds: int) -> None:
    with pytest.raises(UsageError, match=f"{rounds} rounds: there may be 0 to 100, or auto"):
        Precopy(rounds)
    precopy = Precopy(3)
    with pytest.raises(UsageError):
        precopy.set_rounds(rounds)
    assert precopy.rounds == 3


def test_an_event_of_a_round_that_took_no_time() -> None:
    assert policy.about_round(Round(2, 0.0, 0, 0, 5, 5, 0.0, 5)) == {
        "round": 2,
        "seconds": 0.0,
        "pages": 0,
        "zeros": 0,
        "written": 5,
        "left": 5,
        "bytes_left": 5 * PAGE,
        "bytes_per_s": 0,
        "dirty_bytes_per_s": 5 * PAGE * 1000,
        "rest_seconds": None,
    }
