"""The destination's half of the native lanes, and what they share with the rest of a transfer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import cast

from ._declarations import (
    pn_cache,
    pn_cache_config,
    pn_crew,
    pn_dest,
    pn_dest_config,
    pn_end,
    pn_fault_log,
    pn_lane_config,
    pn_piece,
    pn_ring,
    pn_window,
)
from ._library import NULL, check, ffi, lib, new_array, new_struct, opened
from .ends import End, end_of
from .residency import SharedMap
from .tls import Tls, tls_struct

_tunables = lib.pn_tunables


def window_bytes(fixed: int | None) -> tuple[int, int, int]:
    """Bytes of background that a lane over TCP may have in flight: at least, at the beginning, and
    at most (native/pace.c). ``fixed``: always so many."""
    least, low, most = _tunables.window_least, _tunables.window_min, _tunables.window_max
    return (least, low, most) if fixed is None else (fixed, fixed, fixed)


def rdma_window_bytes(fixed: int | None) -> tuple[int, int, int]:
    """The same over RDMA."""
    tunables = _tunables
    window = tunables.rdma_window_least, tunables.rdma_window_min, tunables.rdma_window_max
    return window if fixed is None else (fixed, fixed, fixed)


@dataclass(frozen=True, slots=True)
class Piece:
    """``struct pn_piece``: pages at consecutive addresses. ``second``: the address of our own
    mapping of them, or 0. ``file_offset``: where they begin in the file behind them."""

    first: int
    count: int
    page_size: int
    address: int
    second: int
    file_offset: int
    wire_first: int
    shift: int


def before_sampled(first: int, count: int) -> int:
    """How many of ``count`` pages from ``first`` on come before the first that the sample of
    prefetched pages takes."""
    return lib.pn_before_sampled(first, count)


class Destination:
    """``struct pn_dest``: what the native lanes of one transfer share. Borrows the map and the
    descriptors."""

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
        fills: Cache | None = None,
        shares: bool = False,
    ) -> None:
        self._pieces = new_array(pn_piece, [astuple(piece) for piece in pieces])
        order = sorted(range(len(pieces)), key=lambda index: pieces[index].address)
        self._by_address = ffi.new("uint32_t[]", order)
        config = new_struct(pn_dest_config)
        config.map, config.pieces, config.by_address = shared.map, self._pieces, self._by_address
        config.scope = 2**64 - 1 if shares else shared.scope  # it is never complete
        config.piece_count = len(pieces)
        config.max_page_size = max(piece.page_size for piece in pieces)
        config.uffd, config.how, config.file, config.removes, config.done_fd = (
            uffd,
            how,
            file,
            removes,
            done_fd,
        )
        config.sealed, config.outside_is_zero = sealed, outside_is_zero
        self._window = window
        config.window = window.window
        self._faults = faults
        config.faults, config.faults_fd = (NULL, -1) if faults is None else (faults.log, faults.fd)
        config.encodings = encodings
        self._fills = fills  # it must outlive the lanes
        config.fills, config.shares = NULL if fills is None else fills.cache, shares
        self._dest: pn_dest | None = lib.pn_dest_new(config)
        if self._dest == NULL:
            raise MemoryError("no memory for a transfer's lanes")

    def close(self) -> None:
        """Not to be called while a lane runs. Idempotent."""
        if self._dest is not None:
            lib.pn_dest_free(self._dest)
            self._dest = None

    def release(self) -> None:
        """Let the owner see pages of the sample that it has not touched. Not to be called while a
        lane runs."""
        lib.pn_dest_release(self.dest)

    def withhold(self, withhold: bool) -> None:
        """Have pages that come to shared memory become COPIED instead of visible, and leave faults
        unanswered, or no longer do. To be called while no page is in flight."""
        lib.pn_dest_withhold(self.dest, withhold)

    def limit_background(self, bytes_per_second: int | None) -> None:
        """Limit the rate of the background. None: no limit; 0: ask for nothing more.

        A lane that waits looks at the limit again when its ring is woken.
        """
        rate = 0 if bytes_per_second is None else bytes_per_second or 2**64 - 1
        lib.pn_dest_limit(self.dest, rate)

    @property
    def dest(self) -> pn_dest:
        """The struct. :exc:`TypeError` once it is closed."""
        return opened(self._dest)

    def run_lane(
        self,
        sock: int,
        stop_fd: int,
        ring: Ring | None = None,
        window: tuple[int, int, int] = (0, 0, 0),
        chunk: int = 0,
        tls: Tls | None = None,
    ) -> End:
        """Drive one connection until it ends, as the demand lane, or with a ``ring`` as a
        background lane. Call it in a thread."""
        config = self._lane_config(sock, stop_fd, ring, window, chunk)
        config.tls = tls_struct(tls)
        end = new_struct(pn_end)
        lib.pn_lane_run(config, end)
        return end_of(end)

    def start_lane(
        self, crew: Crew, cache: Cache, stop_fd: int, ring: Ring | None, chunk: int
    ) -> CrewedLane:
        """Have a thread of ``crew`` fill the memory from ``cache``: what faults want, and what is
        in the ``ring``."""
        window = (chunk, chunk, chunk)
        return CrewedLane(crew, cache, self._lane_config(-1, stop_fd, ring, window, chunk))

    def _lane_config(
        self,
        sock: int,
        stop_fd: int,
        ring: Ring | None,
        window: tuple[int, int, int],
        chunk: int,
    ) -> pn_lane_config:
        config = new_struct(pn_lane_config)
        config.dest, config.sock, config.stop_fd = self.dest, sock, stop_fd
        config.ring = NULL if ring is None else ring.ring
        config.work_fd, config.room_fd = (-1, -1) if ring is None else (ring.work_fd, ring.room_fd)
        config.window_least, config.window_min, config.window_max, config.chunk = *window, chunk
        return config


class Cache:
    """``struct pn_cache``: the host cache that one transfer fills, and guests are filled from.
    ``shared``: its map of pages; ``pages``: their number; ``address``: of a mapping of ``file``;
    ``most``: pages that may take memory (0: all). Borrows all of them. Close it when no lane runs.
    """

    def __init__(
        self,
        shared: SharedMap,
        pages: int,
        page_size: int,
        *,
        address: int,
        file: int,
        most: int = 0,
    ) -> None:
        config = new_struct(pn_cache_config)
        config.map, config.pages, config.page_size = shared.map, pages, page_size
        config.memory, config.file, config.most = address, file, most
        self._cache: pn_cache | None = lib.pn_cache_new(config)
        if self._cache == NULL:
            check(-ffi.errno)

    @property
    def cache(self) -> pn_cache:
        """The struct. :exc:`TypeError` once it is closed."""
        return opened(self._cache)

    @property
    def resident(self) -> int:
        """The pages that take memory."""
        return lib.pn_cache_resident(self.cache)

    def close(self) -> None:
        """Idempotent."""
        if self._cache is not None:
            lib.pn_cache_free(self.cache)
            self._cache = None


class Crew:
    """``struct pn_crew``: ``threads`` that drive the lanes of many guests. Close it when no lane
    runs. :exc:`OSError` if they cannot be started."""

    def __init__(self, threads: int) -> None:
        self._crew: pn_crew | None = lib.pn_crew_new(threads)
        if self._crew == NULL:
            check(-ffi.errno)

    @property
    def crew(self) -> pn_crew:
        """The struct. :exc:`TypeError` once it is closed."""
        return opened(self._crew)

    def close(self) -> None:
        """Idempotent."""
        if self._crew is not None:
            lib.pn_crew_free(self.crew)
            self._crew = None


class CrewedLane:
    """A lane that a thread of ``crew`` drives. ``fd`` becomes readable when it has ended. Then
    close it, and not before."""

    def __init__(self, crew: Crew, cache: Cache, config: pn_lane_config) -> None:
        config.cache = cache.cache
        self._config = config  # it keeps alive what it points to
        self._end = new_struct(pn_end)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            check(lib.pn_crew_run(crew.crew, config, self._end, self.fd))
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> End:
        os.read(self.fd, 8)
        os.close(self.fd)
        return end_of(self._end)


class Window:
    """``struct pn_window``: what to ask for around a page that a thread waits for. Adapts unless it
    was fixed."""

    def __init__(self) -> None:
        self.window = new_struct(pn_window)
        lib.pn_window_init(self.window)

    @property
    def fixed(self) -> tuple[int, int] | None:
        """Pages forward and backward; None: it adapts."""
        sides = ffi.new("uint32_t[2]")
        return (
            (int(sides[0]), int(sides[1]))
            if lib.pn_window_fixed(self.window, sides, sides + 1)
            else None
        )

    def fix(self, fixed: tuple[int, int] | None) -> None:
        """Set :attr:`fixed`. May be called at any time."""
        forward, backward = fixed or (0, 0)
        lib.pn_window_fix(self.window, fixed is not None, forward, backward)

    def fault(self, shared: SharedMap, page: int, first: int, end: int, page_size: int) -> None:
        """Note that ``page`` was MISSING and a thread waits for it. [first, end): the pages around
        it that one request may name."""
        lib.pn_window_fault(self.window, shared.map, page, first, end, page_size)

    def next(self, shared: SharedMap, size: int) -> tuple[int, int] | None:
        """First page and number of pages to ask for next, at most ``size`` bytes, but at least one
        page. They were MISSING, and are REQUESTED now. None: nothing more is wanted."""
        first = ffi.new("uint64_t *")
        count = lib.pn_window_next(self.window, shared.map, size, first)
        return (int(first[0]), count) if count else None

    @property
    def pending(self) -> int:
        """The number of stretches of pages that are wanted and not asked for yet."""
        return sum(stack.newest - stack.oldest for stack in self.window.wanted)

    @property
    def level(self) -> int:
        """Sixteen times the base-2 logarithm of the pages that the next area gets, about."""
        return self.window.level


class FaultLog:
    """``struct pn_fault_log``: the pages that threads waited for, written by the demand lane."""

    ROOM = 4096

    def __init__(self) -> None:
        self.log = new_struct(pn_fault_log)
        self._pages = ffi.new("uint64_t[]", self.ROOM)
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read(self) -> list[int]:
        """The pages in the log, oldest first. If there are none, ``fd`` becomes readable with the
        next page."""
        count = lib.pn_fault_log_read(self.log, self._pages, self.ROOM)
        return cast(list[int], ffi.unpack(self._pages, count)) if count else []

    def write(self, page: int) -> None:
        """Add a page, as the lane in C does."""
        lib.pn_fault_log_write(self.log, page, self.fd)

    @property
    def dropped(self) -> int:
        """The number of pages for which there was no room."""
        return self.log.dropped


class Ring:
    """Runs that the schedule hands to a background lane, with an eventfd for new runs
    (``work_fd``), and one for room (``room_fd``)."""

    def __init__(self) -> None:
        self.ring = new_struct(pn_ring)
        self.work_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.room_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        for fd in (self.work_fd, self.room_fd):
            if fd >= 0:
                os.close(fd)
        self.work_fd = self.room_fd = -1

    def push(self, first: int, count: int, wake: bool = True) -> None:
        """Add a run. ``wake`` False: the caller calls :meth:`wake` later. :exc:`OSError` (EAGAIN)
        if the ring is full."""
        check(lib.pn_ring_push(self.ring, first, count))
        if wake:
            self.wake()

    def wake(self) -> None:
        """Have the lane look at its ring, and at the limit of the background, again."""
        os.eventfd_write(self.work_fd, 1)

    def __len__(self) -> int:
        return lib.pn_ring_used(self.ring)

    ROOM = 512

    def wake_me_at(self, runs: int) -> None:
        """Have ``room_fd`` written when at most ``runs`` runs are left, rather than each time that
        the lane takes one."""
        lib.pn_ring_wake_at(self.ring, runs)
