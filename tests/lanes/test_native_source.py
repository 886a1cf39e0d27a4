"""The source's loop in C, compared with the decoder of a destination and with the source's lane in
Trio."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from lanes import PAGE, PATIENCE, RAW_OR_ZERO, Call, wait_until

from pagenet import Run, _native, open_source
from pagenet.protocol import LANE_HEADER_SIZE, Class, Encoding, OutstandingRequests, Reply, Request
from pagenet.snapshot.creating import create_snapshot
from pagenet.source.memory import Source
from pagenet.source.trio_lane import TrioSourceLane
from pagenet.tcp._connection import SocketConnection

pytestmark = pytest.mark.native

PAGES = 1024
LZ4_MAYBE, LZ4_ALWAYS = 0b111, 0b110
SENDFILE_PAGES = 16  # as many pages as the loop sends by sendfile at a time


def content(page: int, zeros: frozenset[int]) -> bytes:
    return bytes(PAGE) if page in zeros else (page + 1).to_bytes(8, "little") * (PAGE // 8)


def stretches(seed: int, pages: int = PAGES) -> frozenset[int]:
    """Zero pages in stretches of all lengths."""
    order, page, zeros = random.Random(seed), 0, set()
    while page < pages:
        length = order.choice([1, 1, 2, 3, 5, 16, 63, 64, 65, 200])
        if order.random() < 0.5:
            zeros |= set(range(page, min(pages, page + length)))
        page += length
    return frozenset(zeros)


# ---- memory ----


@dataclass
class Sparse:
    """A file of ``pages`` pages, of which those in ``zeros`` were written as zeros, or (holes)
    never written."""

    path: str
    zeros: frozenset[int]
    pages: int = PAGES


def write(fd: int, zeros: frozenset[int], pages: int, holes: bool) -> None:
    os.ftruncate(fd, pages * PAGE)
    for page in range(pages):
        if not (holes and page in zeros):
            os.pwrite(fd, content(page, zeros), page * PAGE)


def make_layers(directory: Path, zeros: frozenset[int], pages: int) -> str:
    """A snapshot of three layers: each has every third page, among those of the layers before."""
    directory.mkdir()
    base = None
    for layer in range(3):
        with (directory / "memory").open("w+b") as file:
            write(file.fileno(), zeros, pages, holes=True)
            for page in set(range(pages)) - set(range(0, pages, 3 - layer)):
                os.pwrite(file.fileno(), bytes([layer + 1]) * PAGE, page * PAGE)
        with open_source(directory / "memory") as source:
            trio.run(create_snapshot, source, str(directory / str(layer)), base)
        base = str(directory / str(layer))
    return f"snapshot:{base}"


MakeMemory = Callable[..., Sparse]


@pytest.fixture
def make_memory(tmp_path: Path) -> Iterator[MakeMemory]:
    """``make_memory(kind, seed, pages)``; kinds: file, holes, memfd, memfd holes, process,
    snapshot."""
    with ExitStack() as stack:

        def make(kind: str, seed: int = 0, pages: int = PAGES) -> Sparse:
            zeros = stretches(seed, pages)
            if kind == "process":  # this process
                mapped = _native.Mapped(pages * PAGE)
                stack.callback(mapped.close)
                mapped.buffer(0, mapped.size)[:] = b"".join(
                    content(page, zeros) for page in range(pages)
                )
                return Sparse(
                    f"pid:{os.getpid()}:{mapped.address:#x}+{mapped.size:#x}", zeros, pages
                )
            if kind == "snapshot":
                return Sparse(make_layers(tmp_path / f"layers-{seed}", zeros, pages), zeros, pages)
            if kind.startswith("memfd"):
                fd = os.memfd_create("test", os.MFD_CLOEXEC)
                path = f"/proc/self/fd/{fd}"
            else:
                path = str(tmp_path / f"memory-{seed}-{kind}")
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            stack.callback(os.close, fd)
            write(fd, zeros, pages, kind.endswith("holes"))
            return Sparse(path, zeros, pages)

        yield make


KINDS = ("file", "holes", "memfd", "memfd holes", "process", "snapshot")


# ---- the loop, and a destination's end of a connection ----


class Serving:
    """A loop in its thread."""

    def __init__(self, *specs: str, here: _native.Here | None = None) -> None:
        """``here``: the pieces of the file come one by one."""
        self.source: Source = open_source(*specs)
        blocks = [replace(block, here=here) for block in self.source.native_blocks()]
        self.loop = _native.SourceLoop(blocks, background=False)
        self._numbers = 0
        self.thread = Call(self.loop.run)
        self.ends: dict[int, _native.End] = {}
        self._peers: list[Peer] = []

    def connect(
        self,
        unread: bytes = b"",
        *,
        tcp: bool = False,
        buffer_size: int | None = None,
        encodings: int = RAW_OR_ZERO,
    ) -> Peer:
        ours, theirs = tcp_pair() if tcp else socket.socketpair()
        ours.setblocking(False)
        if buffer_size is not None:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_size)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_size)
        self._numbers += 1
        self.loop.add(ours.detach(), self._numbers, unread)
        self._peers.append(Peer(theirs, self.source, self._numbers, encodings))
        return self._peers[-1]

    def wait_end(self, peer: Peer) -> _native.End:
        def ended() -> bool:
            self.ends |= self.loop.ended()
            return peer.number in self.ends

        wait_until(ended, "the end of a connection")
        return self.ends[peer.number]

    def end(self) -> _native.End:
        """Once the loop has ended, close the connections that it still has."""
        end: _native.End = self.thread.join()
        self.loop.close()
        return end

    def close(self) -> None:
        if self.thread.is_running:
            self.loop.stop()
        try:
            self.end()
        finally:
            self.source.close()
            for peer in self._peers:
                peer.sock.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """A connection between two addresses, as with a peer on another host: sendfile is not used for
    peers on this host."""
    with socket.create_server(("127.0.0.2", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname(), source_address=("127.0.0.1", 0))
        ours, _ = listener.accept()
    return ours, theirs


class Peer:
    """A destination. Checks every reply against the requests that are open."""

    def __init__(
        self, sock: socket.socket, source: Source, number: int, encodings: int = RAW_OR_ZERO
    ) -> None:
        self.sock = sock
        self.number = number
        self.requests = OutstandingRequests(source.region, encodings)
        self._region = source.region
        #: pages that came, and those that came as a flag
        self.pages: dict[int, bytes] = {}
        self.flagged: set[int] = set()
        self.replies: list[Reply] = []
        sock.settimeout(PATIENCE)

    def ask(
        self, first: int, count: int, class_: Class = Class.DEMAND, unit_shift: int = 0
    ) -> Request:
        request = self.requests.open(class_, Run(first, count), unit_shift)
        self.sock.sendall(request.encode())
        return request

    def receive(self, size: int, step: int = 1 << 16) -> bytes:
        data = bytearray()
        while len(data) < size:
            got = self.sock.recv(min(step, size - len(data)))
            if not got:
                raise EOFError(f"{len(data)} of {size} bytes")
            data += got
        return bytes(data)

    def reply(self, step: int = 1 << 16) -> Reply:
        reply = self.requests.reply(self.receive(LANE_HEADER_SIZE, step))
        payload = self.receive(reply.length, step)
        self.replies.append(reply)
        if reply.encoding is Encoding.FAILED:
            return reply
        if reply.encoding is Encoding.LZ4:
            pages = memoryview(bytearray(reply.run.count * PAGE))
            assert _native.unpack(memoryview(payload), pages)
            payload = bytes(pages)
        for index in range(reply.run.count):
            page = reply.run.first + index
            self.pages[page] = (
                payload[index * PAGE : (index + 1) * PAGE] if payload else bytes(PAGE)
            )
            if reply.encoding is Encoding.ZERO:
                self.flagged.add(page)
        return reply

    def fetch(self, step: int = 1 << 16) -> None:
        """Receive the answers to all open requests."""
        while len(self.requests):
            self.reply(step)


MakeServing = Callable[..., Serving]


@pytest.fixture
def serve() -> Iterator[MakeServing]:
    with ExitStack() as stack:

        def make(*memories: Sparse, here: _native.Here | None = None) -> Serving:
            serving = Serving(*(memory.path for memory in memories), here=here)
            stack.callback(serving.close)
            return serving

        yield make


def check(peer: Peer, memory: Sparse, pages: Sequence[int], first: int = 0) -> None:
    for page in pages:
        assert peer.pages[first + page] == content(page, memory.zeros), f"page {page}"


# ---- right bytes ----


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_page_once(kind: str, tcp: bool, make_memory: MakeMemory, serve: MakeServing) -> None:
    memory = make_memory(kind)
    peer = serve(memory).connect(tcp=tcp)
    for first in range(0, PAGES, 128):
        peer.ask(first, 128, Class.BACKGROUND)
    peer.fetch()
    check(peer, memory, range(PAGES))
    assert peer.flagged == memory.zeros


def asked_of_trio(
    memory: Sparse, requests: Sequence[tuple[int, int, int]], encodings: int = RAW_OR_ZERO
) -> list[tuple[int, int, Encoding]]:
    """What the lane in Trio answers: for each page, how often it came and in what encoding."""
    ours, theirs = socket.socketpair()
    with open_source(memory.path) as source, ours:
        peer = Peer(theirs, source, 0, encodings)
        ours.setblocking(False)

        async def run() -> None:
            async with trio.open_nursery() as nursery:
                lane = TrioSourceLane(
                    SocketConnection(trio.socket.from_stdlib_socket(ours), "peer"), source
                )
                nursery.start_soon(lane.run, b"")
                await trio.to_thread.run_sync(ask_and_fetch, peer, requests)
                nursery.cancel_scope.cancel()

        trio.run(run)
    theirs.close()
    return coverage(peer)


def ask_and_fetch(peer: Peer, requests: Sequence[tuple[int, int, int]]) -> None:
    for first, count, shift in requests:
        peer.ask(first, count, Class.PREFETCH, shift)
        peer.fetch()


def coverage(peer: Peer) -> list[tuple[int, int, Encoding]]:
    """Per request (by id) and page. How replies are split does not matter."""
    return [
        (reply.request_id, page, reply.encoding)
        for reply in peer.replies
        for page in range(reply.run.first, reply.run.end)
    ]


def random_requests(order: random.Random, count: int) -> Iterator[tuple[int, int, int]]:
    for _ in range(count):
        shift = order.choice([0, 0, 0, 1, 3, 6, 7])
        unit = 1 << shift
        first = order.randrange(PAGES // unit)
        most = min(PAGES // unit - first, 1024 // unit)
        yield first * unit, unit * order.choice([1, 1, order.randint(1, most), most]), shift


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_same_answers_as_in_trio(
    kind: str, seed: int, make_memory: MakeMemory, serve: MakeServing
) -> None:
    memory = make_memory(kind, seed)
    requests = list(random_requests(random.Random(seed), 20))
    peer = serve(memory).connect(tcp=seed % 2 == 1)
    ask_and_fetch(peer, requests)
    for first, count, _ in requests:
        check(peer, memory, range(first, first + count))
    native, oracle = coverage(peer), asked_of_trio(memory, requests)
    assert [answer[:2] for answer in native] == [answer[:2] for answer in oracle]
    # A hole that reaches to a request's end is a flag in both; so are units that are zero.
    assert native == oracle


# ---- compressed ----


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_as_in_trio(
    kind: str, seed: int, make_memory: MakeMemory, serve: MakeServing
) -> None:
    """What becomes smaller is compressed: here, all that is not zero."""
    memory = make_memory(kind, seed)
    requests = list(random_requests(random.Random(seed), 20))
    peer = serve(memory).connect(tcp=seed % 2 == 1, encodings=LZ4_ALWAYS)
    ask_and_fetch(peer, requests)
    for first, count, _ in requests:
        check(peer, memory, range(first, first + count))
    assert {reply.encoding for reply in peer.replies} == {Encoding.ZERO, Encoding.LZ4}
    assert coverage(peer) == asked_of_trio(memory, requests, LZ4_ALWAYS)


@pytest.fixture
def random_file(tmp_path: Path) -> Path:
    """Every second stretch of 16 pages is random."""
    path, order = tmp_path / "random", random.Random(9)
    path.write_bytes(
        b"".join(order.randbytes(16 * PAGE) + b"text" * (4 * PAGE) for _ in range(PAGES // 32))
    )
    return path


@pytest.mark.parametrize("count", [1, 16])
def test_what_does_not_get_smaller_travels_raw(
    count: int, random_file: Path, serve: MakeServing
) -> None:
    content = random_file.read_bytes()
    requests = [(first, count, 0) for first in range(0, PAGES, count)]
    peer = serve(Sparse(str(random_file), frozenset())).connect(encodings=LZ4_ALWAYS)
    ask_and_fetch(peer, requests)
    assert b"".join(peer.pages[page] for page in range(PAGES)) == content
    for _, page, encoding in coverage(peer):
        assert encoding is (Encoding.LZ4 if page // 16 % 2 else Encoding.RAW)
    assert coverage(peer) == asked_of_trio(
        Sparse(str(random_file), frozenset()), requests, LZ4_ALWAYS
    )


@pytest.mark.parametrize("encodings", [RAW_OR_ZERO, LZ4_MAYBE])
@pytest.mark.parametrize("class_", Class)
@pytest.mark.parametrize("kind", ["memfd", "process"])
def test_not_compressed_where_it_was_not_asked_for_or_is_not_worth_it(
    kind: str, class_: Class, encodings: int, make_memory: MakeMemory, serve: MakeServing
) -> None:
    memory = make_memory(kind)
    peer = serve(memory).connect(encodings=encodings)
    for first in range(0, PAGES, 64):
        peer.ask(first, 64, class_)
        peer.fetch()
    check(peer, memory, range(PAGES))
    assert {reply.encoding for reply in peer.replies} == {Encoding.ZERO, Encoding.RAW}


def test_the_source_chooses_by_what_the_link_does(
    make_memory: MakeMemory, serve: MakeServing
) -> None:
    """A reader that takes 20 MB/s: after a while the background is compressed, and then demand is
    too."""
    memory = make_memory("memfd", 1)
    serving = serve(memory)
    slow = serving.connect(encodings=LZ4_MAYBE, buffer_size=1 << 16)
    both = (Class.BACKGROUND, Class.DEMAND)

    def fetch_slowly() -> None:
        for _ in range(8):
            slow.ask(0, PAGES, Class.BACKGROUND)
        while len(slow.requests):
            header = slow.receive(LANE_HEADER_SIZE)
            reply = slow.requests.reply(header)
            slow.replies.append(reply)
            for start in range(0, reply.length, 1 << 16):
                slow.receive(min(1 << 16, reply.length - start))
                time.sleep(0.003)

    for _ in range(20):
        fetch_slowly()
        slow.ask(0, PAGES)
        slow.fetch()
        if {(reply.class_, reply.encoding) for reply in slow.replies} >= {
            (class_, Encoding.LZ4) for class_ in both
        }:
            break
    else:
        raise AssertionError("never compressed")
    first = next(reply for reply in slow.replies if reply.encoding is Encoding.LZ4)
    assert first.class_ is Class.BACKGROUND
    assert Encoding.RAW in {reply.encoding for reply in slow.replies[: slow.replies.index(first)]}
    check(slow, memory, range(PAGES))


@pytest.mark.parametrize("step", [1, 999])
@pytest.mark.parametrize("kind", ["memfd holes", "process"])
def test_slow_reader_of_compressed_pages(
    kind: str, step: int, make_memory: MakeMemory, serve: MakeServing
) -> None:
    memory = make_memory(kind, 5, 256)
    peer = serve(memory).connect(tcp=True, buffer_size=4096, encodings=LZ4_ALWAYS)
    for _ in range(2):
        peer.ask(0, 256)
    peer.fetch(step)
    check(peer, memory, range(256))


def test_units_too_large_to_be_compressed(tmp_path: Path, serve: MakeServing) -> None:
    path = tmp_path / "units"
    path.write_bytes(b"text" * (2 << 20))
    peer = serve(Sparse(str(path), frozenset())).connect(encodings=LZ4_ALWAYS)
    for shift, encoding in ((9, Encoding.LZ4), (10, Encoding.RAW), (11, Encoding.RAW)):
        peer.ask(0, 2048 if shift == 11 else 1024, unit_shift=shift)
        peer.fetch()
        assert peer.replies[-1].encoding is encoding
        assert peer.pages[1023] == b"text" * (PAGE // 4)


# ---- what is kept for peers that do not read ----

KEPT = (256 << 10) + 64 * LANE_HEADER_SIZE  # of one connection
LARGE_KEPT = 16 << 20  # of all connections, of larger units that were compressed


def large_memory(pages: int, first: bytes = b"1") -> Sparse:
    """Zeros that were written, so that there is no hole, between a first and a last byte."""
    fd = os.memfd_create("large", os.MFD_CLOEXEC)
    os.ftruncate(fd, pages * PAGE)
    for offset in range(0, pages * PAGE, 1 << 20):
        os.pwrite(fd, bytes(1 << 20), offset)
    os.pwrite(fd, first, 0)
    os.pwrite(fd, b"2", pages * PAGE - 1)
    return Sparse(f"/proc/self/fd/{fd}", frozenset(), pages)


def close_large(memory: Sparse) -> None:
    os.close(int(memory.path.rpartition("/")[2]))


def wait_nothing_kept(serving: Serving) -> None:
    """Wait, since the peer may have the last bytes, or see the end, before the loop has counted
    that."""
    deadline = time.monotonic() + 60
    while serving.loop.kept() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert serving.loop.kept() == 0


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("encodings", [RAW_OR_ZERO, LZ4_ALWAYS])
def test_large_unit_that_is_not_read_costs_no_more_than_a_small_one(
    encodings: int, tcp: bool, serve: MakeServing
) -> None:
    """64 MiB each."""
    shift, count = 14, 8
    memory = large_memory(1 << shift)
    serving = serve(memory)
    before = resident()
    peers = [serving.connect(encodings=encodings, tcp=tcp) for _ in range(count)]
    for peer in peers:
        peer.ask(0, 1 << shift, unit_shift=shift)
    for peer in peers:
        assert peer.requests.reply(peer.receive(LANE_HEADER_SIZE)).encoding is Encoding.RAW
    other = serving.connect()
    other.ask(0, 1)
    other.fetch()  # and other connections do not wait for them
    assert serving.loop.kept() <= count * KEPT
    assert resident() - before < count * (PAGE << shift) // 8
    got = peers[0].receive(PAGE << shift)
    assert (got[:1], got[-1:]) == (b"1", b"2")
    assert not any(got[1:-1])
    close_large(memory)


def resident() -> int:
    """Bytes of memory that are this process's own."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"RssAnon:\s*(\d+) kB", status)
    assert match
    return int(match[1]) << 10


