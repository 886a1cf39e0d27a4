"""A destination's lanes with nothing around them: memory of this process, and sockets whose other
ends a test has.

Memory is touched in C, without the GIL: the handler of the fault may need it.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import trio

from pagenet import Block, Region, RemoteProtocolError, Run, SourceLost, _native
from pagenet.background.pacing import CHUNK_BYTES, Background
from pagenet.destination.filling import Filling
from pagenet.destination.trio_lanes import TrioLanes
from pagenet.protocol import LANE_HEADER_SIZE, Class, Encoding, Reply, Request, RequestDecoder
from pagenet.residency import State
from pagenet.tcp._connection import SocketConnection
from pagenet.uffd import Feature, Mode, Userfaultfd, probe
from pagenet.uffd._handshake import Mapping
from pagenet.uffd._target import UffdTarget

PAGE = 4096
# Seconds to wait for something that should happen before the test fails. Only failures take that
# long.
PATIENCE = 20.0
# Tries before the first sleep: most of what is waited for is there at once, and a thread that
# sleeps is woken late.
SPINS = 20
# Turns of a lane's loop after which a test takes it that something does not happen. Each turn takes
# a byte, and these are fewer than a header has.
TURNS = 5
MADV_DONTNEED, MADV_REMOVE = 4, 9
UNBOUNDED = 1 << 40
RAW_OR_ZERO = 1 << Encoding.RAW | 1 << Encoding.ZERO

Kind = Literal["copy", "move", "memfd", "allocated", "hugetlb"]
Driver = Literal["native", "trio"]

libc = ctypes.CDLL(None, use_errno=True)  # drops the GIL while it is in a call
Address, Size = ctypes.c_void_p, ctypes.c_size_t


def wait_until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    tries = 0
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        tries += 1
        time.sleep(0.0 if tries <= SPINS else 0.0002)  # both give up the GIL


def poll(fd: int, events: int, patience: float = 0.0) -> bool:
    """Whether ``fd`` has one of these events, or a hangup."""
    watch = select.poll()  # select() would not tell a thread that waits for room of a hangup
    watch.register(fd, events)
    return bool(watch.poll(patience * 1000))


def wait_others_ran(seconds: float, patience: float = PATIENCE) -> None:
    """Wait until this process's other threads have used the processor for ``seconds``: a thread
    that tries again and again does that, however slow the machine."""

    def ran() -> float:
        return time.process_time() - time.thread_time()

    before = ran()
    wait_until(lambda: ran() - before >= seconds, f"other threads run for {seconds} s", patience)


class Call:
    """A thread that makes one call, whose result :meth:`join` returns."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call, *args), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            self._result = call(*args)
        except BaseException as error:
            self._error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def join(self, patience: float = PATIENCE) -> Any:
        self._thread.join(patience)
        assert not self._thread.is_alive(), "the call has not come back"
        if self._error is not None:
            raise self._error
        return self._result


