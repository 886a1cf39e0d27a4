"""A source's lanes, asked by a hostile destination: valid requests are answered exactly, an invalid
one closes the lane with one line, and another destination's pages come meanwhile."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import trio
from fuzzing import Fuzz, fragments, is_one_line, mutated, unpack, xxh64
from lanes import PAGE, PATIENCE, Call, content, wait_until

from pagenet import ConnectionBroken, RemoteProtocolError, Run, _native, open_source
from pagenet.protocol import (
    LANE_HEADER_SIZE,
    MAX_REQUEST_BYTES,
    REPLY_HEADER,
    REQUEST_HEADER,
    Encoding,
)
from pagenet.source.memory import Source
from pagenet.source.trio_lane import TrioSourceLane
from pagenet.tcp._connection import SocketConnection

pytestmark = pytest.mark.native

PAGES = (1100, 37)  # of two files: more than one request may ask for, and a few more
REGION_PAGES = sum(PAGES)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    paths, first = [], 0
    for number, pages in enumerate(PAGES):
        path: Path = tmp_path_factory.mktemp("source") / str(number)
        path.write_bytes(b"".join(content(page) for page in range(first, first + pages)))
        paths.append(str(path))
        first += pages
    source = open_source(*paths)
    yield source
    source.close()


# ---- a stream of requests, by the protocol ----


@dataclass
class Request:
    id: int
    class_: int
    encodings: int
    unit: int
    run: Run


def judged(stream: bytes) -> tuple[list[Request], bool]:
    """The requests before the first invalid one, and whether there is an invalid one."""
    requests: list[Request] = []
    whole = len(stream) // LANE_HEADER_SIZE * LANE_HEADER_SIZE
    for (
        id_,
        class_,
        encodings,
        shift,
        reserved,
        first,
        count,
        reserved2,
    ) in REQUEST_HEADER.iter_unpack(stream[:whole]):
        start, pages = (0, PAGES[0]) if first < PAGES[0] else (PAGES[0], PAGES[1])
        inside = count and first >= start and first + count <= start + pages
        unit = 1 << shift
        units = unit * PAGE <= 1 << 30 and (first - start) % unit == 0 and count % unit == 0
        small = count * PAGE <= MAX_REQUEST_BYTES or count == unit
        if reserved or reserved2 or class_ > 2 or not inside or not units or not small:
            return requests, True
        requests.append(Request(id_, class_, encodings, unit, Run(first, count)))
    return requests, False


def receive_answers(sock: socket.socket, requests: list[Request]) -> None:
    """Check that the requests are answered one after the other, exactly."""
    for request in requests:
        next_ = request.run.first
        while next_ < request.run.end:
            header = REPLY_HEADER.unpack(receive(sock, LANE_HEADER_SIZE))
            id_, class_, encoding, reserved, first, count, length = header
            assert (id_, class_, reserved, first) == (request.id, request.class_, 0, next_)
            assert 0 < count <= request.run.end - first
            assert count % request.unit == 0
            assert length <= count * PAGE
            payload = receive(sock, length)
            assert unpacked(request, encoding, count * PAGE, payload) == b"".join(
                map(content, range(first, first + count))
            )
            next_ += count


def unpacked(request: Request, encoding: int, size: int, payload: bytes) -> bytes:
    if encoding == Encoding.LZ4:
        assert request.encodings & 1 << Encoding.LZ4
        assert len(payload) < size
        pages = unpack(payload[8:], size)
        assert pages.proper
        assert payload[:8] == xxh64(pages.data)
        return pages.data
    assert encoding in (Encoding.RAW, Encoding.ZERO)
    return payload if encoding == Encoding.RAW else bytes(size if not payload else 0)


# ---- what is asked ----


def right(pick: random.Random) -> bytes:
    block = pick.randrange(2)
    start = PAGES[0] if block else 0
    shift = pick.choice([0, 0, 0, 1, 3])
    unit = 1 << shift
    first = pick.randrange(PAGES[block] // unit)
    most = PAGES[block] // unit - first
    count = min(most, pick.choice([1, 1, 2, 20, 64 if unit == 1 else 8]))
    encodings = pick.choice([0, 1, 2, 3, 4, 5, 6, 7, 255])
    head = (pick.getrandbits(32), pick.randrange(3), encodings, shift, 0)
    return REQUEST_HEADER.pack(*head, start + first * unit, count * unit, 0)


def wrong(pick: random.Random) -> bytes:
    """A request with a field that lies at a limit; or any bytes."""
    fields = list(REQUEST_HEADER.unpack(right(pick)))
    sizes = (4, 1, 1, 1, 1, 8, 4, 4)
    which = pick.choice([1, 3, 3, 4, 5, 5, 6, 6, 7])
    limit = (1 << 8 * sizes[which]) - 1
    near = fields[which] + pick.choice([-1, 1])
    there = [
        PAGES[0] - 1,
        PAGES[0],
        REGION_PAGES - 1,
        REGION_PAGES,
        MAX_REQUEST_BYTES // PAGE,
        MAX_REQUEST_BYTES // PAGE + 1,
    ]
    fields[which] = (
        pick.choice([near, 0, limit, limit >> 1, 1 << pick.randrange(8 * sizes[which]), *there])
        & limit
    )
    request = REQUEST_HEADER.pack(*fields)
    return request if pick.random() < 0.7 else mutated(pick, request)


def make_stream(pick: random.Random) -> bytes:
    parts = [right(pick) for _ in range(pick.choice([0, 1, 3, 10]))]
    parts += [wrong(pick) for _ in range(pick.choice([0, 1, 1, 3]))]
    stream = b"".join(parts)
    if pick.random() < 0.2 and stream:
        stream = stream[: pick.randrange(len(stream))]
    return stream


def send(pick: random.Random, sock: socket.socket, stream: bytes) -> None:
    """Send until the source closes the lane."""
    with suppress(OSError):
        for piece in fragments(pick, stream):
            sock.sendall(piece)


def receive_end(sock: socket.socket) -> None:
    """Check that nothing more comes."""
    with suppress(ConnectionResetError):
        assert sock.recv(1) == b""


def receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, "the connection has ended"
        data += piece
    return bytes(data)


# ---- rounds ----


Outcome = Literal["wrong", "cut", "whole", "gone"]


def ask(pick: random.Random, ours: socket.socket) -> Outcome:
    """Send all that one hostile destination sends, and check the answers. By chance, it leaves
    before they come."""
    stream = make_stream(pick)
    requests, wrong = judged(stream)
    with ours:
        sending = Call(send, pick, ours, stream)
        if pick.random() < 0.1:
            ours.shutdown(socket.SHUT_RDWR)
            sending.join()
            return "gone"
        receive_answers(ours, requests)
        sending.join()
        if not wrong:
            ours.shutdown(socket.SHUT_WR)
        receive_end(ours)
    return "wrong" if wrong else "cut" if len(stream) % LANE_HEADER_SIZE else "whole"


class Loop:
    """The loop in C, with an honest destination's connection."""

    def __init__(self, source: Source) -> None:
        self.loop = _native.SourceLoop(source.native_blocks(), background=False)
        self.thread = Call(self.loop.run)
        self.ends: dict[int, _native.End] = {}
        self._number = 0
        self.honest, _ = self.connect()

    def connect(self) -> tuple[socket.socket, int]:
        theirs, ours = socket.socketpair()
        theirs.setblocking(False)
        ours.settimeout(PATIENCE)
        self._number += 1
        self.loop.add(theirs.detach(), self._number, b"")
        return ours, self._number

    def wait_end(self, number: int) -> _native.End:
        def ended() -> bool:
            self.ends |= dict(self.loop.ended())
            return number in self.ends

        wait_until(ended, "the end of a connection")
        return self.ends.pop(number)

    def check_honest(self, pick: random.Random) -> None:
        page = pick.choice([page for page in range(REGION_PAGES) if page % 6 != 5])
        self.honest.sendall(REQUEST_HEADER.pack(page, 0, 3, 0, 0, page, 1, 0))
        assert receive(self.honest, LANE_HEADER_SIZE + PAGE)[LANE_HEADER_SIZE:] == content(page)

    def close(self) -> None:
        self.honest.close()
        self.loop.stop()
        assert self.thread.join().kind == _native.END_STOPPED
        self.loop.close()


