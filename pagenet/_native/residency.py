"""The destination's map of pages, with its counters, in memory that threads and processes share."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from typing import NamedTuple, cast

from ._declarations import pn_event, pn_map
from ._library import check, ffi, lib, new_array, new_struct, opened, struct_at
from ._pointers import CData
from .memory import Mapped

STATES = {
    "missing": lib.PN_MISSING,
    "requested": lib.PN_REQUESTED,
    "placing": lib.PN_PLACING,
    "resident": lib.PN_RESIDENT,
    "coming": lib.PN_COMING,
    "removing": lib.PN_REMOVING,
    "ready": lib.PN_READY,
    "copied": lib.PN_COPIED,
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
#: the name of the map's memfd, which its link in /proc/PID/fd contains
MAP_NAME = "pagenet-residency"
MAX_NOTE = 256 << 10
# More than any counter reaches. The sum of three still fits the integers of JSON and msgpack.
_MOST_COUNTED = 1 << 60


def _is_small_memfd(file: int) -> bool:
    """Whether it is a memfd, or a file of tmpfs, with small pages, open to read and to write.

    The check asks the kernel alone: other files might keep us waiting. Huge pages are refused,
    because touching one that cannot be allocated raises SIGBUS.
    """
    if fcntl.fcntl(file, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH) != os.O_RDWR:
        return False
    try:
        fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return os.fstatvfs(file).f_bsize == mmap.PAGESIZE


def seal_size(file: int) -> bool:
    """Seal the file against becoming shorter, if that is possible.

    False: a store to a mapping of it may raise SIGBUS. That is so for huge pages even if the file
    is sealed: there may be no huge page to fill a hole with.
    """
    with suppress(OSError):  # it cannot be sealed at all, or not any more
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    try:
        sealed = bool(fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False
    return sealed and os.fstatvfs(file).f_bsize == mmap.PAGESIZE


class FoundMap(NamedTuple):
    """What a map's header and note contain, even while a destination uses the map.

    ``finished``: there is nothing left to do.
    """

    pages: int
    done: int
    scope: int
    finished: bool
    note: bytes


def find_map(file: int) -> FoundMap:
    """The map in ``file``, which any process may have made up. :exc:`ValueError` if there is
    none."""
    if not _is_small_memfd(file):
        raise ValueError("no memfd of small pages")
    header = new_struct(pn_map)
    if os.preadv(file, [ffi.buffer(header)], 0) < ffi.sizeof("struct pn_map"):
        raise ValueError("no map of pages")
    pages, size = header.pages, os.fstat(file).st_size
    if (
        bytes(ffi.buffer(header.magic)) != b"pagenet4"
        or pages > size
        or lib.pn_map_bytes(pages) > size
    ):
        raise ValueError("no map of pages")
    note = os.pread(file, MAX_NOTE, lib.pn_map_bytes(pages))
    return FoundMap(pages, header.done, header.scope, bool(header.finished), note)


def lock_map(file: int) -> int:
    """Open ``file`` anew, and lock it against other destinations for as long as it is open.

    It is opened anew because a lock belongs to an open file, and a lock on the owner's would
    outlive us. Raises :exc:`BlockingIOError` if another process has the lock; other :exc:`OSError`
    if ``file`` is no memfd of small pages, or is not open to read and to write (root could open it
    anew even then).
    """
    if not _is_small_memfd(file):
        check(-errno.EINVAL)
    ours = os.open(f"/proc/self/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(ours)
        raise
    return ours


class SharedMap:
    """``struct pn_map`` in a memfd: page states and counters, shared with threads and processes.
    ``note`` is behind it: what else a process that finds the map must know.

    ``file``: a memfd to use instead of a new one; from :func:`lock_map`, and closed by this object.
    ``published``: False for a map that :meth:`publish` makes known later.
    ``recover``: there is a map in it already, whose users are dead. Raises :exc:`OSError` if it is
    no such memfd, or no map of ``pages`` pages.

    Other processes that have the memfd may write to it at any time. So the number of pages, and how
    many of them are to become resident, are kept here, and never read from the map again.
    """

    def __init__(
        self,
        pages: int,
        note: bytes = b"",
        file: int | None = None,
        *,
        recover: bool = False,
        published: bool = True,
    ) -> None:
        self.pages = pages
        self.fd = (
            os.memfd_create(MAP_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            if file is None
            else file
        )
        size = lib.pn_map_bytes(pages)
        try:
            if not recover:
                os.ftruncate(self.fd, size + len(note))
                # from now on no process can change its size
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
                os.pwrite(self.fd, note, size)
            if not fcntl.fcntl(self.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                check(-errno.EPERM)
            if os.fstat(self.fd).st_size < size:
                check(-errno.EINVAL)
            self._memory = Mapped(size, self.fd)
        except BaseException:
            os.close(self.fd)
            raise
        self._map: pn_map | None = struct_at(pn_map, self._memory.address)
        try:
            (
                check(lib.pn_map_recover(self.map, pages))
                if recover
                else lib.pn_map_init(self.map, pages)
            )
        except BaseException:
            self.close()
            raise
        if published and not recover:
            self.publish()
        #: the number of pages that are to become resident
        self.scope = pages

    def close(self) -> None:
        if self.fd >= 0:
            self._map = None
            self._memory.close()
            os.close(self.fd)
            self.fd = -1

    @property
    def map(self) -> pn_map:
        """The struct. :exc:`TypeError` once it is closed."""
        return opened(self._map)

    @property
    def address(self) -> int:
        """The map's address in this process. :exc:`TypeError` once it is closed."""
        opened(self._map)
        return self._memory.address

    def publish(self) -> None:
        """The map is whole: from now on a process that finds it may go on with it."""
        lib.pn_map_publish(self.map)

    def removals(self) -> list[tuple[int, int]]:
        """As :func:`removals`."""
        return removals(self.map)

    @property
    def done(self) -> int:
        return lib.pn_map_done(self.map)

    def state(self, page: int) -> int:
        return lib.pn_map_state(self.map, page)

    def claim(self, first: int, count: int, from_: int, to: int) -> int:
        return lib.pn_map_claim(self.map, first, count, from_, to)

    def set(self, first: int, count: int, to: int) -> None:
        lib.pn_map_set(self.map, first, count, to)

    def replace(self, first: int, count: int, from_: int, to: int) -> int:
        return lib.pn_map_replace(self.map, first, count, from_, to)

    def find(self, first: int, end: int, state: int) -> int:
        return lib.pn_map_find(self.map, first, end, state)

    def span(self, first: int, end: int, state: int) -> int:
        return lib.pn_map_span(self.map, first, end, state)

    def stale(self, first: int, skip: int, shift: int, bits: bytes, from_: int, count: int) -> int:
        """Make MISSING those COPIED pages whose bits are set, and return how many: see
        ``pn_map_stale``."""
        if from_ + count > 8 * len(bits):
            raise ValueError(f"{len(bits)} bytes have no bits for {from_ + count} pages")
        into = ffi.from_buffer("uint8_t[]", bits)
        return lib.pn_map_stale(self.map, first, skip, shift, into, from_, count)

    def unsettled(self, first: int, end: int) -> int:
        return lib.pn_map_unsettled(self.map, first, end)

    def touched(self, first: int) -> tuple[int, int]:
        """[start, end) of the next pages, from ``first`` on, whose states lie in memory.

        The states before ``start`` lie in a hole of the memfd: nothing has ever touched them, and
        so they are all "missing".
        """
        header, pages = lib.pn_map_bytes(0), self.pages
        try:
            start = min(pages, max(first, os.lseek(self.fd, header + first, os.SEEK_DATA) - header))
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: there are only holes from there on
                raise
            return pages, pages
        # A hole may have been made at start meanwhile. At least one page is returned even then, so
        # that the caller makes progress.
        return start, min(
            pages, max(start + 1, os.lseek(self.fd, header + start, os.SEEK_HOLE) - header)
        )

    @property
    def finished(self) -> bool:
        """Whether the source was told that everything is in place."""
        return bool(self.map.finished)

    def finish(self) -> None:
        self.map.finished = 1

    def add(self, class_: int, counter: int, amount: int) -> None:
        """Add ``amount``, which may be negative, to a counter."""
        lib.pn_stats_add(self.map, class_, counter, amount % 2**64)

    def add_latency(self, class_: int, nanoseconds: int) -> None:
        lib.pn_stats_latency(self.map, class_, nanoseconds)

    def counters(self, class_: int) -> list[int]:
        return _clamped(self.map.classes[class_].counters)

    def latencies(self, class_: int) -> list[int]:
        return _clamped(self.map.classes[class_].latency)


def removals(notes: pn_map) -> list[tuple[int, int]]:
    """What the owner gave up by the events that were read last into this map, whether or not that
    was acted on: addresses, start and end of each."""
    events = new_array(pn_event, lib.PN_EVENTS)
    return [(e.start, e.end) for e in events[0 : lib.pn_map_removals(notes, events)]]


def _clamped(counters: CData) -> list[int]:
    """The counters, each read once, and clamped to what a counter can reach: the owner may have
    written to them."""
    values = cast(list[int], ffi.unpack(counters, len(counters)))
    return (
        values if max(values) <= _MOST_COUNTED else [min(value, _MOST_COUNTED) for value in values]
    )
