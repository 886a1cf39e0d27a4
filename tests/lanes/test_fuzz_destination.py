"""A destination's lanes, fed by a hostile source: replies with right checksums over wrong blocks,
headers that lie, ends anywhere. Only what a reply that the protocol allows has sent is placed; all
else ends the lane with one line.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import pytest
from fuzzing import (
    BadBlock,
    Fuzz,
    NoDistance,
    encode_sequence,
    fragments,
    is_one_line,
    make_block,
    mutated,
    unpack,
    xxh64,
)
from lanes import PAGE, RAW_OR_ZERO, Driver, Kind, Memory, Peer, Rig, content, poll, wait_until

from pagenet import Run, Unsupported, _native
from pagenet.protocol import (
    LANE_HEADER_SIZE,
    MAX_LZ4_BYTES,
    MAX_REASON_BYTES,
    REPLY_HEADER,
    Encoding,
    Request,
)
from pagenet.residency import State
from pagenet.uffd import probe

pytestmark = pytest.mark.native

KINDS: tuple[Kind, ...] = ("copy", "move", "memfd", "allocated")
LZ4 = 1 << Encoding.LZ4
CANARY = b"\xca" * PAGE
Verdict = Literal["protocol", "failed", "either"]


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    try:
        probe()
    except Unsupported as error:
        pytest.skip(str(error))


# ---- a stream of replies, by the protocol ----


@dataclass
class Expected:
    """One request, whose pages are counted down as in docs/protocol.md."""

    class_: int
    next: int
    end: int


@dataclass
class Judge:
    """Reads what a source sends, by the specification alone. ``unit``: pages on the wire in one
    page of the destination."""

    unit: int
    may_pack: bool
    open: dict[int, Expected] = field(default_factory=dict)
    closed: list[int] = field(default_factory=list)
    stream: bytearray = field(default_factory=bytearray)
    verdict: Verdict | None = None
    #: contents that a page of the destination may have; None: any
    proper: dict[int, list[bytes | None]] = field(default_factory=dict)
    #: pages that must be in place once all was read
    due: set[int] = field(default_factory=set)
    replies: int = 0

    def note(self, request: Request) -> None:
        run = request.run
        self.open[request.request_id] = Expected(request.class_, run.first, run.end)

    def feed(self, data: bytes) -> None:
        self.stream += data
        while self.verdict is None and self._judge_one():
            self.replies += 1
        if self.verdict is None:
            self._judge_begun()

    def _judge_one(self) -> bool:
        """Judge the next reply, if it is whole."""
        if len(self.stream) < LANE_HEADER_SIZE:
            return False
        fields = REPLY_HEADER.unpack_from(self.stream)
        if not self._fits(fields):
            self.verdict = "protocol"
            return False
        id_, _, encoding, _, first, count, length = fields
        if len(self.stream) < LANE_HEADER_SIZE + length:
            return False
        payload = bytes(self.stream[LANE_HEADER_SIZE : LANE_HEADER_SIZE + length])
        del self.stream[: LANE_HEADER_SIZE + length]
        if encoding == Encoding.FAILED:
            self.verdict = "failed"
            return False
        return self._take(id_, encoding, first, count, payload)

    def _fits(self, fields: tuple[int, ...]) -> bool:
        id_, class_, encoding, reserved, first, count, length = fields
        request = self.open.get(id_)
        if request is None or class_ != request.class_ or reserved:
            return False
        if encoding == Encoding.FAILED:
            return length <= MAX_REASON_BYTES
        if first != request.next or not 0 < count <= request.end - first or count % self.unit:
            return False
        size = count * PAGE
        if encoding == Encoding.LZ4:
            return self.may_pack and 0 < length < size and size <= MAX_LZ4_BYTES
        return (encoding, length) in ((Encoding.RAW, size), (Encoding.ZERO, 0))

    def _take(self, id_: int, encoding: int, first: int, count: int, payload: bytes) -> bool:
        size = count * PAGE
        pages: bytes | None = payload if encoding == Encoding.RAW else bytes(size)
        sure = True
        if encoding == Encoding.LZ4:
            try:
                unpacked = unpack(payload[8:], size)
            except NoDistance:
                self._place(first, count, None, sure=False)
                self.verdict = "either"
                return False
            except BadBlock:
                unpacked = None
            if (
                unpacked is None
                or len(unpacked.data) != size
                or xxh64(unpacked.data) != payload[:8]
            ):
                self.verdict = "protocol"
                return False
            pages, sure = unpacked.data, unpacked.proper
        self._place(first, count, pages, sure)
        if not sure:
            self.verdict = "either"
            return False
        request = self.open[id_]
        request.next += count
        if request.next == request.end:
            del self.open[id_]
            self.closed.append(id_)
        return True

    def _place(self, first: int, count: int, pages: bytes | None, sure: bool) -> None:
        step = self.unit * PAGE
        for at in range(count // self.unit):
            page = first // self.unit + at
            self.proper.setdefault(page, []).append(pages and pages[at * step : (at + 1) * step])
            if sure:
                self.due.add(page)

    def _judge_begun(self) -> None:
        """Pages that came uncompressed need not wait for the rest of their reply."""
        if len(self.stream) < LANE_HEADER_SIZE:
            return
        _, _, encoding, _, first, _, _ = REPLY_HEADER.unpack_from(self.stream)
        whole = (len(self.stream) - LANE_HEADER_SIZE) // PAGE // self.unit * self.unit
        if encoding == Encoding.RAW and whole:
            self._place(first, whole, bytes(self.stream[LANE_HEADER_SIZE:]), sure=False)


# ---- what is sent ----


def header(id_: int, expected: Expected, encoding: int, count: int, length: int) -> bytes:
    return REPLY_HEADER.pack(id_, expected.class_, encoding, 0, expected.next, count, length)


def packed(data: bytes, block: bytes) -> bytes:
    return xxh64(data) + block


def right_payload(pick: random.Random, size: int) -> bytes:
    """A valid LZ4 payload, shorter than the pages that it stands for."""
    while True:
        block = make_block(pick, size)
        if len(block) + 8 < size:
            return packed(unpack(block, size).data, block)


def other_size(pick: random.Random, size: int) -> bytes:
    """A block of another size than its header tells, with the right checksum of its own content."""
    other = max(1, size + pick.choice([-PAGE, -13, -1, 1, 2, 8, 13, PAGE, 65536]))
    block = make_block(pick, other) if other > 100 else encode_sequence(bytes(other))
    return packed(unpack(block, other).data, block)


def bad_distance(pick: random.Random, size: int) -> bytes:
    """A match from before the beginning, or at distance 0; the checksum is that of zeros in its
    place."""
    literals = pick.randbytes(pick.randint(1, 40))
    match = size - len(literals) - 12
    distance = pick.choice([0, len(literals) + 1, 65535])
    block = encode_sequence(literals, distance, match) + encode_sequence(bytes(12))
    return packed(literals + bytes(size - len(literals)), block)


def bad_length(pick: random.Random, size: int) -> bytes:
    """Lengths that lie: literals behind the end of the block, or a match behind the end of the
    pages."""
    if pick.random() < 0.5:
        block = (
            bytes([0xF0])
            + b"\xff" * pick.choice([1, 100, 300])
            + bytes([pick.randrange(255)])
            + bytes(20)
        )
    else:
        block = encode_sequence(
            b"\0", 1, size + pick.choice([0, 4, 255, 1 << 20])
        ) + encode_sequence(bytes(5))
    return packed(bytes(size), block)


def bad_end(pick: random.Random, size: int) -> bytes:
    """A block that ends as no encoder would end it: with few literals or none behind a match, or
    with something behind the last literals."""
    tail = pick.randint(0, 11)
    block = encode_sequence(b"z", 1, size - 1 - tail)
    block += pick.choice([encode_sequence(b"z" * tail), encode_sequence(b"z" * tail, 1, 4), b""])
    block += pick.choice([b"", b"", b"\0", pick.randbytes(3)])
    return packed(b"z" * size, block)


def flipped(pick: random.Random, size: int) -> bytes:
    """A bit of the block or of the checksum is flipped; or one of the block, with a checksum that
    fits again."""
    payload = bytearray(right_payload(pick, size))
    payload[pick.randrange(len(payload))] ^= 1 << pick.randrange(8)
    if pick.random() < 0.5:
        with suppress(BadBlock):
            payload[:8] = xxh64(unpack(bytes(payload[8:]), 2 * size).data)
    return bytes(payload)


def scrambled(pick: random.Random, size: int) -> bytes:
    """Any other change; what can be unpacked has the right checksum."""
    block = mutated(pick, right_payload(pick, size)[8:])
    data = b""
    with suppress(BadBlock):
        data = unpack(block, 2 * size).data
    return packed(data, block)


PAYLOADS: list[Callable[[random.Random, int], bytes]] = [
    other_size,
    bad_distance,
    bad_length,
    bad_end,
    flipped,
    scrambled,
]


class Hostile:
    """A source's end of one lane."""

    def __init__(
        self, pick: random.Random, peer: Peer, judge: Judge, has_ended: Callable[[], bool]
    ) -> None:
        self.pick, self.peer, self.judge, self.has_ended = pick, peer, judge, has_ended
        self._known = 0

    def read(self) -> None:
        self.peer.read()
        for open_ in self.peer.open[self._known :]:
            self.judge.note(open_.request)
        self._known = len(self.peer.open)

    def choose(self) -> tuple[int, Expected, int]:
        """An open request, and how many of its pages to answer."""
        id_ = self.pick.choice(list(self.judge.open))
        expected = self.judge.open[id_]
        units = (expected.end - expected.next) // self.judge.unit
        return (
            id_,
            expected,
            self.pick.choice([1, units, self.pick.randint(1, units)]) * self.judge.unit,
        )

    def right(self) -> bytes:
        id_, expected, count = self.choose()
        size = count * PAGE
        match self.pick.choice(["zero", "raw", "content", "lz4", "lz4"]):
            case "lz4" if self.judge.may_pack:
                payload = right_payload(self.pick, size)
                return header(id_, expected, Encoding.LZ4, count, len(payload)) + payload
            case "zero":
                return header(id_, expected, Encoding.ZERO, count, 0)
            case "content":
                payload = b"".join(content(expected.next + page) for page in range(count))
                return header(id_, expected, Encoding.RAW, count, size) + payload
        return header(id_, expected, Encoding.RAW, count, size) + self.pick.randbytes(size)

    def wrong(self) -> bytes:
        ways = [
            self._payload,
            self._header,
            self._failure,
            self._scrambled,
            self._twice,
            self._split,
        ]
        return self.pick.choice([self._payload] * 2 + ways)()

    def _payload(self) -> bytes:
        id_, expected, count = self.choose()
        payload = self.pick.choice(PAYLOADS)(self.pick, count * PAGE)
        length = (
            len(payload)
            if self.pick.random() < 0.9
            else max(0, len(payload) + self.pick.choice([-8, -1, 1, 24]))
        )
        return header(id_, expected, Encoding.LZ4, count, length) + payload

    def _header(self) -> bytes:
        id_, expected, count = self.choose()
        fields = [id_, expected.class_, Encoding.RAW, 0, expected.next, count, count * PAGE]
        if self.pick.random() < 0.5:
            fields[2], fields[6] = self.pick.choice(
                [(Encoding.ZERO, 0), (Encoding.LZ4, 100), (3, 0), (254, 0), (255, 2000)]
            )
        which = self.pick.choice([0, 1, 2, 3, 4, 5, 5, 6, 6])
        limit = (1 << 8 * (4, 1, 1, 2, 8, 4, 4)[which]) - 1
        near = fields[which] + self.pick.choice([-1, 1, self.judge.unit, -self.judge.unit])
        fields[which] = (
            self.pick.choice([near, near, 0, limit, limit >> 1, self.pick.randint(0, limit)])
            & limit
        )
        if which == 0:  # not a number that the lane may use a moment later
            fields[0] = self.pick.choice(
                [*self.judge.closed, 1 << 30, limit, self.pick.randint(1 << 24, limit)]
            )
        return REPLY_HEADER.pack(*fields) + self.pick.randbytes(min(fields[6], 5000))

    def _failure(self) -> bytes:
        id_, expected, _ = self.choose()
        length = self.pick.choice([0, 1, 40, MAX_REASON_BYTES, MAX_REASON_BYTES + 1])
        reason = self.pick.choice([b"\x1b[2J\n%s%n", b"\xff\xfe\0", b"gone. "]) * length
        head = REPLY_HEADER.pack(
            id_,
            expected.class_,
            255,
            0,
            self.pick.getrandbits(64),
            self.pick.getrandbits(32),
            length,
        )
        return head + reason[:length]

    def _scrambled(self) -> bytes:
        right = self.right()
        # The id stays: another id may be that of a request in flight.
        return (
            right[:4]
            + mutated(self.pick, right[4 : LANE_HEADER_SIZE + 200])
            + right[LANE_HEADER_SIZE + 200 :]
        )

    def _twice(self) -> bytes:
        return self.right() * 2

    def _split(self) -> bytes:
        """A reply that ends within a unit, or begins within one."""
        id_, expected, count = self.choose()
        count += self.pick.choice([-1, 1])
        return header(id_, expected, Encoding.RAW, count, count * PAGE) + bytes(
            min(count * PAGE, 1 << 17)
        )

    def send(self, data: bytes) -> None:
        """Send as much as the lane takes: a lane that has ended takes nothing."""
        self.judge.feed(data)
        for piece in fragments(self.pick, data):
            view = memoryview(piece)
            while view:
                wait_until(
                    lambda: poll(self.peer.sock.fileno(), select.POLLOUT) or self.has_ended(),
                    "the lane receives",
                )
                if self.has_ended():
                    return
                try:
                    view = view[
                        self.peer.sock.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :
                    ]
                except BlockingIOError:
                    continue
                except OSError:
                    return


