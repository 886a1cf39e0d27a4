"""What tests and benches need of C: an extension module of its own, which code that moves memory
never loads.

It shares nothing with the core. A map of pages is passed to it by address.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from typing import cast

from _cffi_backend import FFI

from .._pagenet_testing import ffi as _ffi
from .._pagenet_testing import lib as _lib
from ._library import check
from ._library import lib as core
from ._pointers import CData
from ._testing_declarations import Library, pn_guest, pn_map, pn_play
from .memory import Mapped
from .residency import SharedMap

ffi: FFI = _ffi
lib: Library = _lib


def pattern_fill(
    into: memoryview, first_page: int, pages: int, page_size: int, seed: int, zero_every: int
) -> None:
    """Fill ``into`` with pages of the pattern (``native/testing/pattern.c``) that the workload
    expects to find. :exc:`ValueError` if there is not enough room."""
    if len(into) < pages * page_size:
        raise ValueError(f"{len(into)} bytes have no room for {pages} pages of {page_size}")
    lib.pn_pattern_fill(
        ffi.from_buffer(into, require_writable=True), first_page, pages, page_size, seed, zero_every
    )


def pattern_differs(address: int, pages: int, page_size: int, seed: int, zero_every: int) -> int:
    """How many of the pages at ``address`` differ from those of :func:`pattern_fill`."""
    bad = ffi.new("uint64_t *")
    return lib.pn_pattern_check(
        ffi.cast("void *", address), 0, pages, page_size, seed, zero_every, bad
    )


def run_workload(argv: list[str]) -> int:
    """Run the owner of ``pagenet.testing.workload`` in this process; returns its exit status."""
    arguments = [ffi.new("char[]", argument.encode()) for argument in argv]
    return lib.pn_workload(len(arguments), ffi.new("char *[]", [*arguments, ffi.NULL]))


_UNTOUCHED = 2**64 - 1


def _map_at(address: int) -> pn_map:
    """The map at ``address``; 0: NULL, for no map."""
    return cast(pn_map, ffi.cast("struct pn_map *", address))


def bench_touch(
    address: int,
    page_size: int,
    pages: Sequence[int],
    threads: int,
    seconds: float,
    shared_fd: int | None = None,
) -> array[int]:
    """Touch ``pages`` from ``threads`` threads, for ``seconds`` at most. Returns how long each
    touch took, in ns, in the order of ``pages``. With the descriptor of a :class:`SharedMap`, pages
    that are there already are left out.

    Call it in a thread. :exc:`OSError` (EFAULT): a page could never come.
    """
    with ExitStack() as stack:
        shared = _map_at(0)
        # a mapping of our own: the transfer may end, and close its own, while this one is in use
        if shared_fd is not None:
            mapped = Mapped(os.fstat(shared_fd).st_size, shared_fd)
            stack.callback(mapped.close)
            shared = _map_at(mapped.address)
        wanted, latencies = array("Q", pages), array("Q", bytes(8 * len(pages)))
        limit = max(1, int(seconds * 1e9))
        to, from_ = ffi.from_buffer("uint64_t[]", latencies), ffi.from_buffer("uint64_t[]", wanted)
        check(
            lib.pn_bench_touch(address, page_size, from_, len(wanted), to, threads, limit, shared)
        )
    return array("Q", (latency for latency in latencies if latency != _UNTOUCHED))


class Play:
    """``struct pn_play``: a trace of touches, and how it goes. ``work_ns``: before each, or one for
    each of them. ``threads`` share the touches."""

    def __init__(
        self,
        address: int,
        page_size: int,
        pages: array[int],
        work_ns: int | array[int],
        threads: int = 1,
    ) -> None:
        #: how long each touch took, in ns
        self.latencies = array("Q", bytes(8 * len(pages)))
        self._pages = ffi.from_buffer("uint64_t[]", pages)
        self._play = cast(pn_play, ffi.new("struct pn_play *"))
        self._play.address, self._play.page_size = address, page_size
        self._play.pages, self._play.count = self._pages, len(pages)
        self._play.threads = threads
        self._latencies = ffi.from_buffer("uint64_t[]", self.latencies)
        self._play.latencies = self._latencies
        if isinstance(work_ns, int):
            self._play.work_ns = work_ns
        else:
            assert len(work_ns) == len(pages)
            self._works = ffi.from_buffer("uint64_t[]", work_ns)
            self._play.works_ns = self._works

    def run(self, shared: SharedMap, *, until_complete: bool = False) -> None:
        """Touch them all, or ``until_complete`` those that have their turn before every page is
        there. Call it in a thread. ``EFAULT``: a page could never come."""
        self._play.until_complete = until_complete
        check(lib.pn_bench_play(self._play, _map_at(shared.address)))

    @property
    def done(self) -> int:
        """Touches so far."""
        return self._play.done

    @property
    def blocked(self) -> int:
        """Touches of pages that were not there."""
        return self._play.blocked

    @property
    def stall_ns(self) -> int:
        """How long the blocked touches took, all together, in ns."""
        return self._play.stall_ns


def bench_count(shared: SharedMap, pages: array[int], state: int) -> int:
    """How many of ``pages`` are in ``state``."""
    return lib.pn_bench_count(
        _map_at(shared.address), ffi.from_buffer("uint64_t[]", pages), len(pages), state
    )


def bench_claim_memory(size: int) -> None:
    """Allocate ``size`` bytes, and free them again. Call it in a thread.

    Where the system is a guest, its host takes back free memory; getting that again would be part
    of what is measured.
    """
    memory = Mapped(size)
    try:
        check(core.pn_populate(memory.address, size))
    finally:
        memory.close()


def bench_page_server(sock: int, page_size: int) -> None:
    """Answer each request on a blocking socket with a page, until the peer closes."""
    check(lib.pn_bench_page_server(sock, page_size))


def bench_fault_floor(uffd: int, sock: int, stop_fd: int, page_size: int) -> None:
    """Answer faults from a page server, or with a page at hand (``sock`` -1), until ``stop_fd`` is
    readable."""
    check(lib.pn_bench_fault_floor(uffd, sock, stop_fd, page_size))


def bench_send(sock: int, address: int, length: int, chunk: int) -> None:
    check(lib.pn_bench_send(sock, ffi.cast("void *", address), length, chunk))


def bench_receive(
    sock: int,
    length: int,
    chunk: int,
    uffd: int = -1,
    address: int = 0,
    second: int = 0,
    file: int = -1,
) -> None:
    """Receive. With a uffd, put each chunk in place: by COPY; or receive through a second mapping
    and continue; or write to the ``file`` behind the memory and continue."""
    check(lib.pn_bench_receive(sock, length, chunk, uffd, address, second, file))


def bench_relay(
    listener: int, host: str, port: int, delay: float, stop_fd: int, rate: int = 0
) -> int:
    """Join each connection that ``listener`` takes to one to that IPv4 address, with ``delay``
    seconds on the way and ``rate`` bytes a second (0: as fast as can be) in each direction, until
    ``stop_fd`` is readable. Returns how many bytes came from there. Call it in a thread."""
    answered, ns = array("Q", [0]), round(delay * 1e9)
    to = ffi.from_buffer("uint64_t[]", answered)
    check(lib.pn_bench_relay(listener, host.encode(), port, ns, rate, stop_fd, to))
    return answered[0]


class Guest:
    """``struct pn_guest``: memory that a handler restores; ``shared``: a private mapping of the
    handler's cache, and not anonymous. ``pages``: which it touches; ``touches``: memory for what
    comes of that, two words of 64 bits for each: when it was over, in ns of CLOCK_MONOTONIC, and
    how long it took."""

    def __init__(
        self,
        socket: str,
        size: int,
        seed: int,
        pages: memoryview,
        touches: memoryview,
        shared: bool = False,
    ) -> None:
        self._socket = ffi.new("char[]", socket.encode())
        self._pages = ffi.from_buffer("uint64_t[]", pages)
        self._touches = ffi.from_buffer("uint64_t[]", touches, require_writable=True)
        self._guest = cast(pn_guest, ffi.new("struct pn_guest *"))
        self._guest.socket, self._guest.pages = self._socket, self._pages
        self._guest.shared = shared
        self._guest.size, self._guest.seed, self._guest.touches = size, seed, len(pages)
        self._guest.ended, self._guest.took = self._touches, self._touches + len(pages)

    def prepare(self) -> None:
        """Make the memory, in which everything is missing. :exc:`OSError`."""
        check(lib.pn_bench_guest_prepare(self._guest))

    def arrive(self) -> None:
        """Connect, hand the memory over, and touch it. :exc:`OSError`."""
        check(lib.pn_bench_guest_arrive(self._guest))

    @property
    def connected(self) -> int:
        """When it began to connect, in ns."""
        return self._guest.connected

    @property
    def wrong(self) -> int:
        """Touched pages that are not what they should be."""
        return self._guest.wrong


def bench_handler(listener: int, memory: int, size: int, stop_fd: int) -> None:
    """Take guests at ``listener``, and answer each of their faults with one COPY from ``memory``,
    until ``stop_fd`` is readable."""
    check(lib.pn_bench_handler(listener, ffi.cast("void *", memory), size, stop_fd))


def bench_answer_pings(sock: int, directory: str, size: int) -> None:
    """Answer each 24 bytes with ``size`` bytes, until the peer closes. ``directory``: certificates,
    as ``--tls-dir`` takes them; empty: without TLS. :exc:`OSError` (EPROTO: no handshake)."""
    check(lib.pn_bench_answer_pings(sock, _name(directory), size))


def bench_ping(sock: int, directory: str, size: int, count: int) -> array[int]:
    """How long each of ``count`` answers took, in ns."""
    latencies = array("Q", bytes(8 * count))
    into = ffi.from_buffer("uint64_t[]", latencies)
    check(lib.pn_bench_ping(sock, _name(directory), size, count, into))
    return latencies


def bench_tls_send(sock: int, directory: str, length: int, chunk: int) -> None:
    """Send ``length`` bytes once, when asked to."""
    check(lib.pn_bench_tls_send(sock, _name(directory), length, chunk))


def bench_tls_receive(sock: int, directory: str, length: int, chunk: int) -> float:
    """How many seconds it takes until they are here."""
    return check(lib.pn_bench_tls_receive(sock, _name(directory), length, chunk)) / 1e9


def _name(directory: str) -> bytes | CData:
    return directory.encode() if directory else ffi.NULL


def bench_memcpy(to: int, from_: int, length: int) -> None:
    lib.pn_bench_memcpy(to, from_, length)


def bench_write(address: int, page_size: int, pages: int) -> None:
    """Write to every second one of the first ``pages`` pages."""
    lib.pn_bench_write(address, page_size, pages)


def bench_scan(pagemap: int, address: int, length: int) -> int:
    """How many bytes are not protected against writing, by PAGEMAP_SCAN alone."""
    return check(lib.pn_bench_scan(pagemap, address, length))


def bench_claims(shared: SharedMap) -> int:
    """Take each page from MISSING to RESIDENT. Returns how many claims that took."""
    return lib.pn_bench_claims(_map_at(shared.address))