@pytest.mark.parametrize("first", [b"1", b"\0"])
def test_large_unit_is_zero_or_it_is_not(first: bytes, serve: MakeServing) -> None:
    memory = large_memory(4096, first)
    peer = serve(memory).connect(encodings=LZ4_ALWAYS)
    for unit in range(0, 4096, 1024):
        peer.ask(unit, 1024, unit_shift=10)
        peer.fetch()
    shown = [
        (reply.run, reply.encoding) for reply in peer.replies if reply.encoding is not Encoding.ZERO
    ]
    raw = [Run(0, 1024)] if first == b"1" else []
    assert shown == [(run, Encoding.RAW) for run in [*raw, Run(3072, 1024)]]
    assert (peer.pages[0][:1], peer.pages[4095][-1:]) == (first, b"2")
    close_large(memory)


def test_large_units_are_compressed_as_long_as_little_is_kept(
    tmp_path: Path, serve: MakeServing
) -> None:
    """Half of each unit is random, so 1 MiB of 2 is kept for some of the units; the others travel
    uncompressed."""
    path, order = tmp_path / "units", random.Random(3)
    half = order.randbytes(1 << 20)
    path.write_bytes(half + b"text" * (1 << 18))
    serving = serve(Sparse(str(path), frozenset()))
    peers = [serving.connect(encodings=LZ4_ALWAYS, buffer_size=4096) for _ in range(40)]
    for peer in peers:
        peer.ask(0, 512, unit_shift=9)
        peer.sock.recv(1, socket.MSG_PEEK)
    other = serving.connect()
    other.ask(0, 1)
    other.fetch()
    kept = serving.loop.kept()
    assert LARGE_KEPT // 2 < kept <= LARGE_KEPT + len(peers) * KEPT
    for peer in peers:
        peer.fetch()
        assert b"".join(peer.pages[page] for page in range(512)) == half + b"text" * (1 << 18)
    assert {peer.replies[0].encoding for peer in peers} == {Encoding.LZ4, Encoding.RAW}
    wait_nothing_kept(serving)


