"""The C core as the rest of pagenet sees it. The only module that touches ``ffi`` and ``lib``.

``-errno`` becomes :exc:`OSError` here. Every call drops the GIL, so one that waits for a page fault stalls its own thread
alone. Buffers are passed by address: the caller keeps them alive and mapped.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, astuple, dataclass
from typing import Any, NamedTuple

from ._pagenet import ffi, lib

__all__ = [
    "Choice",
    "Destination",
    "End",
    "FaultLog",
    "FoundMap",
    "Links",
    "Mapped",
    "MappedFile",
    "NativeEvent",
    "Packer",
    "Piece",
    "Placed",
    "Planted",
    "Play",
    "RdmaLoop",
    "Ring",
    "SharedMap",
    "SourceBlock",
    "SourceLoop",
    "Window",
    "answer_outside",
    "bench_claims",
    "bench_count",
    "bench_fault_floor",
    "bench_memcpy",
    "bench_page_server",
    "bench_receive",
    "bench_send",
    "bench_touch",
    "copy_out",
    "find_map",
    "leading_alike",
    "lock_map",
    "pattern_differs",
    "pattern_fill",
    "place",
    "plant",
    "punch",
    "read_process",
    "run_workload",
    "same_file",
    "seal_size",
    "store",
    "take_descriptor",
    "uffd_api",
    "uffd_open",
    "uffd_probe",
    "uffd_read",
    "uffd_register",
    "uffd_unregister",
    "uffd_wake",
    "unpack",
    "uproot",
]

Buffer = bytes | bytearray | memoryview | mmap.mmap

COPY, ZERO, CONTINUE, MOVE, POISON = lib.PN_COPY, lib.PN_ZERO, lib.PN_CONTINUE, lib.PN_MOVE, lib.PN_POISON


def _check(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


# ---- userfaultfd ----


@dataclass(frozen=True, slots=True)
class NativeEvent:
    kind: int
    start: int
    end: int
    length: int
    flags: int
    thread: int
    fd: int


def uffd_open(device: str, user_mode_only: bool) -> int:
    return _check(lib.pn_uffd_open(device.encode(), user_mode_only))


def uffd_api(uffd: int, wanted: int) -> int:
    features = ffi.new("uint64_t *")
    _check(lib.pn_uffd_api(uffd, wanted, features))
    return int(features[0])


def uffd_register(uffd: int, start: int, length: int, mode: int) -> int:
    ioctls = ffi.new("uint64_t *")
    _check(lib.pn_uffd_register(uffd, start, length, mode, ioctls))
    return int(ioctls[0])


def uffd_unregister(uffd: int, start: int, length: int) -> None:
    _check(lib.pn_uffd_unregister(uffd, start, length))


def uffd_wake(uffd: int, start: int, length: int) -> None:
    _check(lib.pn_uffd_wake(uffd, start, length))


def populate(address: int, size: int) -> bool:
    """Get every page of that memory now, rather than at its first touch. False: this kernel cannot (before 5.14).

    :exc:`OSError` if there is not that much. Call it in a thread.
    """
    try:
        _check(lib.pn_populate(address, size))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def uffd_read(uffd: int, room: int = 64) -> list[NativeEvent]:
    """Events that are queued, up to ``room``; :exc:`BlockingIOError` if there are none."""
    events = ffi.new("struct pn_event[]", room)
    count = _check(lib.pn_uffd_read(uffd, events, room))
    return [NativeEvent(e.kind, e.start, e.end, e.length, e.flags, e.thread, e.fd) for e in events[0:count]]


def uffd_probe(uffd: int, address: int) -> int:
    """0, or the errno: ``EAGAIN`` while the owner's memory is changing, ``ESRCH`` if it is gone."""
    return -int(lib.pn_uffd_probe(uffd, address))


@dataclass(frozen=True, slots=True)
class Planted:
    """Descriptors of another process, by number. ``refused``: an errno, if the kernel did not let it have them."""

    uffd: int
    map: int
    refused: int


def plant(pid: int, pidfd: int, device: str) -> Planted:
    """Have process ``pid``, which is the one behind ``pidfd``, open a userfaultfd, and a memfd for the
    map of pages. Call it in a thread.

    :exc:`OSError` if it cannot be traced, as of ``pn_plant``; it is then as it was.
    """
    planted = ffi.new("struct pn_planted *")
    _check(lib.pn_plant(pid, pidfd, device.encode(), planted))
    return Planted(planted.uffd, planted.map, -planted.refused)


def uproot(pid: int, pidfd: int, planted: Planted) -> None:
    """Have it close them again. Call it in a thread."""
    _check(lib.pn_uproot(pid, pidfd, ffi.new("struct pn_planted *", astuple(planted))))


def store(address: int, data: Buffer) -> None:
    """Write to memory of this process that may be gone: :exc:`OSError` (EFAULT) then, and no signal."""
    _check(lib.pn_store(address, ffi.from_buffer(data), len(data)))


def punch(fd: int, length: int) -> None:
    """Take the first ``length`` bytes out of a file, and leave a hole."""
    _check(lib.pn_punch(fd, length))


def take_descriptor(pidfd: int, theirs: int) -> int:
    """A duplicate of descriptor ``theirs`` of the process behind ``pidfd``; it takes ptrace access to it."""
    return _check(lib.pn_take_descriptor(pidfd, theirs))