def content(page: int, page_size: int = PAGE) -> bytes:
    """What the source has in a page; every sixth page is zero."""
    return (
        bytes(page_size) if page % 6 == 5 else (page + 1).to_bytes(8, "little") * (page_size // 8)
    )


def contents(run: Run, page_size: int = PAGE) -> bytes:
    return b"".join(content(page, page_size) for page in range(run.first, run.end))


# ---- memory ----


class Memory:
    """Memory under a userfaultfd: ``low``, of which page ``hole`` is not mapped, and ``high``,
    which is mapped before it. ``page_size``: size of pages that its owner gets whole, even if the
    system's are smaller."""

    _outside: _native.Mapped | None = None

    def __init__(
        self,
        kind: Kind,
        low: int = 10,
        high: int = 8,
        hole: int | None = 5,
        *,
        page_size: int | None = None,
        outside_is_zero: bool = False,
    ) -> None:
        self.kind = kind
        self.page_size = page_size or ((2 << 20) if kind == "hugetlb" else PAGE)
        self.wire = Region(
            [Block("low", low * self.page_size), Block("high", high * self.page_size)]
        )
        runs = [Run(low, high), Run(0, low if hole is None else hole)]
        if hole is not None:
            runs.append(Run(hole + 1, low - hole - 1))
        self._fd = self._open_file()
        wanted = Feature.EVENT_REMOVE | (Feature.MOVE if kind == "move" else Feature(0))
        self._uffd = Userfaultfd.open(wanted & probe())
        self.mapped: dict[Run, _native.Mapped] = {}
        for run in runs:
            size, offset = run.count * self.page_size, run.first * self.page_size
            self.mapped[run] = _native.Mapped(
                size, self._fd, 0 if self._fd < 0 else offset, self.page_size
            )
            self._uffd.register(self.mapped[run].address, size, Mode.MISSING)
        self.target = UffdTarget(
            self._uffd,
            [
                Mapping(m.address, m.size, run.first * self.page_size, self.page_size)
                for run, m in self.mapped.items()
            ],
            self.wire,
            shared_fd=None if self._fd < 0 else os.dup(self._fd),
            own=kind == "move",
            outside_is_zero=outside_is_zero,
            keeps_uffd=lambda: True,
            wait_gone=trio.sleep_forever,
        )
        self.region = self.target.region
        if kind == "allocated":
            self.target.allocate(0, self.region.size)

    def map_outside(self, pages: int) -> int:
        """The address of memory that the userfaultfd watches too, and that is not announced."""
        flags = os.MFD_HUGETLB if self.kind == "hugetlb" else 0
        fd = os.memfd_create("outside", os.MFD_CLOEXEC | flags) if self.is_shared else -1
        size = pages * self.page_size
        try:
            if fd >= 0:
                os.ftruncate(fd, size)
            self._outside = _native.Mapped(size, fd, alignment=self.page_size)
        finally:
            if fd >= 0:
                os.close(fd)
        self._uffd.register(self._outside.address, size, Mode.MISSING)
        return self._outside.address

    def _open_file(self) -> int:
        if self.kind in ("copy", "move"):
            return -1
        fd = os.memfd_create(
            "test", os.MFD_CLOEXEC | (os.MFD_HUGETLB if self.kind == "hugetlb" else 0)
        )
        os.ftruncate(fd, self.wire.size)
        return fd

    @property
    def is_shared(self) -> bool:
        return self._fd >= 0

    @property
    def uffd(self) -> int:
        return self._uffd.fd

    def piece_of(self, page: int) -> Run:
        (piece,) = [run for run in self.mapped if run.first <= page < run.end]
        return piece

    def address(self, page: int) -> int:
        piece = self.piece_of(page)
        return self.mapped[piece].address + (page - piece.first) * self.page_size

    def read(self, page: int) -> bytes:
        """Waits for the page. To be called in a thread, unless the page is known to be there."""
        into = bytearray(self.page_size)
        _native.copy_out(self.address(page), memoryview(into))
        return bytes(into)

    def write(self, page: int, data: bytes) -> None:
        address = ctypes.cast(ctypes.c_char_p(data), Address).value or 0
        piece = self.piece_of(page)
        into = self.mapped[piece].buffer((page - piece.first) * self.page_size, len(data))
        _native.copy_out(address, into)

    def remove(self, run: Run, advice: int) -> None:
        """Gives pages up by madvise. Waits for the reader of events."""
        length = run.count * self.page_size
        if libc.madvise(Address(self.address(run.first)), Size(length), advice):
            raise OSError(ctypes.get_errno(), "madvise")

    def place(self, page: int, data: bytes) -> _native.Placed:
        """Place a page, as a third party would."""
        how = _native.COPY
        return _native.place(
            self.uffd, how, self.address(page), data, self.page_size, self.page_size
        )

    def used(self) -> int:
        """Bytes of the shared memory that are allocated."""
        return os.fstat(self._fd).st_blocks * 512 if self._fd >= 0 else 0

    def close(self) -> None:
        for mapped in self.mapped.values():
            mapped.close()
        if self._outside is not None:
            self._outside.close()
        if self._fd >= 0:
            os.close(self._fd)


# ---- the source's end of a lane ----


@dataclass(eq=False)  # compared by identity: one of 4,096 is looked for again and again
class Open:
    """An open request: its pages that are still to come, in the source's page numbers."""

    request: Request
    next: int
    end: int


class Peer:
    """The other end of a lane. Checks every request, as a source would."""

    def __init__(self, sock: socket.socket, region: Region, wire: Region) -> None:
        self.sock = sock
        self._region, self._wire = region, wire
        self._decoder = RequestDecoder(wire)
        self.shift = (region.max_page_size // wire.max_page_size).bit_length() - 1
        #: all that was asked for, in pages of the destination
        self.asked: list[tuple[Class, Run]] = []
        self.open: list[Open] = []

    def read(self) -> None:
        """Read what has come, without waiting."""
        while True:
            try:
                data = self.sock.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not data:
                return
            self._decoder.feed(data)
            for request in self._decoder.requests():
                assert request.unit_shift == self.shift
                self.open.append(Open(request, request.run.first, request.run.end))
                self.asked.append((request.class_, self.run_of(request.run)))

    def run_of(self, run: Run) -> Run:
        """The run in pages of the destination: blocks are whole numbers of those."""
        return Run(run.first >> self.shift, run.count >> self.shift)

    def wait_asked(self, count: int) -> None:
        def asked() -> bool:
            self.read()
            return len(self.asked) >= count

        wait_until(asked, f"{count} requests")

    def answer(self, open_: Open, pages: int, zero: bool, pack: bool = False) -> tuple[Run, bytes]:
        """The bytes of the next reply to a request, for ``pages`` pages."""
        wire = Run(open_.next, pages << self.shift)
        run = self.run_of(wire)
        payload = b"" if zero else contents(run, self._region.max_page_size)
        encoding = Encoding.ZERO if zero else Encoding.RAW
        if pack and (packed := _native.Packer().pack(memoryview(payload))):
            payload, encoding = bytes(packed), Encoding.LZ4
        open_.next = wire.end
        if open_.next == open_.end:
            self.open.remove(open_)
        header = Reply(
            open_.request.request_id, open_.request.class_, encoding, wire, len(payload)
        ).encode()
        return run, header + payload

    def left(self, open_: Open) -> Run:
        return self.run_of(Run(open_.next, open_.end - open_.next))

    def send(self, data: bytes | memoryview) -> None:
        """Send all of it, as fast as the lane takes it."""
        view = memoryview(data)
        while view:
            assert poll(self.sock.fileno(), select.POLLOUT, PATIENCE), "the lane does not receive"
            with suppress(BlockingIOError):
                view = view[self.sock.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]

    def trickle(self, data: bytes) -> bytes:
        """Sends the first bytes, each once the lane has received the previous one, and returns the
        rest. Between two receives a lane does all else that it has to do, so what it has not done
        by then will not happen.
        """
        for at in range(TURNS):
            self.send(data[at : at + 1])
            wait_until(lambda: not self.unread(), "the byte received")
        return data[TURNS:]

    def unread(self) -> int:
        """Bytes that were sent and that the lane has not received yet."""
        answer = bytearray(4)
        fcntl.ioctl(self.sock, 0x5411, answer)  # SIOCOUTQ
        return int.from_bytes(answer, "little")

    def close(self) -> None:
        self.sock.close()


# ---- lanes ----


@dataclass
class Rig:
    """Lanes of one destination, driven by ``driver``, over sockets whose other ends are ``demand``
    and ``background``."""

    memory: Memory
    driver: Driver
    prefetch: tuple[int, int] = (0, 0)
    window: tuple[int, int, int] = (UNBOUNDED, UNBOUNDED, UNBOUNDED)
    #: lanes to start; some tests begin with one lane alone
    start: Sequence[str] = ("demand", "background")
    buffer_size: int | None = None
    encodings: int = RAW_OR_ZERO
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.filling = Filling(self.memory.target)
        self.filling.prefetch = self.prefetch
        self.filling.encodings = self.encodings
        self.map = self.filling.residency
        pairs = [socket.socketpair() for _ in range(2)]
        for pair in pairs:
            for sock in pair:
                sock.setblocking(False)
                if self.buffer_size is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.buffer_size)
        self.demand, self.background = (
            Peer(theirs, self.memory.region, self.memory.wire) for _, theirs in pairs
        )
        make = NativeDriver if self.driver == "native" else TrioDriver
        self.lanes: NativeDriver | TrioDriver = make(self, *(ours for ours, _ in pairs))
        for lane in self.start:
            self.lanes.start(lane)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.lanes.stop()
        finally:
            self.filling.close()  # threads that still wait are released
            for call in self.calls:
                with suppress(OSError):
                    call.join()
            self.lanes.close()
            self.demand.close()
            self.background.close()
            self.memory.close()

    @property
    def native(self) -> NativeDriver:
        """The driver, for tests of what only lanes in C have."""
        assert isinstance(self.lanes, NativeDriver)
        return self.lanes

    @property
    def peers(self) -> tuple[Peer, Peer]:
        return self.demand, self.background

    def call(self, function: Callable[..., Any], *args: Any) -> Call:
        self.calls.append(Call(function, *args))
        return self.calls[-1]

    def touch(self, page: int) -> Call:
        return self.call(self.memory.read, page)

    def count(self, name: str, *classes: Class) -> int:
        return sum(getattr(self.map.statistics(class_), name) for class_ in classes or Class)

    def counts(self) -> dict[str, list[int]]:
        names = [
            "pages",
            "zero_pages",
            "dropped",
            "existed",
            "requests",
            "runs",
            "wire_bytes",
            "faults",
        ]
        names += ["lz4_runs", "lz4_bytes", "lz4_wire_bytes"]
        return {name: [self.count(name, class_) for class_ in Class] for name in names}

    def states(self) -> list[State]:
        return [self.map.state(page) for page in range(self.map.pages)]

    def scope(self) -> Iterator[int]:
        for run in sorted(self.memory.mapped, key=lambda run: run.first):
            yield from range(run.first, run.end)

    def wait_came(self, pages: int) -> None:
        wait_until(
            lambda: self.count("pages") + self.count("dropped") >= pages,
            f"{pages} pages placed or dropped",
        )

    def wait_faults(self, faults: int) -> None:
        wait_until(lambda: self.count("faults") >= faults, f"{faults} faults read")

    def feed(self, run: Run) -> None:
        self.lanes.feed(run)

    def answer_all(self, peer: Peer) -> int:
        """Answer every open request with one reply. Returns the number of pages."""
        peer.read()
        pages = 0
        for open_ in list(peer.open):
            run, data = peer.answer(open_, peer.left(open_).count, zero=False)
            pages += run.count
            peer.send(data)
        return pages


class NativeDriver:
    def __init__(self, rig: Rig, demand: socket.socket, background: socket.socket) -> None:
        memory = rig.memory.target.native(rig.memory.wire)
        self._sockets = {"demand": demand, "background": background}
        self.stop_fd, self.done_fd = (
            os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)
        )
        self.ring = _native.Ring()
        self._window = rig.window
        self._dest = _native.Destination(
            rig.map.shared,
            memory.pieces,
            uffd=memory.uffd,
            how=memory.how,
            file=memory.file,
            sealed=memory.sealed,
            outside_is_zero=memory.outside_is_zero,
            removes=memory.removes,
            done_fd=self.done_fd,
            window=rig.filling.window,
            encodings=rig.encodings,
        )
        self.running: dict[str, Call] = {}

    def start(self, lane: str) -> None:
        ring = self.ring if lane == "background" else None
        sock = self._sockets[lane].fileno()
        self.running[lane] = Call(
            self._dest.run_lane, sock, self.stop_fd, ring, self._window, CHUNK_BYTES
        )

    def feed(self, run: Run) -> None:
        self.ring.push(run.first, run.count)

    def limit(self, bytes_per_second: int | None) -> None:
        self._dest.limit_background(bytes_per_second)

    def wait_complete(self) -> None:
        assert poll(self.done_fd, select.POLLIN, PATIENCE), "not complete"

    def is_running(self, lane: str) -> bool:
        return self.running[lane].is_running

    def end_of(self, lane: str) -> _native.End:
        end: _native.End = self.running[lane].join()
        return end

    def stop(self) -> list[_native.End]:
        os.eventfd_write(self.stop_fd, 1)
        return [call.join() for call in self.running.values()]

    def close(self) -> None:
        self._dest.close()
        self.ring.close()
        for fd in (self.stop_fd, self.done_fd):
            os.close(fd)
        for sock in self._sockets.values():
            sock.close()