def test_hostile_destination_of_the_loop(fuzz: Fuzz, source: Source) -> None:
    loop = Loop(source)
    try:
        for pick in fuzz.rounds(300):
            ours, number = loop.connect()
            outcome = ask(pick, ours)
            end = loop.wait_end(number)
            if outcome in ("wrong", "cut"):
                assert end.kind == _native.END_PROTOCOL, end
                assert is_one_line(end.text), end
            elif outcome == "whole":
                assert end.kind == _native.END_CLOSED, end
            loop.check_honest(pick)
    finally:
        loop.close()


async def serve_in_trio(theirs: socket.socket, source: Source) -> str | None:
    """Serve in Trio. Returns why the lane was closed, if something was wrong."""
    theirs.setblocking(False)
    connection = SocketConnection(trio.socket.from_stdlib_socket(theirs), "peer")
    try:
        await TrioSourceLane(connection, source).run(b"")
    except RemoteProtocolError as error:
        return str(error)
    except ConnectionBroken:
        return None
    finally:
        connection.close()
    return None


async def test_hostile_destination_of_a_lane_in_trio(fuzz: Fuzz, source: Source) -> None:
    for pick in fuzz.rounds(300):
        theirs, ours = socket.socketpair()
        ours.settimeout(PATIENCE)
        asking = Call(ask, pick, ours)
        reason = await serve_in_trio(theirs, source)
        outcome = await trio.to_thread.run_sync(asking.join)
        if outcome != "gone":
            assert (reason is not None) == (outcome in ("wrong", "cut"))
        assert reason is None or is_one_line(reason)