def same_file(ours: int, pid: int, theirs: int) -> bool:
    return bool(_check(lib.pn_same_file(ours, pid, theirs)))


@dataclass(frozen=True, slots=True)
class Placed:
    """Bytes dealt with, in order: placed by us, found there already, without a mapping. ``error``: errno, or 0."""

    placed: int
    existed: int
    absent: int
    error: int

    @property
    def done(self) -> int:
        return self.placed + self.existed + self.absent


def place(uffd: int, how: int, address: int, data: Buffer | None, length: int, page_size: int) -> Placed:
    source = ffi.NULL if data is None else ffi.from_buffer(data)
    return _placed(lib.pn_place(uffd, how, address, source, length, page_size))


def settle(uffd: int, address: int, minor: bool, zeros: Buffer, page_size: int) -> Placed:
    return _placed(lib.pn_settle(uffd, address, minor, ffi.from_buffer(zeros), page_size))


def answer_outside(uffd: int, address: int, flags: int, zero: bool) -> int:
    """0, or the errno: ``EAGAIN`` or ``ESRCH``, as of :func:`place`."""
    return -int(lib.pn_answer_outside(uffd, address, flags, zero))


def _placed(result: Any) -> Placed:
    return Placed(result.placed, result.existed, result.absent, -result.error)


# ---- memory ----


def leading_alike(data: memoryview, pages: int, page_size: int) -> tuple[int, bool]:
    """How many pages from the start of ``data`` are alike in being zero throughout or not, and which of the two."""
    zero = ffi.new("int *")
    count = lib.pn_zero_run(ffi.from_buffer(data), pages, page_size, zero)
    return int(count), bool(zero[0])


