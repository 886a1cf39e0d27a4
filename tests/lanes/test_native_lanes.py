"""The destination's lanes in C, compared with those in Trio, and with everything that may go wrong
around them."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from lanes import (
    MADV_DONTNEED,
    MADV_REMOVE,
    PAGE,
    Address,
    Call,
    Driver,
    Kind,
    Memory,
    Open,
    Peer,
    Rig,
    Size,
    content,
    libc,
    poll,
    wait_others_ran,
    wait_until,
)
from processes import huge_pages

from pagenet import Block, Region, RemoteProtocolError, Run, Unsupported, _native
from pagenet.background.pacing import CHUNK_BYTES
from pagenet.protocol import (
    LANE_HEADER_SIZE,
    MAX_LZ4_BYTES,
    Class,
    Encoding,
    OutstandingRequests,
    Reply,
)
from pagenet.residency import State
from pagenet.uffd import Feature, Userfaultfd, probe
from pagenet.uffd._handshake import Mapping
from pagenet.uffd._target import UffdTarget

DEMAND, PREFETCH, BACKGROUND = Class.DEMAND, Class.PREFETCH, Class.BACKGROUND
KINDS: tuple[Kind, ...] = ("copy", "move", "memfd", "allocated")
# Seconds. It should take 0.1 s; on a loaded machine it may take longer.
PROMPT = 5.0
RAW_ZERO_OR_LZ4 = 0b111


@pytest.fixture(scope="module", autouse=True)
def kernel() -> Feature:
    try:
        return probe()
    except Unsupported as error:
        pytest.skip(str(error))


MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig() -> Iterator[MakeRig]:
    """``make_rig(kind, low, high, hole, **rig)``."""
    with ExitStack() as stack:

        def make(
            kind: Kind = "copy", low: int = 10, high: int = 8, hole: int | None = 5, **options: Any
        ) -> Rig:
            rig = Rig(Memory(kind, low, high, hole), **{"driver": "native", **options})
            return stack.enter_context(rig)

        yield make


# ---- the same script, native and Trio ----


@dataclass
class Told:
    """What became of a script."""

    asked: list[list[tuple[Class, Run]]]
    counts: dict[str, list[int]]
    states: list[State]
    memory: dict[int, bytes]


@dataclass
class Play:
    """A script drawn from ``seed``, step by step, each of which is over before the next. It knows
    what the outcome must be."""

    rig: Rig
    seed: int
    prefetch: tuple[int, int]
    #: pages that are in the owner's page table
    there: dict[int, bytes] = field(default_factory=dict)
    #: shared memory: the file's pages, mapped or not
    cache: dict[int, bytes] = field(default_factory=dict)
    waiting: list[tuple[int, Call]] = field(default_factory=list)
    expected: dict[str, list[int]] = field(default_factory=dict)
    asked: tuple[list[tuple[Class, Run]], list[tuple[Class, Run]]] = field(
        default_factory=lambda: ([], [])
    )
    #: false once a thread may have faulted more often than the script knows, because its page was
    #: given up
    faults_known: bool = True
    #: pages of the reply that is being sent
    in_flight: set[int] = field(default_factory=set)
    #: pages that the owner gave up
    removed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.memory = self.rig.memory
        self.pages = list(self.rig.scope())
        self.expected = {name: [0, 0, 0] for name in self.rig.counts()}
        if self.memory.kind == "allocated":
            self.cache = dict.fromkeys(self.pages, bytes(PAGE))

    def run(self, steps: int) -> Told:
        for _ in range(steps):
            self.step(
                [
                    self.touch,
                    self.touch,
                    self.feed,
                    self.reply,
                    self.reply,
                    self.remove,
                    self.intrude,
                ]
            )
        self.finish()
        asked, counts = [peer.asked for peer in self.rig.peers], self.counts()
        memory = {page: self.memory.read(page) for page in self.pages}
        if not self.faults_known:
            assert counts.pop("faults") >= self.expected.pop("faults")
        assert counts == self.expected
        for page in self.pages:
            assert memory[page] == self.memory_of(page), f"page {page}"
        return Told(asked, counts, self.rig.states(), memory)

    def counts(self) -> dict[str, list[int]]:
        """The counts, once they are complete: pages are counted, and threads woken, a moment before
        the rest is counted."""
        for name in ("wire_bytes", "zero_pages", "existed"):
            wait_until(partial(self.is_counted, name), name)
        return self.rig.counts()

    def is_counted(self, name: str) -> bool:
        return sum(self.rig.counts()[name]) >= sum(self.expected[name])

    def step(self, choices: list[Callable[[], None]]) -> None:
        self.random.choice(choices)()
        for peer, asked in zip(self.rig.peers, self.asked, strict=True):
            assert peer.asked == asked

    def memory_of(self, page: int) -> bytes:
        zeros = bytes(self.memory.page_size)
        return self.there[page] if page in self.there else self.cache.get(page, zeros)

    # ---- steps ----

    def touch(self) -> None:
        page = self.random.choice(self.pages)
        if page in self.in_flight:
            return
        state = self.rig.map.state(page)
        call = self.rig.touch(page)
        if page in self.there:
            assert call.join() == self.there[page]
            return
        self.expected["faults"][DEMAND] += 1
        if state in (State.MISSING, State.COMING):
            self.ask(DEMAND, Run(page, 1))
        if state is State.MISSING:
            for run in self.window(page):
                self.ask(PREFETCH, run)
        self.rig.demand.wait_asked(len(self.asked[0]))
        self.rig.wait_faults(sum(self.expected["faults"]))
        if state is State.REMOVED:
            self.there[page] = self.memory_of(page)
            assert call.join() == self.there[page]
        else:
            self.waiting.append((page, call))

    def ask(self, class_: Class, run: Run) -> None:
        self.asked[class_ is BACKGROUND].append((class_, run))
        self.expected["requests"][class_] += 1

    def window(self, page: int) -> Iterator[Run]:
        """The rule for the window, implemented again, from the states before the fault."""
        piece = self.memory.piece_of(page)
        states = {p: self.before(p) for p in range(piece.first, piece.end)}
        forward, backward = self.prefetch
        if self.memory.page_size > PAGE:
            forward = backward = 0
        end = page + 1
        while end < min(piece.end, page + 1 + forward) and states[end] is State.MISSING:
            end += 1
        first = page
        while first > max(piece.first, page - backward) and states[first - 1] is State.MISSING:
            first -= 1
        return (Run(a, b - a) for a, b in ((page + 1, end), (first, page)) if a < b)

    def before(self, page: int) -> State:
        """The page's state by what the script knows: the map itself may have changed since."""
        known = {p for asked in self.asked for _, run in asked for p in range(run.first, run.end)}
        if page in self.removed:
            return State.REMOVED
        return State.REQUESTED if page in known else State.MISSING

    def feed(self) -> None:
        piece = self.memory.piece_of(self.random.choice(self.pages))
        first = self.random.randrange(piece.first, piece.end)
        self.feed_run(Run(first, self.random.randint(1, piece.end - first)))

    def feed_run(self, run: Run) -> None:
        missing = [page for page in range(run.first, run.end) if self.before(page) is State.MISSING]
        for part in runs_of(missing):
            for chunk in self.rig.filling.region.split(part, CHUNK_BYTES):
                self.ask(BACKGROUND, chunk)
        self.rig.feed(run)
        self.rig.background.wait_asked(len(self.asked[1]))
        if self.rig.driver == "native":
            wait_until(lambda: not len(self.rig.native.ring), "the ring empty")

    def reply(self) -> None:
        choices = [(peer, open_) for peer in self.rig.peers for open_ in peer.open]
        if choices:
            peer, open_ = self.random.choice(choices)
            left = peer.left(open_)
            self.reply_to(peer, open_, self.random.randint(1, left.count))

    def reply_to(self, peer: Peer, open_: Open, pages: int) -> None:
        first, size = peer.left(open_).first, self.memory.page_size
        zero_pages = [content(page, size) == bytes(size) for page in range(first, first + pages)]
        zero = zero_pages[0] and self.random.random() < 0.7
        if zero:
            pages = (*zero_pages, False).index(False)
        pack = not zero and self.random.random() < 0.5
        if pack:
            pages = min(pages, MAX_LZ4_BYTES // size)
        class_ = open_.request.class_
        run, data = peer.answer(open_, pages, zero, pack)
        if pack:
            self.expect_packed(class_, pages * size, len(data))
        wanted = [
            page
            for page in range(run.first, run.end)
            if self.rig.map.state(page) in (State.COMING, State.REQUESTED)
        ]
        self.send(peer, run, data)
        self.expect_reply(class_, run, wanted, zero, len(data))
        self.rig.wait_came(sum(self.expected["pages"]) + sum(self.expected["dropped"]))
        self.wake(wanted)

    def send(self, peer: Peer, run: Run, data: bytes) -> None:
        """Send in pieces, between which other things happen to other pages."""
        self.in_flight = set(range(run.first, run.end))
        cuts = sorted(
            self.random.randrange(len(data)) for _ in range(self.random.choice([0, 0, 1, 2, 5]))
        )
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            peer.send(memoryview(data)[start:end])
            if end < len(data) and self.random.random() < 0.5:
                wait_until(lambda: not peer.unread(), "the piece received")
                self.step([self.touch, self.feed, self.remove])
        self.in_flight = set()

    def expect_reply(
        self, class_: Class, run: Run, wanted: list[int], zero: bool, size: int
    ) -> None:
        add = self.expected
        add["runs"][class_] += 1
        add["wire_bytes"][class_] += size
        add["pages"][class_] += len(wanted)
        add["dropped"][class_] += run.count - len(wanted)
        add["zero_pages"][class_] += len(wanted) if zero else 0
        add["existed"][class_] += sum(
            page in self.there and not self.is_held(class_, page) for page in wanted
        )
        for page in wanted:
            data = content(page, self.memory.page_size)
            if self.memory.is_shared:
                self.cache[page] = self.there[page] = data
            else:
                self.there.setdefault(page, data)

    def is_held(self, class_: Class, page: int) -> bool:
        """Whether the page is left unmapped, as part of the sample."""
        sampled = (
            class_ is Class.PREFETCH
            and self.memory.is_shared
            and _native.before_sampled(page, 1) == 0
        )
        return sampled and all(page != waiting for waiting, _ in self.waiting)

    def expect_packed(self, class_: Class, size: int, wire: int) -> None:
        assert wire < size
        for name, amount in (("lz4_runs", 1), ("lz4_bytes", size), ("lz4_wire_bytes", wire)):
            self.expected[name][class_] += amount

    def wake(self, pages: list[int]) -> None:
        for page, call in [waiter for waiter in self.waiting if waiter[0] in pages]:
            assert call.join() == self.there[page]
        self.waiting = [waiter for waiter in self.waiting if waiter[0] not in pages]

    def remove(self) -> None:
        piece = self.memory.piece_of(self.random.choice(self.pages))
        first = self.random.randrange(piece.first, piece.end)
        run = Run(first, self.random.randint(1, min(3, piece.end - first)))
        gone = set(range(run.first, run.end))
        if gone & self.in_flight or self.random.random() < 0.4:
            return
        punch = self.memory.is_shared and (
            self.memory.kind == "hugetlb" or self.random.random() < 0.5
        )
        self.rig.call(self.memory.remove, run, MADV_REMOVE if punch else MADV_DONTNEED).join()
        self.removed |= gone
        # The owner resumes once its event was read, a moment before the event takes effect.
        wait_until(
            lambda: all(self.rig.map.state(page) is State.REMOVED for page in gone), "removal"
        )
        for page in gone:
            self.there.pop(page, None)
            if punch:
                self.cache.pop(page, None)
        woken = [waiter for waiter in self.waiting if waiter[0] in gone]
        self.waiting = [waiter for waiter in self.waiting if waiter[0] not in gone]
        for page, call in woken:
            assert call.join() == self.memory_of(page)
        for page in {page for page, _ in woken}:
            # Its zeros came before the memory was given up, or after, so it may be resident or not.
            # From here on it is.
            self.faults_known = False
            assert self.rig.touch(page).join() == self.memory_of(page)
            self.there[page] = self.memory_of(page)

    def intrude(self) -> None:
        """A third party places a page that is in flight, or will be."""
        page = self.random.choice(self.pages)
        if (
            page in self.there
            or page in self.removed
            or page in self.in_flight
            or page in self.cache
        ):
            return
        data = b"3" * self.memory.page_size
        assert self.memory.place(page, data).placed == self.memory.page_size
        self.there[page] = data
        if self.memory.is_shared:
            self.cache[page] = data
        self.wake([page])

    def finish(self) -> None:
        for piece in self.memory.mapped:
            self.feed_run(piece)
        for peer in self.rig.peers:
            while peer.open:
                open_ = self.random.choice(peer.open)
                self.reply_to(peer, open_, self.random.randint(1, peer.left(open_).count))
        assert not self.waiting, "a thread was forgotten"
        self.rig.lanes.wait_complete()


def runs_of(pages: list[int]) -> Iterator[Run]:
    first = None
    for index, page in enumerate(pages):
        if first is None:
            first = page
        if index + 1 == len(pages) or pages[index + 1] != page + 1:
            yield Run(first, page + 1 - first)
            first = None


def told(driver: Driver, memory: Memory, seed: int, steps: int) -> Told:
    prefetch = random.Random(seed).choice([(0, 0), (1, 1), (3, 2), (8, 8)])
    with Rig(memory, driver, prefetch, encodings=RAW_ZERO_OR_LZ4) as rig:
        return Play(rig, seed, prefetch).run(steps)


@pytest.mark.native
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_same_script_same_outcome(kind: Kind, seed: int) -> None:
    native, oracle = (told(driver, Memory(kind), seed, steps=40) for driver in ("native", "trio"))
    assert native == oracle


@pytest.mark.native
@pytest.mark.parametrize("seed", range(2))
def test_same_script_same_outcome_with_huge_pages(seed: int) -> None:
    with huge_pages(7):
        native, oracle = (
            told(driver, Memory("hugetlb", 5, 2, 3), seed, steps=20)
            for driver in ("native", "trio")
        )
    assert native == oracle


# ---- replies in pieces ----


@pytest.mark.native
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("lane", ["demand", "background"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_alone(kind: Kind, lane: str, pack: bool, make_rig: MakeRig) -> None:
    """Header, page, header, zeros, header, two pages: each byte is a receive of its own."""
    rig = make_rig(kind, encodings=RAW_ZERO_OR_LZ4)
    calls = []
    if lane == "demand":
        for index, page in enumerate((4, 5 + 6, 8)):  # the second one is zero
            calls.append((page, rig.touch(page)))
            rig.demand.wait_asked(index + 1)
    else:
        rig.feed(Run(10, 4))
        rig.background.wait_asked(1)
    peer = rig.demand if lane == "demand" else rig.background
    stream = b""
    pages: list[int] = []
    while peer.open:
        open_ = peer.open[0]
        left = peer.left(open_)
        zero = left.first % 6 == 5
        run, data = peer.answer(open_, 1 if zero or left.first == 10 else left.count, zero, pack)
        stream += data
        pages += range(run.first, run.end)
    for index in range(len(stream)):
        peer.send(stream[index : index + 1])
        wait_until(lambda: not peer.unread(), "the byte received")
    rig.wait_came(len(pages))
    assert [rig.touch(page).join() for page in pages] == [content(page) for page in pages]
    assert (rig.count("pages"), rig.count("wire_bytes")) == (len(pages), len(stream))
    for page, call in calls:
        assert call.join() == content(page)


# ---- pages given up, or placed by a third party ----


@pytest.mark.native
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_missing_pages_are_given_up(kind: Kind, make_rig: MakeRig) -> None:
    rig = make_rig(kind)
    for run in (Run(0, 5), Run(6, 4), Run(10, 6)):
        rig.feed(run)
    rig.background.wait_asked(3)
    rig.wait_came(rig.answer_all(rig.background))
    rig.call(rig.memory.remove, Run(16, 2), MADV_DONTNEED).join()
    rig.lanes.wait_complete()


@pytest.mark.native
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_given_up_again_and_again_while_its_bytes_come_in(
    kind: Kind, times: int, make_rig: MakeRig
) -> None:
    """What the owner writes afterwards stays. (In allocated memory the bytes go straight to where
    the owner would see them.)"""
    rig = make_rig(kind)
    rig.feed(Run(10, 4))
    rig.background.wait_asked(1)
    _, data = rig.background.answer(rig.background.open[0], 4, zero=False)
    half = 24 + PAGE // 2
    rig.background.send(data[:half])
    wait_until(lambda: not rig.background.unread(), "half a page received")
    for _ in range(times):
        rig.call(
            rig.memory.remove, Run(10, 2), MADV_REMOVE if rig.memory.is_shared else MADV_DONTNEED
        ).join()
    writer = rig.call(rig.memory.write, 10, b"owner's" * 100)
    if kind != "allocated":
        writer.join()
    rig.wait_faults(1)
    # What must not happen: the write goes through, and the rest of the page comes over it.
    rest = rig.background.trickle(data[half:])
    assert writer.is_running == (kind == "allocated")
    rig.background.send(rest)
    writer.join()
    rig.wait_came(4)
    wait_until(
        lambda: rig.states()[10:14] == [State.REMOVED] * 2 + [State.RESIDENT] * 2, "the states"
    )
    assert rig.touch(10).join() == (b"owner's" * 100).ljust(PAGE, b"\0")
    assert rig.touch(11).join() == bytes(PAGE)
    assert rig.touch(12).join() == content(12)
    assert (rig.count("pages"), rig.count("dropped")) == (2, 2)


@pytest.mark.native
@pytest.mark.parametrize("kind", KINDS)
def test_placing_waits_for_the_reader_of_events(kind: Kind, make_rig: MakeRig) -> None:
    """A background lane cannot read the event that memory was given up: it tries again until the
    demand lane has read it."""
    rig = make_rig(kind, start=["background"])
    rig.feed(Run(10, 8))
    rig.background.wait_asked(1)
    removal = rig.call(rig.memory.remove, Run(0, 2), MADV_DONTNEED)
    wait_until(lambda: poll(rig.memory.uffd, select.POLLIN), "the event")
    rig.answer_all(rig.background)
    wait_until(lambda: State.PLACING in rig.states(), "pages taken")
    wait_others_ran(0.005)
    assert State.RESIDENT not in rig.states()
    assert removal.is_running
    rig.lanes.start("demand")
    removal.join()
    rig.wait_came(8)
    assert rig.states()[10:] == [State.RESIDENT] * 8
    assert (rig.count("pages"), rig.count("existed")) == (8, 0)


@pytest.mark.native
@pytest.mark.parametrize("kind", KINDS)
def test_stop_while_placing_waits_for_the_reader_of_events(kind: Kind, make_rig: MakeRig) -> None:
    rig = make_rig(kind, start=["background"])
    rig.feed(Run(10, 8))
    rig.background.wait_asked(1)
    rig.call(rig.memory.remove, Run(0, 2), MADV_DONTNEED)
    wait_until(lambda: poll(rig.memory.uffd, select.POLLIN), "the event")
    rig.answer_all(rig.background)
    wait_until(lambda: State.PLACING in rig.states(), "pages taken")
    assert stop_time(rig) < PROMPT


def first_byte(address: int) -> bytes:
    """The first byte of a page, which is waited for. A system call reads it: :exc:`OSError`
    (EFAULT) where a load would be a SIGBUS."""
    read_end, write_end = os.pipe()
    try:
        if libc.write(write_end, Address(address), Size(1)) < 0:
            raise OSError(ctypes.get_errno(), "write")
        return os.read(read_end, 1)
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize("zero", [False, True], ids=["poison", "zero"])
@pytest.mark.parametrize("kind", ["copy", "memfd", "hugetlb"])
def test_fault_outside_what_was_announced(
    kind: Kind, zero: bool, lane: str, kernel: Feature
) -> None:
    """The thread gets an error or zeros, as the owner has chosen; and pages of what was announced
    continue to come."""
    if not zero and Feature.POISON not in kernel:
        pytest.skip("the kernel has no UFFDIO_POISON")
    driver: Any = lane
    with huge_pages(6) if kind == "hugetlb" else nullcontext():
        memory = Memory(kind, low=2, high=2, hole=None, outside_is_zero=zero)
        with Rig(memory, driver) as rig:
            address = memory.map_outside(2)
            waiting = rig.touch(3)
            rig.demand.wait_asked(1)
            for place in (address, address + memory.page_size + 100):
                outside = rig.call(first_byte, place)
                if zero:
                    assert outside.join() == b"\0"
                    continue
                with pytest.raises(OSError, match="write") as told:
                    outside.join()
                assert told.value.errno == errno.EFAULT
            rig.answer_all(rig.demand)
            assert waiting.join() == content(3, memory.page_size)
            assert (rig.count("faults"), rig.count("outside_faults"), rig.count("requests")) == (
                3,
                2,
                1,
            )


@pytest.mark.native
@pytest.mark.parametrize("zero", [False, True], ids=["poison", "zero"])
def test_fault_outside_waits_for_the_reader_of_events(
    zero: bool, lane: str, kernel: Feature
) -> None:
    """The owner gives memory up meanwhile, again and again: nothing can be poisoned, nor placed,
    until that is read."""
    if not zero and Feature.POISON not in kernel:
        pytest.skip("the kernel has no UFFDIO_POISON")
    driver: Any = lane
    memory = Memory("copy", hole=None, outside_is_zero=zero)
    with Rig(memory, driver) as rig:
        address = memory.map_outside(32)
        for page in range(32):
            outside = rig.call(first_byte, address + page * PAGE)
            removal = rig.call(memory.remove, Run(page % 10, 1), MADV_DONTNEED)
            removal.join()
            with nullcontext() if zero else pytest.raises(OSError, match="write"):
                outside.join()
        assert rig.count("outside_faults") >= 32


@pytest.mark.native
@pytest.mark.parametrize("kind", ["copy", "move"])
def test_somebody_else_was_faster(kind: Kind, make_rig: MakeRig) -> None:
    rig = make_rig(kind)
    waiting = rig.touch(3)
    rig.demand.wait_asked(1)
    rig.feed(Run(10, 8))
    rig.background.wait_asked(1)
    for page in (3, 12, 17):
        assert rig.memory.place(page, b"3" * PAGE).placed == PAGE
    assert waiting.join() == b"3" * PAGE
    rig.wait_came(rig.answer_all(rig.demand) + rig.answer_all(rig.background))
    wait_until(lambda: rig.counts()["existed"] == [1, 0, 2], "existed counted")
    assert rig.touch(12).join() == b"3" * PAGE
    assert rig.touch(13).join() == content(13)


# ---- a peer that breaks the protocol ----


def wrong_headers(rig: Rig) -> dict[str, bytes]:
    request = rig.background.open[0].request
    run, id_ = request.run, request.request_id

    def reply(
        id_: int = id_,
        class_: int = BACKGROUND,
        encoding: int = 0,
        run: Run = run,
        length: int = -1,
    ) -> bytes:
        size = run.count * PAGE if length < 0 else length
        return struct.pack("<IBBHQII", id_, class_, encoding, 0, run.first, run.count, size)

    return {
        "another id": reply(id_=id_ + 1),
        "an id of the same slot": reply(id_=(id_ + 4096) % 2**32),
        "another class": reply(class_=DEMAND),
        "reserved bits": reply()[:6] + b"\x01\0" + reply()[8:],
        "lz4 that is no shorter": reply(encoding=2),
        "lz4 of nothing": reply(encoding=2, length=0),
        "an unknown encoding": reply(encoding=77),
        "not the first page": reply(run=Run(run.first + 1, 1)),
        "too many pages": reply(run=Run(run.first, run.count + 1)),
        "no pages": reply(run=Run(run.first, 0)),
        "a count that wraps": reply(run=Run(run.first, 2**32 - 1), length=0),
        "too few bytes": reply(length=PAGE),
        "zeros with bytes": reply(encoding=1, length=PAGE),
        "a long reason": reply(encoding=255, length=1025),
    }


@pytest.mark.native
@pytest.mark.parametrize("encodings", [0b011, 0b111])
def test_wrong_replies_are_told_in_the_same_words(encodings: int, make_rig: MakeRig) -> None:
    for name in wrong_headers(asked_rig(make_rig, encodings)):
        rig = asked_rig(make_rig, encodings)
        header = wrong_headers(rig)[name]
        checker = OutstandingRequests(rig.memory.wire, encodings)
        checker._next_id = rig.background.open[0].request.request_id
        checker.open(BACKGROUND, Run(10, 8))
        with pytest.raises(RemoteProtocolError) as error:
            checker.reply(header)
        rig.background.send(header)
        end = rig.lanes.end_of("background")
        assert (end.kind, end.text) == (_native.END_PROTOCOL, str(error.value)), name


@pytest.mark.native
@pytest.mark.parametrize("lane", ["demand", "background"])
@pytest.mark.parametrize("kind", KINDS)
def test_broken_compressed_pages_are_never_claimed(
    kind: Kind, lane: str, make_rig: MakeRig
) -> None:
    """Neither their states nor their memory change."""
    rig = make_rig(kind, encodings=RAW_ZERO_OR_LZ4)
    if lane == "demand":
        rig.touch(10)
        peer, state = rig.demand, State.REQUESTED
    else:
        rig.feed(Run(10, 1))
        peer, state = rig.background, State.COMING
    peer.wait_asked(1)
    _, data = peer.answer(peer.open[0], 1, zero=False, pack=True)
    broken = bytearray(data)
    broken[-1] ^= 1
    for part in (broken[:30], broken[30:]):
        peer.send(bytes(part))
    end = rig.lanes.end_of(lane)
    words = f"the peer's {len(data) - LANE_HEADER_SIZE} compressed bytes are not 1 pages"
    assert (end.kind, end.text) == (_native.END_PROTOCOL, words)
    assert rig.states()[10] is state
    assert rig.count("pages") == rig.count("lz4_runs") == 0
    if rig.memory.is_shared:
        assert os.pread(rig.memory._fd, PAGE, 10 * PAGE) == bytes(PAGE)


def asked_rig(make_rig: MakeRig, encodings: int) -> Rig:
    rig = make_rig("copy", encodings=encodings)
    rig.feed(Run(10, 8))
    rig.background.wait_asked(1)
    return rig


@pytest.mark.native
@pytest.mark.parametrize("reason", [b"", b"it ends at byte 4096", b"x" * 1024])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("lane", ["demand", "background"])
def test_source_that_fails(lane: str, whole: bool, reason: bytes, make_rig: MakeRig) -> None:
    rig = make_rig("copy")
    if lane == "demand":
        rig.touch(3)
        peer = rig.demand
    else:
        rig.feed(Run(10, 8))
        peer = rig.background
    peer.wait_asked(1)
    request = peer.open[0].request
    data = (
        Reply(
            request.request_id, request.class_, Encoding.FAILED, request.run, len(reason)
        ).encode()
        + reason
    )
    for start in range(0, len(data), len(data) if whole else 1):
        peer.send(data[start : len(data) if whole else start + 1])
    end = rig.lanes.end_of(lane)
    assert (end.kind, end.text) == (_native.END_FAILED, reason.decode())


# ---- how much is in flight ----


@pytest.mark.native
def test_more_runs_than_requests_may_be_open(make_rig: MakeRig) -> None:
    """Every second page is resident, so each run is a page: the 4097th request waits until one of
    the others is answered."""
    pages = 9000
    rig = make_rig("copy", pages, 1, None)
    for page in range(1, pages, 2):
        rig.map.set(Run(page, 1), State.RESIDENT)
    rig.feed(Run(0, pages))
    rig.background.wait_asked(4096)
    first = rig.background.answer(rig.background.open[0], 1, zero=False)[1]
    rest = rig.background.trickle(first)
    rig.background.read()
    assert len(rig.background.asked) == 4096
    rig.background.send(rest)
    order = random.Random(1)
    came = 1
    while came < pages // 2:
        rig.background.read()
        batch = order.sample(rig.background.open, min(1000, len(rig.background.open)))
        rig.background.send(b"".join(rig.background.answer(open_, 1, False)[1] for open_ in batch))
        came += len(batch)
        rig.wait_came(came)
    assert (
        len({run.first for _, run in rig.background.asked})
        == pages // 2
        == len(rig.background.asked)
    )
    assert rig.touch(8000).join() == content(8000)


@pytest.mark.native
def test_more_faults_than_requests_may_be_open(make_rig: MakeRig) -> None:
    """The source never answers, and a third party lets the thread continue. In the end faults wait
    unread."""
    pages = 3 * 1400
    rig = make_rig("copy", pages, 1, None, prefetch=(1, 1))
    touched = 0

    def touch_all() -> None:
        nonlocal touched
        for page in range(1, pages, 3):
            rig.memory.read(page)
            touched += 1

    toucher = rig.call(touch_all)
    for fault in range(1302):
        rig.wait_faults(fault + 1)
        assert rig.memory.place(1 + 3 * fault, content(1)).placed == PAGE
    rig.demand.wait_asked(3 * 1302)
    wait_until(lambda: poll(rig.memory.uffd, select.POLLIN), "one more fault")
    rest = rig.demand.trickle(rig.demand.answer(rig.demand.open[0], 1, zero=False)[1])
    assert rig.count("faults") == 1302, "no room for three requests of each of 64 faults more"
    assert poll(rig.memory.uffd, select.POLLIN)
    assert toucher.is_running
    rig.demand.send(rest)
    while toucher.is_running:
        rig.answer_all(rig.demand)
        time.sleep(0.0002)
    toucher.join()
    assert touched == pages // 3
    rig.answer_all(rig.demand)
    wait_until(lambda: rig.states()[:pages] == [State.RESIDENT] * pages, "all pages")


@pytest.mark.native
@pytest.mark.parametrize("kind", KINDS)
def test_64_threads_fault_while_the_source_stalls(kind: Kind, make_rig: MakeRig) -> None:
    rig = make_rig(kind, 128, 1, None)
    order = random.Random(2)
    pages = order.sample(range(128), 64)
    calls = [(page, rig.touch(page)) for page in pages]
    rig.demand.wait_asked(64)
    rig.wait_faults(64)
    assert {run.first for _, run in rig.demand.asked} == set(pages)
    order.shuffle(rig.demand.open)
    while rig.demand.open:
        open_ = rig.demand.open[0]
        page, data = rig.demand.left(open_).first, rig.demand.answer(open_, 1, zero=False)[1]
        rig.demand.send(data)
        (call,) = [call for waits_for, call in calls if waits_for == page]
        assert call.join() == content(page), "answered out of order"
    wait_until(lambda: rig.filling.statistics().fault_latency.count == 64, "all timed")


NARROW, WIDE = 64 * PAGE, 256 * PAGE
CHUNK = 16


@pytest.mark.native
def test_background_stays_in_its_window_before_the_first_reply(make_rig: MakeRig) -> None:
    rig = make_rig("copy", 4096, 8, None, window=(NARROW, NARROW, WIDE))
    for first in range(0, 8 * CHUNK, CHUNK):
        rig.feed(Run(first, CHUNK))
    peer = rig.background
    peer.wait_asked(4)
    run, data = peer.answer(peer.open[0], CHUNK, zero=False)
    rest = peer.trickle(data)
    peer.read()
    assert in_flight(peer) + run.count * PAGE == NARROW
    peer.send(rest)
    for asked in range(5, 9):
        peer.wait_asked(asked)
        peer.send(peer.answer(peer.open[0], CHUNK, zero=False)[1])
    rig.answer_all(peer)
    rig.wait_came(8 * CHUNK)


@pytest.mark.native
def test_page_that_is_coming_is_asked_for_after_a_moment(make_rig: MakeRig) -> None:
    """What the background has asked for may come at once. If it does not, it is asked for again on
    the demand lane."""
    rig = make_rig("copy", 64, 8, None)
    rig.feed(Run(0, 64))
    rig.background.wait_asked(1)
    before = time.monotonic()
    calls = [rig.touch(page) for page in (40, 3)]
    rig.demand.wait_asked(2)
    assert time.monotonic() - before >= 0.0003
    assert {run for _, run in rig.demand.asked} == {Run(40, 1), Run(3, 1)}
    rig.answer_all(rig.demand)
    assert [call.join() for call in calls] == [content(40), content(3)]
    rig.answer_all(rig.background)
    rig.wait_came(64 + 2)
    assert rig.count("dropped", BACKGROUND) == 2
    assert rig.count("requests", DEMAND) == 2


@pytest.mark.native
@pytest.mark.parametrize("kind", KINDS)
def test_stretch_of_zeros(kind: Kind, make_rig: MakeRig) -> None:
    """In shared memory it becomes a hole that is not watched any more: it takes no memory, and
    reads as zeros. A page in it that a third party had placed, and one that was given up, are zero
    too."""
    rig = make_rig(kind, 512, 8, None)
    used = rig.memory.used()
    rig.feed(Run(0, 512))
    rig.background.wait_asked(512 * PAGE // CHUNK_BYTES)
    waiting = rig.touch(70)
    rig.demand.wait_asked(1)
    rig.memory.remove(Run(100, 1), MADV_DONTNEED)
    if kind in ("memfd", "allocated"):
        assert rig.memory.target.write(Run(64, 1), memoryview(b"3" * PAGE))
    for open_ in list(rig.background.open):
        rig.background.send(
            rig.background.answer(open_, rig.background.left(open_).count, zero=True)[1]
        )
    rig.wait_came(512)
    assert waiting.join() == bytes(PAGE)
    assert rig.count("zero_pages") == 511 == rig.count("pages", BACKGROUND)
    if kind == "memfd":
        assert rig.memory.used() <= used + PAGE, "the page that was given up"
    faults = rig.count("faults")
    for page in (0, 63, 64, 100, 511):
        assert rig.touch(page).join() == bytes(PAGE)
    rig.memory.write(5, b"now")
    assert rig.memory.read(5)[:4] == b"now\0"
    if kind == "memfd":
        assert rig.count("faults") <= faults + 1
    rig.answer_all(rig.demand)
    assert rig.states()[:512].count(State.RESIDENT) == 511


def in_flight(peer: Peer) -> int:
    return sum(peer.left(open_).count for open_ in peer.open) * PAGE


def test_ring_full_and_empty() -> None:
    ring = _native.Ring()
    assert len(ring) == 0
    for index in range(ring.ROOM):
        ring.push(index, 1)
    with pytest.raises(BlockingIOError):
        ring.push(ring.ROOM, 1)
    assert len(ring) == ring.ROOM
    ring.close()
    ring.close()


@pytest.mark.native
def test_full_ring_is_emptied_in_order(make_rig: MakeRig) -> None:
    room = _native.Ring.ROOM
    rig = make_rig("copy", 3 * room + 8, 1, None, start=["demand"])
    for page in range(room):
        rig.feed(Run(3 * page, 2))
    with pytest.raises(BlockingIOError):
        rig.feed(Run(3 * room, 2))
    rig.lanes.start("background")
    rig.background.wait_asked(room)
    assert rig.background.asked == [(BACKGROUND, Run(3 * page, 2)) for page in range(room)]
    assert poll(rig.native.ring.room_fd, select.POLLIN)
    rig.feed(Run(0, 3 * room + 8))
    rig.background.wait_asked(room + room)


# ---- the end, while lanes are busy ----


def stop_time(rig: Rig) -> float:
    started = time.monotonic()
    ends = rig.native.stop()
    took = time.monotonic() - started
    assert {end.kind for end in ends} == {_native.END_STOPPED}
    return took


@dataclass
class Busy:
    """Sources that answer every request, threads that touch, and a background without end."""

    rig: Rig
    pages: int
    stopped: threading.Event = field(default_factory=threading.Event)
    calls: list[Call] = field(default_factory=list)

    def start(self, stall: bool = False) -> None:
        self.calls += [Call(feed_until, self.rig, self.pages, self.stopped)]
        if not stall:
            self.calls += [Call(self.serve, peer, seed) for seed, peer in enumerate(self.rig.peers)]
        for seed in range(4):
            self.rig.call(self.touch, random.Random(seed))

    def serve(self, peer: Peer, seed: int) -> None:
        order = random.Random(seed)
        with suppress(OSError, AssertionError):
            while not self.stopped.is_set():
                peer.read()
                if not peer.open:
                    time.sleep(0.0002)
                    continue
                open_ = order.choice(peer.open)
                peer.send(
                    peer.answer(open_, order.randint(1, peer.left(open_).count), zero=False)[1]
                )

    def touch(self, order: random.Random) -> None:
        while not self.stopped.is_set():
            self.rig.memory.read(order.randrange(self.pages))

    def stop(self) -> None:
        self.stopped.set()
        for peer in self.rig.peers:  # a source that is sending does not wait any more
            with suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        for call in self.calls:
            call.join()


def feed_until(rig: Rig, pages: int, stopped: threading.Event) -> None:
    first = 0
    while first < pages and not stopped.is_set():
        try:
            rig.feed(Run(first, CHUNK))
            first += CHUNK
        except BlockingIOError:
            time.sleep(0.0002)


@pytest.mark.native
@pytest.mark.parametrize("stall", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stop_while_busy(
    kind: Kind, stall: bool, make_rig: MakeRig, record_property: Callable[[str, object], None]
) -> None:
    rig = make_rig(kind, 1 << 14, 1, None, prefetch=(8, 8), window=(1 << 16, 1 << 18, 1 << 20))
    busy = Busy(rig, 1 << 14)
    busy.start(stall)
    if stall:
        rig.demand.wait_asked(4)
    else:
        rig.wait_came(500)
    took = stop_time(rig)
    busy.stop()
    record_property("seconds to stop", took)
    print(f"stopped within {took * 1000:.1f} ms")
    assert took < PROMPT


@pytest.mark.native
@pytest.mark.parametrize("lane", ["demand", "background"])
def test_connection_lost_while_busy(lane: str, make_rig: MakeRig) -> None:
    rig = make_rig("copy", 1 << 14, 1, None, window=(1 << 16, 1 << 18, 1 << 20))
    busy = Busy(rig, 1 << 14)
    busy.start()
    rig.wait_came(500)
    started = time.monotonic()
    (rig.demand if lane == "demand" else rig.background).sock.shutdown(socket.SHUT_RDWR)
    end = rig.lanes.end_of(lane)
    took = time.monotonic() - started
    print(f"noticed within {took * 1000:.1f} ms: {end}")
    assert end.kind in (_native.END_CLOSED, _native.END_BROKEN)
    assert took < PROMPT
    assert rig.native.running["background" if lane == "demand" else "demand"].is_running
    os.eventfd_write(rig.native.stop_fd, 1)
    for call in rig.native.running.values():
        call.join()
    busy.stop()


OWNER = """
import ctypes, mmap, os, socket, struct, sys, threading
from pagenet import _native
from pagenet.uffd import Feature, Mode, Userfaultfd
size = int(sys.argv[2])
uffd = Userfaultfd.open(Feature.EVENT_REMOVE)
memory = _native.Mapped(size)
uffd.register(memory.address, size, Mode.MISSING)
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
socket.send_fds(sock, [struct.pack("<Q", memory.address)], [uffd.fd])
def touch(first):
    into = memoryview(bytearray(4096))
    for page in range(first, size // 4096, 4):
        _native.copy_out(memory.address + page * 4096, into)
threads = [threading.Thread(target=touch, args=(n,)) for n in range(4)]
for thread in threads: thread.start()
sock.recv(1)
"""


def test_owner_dies_while_busy(tmp_path: Path) -> None:
    """These lanes have no task that watches the owner: the lane that places the next page
    notices."""
    pages = 1 << 15
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "owner"))
        listener.listen()
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path / "owner"), str(pages * PAGE)]
        )
        sock, _ = listener.accept()
    with sock:
        message, (uffd,), _, _ = socket.recv_fds(sock, 8, 1)
        rig = Rig(
            OtherMemory(uffd, struct.unpack("<Q", message)[0], pages),
            "native",
            window=(1 << 16, 1 << 18, 1 << 20),
        )
        with rig:
            busy = Busy(rig, pages)
            busy.calls += [Call(feed_until, rig, pages, busy.stopped)]
            busy.calls += [Call(busy.serve, peer, seed) for seed, peer in enumerate(rig.peers)]
            rig.wait_came(500)
            owner.kill()
            started = time.monotonic()
            owner.wait()
            ends = [rig.lanes.end_of("background")]
            took = time.monotonic() - started
            print(f"noticed within {took * 1000:.1f} ms: {ends}")
            assert [end.kind for end in ends] == [_native.END_OWNER_GONE]
            assert took < PROMPT
            assert rig.native.stop()[0].kind in (_native.END_OWNER_GONE, _native.END_STOPPED)
            busy.stop()