# ---- rounds ----


class GuardedMemory(Memory):
    """If there is a file behind the memory, its page that is not announced has something in it."""

    def _open_file(self) -> int:
        fd = super()._open_file()
        if fd >= 0:
            os.pwrite(fd, CANARY * (self.page_size // PAGE), 5 * self.page_size)
        return fd

    def read_behind(self, page: int) -> bytes:
        """A page that has come, but that the lane, which has ended, has not made visible: its first
        touch would have been counted."""
        assert self._fd >= 0, f"page {page} is resident, and its owner does not see it"
        return os.pread(self._fd, self.page_size, page * self.page_size)

    def check_hole(self) -> None:
        if self._fd >= 0:
            assert os.pread(self._fd, self.page_size, 5 * self.page_size) == CANARY * (
                self.page_size // PAGE
            )


def is_present(address: int) -> bool:
    """Whether this process has that page in its page table."""
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        entry = os.pread(file.fileno(), 8, address // mmap.PAGESIZE * 8)
    return bool(entry[7] >> 7)


def begin(pick: random.Random, rig: Rig, attacked: Peer, spared: set[int]) -> None:
    """Have pages asked for on the lane that will be attacked, and perhaps on the other lane."""
    free = [page for page in rig.scope() if page not in spared]
    demanding = attacked is rig.demand
    if not demanding or pick.random() < 0.5:
        for _ in range(pick.randint(1, 4)):
            first = pick.choice(free)
            piece = rig.memory.piece_of(first)
            rig.feed(Run(first, pick.randint(1, piece.end - first)))
        rig.background.wait_asked(1)
    if demanding or pick.random() < 0.5:
        touched = pick.sample(free, pick.randint(1, 4))
        for page in touched:
            rig.touch(page)
        rig.wait_faults(len(touched))


def check_memory(
    rig: Rig,
    memory: GuardedMemory,
    proper: dict[int, list[bytes | None]],
    due: set[int],
    spared: dict[int, bytes],
) -> None:
    for page in rig.scope():
        present = is_present(memory.address(page))
        if page in spared:
            assert memory.read(page) == spared[page], f"page {page} was written over"
        elif rig.map.state(page) is State.RESIDENT:
            found = memory.read(page) if present else memory.read_behind(page)
            assert found in proper.get(page, []) or None in proper.get(page, []), (
                f"page {page} is none that was sent"
            )
        else:
            assert not present, f"page {page} is visible and {rig.map.state(page).name}"
    missing = {
        page for page in due if rig.map.state(page) is not State.RESIDENT and page not in spared
    }
    assert not missing, f"pages {sorted(missing)} came and are not there"


def check_end(verdict: Verdict | None, end: _native.End) -> None:
    assert is_one_line(end.text) or end.kind in (
        _native.END_CLOSED,
        _native.END_BROKEN,
        _native.END_FAILED,
    ), end
    closed = {_native.END_CLOSED, _native.END_BROKEN}
    expected = {
        "protocol": {_native.END_PROTOCOL},
        "failed": {_native.END_FAILED},
        "either": {_native.END_PROTOCOL} | closed,
        None: closed,
    }
    assert end.kind in expected[verdict], (verdict, end)


def attack(pick: random.Random, rig: Rig, hostile: Hostile) -> _native.End:
    """Right replies and then, or soon, something else."""
    judge = hostile.judge
    for _ in range(pick.choice([0, 1, 2, 5, 12])):
        hostile.read()
        if judge.open and judge.verdict is None:
            hostile.send(hostile.right())
    hostile.read()
    if judge.open and pick.random() < 0.85:
        hostile.send(hostile.wrong())
    elif judge.open:
        whole = hostile.right()
        hostile.send(whole[: pick.randrange(len(whole))])
    if judge.verdict in (None, "either"):
        how = pick.choice([socket.SHUT_WR, socket.SHUT_RDWR])
        hostile.peer.sock.shutdown(how)
        if how == socket.SHUT_RDWR:
            judge.due.clear()  # a lane that cannot send any more need not read what has come
    return rig.lanes.end_of("demand" if hostile.peer is rig.demand else "background")


def run_round(pick: random.Random, driver: Driver, attacked: str) -> int:
    kind = pick.choice(KINDS)
    shift = pick.choice([0, 0, 0, 2])
    memory = GuardedMemory(kind, *pick.choice([(10, 8), (40, 8)]), page_size=PAGE << shift)
    encodings = pick.choice([RAW_OR_ZERO | LZ4, LZ4 | 1 << Encoding.ZERO, RAW_OR_ZERO])
    prefetch = pick.choice([(0, 0), (2, 2), (8, 0)])
    buffer_size = pick.choice([None, None, 2048])
    with Rig(
        memory, driver, prefetch=prefetch, buffer_size=buffer_size, encodings=encodings
    ) as rig:
        spared = spare(pick, rig)
        lane, other = (
            (rig.demand, rig.background) if attacked == "demand" else (rig.background, rig.demand)
        )
        begin(pick, rig, lane, set(spared))
        judge = Judge(1 << shift, bool(encodings & LZ4))
        proper, due = judge.proper, judge.due
        for page in honest_answers(pick, rig, other):
            proper.setdefault(page, []).append(content(page, memory.page_size))
        end = attack(
            pick, rig, Hostile(pick, lane, judge, lambda: not rig.lanes.is_running(attacked))
        )
        check_end(judge.verdict, end)
        if driver == "native" and pick.random() < 0.3:
            check_other_lane(rig, other, proper)
        if driver == "native":
            rig.lanes.stop()  # the other lane may be about to place something
        check_memory(rig, memory, proper, due, spared)
        memory.check_hole()
        return judge.replies


def spare(pick: random.Random, rig: Rig) -> dict[int, bytes]:
    """Pages that a third party has placed, if the lane cannot see that in the file behind the
    memory."""
    if rig.memory.is_shared:
        return {}
    page, canary = pick.choice(list(rig.scope())), CANARY * (rig.memory.page_size // PAGE)
    assert rig.memory.place(page, canary).done == rig.memory.page_size
    return {page: canary}


def honest_answers(pick: random.Random, rig: Rig, peer: Peer) -> Iterator[int]:
    """Answer, uncompressed, what a lane has asked for by now."""
    peer.read()
    for open_ in list(peer.open) if pick.random() < 0.5 else []:
        run, data = peer.answer(open_, peer.left(open_).count, zero=False)
        yield from range(run.first, run.end)
        peer.send(data)


def check_other_lane(rig: Rig, peer: Peer, proper: dict[int, list[bytes | None]]) -> None:
    """The other lane continues, and so does the thread that waits for it."""
    peer.read()
    for open_ in list(peer.open):
        run, data = peer.answer(open_, peer.left(open_).count, zero=False)
        for page in range(run.first, run.end):
            proper.setdefault(page, []).append(content(page, rig.memory.page_size))
        peer.send(data)
    wait_until(lambda: not peer.unread(), "what was sent is received")


@pytest.mark.parametrize("attacked", ["demand", "background"])
@pytest.mark.parametrize("driver", ["native", "trio"])
def test_hostile_source(fuzz: Fuzz, driver: Driver, attacked: str) -> None:
    for pick in fuzz.rounds(150):
        run_round(pick, driver, attacked)
