"""The C core as the rest of pagenet sees it. The only module that touches ``ffi`` and ``lib``.

``-errno`` becomes :exc:`OSError` here. Every call drops the GIL, so one that waits for a page fault stalls its own thread
alone. Buffers are passed by address: the caller keeps them alive and mapped.
"""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass
from typing import Any

from ._pagenet import ffi, lib

__all__ = [
    "Mapped",
    "NativeEvent",
    "Placed",
    "SharedMap",
    "copy_out",
    "leading_alike",
    "pattern_fill",
    "place",
    "read_process",
    "run_workload",
    "same_file",
    "uffd_api",
    "uffd_open",
    "uffd_probe",
    "uffd_read",
    "uffd_register",
    "uffd_unregister",
    "uffd_wake",
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


def uffd_read(uffd: int, room: int = 64) -> list[NativeEvent]:
    """Events that are queued, up to ``room``; :exc:`BlockingIOError` if there are none."""
    events = ffi.new("struct pn_event[]", room)
    count = _check(lib.pn_uffd_read(uffd, events, room))
    return [NativeEvent(e.kind, e.start, e.end, e.length, e.flags, e.thread, e.fd) for e in events[0:count]]


def uffd_probe(uffd: int, address: int) -> int:
    """0, or the errno: ``EAGAIN`` while the owner's memory is changing, ``ESRCH`` if it is gone."""
    return -int(lib.pn_uffd_probe(uffd, address))


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
    result = lib.pn_place(uffd, how, address, source, length, page_size)
    return Placed(result.placed, result.existed, result.absent, -result.error)


# ---- memory ----


def leading_alike(data: memoryview, pages: int, page_size: int) -> tuple[int, bool]:
    """How many pages from the start of ``data`` are alike in being zero throughout or not, and which of the two."""
    zero = ffi.new("int *")
    count = lib.pn_zero_run(ffi.from_buffer(data), pages, page_size, zero)
    return int(count), bool(zero[0])


def read_process(pid: int, address: int, into: memoryview) -> None:
    _check(lib.pn_read_process(pid, address, ffi.from_buffer(into), len(into)))


def copy_out(address: int, into: memoryview) -> None:
    """Copy from ``address``, which may fault: call it from a thread."""
    lib.pn_copy(ffi.from_buffer(into), ffi.cast("void *", address), len(into))


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


# ---- residency and statistics ----

STATES = {
    "missing": lib.PN_MISSING,
    "requested": lib.PN_REQUESTED,
    "placing": lib.PN_PLACING,
    "resident": lib.PN_RESIDENT,
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
}


class SharedMap:
    """``struct pn_map`` in a memfd: page states and counters, shared with threads and processes."""

    def __init__(self, pages: int) -> None:
        size = lib.pn_map_bytes(pages)
        self.fd = os.memfd_create("pagenet-residency", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._memory = Mapped(size, self.fd)
        self.map: Any = ffi.cast("struct pn_map *", self._memory.address)
        lib.pn_map_init(self.map, pages)

    def close(self) -> None:
        if self.fd >= 0:
            self.map = None  # what still uses it raises TypeError, and reads no memory that is gone
            self._memory.close()
            os.close(self.fd)
            self.fd = -1

    @property
    def scope(self) -> int:
        return int(self.map.scope)

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

    def touched(self, first: int) -> tuple[int, int]:
        """Where from ``first`` on the next pages begin, and end, that are not all "missing" for want of ever being touched."""
        header, pages = lib.pn_map_bytes(0), int(self.map.pages)
        try:
            start = max(first, os.lseek(self.fd, header + first, os.SEEK_DATA) - header)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing more but holes
                raise
            return pages, pages
        return start, min(pages, os.lseek(self.fd, header + start, os.SEEK_HOLE) - header)

    def add(self, class_: int, counter: int, amount: int) -> None:
        lib.pn_stats_add(self.map, class_, counter, amount)

    def add_latency(self, class_: int, nanoseconds: int) -> None:
        lib.pn_stats_latency(self.map, class_, nanoseconds)

    def counters(self, class_: int) -> list[int]:
        return list(self.map.classes[class_].counters)

    def latencies(self, class_: int) -> list[int]:
        return list(self.map.classes[class_].latency)


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