class OtherMemory(Memory):
    """Memory of another process."""

    def __init__(self, uffd: int, address: int, pages: int) -> None:
        self.kind, self.page_size, self._fd, self.mapped = "copy", PAGE, -1, {}
        self.wire = Region([Block("ram", pages * PAGE)])
        self._uffd = Userfaultfd.received(uffd)
        mapping = Mapping(address, pages * PAGE, 0, PAGE)
        self.target = UffdTarget(
            self._uffd, [mapping], self.wire, keeps_uffd=lambda: True, wait_gone=trio.sleep_forever
        )
        self.region = self.target.region


# ---- everything at once ----


@dataclass
class Storm:
    """Threads that touch, write, give up and place pages of their own accord, and sources that
    answer in any order."""

    rig: Rig
    pages: int
    seed: int
    served: threading.Event = field(default_factory=threading.Event)
    #: pages that were given up: from then on only the thread that did so uses them
    removed: dict[int, bytes] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def run(self) -> None:
        shared = self.rig.memory.is_shared
        order = random.Random(self.seed)
        mine = set(order.sample(range(self.pages), self.pages // 8))
        servers = [Call(self.serve, peer, self.seed + n) for n, peer in enumerate(self.rig.peers)]
        workers = [
            self.rig.call(self.touch, random.Random(self.seed * 7 + n), mine) for n in range(6)
        ]
        workers.append(self.rig.call(self.give_up, sorted(mine), shared))
        workers.append(Call(feed_until, self.rig, self.pages, self.served))
        if not shared:
            workers.append(self.rig.call(self.intrude, random.Random(self.seed * 11), mine))
        for worker in workers:
            worker.join()
        self.rig.lanes.wait_complete()
        self.served.set()
        for server in servers:
            server.join()
        assert not self.wrong, self.wrong[:5]
        for page in range(self.pages):
            assert self.rig.memory.read(page) == self.removed.get(page, content(page)), (
                f"page {page}"
            )

    def serve(self, peer: Peer, seed: int) -> None:
        order = random.Random(seed)
        while not self.served.is_set():
            peer.read()
            if not peer.open:
                time.sleep(0.0002)
                continue
            batch = []
            for _ in range(order.randint(1, 4)):
                if peer.open:
                    open_ = order.choice(peer.open)
                    left = peer.left(open_)
                    zero = left.first % 6 == 5 and order.random() < 0.7
                    batch.append(
                        peer.answer(open_, 1 if zero else order.randint(1, left.count), zero)[1]
                    )
            self.send(peer, b"".join(batch), order)

    def send(self, peer: Peer, data: bytes, order: random.Random) -> None:
        at = 0
        while at < len(data):
            size = order.choice([1, 20, 24, 100, PAGE, 2 * PAGE + 7, 1 << 17])
            peer.send(data[at : at + size])
            at += size

    def touch(self, order: random.Random, mine: set[int]) -> None:
        for page in order.sample(range(self.pages), self.pages // 3):
            data = self.rig.memory.read(page)
            if page not in mine and data != content(page):
                self.wrong.append(f"page {page} reads {data[:8]!r}")

    def give_up(self, mine: list[int], shared: bool) -> None:
        """Single pages, each of which then reads as zeros until it is written, and then as what was
        written."""
        order = random.Random(self.seed)
        order.shuffle(mine)
        for page in mine:
            for _ in range(order.randint(1, 2)):
                self.rig.memory.remove(Run(page, 1), MADV_REMOVE if shared else MADV_DONTNEED)
            if (data := self.rig.memory.read(page)) != bytes(PAGE):
                self.wrong.append(f"page {page} was given up and reads {data[:8]!r}")
            self.removed[page] = page.to_bytes(8, "big") * (PAGE // 8)
            self.rig.memory.write(page, self.removed[page])
        for page in mine:
            if (data := self.rig.memory.read(page)) != self.removed[page]:
                self.wrong.append(f"page {page} was written and reads {data[:8]!r}")

    def intrude(self, order: random.Random, mine: set[int]) -> None:
        for page in order.sample(sorted(set(range(self.pages)) - mine), self.pages // 8):
            while self.rig.memory.place(page, content(page)).error == errno.EAGAIN:
                time.sleep(0.0001)


@pytest.mark.native
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_storm(kind: Kind, seed: int, make_rig: MakeRig) -> None:
    pages = 1024
    rig = make_rig(kind, pages, 1, None, prefetch=(seed, 2), window=(1 << 16, 1 << 16, 1 << 18))
    rig.map.set(Run(pages, 1), State.RESIDENT)
    Storm(rig, pages, seed).run()
    counts = rig.counts()
    came = sum(counts["pages"]) + sum(counts["dropped"])
    assert came <= sum(run.count for peer in rig.peers for _, run in peer.asked)
    assert sum(counts["zero_pages"]) <= sum(counts["pages"])
    assert State.PLACING not in rig.states()
    assert State.REMOVING not in rig.states()