def test_nothing_is_kept_of_connections_that_are_gone(
    make_memory: MakeMemory, serve: MakeServing
) -> None:
    serving = serve(make_memory("memfd"))
    peers = [
        serving.connect(buffer_size=4096, encodings=encodings)
        for encodings in (RAW_OR_ZERO, LZ4_ALWAYS) * 5
    ]
    for peer in peers:
        for _ in range(20):
            peer.ask(0, PAGES)
        peer.reply()
    assert 0 < serving.loop.kept() <= len(peers) * KEPT
    for peer in peers:
        serving.loop.remove(peer.number)
        serving.wait_end(peer)
    wait_nothing_kept(serving)


class Weighing:
    """A connection that takes everything, and records how much it was given at a time."""

    peer = "a pair of scales"

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.sent: list[int] = []

    async def send(self, *buffers: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append(sum(map(len, buffers)))

    async def receive_into(self, buffer: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        count, self._request = len(self._request), b""
        buffer[:count] = Request(0, Class.DEMAND, Run(0, 4096), 12, LZ4_ALWAYS).encode()[:count]
        return count

    def close(self) -> None: ...


def test_lane_in_trio_sends_large_units_in_pieces() -> None:
    memory = large_memory(4096)
    with open_source(memory.path) as source:
        scales = Weighing(bytes(LANE_HEADER_SIZE))
        trio.run(TrioSourceLane(scales, source).run, b"")
    assert sum(scales.sent) == LANE_HEADER_SIZE + 4096 * PAGE
    assert max(scales.sent) <= KEPT
    close_large(memory)


@pytest.mark.parametrize("encodings", [RAW_OR_ZERO, LZ4_ALWAYS])
@pytest.mark.parametrize("kind", ["holes", "memfd holes"])
def test_serving_does_not_fill_holes(
    kind: str, encodings: int, make_memory: MakeMemory, serve: MakeServing
) -> None:
    memory = make_memory(kind, 3)
    blocks = os.stat(memory.path).st_blocks
    peer = serve(memory).connect(encodings=encodings)
    for size in (1, 7, 16, 100, 1024):
        for first in range(0, PAGES - size + 1, size):
            peer.ask(first, size)
            peer.fetch()
    check(peer, memory, range(PAGES))
    assert os.stat(memory.path).st_blocks == blocks


def test_hole_between_pages_of_one_request(make_memory: MakeMemory, serve: MakeServing) -> None:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    zeros = frozenset(range(PAGES)) - {0, 500, 1023}
    write(fd, zeros, PAGES, holes=True)
    blocks = os.fstat(fd).st_blocks
    memory = Sparse(f"/proc/self/fd/{fd}", zeros)
    peer = serve(memory).connect()
    peer.ask(0, PAGES)
    peer.fetch()
    check(peer, memory, range(PAGES))
    assert peer.flagged == zeros
    assert os.fstat(fd).st_blocks == blocks
    os.close(fd)


def test_several_blocks(make_memory: MakeMemory, serve: MakeServing) -> None:
    memories = [
        make_memory("file", 1, 40),
        make_memory("process", 2, 77),
        make_memory("memfd holes", 3, 130),
    ]
    peer = serve(*memories).connect()
    first = 0
    for memory in memories:
        peer.ask(first, memory.pages)
        peer.ask(first + memory.pages - 1, 1)
        first += memory.pages
    peer.fetch()
    first = 0
    for memory in memories:
        check(peer, memory, range(memory.pages), first)
        first += memory.pages


def test_unit_is_counted_from_its_block_and_never_split(
    make_memory: MakeMemory, serve: MakeServing
) -> None:
    memories = [make_memory("memfd", 1, 3), make_memory("memfd", 2, 1024)]
    peer = serve(*memories).connect()
    for shift in (3, 9, 10):
        peer.ask(3, 1024, unit_shift=shift)
        peer.fetch()  # the decoder refuses replies that split a unit
        check(peer, memories[1], range(1024), 3)
    assert not peer.flagged & {3 + page for page in range(1024) if page not in memories[1].zeros}


# ---- sockets that are slow, full, gone ----


@pytest.mark.parametrize("step", [1, 999])
@pytest.mark.parametrize("kind", ["memfd holes", "process"])
def test_slow_reader(kind: str, step: int, make_memory: MakeMemory, serve: MakeServing) -> None:
    """Each send is cut somewhere: in headers, in pages, in what the kernel sends from the file."""
    memory = make_memory(kind, 5, 256)
    serving = serve(memory)
    peer, other = serving.connect(tcp=True, buffer_size=4096), serving.connect()
    pages = 8 if step == 1 else 96
    peer.ask(0, pages)
    for page in range(pages, 2 * pages):
        peer.ask(page % 256, 1)
    other.ask(7, 1)
    other.fetch()  # and no other connection waits for that
    peer.fetch(step)
    check(peer, memory, range(pages))


@pytest.mark.parametrize("kind", ["memfd", "process"])
def test_reader_that_stops_in_the_middle_and_goes_on(
    kind: str, make_memory: MakeMemory, serve: MakeServing
) -> None:
    memory = make_memory(kind, 6)
    peer = serve(memory).connect(tcp=True, buffer_size=16384)
    order = random.Random(6)
    for _ in range(40):
        first = order.randrange(PAGES)
        peer.ask(first, order.randint(1, PAGES - first))
    for _ in range(20):
        peer.reply()
        time.sleep(0.002)
    peer.fetch()
    check(peer, memory, sorted(peer.pages))


def test_200_connections(make_memory: MakeMemory, serve: MakeServing) -> None:
    memory = make_memory("memfd", 7)
    serving = serve(memory)
    first_peer = serving.connect()
    first_peer.ask(0, 1)
    first_peer.fetch()
    before = threads_and_memory()
    peers = [serving.connect() for _ in range(200)]
    for index, peer in enumerate(peers):
        peer.ask(index, 64)
    for peer in peers:
        peer.fetch()
    for index, peer in enumerate(peers):
        check(peer, memory, range(index, index + 64))
    threads, memory_size = threads_and_memory()
    assert threads <= before[0]  # a thread of an earlier test may end meanwhile
    assert memory_size - before[1] < 64 << 20, "200 stacks would be 1600 MiB of address space"
    for peer in peers:
        peer.sock.close()
    for peer in peers:
        assert serving.wait_end(peer).kind == _native.END_CLOSED
    first_peer.ask(5, 5)
    first_peer.fetch()


def threads_and_memory() -> tuple[int, int]:
    """How many threads this process has, and its address space in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return len(os.listdir("/proc/self/task")), pages * PAGE


@pytest.mark.parametrize("split", [0, 1, 23, 24, 25, 48, 24 * 128])
def test_requests_that_came_before_the_loop_had_the_connection(
    split: int, make_memory: MakeMemory, serve: MakeServing
) -> None:
    memory = make_memory("memfd", 8)
    serving = serve(memory)
    requests = OutstandingRequests(serving.source.region)
    data = b"".join(requests.open(Class.DEMAND, Run(page, 1)).encode() for page in range(200))
    peer = serving.connect(data[:split])
    peer.requests = requests
    peer.sock.sendall(data[split:])
    peer.fetch()
    check(peer, memory, range(200))


def test_more_unread_than_the_loop_takes(make_memory: MakeMemory, serve: MakeServing) -> None:
    with pytest.raises(OSError, match="too long"):
        serve(make_memory("memfd")).loop.add(-1, 1, bytes(24 * 128 + 1))


@pytest.mark.parametrize("size", [1, 23, 25])
def test_half_a_request_and_then_the_end(
    size: int, make_memory: MakeMemory, serve: MakeServing
) -> None:
    serving = serve(make_memory("memfd"))
    peer = serving.connect()
    request = (
        Request(0, Class.DEMAND, Run(0, 1)).encode() + Request(1, Class.DEMAND, Run(0, 1)).encode()
    )
    peer.sock.sendall(request[:size])
    if size > 24:
        peer.receive(LANE_HEADER_SIZE)
    peer.sock.shutdown(socket.SHUT_WR)
    end = serving.wait_end(peer)
    assert (end.kind, end.text) == (
        _native.END_PROTOCOL,
        "the peer closed in the middle of a request",
    )


@pytest.mark.parametrize("busy", [False, True])
def test_connection_removed(busy: bool, make_memory: MakeMemory, serve: MakeServing) -> None:
    serving = serve(make_memory("memfd"))
    peer, other = serving.connect(), serving.connect()
    if busy:
        for _ in range(50):
            peer.ask(0, PAGES)
        peer.reply()
    serving.loop.remove(peer.number)
    serving.loop.remove(12345)
    assert serving.wait_end(peer).kind == _native.END_STOPPED
    drain(peer.sock)
    other.ask(3, 4)
    other.fetch()


def test_peer_resets_while_busy(make_memory: MakeMemory, serve: MakeServing) -> None:
    serving = serve(make_memory("memfd"))
    peers = [serving.connect(tcp=True) for _ in range(10)]
    for peer in peers:
        for _ in range(20):
            peer.ask(0, PAGES)
        peer.reply()
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.sock.close()
    for peer in peers:
        assert serving.wait_end(peer).kind == _native.END_BROKEN


def test_stopped_while_busy(make_memory: MakeMemory, serve: MakeServing) -> None:
    serving = serve(make_memory("memfd"))
    peers = [serving.connect(tcp=index % 2 == 0) for index in range(20)]
    for peer in peers:
        for _ in range(20):
            peer.ask(0, PAGES)
    readers = [Call(drain, peer.sock) for peer in peers[:10]]
    peers[15].reply()
    started = time.monotonic()
    serving.loop.stop()
    end = serving.end()
    took = time.monotonic() - started
    print(f"stopped within {took * 1000:.1f} ms")
    assert (end.kind, took < 5) == (_native.END_STOPPED, True)
    for reader in readers:
        reader.join()


def drain(sock: socket.socket) -> None:
    try:
        while sock.recv(1 << 20):
            pass
    except ConnectionError:
        pass


# ---- memory that is gone ----


@pytest.mark.parametrize("buffer_size", [None, 16384])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("length", [0, 100 * PAGE, 100 * PAGE + 100])
def test_file_that_becomes_shorter(
    length: int, holes: bool, buffer_size: int | None, make_memory: MakeMemory, serve: MakeServing
) -> None:
    """The file is cut while it is being sent: a reason or a closed connection follows, and never
    wrong bytes."""
    memory = make_memory("memfd holes" if holes else "memfd", 9)
    serving = serve(memory)
    peer = serving.connect(buffer_size=buffer_size)
    for first in range(0, PAGES, 64):
        peer.ask(first, 64)
    peer.reply()
    os.truncate(memory.path, length)
    ended = Call(serving.end)
    failed = None
    try:
        while failed is None and len(peer.requests):
            reply = peer.reply()
            failed = reply if reply.encoding is Encoding.FAILED else None
        peer.ask(PAGES - 64, 64)  # all had been sent before it became shorter
        failed = peer.reply()
    except (EOFError, ConnectionError):
        pass  # closed
    assert failed is None or failed.encoding is Encoding.FAILED
    end = ended.join()
    assert end.kind == _native.END_FAILED
    assert re.search(rf"cannot be read any more: it ends at byte \d+ of {PAGES * PAGE}$", end.text)
    for page, data in peer.pages.items():
        # If the new end of the file divides a page, the rest of that page reads as zeros, in a
        # mapping and by sendfile.
        assert data == content(page, memory.zeros) or page == length // PAGE, f"page {page}"


@pytest.mark.parametrize("how", ["missing", "shorter", "changed", "a FIFO"])
def test_object_of_a_snapshot_that_changes(
    how: str, make_memory: MakeMemory, serve: MakeServing, tmp_path: Path
) -> None:
    """What was unpacked before is served on; after that, there is a reason, and no wrong byte."""
    memory = make_memory("snapshot", 9, 4096)
    serving = serve(memory)
    peer = serving.connect()
    peer.ask(0, 64)
    peer.fetch()
    for path in (tmp_path / "layers-9").glob("*.frames"):
        if how == "shorter":
            os.truncate(path, 100)
        elif how == "changed":
            path.write_bytes(bytes([1]) * path.stat().st_size)
        else:
            path.unlink()
            if how == "a FIFO":
                os.mkfifo(path)
    peer.ask(0, 64)
    peer.fetch()
    peer.ask(4000, 64)
    failed = peer.reply()
    end = serving.end()
    words = {"missing": "is missing", "shorter": "ends at byte", "changed": "are not what was"}
    assert failed.encoding is Encoding.FAILED
    assert end.kind == _native.END_FAILED
    assert words.get(how, "it is not a regular file") in end.text
    check(peer, memory, range(64))


def test_frames_by_many_loops_at_once(make_memory: MakeMemory) -> None:
    """Each frame is unpacked by one of them, and the others wait for it."""
    memory = make_memory("snapshot", 4, 4096)
    with open_source(memory.path) as source:
        loops = [
            _native.SourceLoop(source.native_blocks(), background) for background in (True, False)
        ]
        threads, peers = [Call(loop.run) for loop in loops], []
        for number, loop in enumerate(loops * 3):
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            loop.add(ours.detach(), number, b"")
            peers.append(Peer(theirs, source, number))
        for number, peer in enumerate(peers):
            pieces = list(range(0, 4096, 32))
            random.Random(number % 2).shuffle(pieces)
            for first in pieces:
                peer.ask(first, 32)
        for call in [Call(peer.fetch) for peer in peers]:
            call.join()
        for loop, thread in zip(loops, threads, strict=True):
            loop.stop()
            thread.join()
            loop.close()
        for peer in peers:
            check(peer, memory, range(4096))
            peer.sock.close()


def test_process_that_ends(serve: MakeServing) -> None:
    mapped = _native.Mapped(4 * PAGE)
    mapped.buffer(0, mapped.size)[:] = b"p" * mapped.size
    child = os.fork()
    if not child:
        while True:
            signal.pause()
    serving = serve(Sparse(f"pid:{child}:{mapped.address:#x}+{mapped.size:#x}", frozenset(), 4))
    peer = serving.connect()
    peer.ask(0, 4)
    peer.fetch()
    assert peer.pages[3] == b"p" * PAGE
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    peer.ask(0, 1)
    reply = peer.requests.reply(peer.receive(LANE_HEADER_SIZE))
    assert reply.encoding is Encoding.FAILED
    assert (
        peer.receive(reply.length).decode()
        == serving.thread.join().text
        == f"process {child} has ended"
    )
    mapped.close()


# ---- a child that has copies of descriptors ----


def test_connections_close_while_processes_start(
    make_memory: MakeMemory, serve: MakeServing
) -> None:
    """Between fork and exec a child has a copy of each socket: a socket that was closed here would
    stay in epoll's set, with a connection that does not exist any more."""
    serving = serve(make_memory("memfd", 10))
    stopped = threading.Event()
    started = Call(start_processes, stopped)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        peers = [serving.connect(tcp=index % 2 == 0) for index in range(20)]
        for peer in peers:
            peer.ask(0, 8)
        for peer in peers[::3]:
            serving.loop.remove(peer.number)
        for peer in peers:
            peer.sock.close()
        for peer in peers:
            serving.wait_end(peer)
    stopped.set()
    assert started.join() > 0


def start_processes(stopped: threading.Event) -> int:
    count = 0
    while not stopped.is_set():
        # preexec_fn: a real fork, and a child that keeps its copies for a while.
        subprocess.run(["/bin/true"], preexec_fn=lambda: time.sleep(0.002), check=True)
        count += 1
    return count


# ---- pages that come while they are served ----

PIECE_PAGES = _native.PIECE // PAGE


class Filling:
    """A file of which nothing is there yet."""

    def __init__(self, serve: MakeServing, make_memory: MakeMemory) -> None:
        self.memory = make_memory("file", pages=8 * PIECE_PAGES)
        self.here = _native.Here(self.memory.pages * PAGE)
        self.serving = serve(self.memory, here=self.here)
        self.loop = self.serving.loop
        self.lacks: list[tuple[int, int, int]] = []

    def wait_lacks(self, count: int) -> None:
        """Until as many requests have been put off."""

        def told() -> bool:
            self.lacks += self.loop.lacks()
            return len(self.lacks) >= count

        wait_until(told, "requests that are put off")
        assert len(self.lacks) == count

    def come(self, *pieces: int) -> None:
        for piece in pieces:
            self.here.came(range(piece, piece + 1))
        self.loop.look()


@pytest.fixture
def filling(serve: MakeServing, make_memory: MakeMemory) -> Filling:
    return Filling(serve, make_memory)


def test_pages_that_are_here_do_not_wait_for_others(filling: Filling) -> None:
    peer = filling.serving.connect()
    late = peer.ask(PIECE_PAGES - 1, 2, Class.PREFETCH)  # of two pieces
    filling.wait_lacks(1)
    assert filling.lacks == [(PIECE_PAGES - 1, 2, Class.PREFETCH)]
    filling.come(0)
    peer.ask(3, 1)
    assert peer.reply().run == Run(3, 1)
    filling.come(1)
    peer.fetch()
    assert peer.replies[-1].request_id == late.request_id
    check(peer, filling.memory, [3, PIECE_PAGES - 1, PIECE_PAGES])
    filling.wait_lacks(1)


def test_more_requests_than_are_put_off(filling: Filling) -> None:
    """As many are read as the loop takes at a time; the others stay in the socket."""
    peer, other = filling.serving.connect(), filling.serving.connect()
    asked = [peer.ask(page % 64, 1) for page in range(300)]
    filling.wait_lacks(128)
    filling.come(7)
    other.ask(7 * PIECE_PAGES, 1)
    other.fetch()
    filling.wait_lacks(128)
    filling.come(*range(7))
    peer.fetch()
    assert len(peer.replies) == len(asked)
    check(peer, filling.memory, range(64))


@pytest.mark.parametrize("how", ["closes", "removed", "loop stops"])
def test_connection_ends_while_its_requests_are_put_off(filling: Filling, how: str) -> None:
    peer, other = filling.serving.connect(), filling.serving.connect()
    for page in range(5):
        peer.ask(page, 1)
    filling.wait_lacks(5)
    if how == "loop stops":
        return
    if how == "closes":
        peer.sock.close()
    else:
        filling.loop.remove(peer.number)
    filling.serving.wait_end(peer)
    filling.come(0)
    other.ask(0, 1)
    other.fetch()
    check(other, filling.memory, [0])


def test_what_came_before_the_request_was_put_off_is_found(filling: Filling) -> None:
    """A look before a request is put off says nothing to it: whoever hears of it looks again."""
    peer = filling.serving.connect()
    filling.loop.look()
    peer.ask(0, 1)
    filling.wait_lacks(1)
    filling.loop.look()  # in vain
    filling.come(0)
    peer.fetch()
    check(peer, filling.memory, [0])