class TrioDriver:
    """Lanes in Trio: the oracle."""

    def __init__(self, rig: Rig, demand: socket.socket, background: socket.socket) -> None:
        self._rig = rig
        self._sockets = [demand, background]
        self._started = threading.Event()
        self._thread: Call | None = None
        self._end: _native.End | None = None

    def start(self, lane: str) -> None:
        if self._thread is None:
            self._thread = Call(trio.run, self._run)
            assert self._started.wait(PATIENCE)

    async def _run(self) -> None:
        connections = [
            SocketConnection(trio.socket.from_stdlib_socket(sock), "peer") for sock in self._sockets
        ]
        self._token = trio.lowlevel.current_trio_token()
        self._lanes = TrioLanes(
            self._rig.filling, self._rig.memory.wire, connections, Background(None)
        )
        self._scope = trio.CancelScope()
        with self._scope:
            self._started.set()
            await self._lanes.run()

    def feed(self, run: Run) -> None:
        trio.from_thread.run_sync(self._feed, run, trio_token=self._token)

    def _feed(self, run: Run) -> None:
        for part in self._rig.filling.claim(run):
            for chunk in self._rig.filling.region.split(part, CHUNK_BYTES):
                self._lanes._pushers[0]._lane.request_nowait(Class.BACKGROUND, chunk)

    def wait_complete(self) -> None:
        wait_until(self._rig.filling.completed.is_set, "completion")

    def is_running(self, lane: str) -> bool:
        return self._thread is not None and self._thread.is_running

    def end_of(self, lane: str) -> _native.End:
        """The end of both, in the form of a loop in C: they end together, with the error of one of
        them."""
        assert self._thread is not None
        try:
            self._thread.join()
        except RemoteProtocolError as error:
            self._end = _native.End(_native.END_PROTOCOL, 0, str(error))
        except SourceLost as error:
            kind = (
                _native.END_FAILED
                if str(error).startswith("the source cannot go on")
                else _native.END_CLOSED
            )
            self._end = _native.End(kind, 0, str(error))
        assert self._end is not None, "they were stopped"
        return self._end

    def stop(self) -> None:
        with suppress(trio.RunFinishedError):
            trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        assert self._thread is not None
        if self._end is None:
            self._thread.join()

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


assert mmap.PAGESIZE == PAGE
assert LANE_HEADER_SIZE == 24