def zero_map(fd: int, offset: int, pages: int, page_size: int) -> tuple[bytes, int]:
    """A bit for each page of a file from ``offset`` on that is zero, and how many are.

    :exc:`OSError`; ENODATA if it ends before.
    """
    bits = bytearray(-(-pages // 8))
    count = lib.pn_zero_map(fd, offset, pages, page_size, ffi.from_buffer("uint8_t[]", bits))
    _check(min(0, count))
    return bytes(bits), int(count)


def read_process(pid: int, address: int, into: memoryview) -> None:
    _check(lib.pn_read_process(pid, address, ffi.from_buffer(into), len(into)))


def copy_out(address: int, into: memoryview) -> None:
    """Copy from ``address``, which may fault: call it from a thread."""
    lib.pn_copy(ffi.from_buffer(into), ffi.cast("void *", address), len(into))


class MappedFile:
    """The first ``size`` bytes of a file, by address: Python never looks at them. ``writable``: as if they were to be."""

    def __init__(self, size: int, fd: int, writable: bool) -> None:
        self.size = size
        self.address = _check_address(lib.pn_map_file(size, fd, writable))

    def map_ahead(self, offset: int, length: int) -> None:
        """Enter pages into the page table, if they are in memory and the kernel can do that (from 5.14 on): cheaper than one by
        one, as they are wanted."""
        lib.pn_map_ahead(self.address + offset, length)

    def close(self) -> None:
        if self.address:
            lib.pn_unmap_memory(self.address, self.size)
            self.address = 0


class Mapped:
    """Memory of this process's own, by address: anonymous, or a file's (``fd``, from ``offset`` on), shared.

    Python never looks at the bytes, so a missing page never faults with the GIL held.
    """

    def __init__(self, size: int, fd: int = -1, offset: int = 0, alignment: int = mmap.PAGESIZE) -> None:
        self.size = size
        self.address = _check_address(lib.pn_map_memory(size, fd, offset, alignment))

    def close(self) -> None:
        if self.address:
            lib.pn_unmap_memory(self.address, self.size)
            self.address = 0

    def buffer(self, offset: int, length: int) -> memoryview:
        """A view for the kernel to read into or write from; valid until :meth:`close`."""
        if not self.address or offset + length > self.size:
            raise ValueError("outside the mapping, or it is closed")
        return memoryview(ffi.buffer(ffi.cast("char *", self.address + offset), length))


def _check_address(address: int) -> int:
    if address > 2**64 - 4096:  # -errno, as the kernel itself packs it
        _check(address - 2**64)
    return address


# ---- compression ----


class Packer:
    """Compresses pages, and knows nothing from one call to the next."""

    def __init__(self) -> None:
        self._state = ffi.new("uint64_t[]", lib.pn_pack_state() // 8 + 1)
        self._room = bytearray()

    def pack(self, pages: memoryview) -> memoryview | None:
        """The pages, 2 MiB at most, as one LZ4 block behind their checksum, valid until the next call; None if that would save
        too little."""
        if len(self._room) < len(pages):
            self._room = bytearray(len(pages))
        length = lib.pn_pack(self._state, ffi.from_buffer(pages), len(pages), ffi.from_buffer(self._room))
        return memoryview(self._room)[:length] if length else None


def unpack(data: memoryview, into: memoryview) -> bool:
    """Whether ``data`` is what as many bytes of pages as there is room for ``into`` become; they are there then."""
    return not lib.pn_unpack(ffi.from_buffer(data), len(data), ffi.from_buffer(into), len(into))


class Choice:
    """``struct pn_choice``: whether one connection of a source's compresses. Times in ns, on one clock."""

    def __init__(self) -> None:
        self._choice = ffi.new("struct pn_choice *")
        lib.pn_choice_init(self._choice)

    @property
    def packs(self) -> bool:
        return bool(lib.pn_choice_packs(self._choice))

    @property
    def prompt(self) -> bool:
        """Whether it pays even for a page that somebody waits for."""
        return bool(lib.pn_choice_prompt(self._choice))

    def wants_sample(self, now: int) -> bool:
        return bool(lib.pn_choice_wants_sample(self._choice, now))

    def tried(self, size: int, length: int, nanoseconds: int) -> None:
        """Compressing ``size`` bytes left ``length``, or (0) too many."""
        lib.pn_choice_tried(self._choice, size, length, nanoseconds)

    def resume(self, now: int) -> None:
        """There was nothing to do until now."""
        lib.pn_choice_resume(self._choice, now)

    def answered(self, size: int, wire: int, began: int, now: int) -> None:
        """So many bytes of pages were sent as so many on the wire, which took from ``began`` to ``now``."""
        lib.pn_choice_answered(self._choice, size, wire, began, now)


class Prompt:
    """``struct pn_prompt``: whether pages that somebody waits for come compressed. Times in ns."""

    def __init__(self) -> None:
        self._prompt = ffi.new("struct pn_prompt *")
        lib.pn_prompt_init(self._prompt)

    @property
    def packs(self) -> bool:
        """Whether they are to be asked for compressed, whatever that costs."""
        return bool(lib.pn_prompt_packs(self._prompt))

    def came(self, packs: bool, nanoseconds: int) -> None:
        """A page that was asked for like that took so long for each of its 4 KiB. Not one of zeros."""
        lib.pn_prompt_came(self._prompt, packs, nanoseconds)


# ---- residency and statistics ----

STATES = {
    "missing": lib.PN_MISSING,
    "requested": lib.PN_REQUESTED,
    "placing": lib.PN_PLACING,
    "resident": lib.PN_RESIDENT,
    "coming": lib.PN_COMING,
    "removing": lib.PN_REMOVING,
    "ready": lib.PN_READY,
    "removed": lib.PN_REMOVED,
    "outside": lib.PN_OUTSIDE,
    "poisoned": lib.PN_POISONED,
}
COUNTERS = {
    "pages": lib.PN_PAGES,
    "runs": lib.PN_RUNS,
    "zero_pages": lib.PN_ZERO_PAGES,
    "wire_bytes": lib.PN_WIRE_BYTES,
    "existed": lib.PN_EXISTED,
    "dropped": lib.PN_DROPPED,
    "requests": lib.PN_REQUESTS,
    "faults": lib.PN_FAULTS,
    "deferred": lib.PN_DEFERRED,
    "lz4_runs": lib.PN_LZ4_RUNS,
    "lz4_bytes": lib.PN_LZ4_BYTES,
    "lz4_wire_bytes": lib.PN_LZ4_WIRE_BYTES,
    "sampled": lib.PN_SAMPLED,
    "sampled_used": lib.PN_SAMPLED_USED,
    "outside_faults": lib.PN_OUTSIDE_FAULTS,
}


#: as it stands in /proc/PID/fd
MAP_NAME = "pagenet-residency"
MAX_NOTE = 256 << 10
# More than any counter comes to. Three of them fit what JSON and msgpack can say.
_MOST_COUNTED = 1 << 60


def _is_small_memfd(file: int) -> bool:
    """A memfd or a file of tmpfs, open to read and to write. The kernel alone answers: any other file
    might keep us waiting. Huge pages that are not there when they are touched are a SIGBUS."""
    if fcntl.fcntl(file, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH) != os.O_RDWR:
        return False
    try:
        fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return os.fstatvfs(file).f_bsize == mmap.PAGESIZE


def seal_size(file: int) -> bool:
    """Have it that nobody makes that file shorter, if it can be had. False: a store to a mapping of it may
    be a SIGBUS. So it may be to huge pages, of which there may be none to fill a hole with."""
    with suppress(OSError):  # not to be sealed at all, or any more
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    try:
        sealed = bool(fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False
    return sealed and os.fstatvfs(file).f_bsize == mmap.PAGESIZE


class FoundMap(NamedTuple):
    """What a map says of itself, whoever uses it. ``finished``: there is nothing left to do."""

    pages: int
    done: int
    scope: int
    finished: bool
    note: bytes


def find_map(file: int) -> FoundMap:
    """The map in ``file``, which anybody may have made up. :exc:`ValueError` if there is none."""
    if not _is_small_memfd(file):
        raise ValueError("no memfd of small pages")
    header = ffi.new("struct pn_map *")
    if os.preadv(file, [ffi.buffer(header)], 0) < ffi.sizeof(header[0]):
        raise ValueError("no map of pages")
    pages, size = int(header.pages), os.fstat(file).st_size
    if bytes(ffi.buffer(header.magic)) != b"pagenet3" or pages > size or lib.pn_map_bytes(pages) > size:
        raise ValueError("no map of pages")
    note = os.pread(file, MAX_NOTE, lib.pn_map_bytes(pages))
    return FoundMap(pages, int(header.done), int(header.scope), bool(header.finished), note)


def lock_map(file: int) -> int:
    """``file``, opened anew: no other process gets it so as long as that is open.

    A lock belongs to an open file: the owner's would outlive us. :exc:`BlockingIOError` if another process has it; other
    :exc:`OSError` if it is no memfd of small pages, or not open to read and to write: opened anew it would be, for root.
    """
    if not _is_small_memfd(file):
        _check(-errno.EINVAL)
    ours = os.open(f"/proc/self/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(ours)
        raise
    return ours


class SharedMap:
    """``struct pn_map`` in a memfd: page states and counters, shared with threads and processes. Behind it, ``note``: what else
    somebody must know who finds it.

    ``file``: a memfd for it, ours to close (:func:`lock_map`), rather than one of our own. ``recover``: it has one already,
    whose users are dead. :exc:`OSError`: it is no such memfd, or no map of so many pages.

    Whoever else has the memfd may write to it at any time: the number of pages, and how many of them are to become resident,
    are kept here, and never read from it again.
    """

    def __init__(self, pages: int, note: bytes = b"", file: int | None = None, *, recover: bool = False) -> None:
        self.pages = pages
        self.fd = os.memfd_create(MAP_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if file is None else file
        size = lib.pn_map_bytes(pages)
        try:
            if not recover:
                os.ftruncate(self.fd, size + len(note))
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)  # by no one, under our feet
                os.pwrite(self.fd, note, size)
            if not fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                _check(-errno.EPERM)
            if os.fstat(self.fd).st_size < size:
                _check(-errno.EINVAL)
            self._memory = Mapped(size, self.fd)
        except BaseException:
            os.close(self.fd)
            raise
        self.map: Any = ffi.cast("struct pn_map *", self._memory.address)
        try:
            _check(lib.pn_map_recover(self.map, pages)) if recover else lib.pn_map_init(self.map, pages)
        except BaseException:
            self.close()
            raise
        #: pages that are to become resident
        self.scope = pages

    def close(self) -> None:
        if self.fd >= 0:
            self.map = None  # what still uses it raises TypeError, and reads no memory that is gone
            self._memory.close()
            os.close(self.fd)
            self.fd = -1

    @property
    def done(self) -> int:
        return int(lib.pn_map_done(self.map))

    def state(self, page: int) -> int:
        return int(lib.pn_map_state(self.map, page))

    def claim(self, first: int, count: int, from_: int, to: int) -> int:
        return int(lib.pn_map_claim(self.map, first, count, from_, to))

    def set(self, first: int, count: int, to: int) -> None:
        lib.pn_map_set(self.map, first, count, to)

    def replace(self, first: int, count: int, from_: int, to: int) -> int:
        return int(lib.pn_map_replace(self.map, first, count, from_, to))

    def find(self, first: int, end: int, state: int) -> int:
        return int(lib.pn_map_find(self.map, first, end, state))

    def span(self, first: int, end: int, state: int) -> int:
        return int(lib.pn_map_span(self.map, first, end, state))

    def unsettled(self, first: int, end: int) -> int:
        return int(lib.pn_map_unsettled(self.map, first, end))

    def touched(self, first: int) -> tuple[int, int]:
        """Where from ``first`` on the next pages begin, and end, that are not all "missing" for want of ever being touched."""
        header, pages = lib.pn_map_bytes(0), self.pages
        try:
            start = min(pages, max(first, os.lseek(self.fd, header + first, os.SEEK_DATA) - header))
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing more but holes
                raise
            return pages, pages
        # A hole may have been made there meanwhile. It is looked at all the same, so that the caller comes to an end.
        return start, min(pages, max(start + 1, os.lseek(self.fd, header + start, os.SEEK_HOLE) - header))

    @property
    def finished(self) -> bool:
        """The source was told that everything is in place."""
        return bool(self.map.finished)

    def finish(self) -> None:
        self.map.finished = 1

    def add(self, class_: int, counter: int, amount: int) -> None:
        lib.pn_stats_add(self.map, class_, counter, amount)

    def add_latency(self, class_: int, nanoseconds: int) -> None:
        lib.pn_stats_latency(self.map, class_, nanoseconds)

    def counters(self, class_: int) -> list[int]:
        return _clamped(self.map.classes[class_].counters)

    def latencies(self, class_: int) -> list[int]:
        return _clamped(self.map.classes[class_].latency)


def _clamped(counters: Any) -> list[int]:
    """Of numbers that the owner may have written: each once read, none more than a counter comes to."""
    values: list[int] = ffi.unpack(counters, len(counters))
    return values if max(values) <= _MOST_COUNTED else [min(value, _MOST_COUNTED) for value in values]


# ---- native lanes ----

#: bytes of background that may be in flight while the owner does little but wait, while there are faults, and when there have
#: been none for a while: native/pace.c
WINDOW_BYTES = (lib.pn_tunables.window_least, lib.pn_tunables.window_min, lib.pn_tunables.window_max)

@dataclass(frozen=True, slots=True)
class Piece:
    """Pages at consecutive addresses: ``struct pn_piece``. ``second``: address of our own mapping of them, or 0, and
    ``file_offset`` where in the file behind them they begin."""

    first: int
    count: int
    page_size: int
    address: int
    second: int
    file_offset: int
    wire_first: int
    shift: int


@dataclass(frozen=True, slots=True)
class End:
    """Why a loop in C ended: one of the ``END_`` constants, an errno, a line of text."""

    kind: int
    error: int
    text: str


END_STOPPED, END_CLOSED, END_BROKEN = lib.PN_END_STOPPED, lib.PN_END_CLOSED, lib.PN_END_BROKEN
END_PROTOCOL, END_FAILED = lib.PN_END_PROTOCOL, lib.PN_END_FAILED
END_OWNER_GONE, END_OWNER_WRONG = lib.PN_END_OWNER_GONE, lib.PN_END_OWNER_WRONG


def _end_of(end: Any) -> End:
    return End(end.kind, end.error, ffi.string(end.text).decode(errors="replace"))


def before_sampled(first: int, count: int) -> int:
    """How many of ``count`` pages from ``first`` on come before the first that the sample of prefetched pages takes."""
    return int(lib.pn_before_sampled(first, count))


class Destination:
    """``struct pn_dest``: what the native lanes of one transfer share. Borrows the map and the descriptors."""

    def __init__(
        self,
        shared: SharedMap,
        pieces: Sequence[Piece],
        *,
        uffd: int,
        how: int,
        file: int,
        sealed: bool = False,
        outside_is_zero: bool = False,
        removes: bool,
        done_fd: int,
        window: Window,
        faults: FaultLog | None = None,
        encodings: int,
    ) -> None:
        self._pieces = ffi.new("struct pn_piece[]", [astuple(piece) for piece in pieces])
        order = sorted(range(len(pieces)), key=lambda index: pieces[index].address)
        self._by_address = ffi.new("uint32_t[]", order)
        config = ffi.new("struct pn_dest_config *")
        config.map, config.pieces, config.by_address = shared.map, self._pieces, self._by_address
        config.scope = shared.scope
        config.piece_count = len(pieces)
        config.max_page_size = max(piece.page_size for piece in pieces)
        config.uffd, config.how, config.file, config.removes, config.done_fd = uffd, how, file, removes, done_fd
        config.sealed, config.outside_is_zero = sealed, outside_is_zero
        self._window = window
        config.window = window.window
        self._faults = faults
        config.faults, config.faults_fd = (ffi.NULL, -1) if faults is None else (faults.log, faults.fd)
        config.encodings = encodings
        self._dest = lib.pn_dest_new(config)
        if self._dest == ffi.NULL:
            raise MemoryError("no memory for a transfer's lanes")

    def close(self) -> None:
        """Not while a lane runs. Idempotent."""
        if self._dest is not None:
            lib.pn_dest_free(self._dest)
            self._dest = None

    def release(self) -> None:
        """Let the owner see pages of the sample that it has not touched. Not while a lane runs."""
        lib.pn_dest_release(self._dest)

    def limit_background(self, bytes_per_second: int | None) -> None:
        """None: no limit; 0: nothing more. Lanes that wait look again when their ring is woken."""
        rate = 0 if bytes_per_second is None else bytes_per_second or 2**64 - 1
        lib.pn_dest_limit(self._dest, rate)

    @property
    def dest(self) -> Any:
        return self._dest

    def run_lane(
        self, sock: int, stop_fd: int, ring: Ring | None = None, window: tuple[int, int, int] = (0, 0, 0), chunk: int = 0
    ) -> End:
        """Drive one connection until it ends: the demand lane, or with a ``ring`` a background lane. Call it in a thread."""
        config = ffi.new("struct pn_lane_config *")
        config.dest, config.sock, config.stop_fd = self._dest, sock, stop_fd
        config.ring = ffi.NULL if ring is None else ring.ring
        config.work_fd, config.room_fd = (-1, -1) if ring is None else (ring.work_fd, ring.room_fd)
        config.window_least, config.window_min, config.window_max, config.chunk = *window, chunk
        end = ffi.new("struct pn_end *")
        lib.pn_lane_run(config, end)
        return _end_of(end)


class Window:
    """``struct pn_window``: what to ask for around a page that somebody waits for. Adapts unless it was fixed."""

    def __init__(self) -> None:
        self.window = ffi.new("struct pn_window *")
        lib.pn_window_init(self.window)

    @property
    def fixed(self) -> tuple[int, int] | None:
        """Pages forward and backward; None: it adapts."""
        sides = ffi.new("uint32_t[2]")
        return (int(sides[0]), int(sides[1])) if lib.pn_window_fixed(self.window, sides, sides + 1) else None

    def fix(self, fixed: tuple[int, int] | None) -> None:
        """At any time."""
        forward, backward = fixed or (0, 0)
        lib.pn_window_fix(self.window, fixed is not None, forward, backward)

    def fault(self, shared: SharedMap, page: int, first: int, end: int, page_size: int) -> None:
        """``page``, of the pages [first, end) that a request may name, was missing, and is waited for."""
        lib.pn_window_fault(self.window, shared.map, page, first, end, page_size)

    def next(self, shared: SharedMap, size: int) -> tuple[int, int] | None:
        """First page, and number, of at most so many bytes to ask for: MISSING, and from now on REQUESTED. None: no more."""
        first = ffi.new("uint64_t *")
        count = int(lib.pn_window_next(self.window, shared.map, size, first))
        return (int(first[0]), count) if count else None

    @property
    def pending(self) -> int:
        """Stretches of pages that it wants and that nobody has asked for yet."""
        return sum(int(stack.newest - stack.oldest) for stack in self.window.wanted)

    @property
    def level(self) -> int:
        """The window that the next area gets is about 2 to the power of a sixteenth of this."""
        return int(self.window.level)


class FaultLog:
    """``struct pn_fault_log``: the pages that threads waited for, written by the demand lane."""

    ROOM = 4096

    def __init__(self) -> None:
        self.log = ffi.new("struct pn_fault_log *")
        self._pages = ffi.new("uint64_t[]", self.ROOM)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read(self) -> list[int]:
        """What is there, oldest first. If that is nothing, ``fd`` becomes readable with the next page."""
        count = int(lib.pn_fault_log_read(self.log, self._pages, self.ROOM))
        return ffi.unpack(self._pages, count) if count else []

    def write(self, page: int) -> None:
        """As the lane in C does."""
        lib.pn_fault_log_write(self.log, page, self.fd)

    @property
    def dropped(self) -> int:
        """Pages that found no room."""
        return int(self.log.dropped)


class RdmaLoop:
    """``struct pn_rdma``: both queue pairs of a destination and the loop that drives them. Borrows ``dest``, the ring and the
    descriptors. ``blocks``: (first page, pages, page size, first chunk) of each, as on the wire.

    :exc:`OSError`: ENOENT without libibverbs, ENODEV without the device, else what the device says.
    """

    def __init__(
        self,
        dest: Destination,
        stop_fd: int,
        ring: Ring,
        window: tuple[int, int, int],
        chunk: int,
        *,
        device: str,
        port: int,
        gid_index: int,
        blocks: Sequence[tuple[int, int, int, int]],
        chunks: int,
        chunk_size: int,
    ) -> None:
        config = ffi.new("struct pn_rdma_config *")
        table, name = ffi.new("struct pn_rdma_block[]", list(blocks)), ffi.new("char[]", device.encode())
        self._kept = (dest, ring, table, name)
        lane: Any = config.lane
        lane.dest, lane.sock, lane.stop_fd, lane.ring = dest.dest, -1, stop_fd, ring.ring
        lane.work_fd, lane.room_fd = ring.work_fd, ring.room_fd
        (lane.window_least, lane.window_min, lane.window_max), lane.chunk = window, chunk
        config.blocks, config.device = table, name
        config.block_count, config.chunk_count, config.chunk_size = len(blocks), chunks, chunk_size
        config.port, config.gid_index = port, gid_index
        error = ffi.new("int *")
        self._loop = lib.pn_rdma_new(config, error)
        _check(error[0])

    def number(self, queue_pair: int) -> int:
        return int(lib.pn_rdma_number(self._loop, queue_pair))

    def connect(
        self, queue_pair: int, psn: int, *, gid: bytes, number: int, peer_psn: int, lid: int, mtu: int, reads: int
    ) -> None:
        peer = _rdma_peer(gid, number, peer_psn, lid, mtu, reads)
        _check(lib.pn_rdma_connect(self._loop, queue_pair, psn, peer))

    def run(self, sock: int) -> End:
        """Until it ends. Call it in a thread."""
        end = ffi.new("struct pn_end *")
        lib.pn_rdma_run(self._loop, sock, end)
        return _end_of(end)

    @property
    def spun(self) -> int:
        """How often it has looked for the end of a READ before it slept. Not while it runs, nor after :meth:`close`."""
        return int(lib.pn_rdma_spun(self._loop))

    def close(self) -> None:
        """Not while it runs. Idempotent."""
        if self._loop is not None:
            lib.pn_rdma_free(self._loop)
            self._loop = None


def _rdma_peer(gid: bytes, number: int, psn: int, lid: int, mtu: int, reads: int) -> Any:
    peer = ffi.new("struct pn_rdma_peer *")
    peer.gid, peer.number, peer.psn = list(gid), number, psn
    peer.lid, peer.mtu, peer.reads = lid, mtu, reads
    return peer


class Ring:
    """Runs on their way from the schedule to a background lane, and the eventfds that say that there are some, or room."""

    def __init__(self) -> None:
        self.ring = ffi.new("struct pn_ring *")
        self.work_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.room_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        for fd in (self.work_fd, self.room_fd):
            if fd >= 0:
                os.close(fd)
        self.work_fd = self.room_fd = -1

    def push(self, first: int, count: int, wake: bool = True) -> None:
        """``wake`` False: :meth:`wake` is to follow."""
        _check(lib.pn_ring_push(self.ring, first, count))
        if wake:
            self.wake()

    def wake(self) -> None:
        """Have the lane look at its ring, and at the limit of the background, again."""
        os.eventfd_write(self.work_fd, 1)

    def __len__(self) -> int:
        return int(lib.pn_ring_used(self.ring))

    ROOM = 512

    def wake_me_at(self, runs: int) -> None:
        """Have ``room_fd`` written when no more runs than this are left, rather than at each that the lane takes."""
        self.ring.wake_at = runs


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """``struct pn_source_block``: pages of a file (``fd``, ``name``), or of a process (``pid``, ``pidfd``, ``address``)."""

    first: int
    pages: int
    page_size: int
    address: int
    name: str
    fd: int
    pid: int
    pidfd: int


def _source_blocks(blocks: Sequence[SourceBlock]) -> tuple[Any, list[Any]]:
    """As C has them, and the names that they point to."""
    names = [ffi.new("char[]", block.name.encode(errors="replace")) for block in blocks]
    named = zip(blocks, names, strict=True)
    return ffi.new("struct pn_source_block[]", [{**asdict(block), "name": name} for block, name in named]), names


class Links:
    """``struct pn_links``: what the loops of one source tell each other about destinations' links."""

    def __init__(self) -> None:
        self.links = ffi.new("struct pn_links *")


class SourceLoop:
    """``struct pn_source``: one loop that answers any number of connections. ``background``: nobody waits for its pages."""

    def __init__(self, blocks: Sequence[SourceBlock], background: bool, links: Links | None = None) -> None:
        self._background = background
        self._links = links or Links()
        self.ended_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._last_asked = [0, 0, 0]
        self._blocks, self._names = _source_blocks(blocks)
        self._source = lib.pn_source_new(self._blocks, len(blocks), self._links.links, self.ended_fd)
        if self._source == ffi.NULL:
            os.close(self.ended_fd)
            raise MemoryError("no memory, or no file descriptors, for a source's lanes")

    def close(self) -> None:
        """Closes its connections too. Not while it runs. Idempotent."""
        if self._source is not None:
            self._last_asked = [self.asked(class_) for class_ in range(len(self._last_asked))]
            lib.pn_source_free(self._source)
            os.close(self.ended_fd)
            self._source = None

    def run(self) -> End:
        """Until :meth:`stop`, or until the memory cannot be read. Call it in a thread."""
        end = ffi.new("struct pn_end *")
        lib.pn_source_run(self._source, self._background, end)
        return _end_of(end)

    def stop(self) -> None:
        lib.pn_source_stop(self._source)

    def add(self, sock: int, number: int, unread: bytes, link: int = 0) -> None:
        """Serve the peer at ``sock``, which the loop then owns. ``unread``: what it has sent already; ``link``: a number that
        its destination's connections have in common."""
        _check(lib.pn_source_add(self._source, sock, number, link % 256, unread, len(unread)))

    def remove(self, number: int) -> None:
        if self._source is not None:
            _check(lib.pn_source_remove(self._source, number))

    def asked(self, class_: int) -> int:
        """Pages that were asked for in that class, so far."""
        return self._last_asked[class_] if self._source is None else int(lib.pn_source_asked(self._source, class_))

    def kept(self) -> int:
        """Bytes that are kept now because sockets are full, of all connections."""
        return 0 if self._source is None else int(lib.pn_source_kept(self._source))

    def ended(self) -> Iterator[tuple[int, End]]:
        """Connections that have ended since the last call, and why."""
        number, end = ffi.new("uint64_t *"), ffi.new("struct pn_end *")
        while lib.pn_source_ended(self._source, number, end):
            yield int(number[0]), _end_of(end)


class Keys:
    """``struct pn_keys``: a source's memory on one RDMA device, registered as destinations ask for keys. ``blocks``: files with
    the address at which they are mapped. :exc:`OSError` as of :class:`RdmaLoop`."""

    def __init__(
        self,
        blocks: Sequence[SourceBlock],
        *,
        device: str,
        port: int,
        gid_index: int,
        chunks: int,
        chunk_size: int,
        pin_limit: int,
        in_any_case: int,
    ) -> None:
        config, name = ffi.new("struct pn_keys_config *"), ffi.new("char[]", device.encode())
        table, names = _source_blocks(blocks)
        self._kept = (name, table, names)
        config.device, config.blocks, config.block_count = name, table, len(blocks)
        config.chunk_count, config.chunk_size, config.pin_limit, config.in_any_case = chunks, chunk_size, pin_limit, in_any_case
        config.port, config.gid_index = port, gid_index
        error = ffi.new("int *")
        self.keys = lib.pn_keys_new(config, error)
        _check(error[0])

    @property
    def pinned(self) -> int:
        """Bytes that are registered now."""
        return 0 if self.keys is None else int(lib.pn_keys_pinned(self.keys))

    def close(self) -> None:
        """After its readers. Idempotent."""
        if self.keys is not None:
            lib.pn_keys_free(self.keys)
            self.keys = None


class KeyReader:
    """``struct pn_reader``: one connection that is given keys. :exc:`OSError` is what the device says."""

    def __init__(self, keys: Keys) -> None:
        error = ffi.new("int *")
        self._keys = keys
        self._reader = lib.pn_reader_new(keys.keys, error)
        _check(error[0])

    @property
    def number(self) -> int:
        """Of its queue pair."""
        return int(lib.pn_reader_number(self._reader))

    def connect(self, psn: int, *, gid: bytes, number: int, peer_psn: int, lid: int, mtu: int, reads: int) -> None:
        _check(lib.pn_reader_connect(self._reader, psn, _rdma_peer(gid, number, peer_psn, lid, mtu, reads)))

    def run(self, sock: int, stop_fd: int, unread: bytes) -> End:
        """Until it ends. Call it in a thread."""
        end = ffi.new("struct pn_end *")
        lib.pn_reader_run(self._reader, sock, stop_fd, unread, len(unread), end)
        return _end_of(end)

    def close(self) -> None:
        """Gives its keys back. Not while it runs. Idempotent."""
        if self._reader is not None:
            lib.pn_reader_free(self._reader)
            self._reader = None


# ---- the test workload ----


def pattern_fill(into: memoryview, first_page: int, pages: int, page_size: int, seed: int, zero_every: int) -> None:
    """Pages of the pattern (``native/pattern.c``) that the workload expects to find."""
    if len(into) < pages * page_size:
        raise ValueError(f"{len(into)} bytes have no room for {pages} pages of {page_size}")
    lib.pn_pattern_fill(ffi.from_buffer(into, require_writable=True), first_page, pages, page_size, seed, zero_every)


def run_workload(argv: list[str]) -> int:
    """The owner of ``pagenet.testing.workload``, in this process; returns its exit status."""
    arguments = [ffi.new("char[]", argument.encode()) for argument in argv]
    return int(lib.pn_workload(len(arguments), ffi.new("char *[]", [*arguments, ffi.NULL])))


# ---- bench ----

_UNTOUCHED = 2**64 - 1


def bench_touch(
    address: int, page_size: int, pages: Sequence[int], threads: int, seconds: float, shared_fd: int | None = None
) -> array[int]:
    """How long each touch of ``pages`` took, in ns, in the order of the list: from that many threads, for ``seconds`` at most.
    With the descriptor of a :class:`SharedMap`, pages that are there already are left out.

    Call it in a thread. ``EFAULT``: a page could never come.
    """
    with ExitStack() as stack:
        shared = ffi.NULL
        if shared_fd is not None:  # a mapping of our own: the transfer may end, and take its own along, while we still look
            mapped = Mapped(os.fstat(shared_fd).st_size, shared_fd)
            stack.callback(mapped.close)
            shared = ffi.cast("struct pn_map *", mapped.address)
        wanted, latencies = array("Q", pages), array("Q", bytes(8 * len(pages)))
        limit = max(1, int(seconds * 1e9))
        to, from_ = ffi.from_buffer("uint64_t[]", latencies), ffi.from_buffer("uint64_t[]", wanted)
        _check(lib.pn_bench_touch(address, page_size, from_, len(wanted), to, threads, limit, shared))
    return array("Q", (latency for latency in latencies if latency != _UNTOUCHED))


class Play:
    """``struct pn_play``: a trace of touches, and how it goes. ``work_ns``: before each, or one for each of them."""

    def __init__(self, address: int, page_size: int, pages: array[int], work_ns: int | array[int]) -> None:
        self._pages = ffi.from_buffer("uint64_t[]", pages)
        self._play = ffi.new("struct pn_play *")
        self._play.address, self._play.page_size = address, page_size
        self._play.pages, self._play.count = self._pages, len(pages)
        if isinstance(work_ns, int):
            self._play.work_ns = work_ns
        else:
            assert len(work_ns) == len(pages)
            self._works = ffi.from_buffer("uint64_t[]", work_ns)
            self._play.works_ns = self._works

    def run(self, shared: SharedMap) -> None:
        """Touch them all. Call it in a thread. ``EFAULT``: a page could never come."""
        _check(lib.pn_bench_play(self._play, shared.map))

    @property
    def done(self) -> int:
        """Touches so far."""
        return int(self._play.done)

    @property
    def blocked(self) -> int:
        """Touches of pages that were not there."""
        return int(self._play.blocked)

    @property
    def stall_ns(self) -> int:
        """How long those took, all together."""
        return int(self._play.stall_ns)


def bench_count(shared: SharedMap, pages: array[int], state: int) -> int:
    """How many of ``pages`` are in that state."""
    return int(lib.pn_bench_count(shared.map, ffi.from_buffer("uint64_t[]", pages), len(pages), state))


def bench_claim_memory(size: int) -> None:
    """Have the system find ``size`` bytes, and give them back: where it is itself a guest, its host takes what is free, and
    getting it again would be measured along. Call it in a thread."""
    memory = Mapped(size)
    try:
        _check(lib.pn_populate(memory.address, size))
    finally:
        memory.close()


def bench_page_server(sock: int, page_size: int) -> None:
    """Answer each request on a blocking socket with a page, until the peer closes."""
    _check(lib.pn_bench_page_server(sock, page_size))


def bench_fault_floor(uffd: int, sock: int, stop_fd: int, page_size: int) -> None:
    """Answer faults from a page server, or with a page at hand (``sock`` -1), until ``stop_fd`` is readable."""
    _check(lib.pn_bench_fault_floor(uffd, sock, stop_fd, page_size))


def bench_send(sock: int, address: int, length: int, chunk: int) -> None:
    _check(lib.pn_bench_send(sock, ffi.cast("void *", address), length, chunk))


def bench_receive(sock: int, length: int, chunk: int, uffd: int = -1, address: int = 0, second: int = 0) -> None:
    """Receive; with a uffd, copy each chunk into place; with a second mapping too, receive through that, and continue."""
    _check(lib.pn_bench_receive(sock, length, chunk, uffd, address, second))


def bench_memcpy(to: int, from_: int, length: int) -> None:
    lib.pn_bench_memcpy(to, from_, length)


def bench_claims(shared: SharedMap) -> int:
    """Take each page from MISSING to RESIDENT: how many claims that took."""
    return int(lib.pn_bench_claims(shared.map))


def pattern_differs(address: int, pages: int, page_size: int, seed: int, zero_every: int) -> int:
    """How many pages of memory at ``address`` are not as :func:`pattern_fill` makes them."""
    bad = ffi.new("uint64_t *")
    return int(lib.pn_pattern_check(ffi.cast("void *", address), 0, pages, page_size, seed, zero_every, bad))
