"""Filling memory that faults: a userfaultfd, the mappings it watches, and the file behind them if
there is one.

How pages get into place is decided here, once, by what the memory is:

- shared memory, if the file behind it came along: write the page through a second mapping, then
  CONTINUE. The owner's ranges are registered again for MISSING and MINOR, because a range that is
  registered for MINOR alone gets fresh zero pages where the file has a hole;
- private anonymous memory of this very process, on a kernel that has MOVE: MOVE, which refuses
  other processes' memory;
- everything else: COPY.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from .. import _native
from ..errors import HandshakeError, OwnerGone, OwnerLeft, PagenetError, Unsupported, UsageError
from ..region import Region, Run
from ..residency import Residency
from ..target import POISON_PATIENCE, Event, Fault, OnLoss, Outcome
from ._handshake import Mapping, Note, check_mappings, mapping_pieces
from ._userfaultfd import NO_POISON, Feature, Mode, Userfaultfd

__all__ = ["UffdTarget"]

# The words are those of native/lane.c.
_NOT_THERE = "the owner made its memory file shorter, or it is not the one that it has mapped"
_HOW = {
    "copy": _native.COPY,
    "move": _native.MOVE,
    "continue": _native.CONTINUE,
    "share": _native.CONTINUE,
}


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of pages that lies in one block and at consecutive addresses."""

    run: Run
    address: int
    page_size: int

    @property
    def size(self) -> int:
        return self.run.count * self.page_size

    def address_of(self, page: int) -> int:
        return self.address + (page - self.run.first) * self.page_size


@dataclass(slots=True)
class NativeMemory:
    """A target as lanes in C see it. ``fills``: the host cache whose memory it is."""

    uffd: int
    how: int
    file: int
    sealed: bool
    outside_is_zero: bool
    removes: bool
    pieces: list[_native.Piece]
    shares: bool
    fills: _native.Cache | None = None


class OwnerProcess(Protocol):
    """The process that has handed over its memory."""

    @property
    def pid(self) -> int: ...

    def check_kill(self, address: int) -> None:
        """:exc:`~pagenet.errors.Unsupported` unless it is certain that userfaultfd watches its
        memory at ``address``, and this user may kill it."""
        ...

    def kill(self) -> bool:
        """False: it has ended already."""
        ...


class UffdTarget:
    """Memory behind a userfaultfd. Owns ``uffd``, ``shared_fd`` and ``map_fd``.

    ``shared_fd``: the file behind the memory. ``map_fd``: the owner's memfd for the map of pages,
    locked; the map in it outlives this process. ``recover``: a dead destination has left a map in
    it, with that note. ``keeps_uffd`` tells whether the owner has a descriptor of its own for
    ``uffd``, so that its threads go on waiting when ours is closed. ``wait_gone`` returns once the
    owner is gone. ``process``: the owner. ``on_close`` runs when everything is released. ``own``:
    the memory is this process's. ``shares``: it is a private mapping of a host cache's file, and
    never complete: a page may leave the cache. ``outside_is_zero``: what the owner announced
    nothing about reads as zero; otherwise it is poisoned.

    Raises :exc:`HandshakeError` if mappings, file or userfaultfd do not fit the region, or each
    other.
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        mappings: Sequence[Mapping],
        region: Region,
        *,
        shared_fd: int | None = None,
        map_fd: int | None = None,
        recover: Note | None = None,
        own: bool = False,
        shares: bool = False,
        outside_is_zero: bool = False,
        keeps_uffd: Callable[[], bool],
        wait_gone: Callable[[], Awaitable[None]],
        process: OwnerProcess | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._uffd = uffd
        self._shared_fd = shared_fd
        self.shares = shares
        self._keeps_uffd = keeps_uffd
        self._wait_gone = wait_gone
        self._process = process
        self._on_close = on_close
        self._map_fd = map_fd
        self._shared: _native.SharedMap | None = None
        self._recover = recover
        self._mappings = mappings
        self._outside_is_zero = outside_is_zero
        self.region = check_mappings(mappings, region)
        if uffd.features & (Feature.EVENT_FORK | Feature.EVENT_REMAP):
            raise HandshakeError(
                "the owner's userfaultfd reports forks and remaps, which pagenet does not follow"
            )
        self._pieces = sorted(self._cut(mappings), key=lambda piece: piece.run.first)
        self._check_watched()
        self._firsts = [piece.run.first for piece in self._pieces]
        self._by_address = sorted(self._pieces, key=lambda piece: piece.address)
        self._addresses = [piece.address for piece in self._by_address]
        self._second: _native.Mapped | None = None
        #: pages are stored through the second mapping: its page tables are filled, or there is no
        #: other way, because hugetlbfs has no write()
        self._in_place = self.region.max_page_size > mmap.PAGESIZE
        #: storing through the second mapping is never a SIGBUS
        self._sealed = shared_fd is not None and (own or _native.seal_size(shared_fd))
        self.placement = self._choose_placement(own)
        self._zeros = _native.Mapped(self.region.max_page_size)

    def _cut(self, mappings: Sequence[Mapping]) -> Iterator[_Piece]:
        for mapping in mappings:
            for run, address in mapping_pieces(mapping, self.region):
                yield _Piece(run, address, mapping.page_size)

    def _check_watched(self) -> None:
        """Check that the userfaultfd watches all pieces.

        Otherwise pages that cannot be placed would be taken for pages that are not mapped. What is
        watched already stays watched. The kernel refuses memory that another userfaultfd watches,
        and a userfaultfd that is not set up.
        """
        self._can_poison = True
        mode = Mode.MISSING | Mode.MINOR if self.shares else Mode.MISSING
        for piece in self._pieces:
            try:
                self._can_poison &= self._uffd.register(piece.address, piece.size, mode)
            except OSError as error:
                if error.errno == errno.EINVAL and self.shares:
                    raise HandshakeError(
                        f"the owner asked for a file to share, and its memory at"
                        f" {piece.address:#x} is not that"
                    ) from None
                if not self.is_alive():  # the kernel says ENOMEM, too
                    raise OwnerLeft("the owner of the memory is gone") from None
                what = f"the owner's userfaultfd does not watch its memory at {piece.address:#x}"
                raise HandshakeError(f"{what}: {error.strerror}") from None

    def _choose_placement(self, own: bool) -> str:
        if self.shares:
            return "share"
        if self._shared_fd is not None:
            return "continue" if self._map_shared(self._shared_fd) else "copy"
        return "move" if own and Feature.MOVE in self._uffd.features else "copy"

    def _map_shared(self, fd: int) -> bool:
        """Map the owner's file a second time, and watch its ranges for MINOR too. False: the kernel
        cannot watch them so."""
        if os.fstat(fd).st_size < self.region.size:
            raise HandshakeError(
                f"the owner's memory file is {os.fstat(fd).st_size:#x} bytes long, the region"
                f" {self.region.size:#x}"
            )
        try:
            for piece in self._pieces:
                self._uffd.register(piece.address, piece.size, Mode.MISSING | Mode.MINOR)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise HandshakeError(f"cannot watch the owner's memory: {error.strerror}") from None
        try:
            self._second = _native.Mapped(self.region.size, fd, alignment=self.region.max_page_size)
        except OSError as error:
            raise HandshakeError(f"cannot map the owner's memory file: {error.strerror}") from None
        return True

    @property
    def event_fd(self) -> int | None:
        return self._uffd.fd

    def open_residency(self, source: bytes) -> Residency:
        residency = self._make_residency(source)
        self._shared = residency.shared
        return residency

    def _make_residency(self, source: bytes) -> Residency:
        if self._map_fd is None:
            return Residency(self.region.pages)
        note = Note(source, self._second is not None, tuple(self._mappings), self._outside_is_zero)
        if self._recover is not None and (was := self._recover.source) != source:
            other = f"{source.hex()[:8]} instead of {was.hex()[:8]}"
            raise UsageError(
                "this source is not the one whose pages were coming, but another machine's, or was"
                f" changed since ({other}): if it holds the same bytes, serve it with --identity"
                f" {was.hex()}"
            )
        file, self._map_fd = self._map_fd, None  # the map closes it
        try:
            return Residency(
                self.region.pages,
                note=note.encode(),
                file=file,
                recover=self._recover is not None,
                published=False,
            )
        except OSError as error:
            raise HandshakeError(
                f"the owner's memfd for the map of its pages cannot be used: {error.strerror}"
            ) from None

    def scope(self) -> Sequence[Run]:
        return [piece.run for piece in self._pieces]

    def read_events(self) -> list[Event]:
        return self._uffd.read(self._shared)

    def page_of(self, fault: Fault) -> int | None:
        at = bisect_right(self._addresses, fault.address) - 1
        if at >= 0:
            piece = self._by_address[at]
            if fault.address - piece.address < piece.size:
                return piece.run.first + (fault.address - piece.address) // piece.page_size
        return None

    def pages_between(self, start: int, end: int) -> Sequence[Run]:
        runs = []
        for piece in self._by_address[max(0, bisect_right(self._addresses, start) - 1) :]:
            if piece.address >= end:
                break
            first = max(0, start - piece.address) // piece.page_size
            past = min(piece.run.count, -(-(end - piece.address) // piece.page_size))
            if first < past:
                runs.append(Run(piece.run.first + first, past - first))
        return runs

    def piece_of(self, page: int) -> Run:
        return self._pieces[bisect_right(self._firsts, page) - 1].run

    def place(self, run: Run, data: memoryview | None) -> Outcome:
        if self.write(run, data):
            return self.publish(run)
        if data is None:
            return self._place(run, _native.ZERO, self._zeros.buffer(0, self._zeros.size))
        return self._place(run, _HOW[self.placement], data)

    def write(self, run: Run, data: memoryview | None) -> bool:
        if self._second is not None:
            self._write_shared(run, data)
        return self._second is not None

    def publish(self, run: Run, *, again: bool = False) -> Outcome:
        return self._place(run, _native.CONTINUE, None, given_up=again)

    def settle(self, page: int | None, fault: Fault) -> bool:
        if page is None:
            error = self._uffd.answer_outside(fault, self._outside_is_zero)
            return not self._retry(error, fault.address)
        piece, _ = next(self._parts(Run(page, 1)))
        address = piece.address_of(page)
        settled = self._uffd.settle(
            fault, address, self._zeros.buffer(0, self._zeros.size), piece.page_size
        )
        return not self._retry(settled.error, address)

    def wake(self, run: Run) -> None:
        for piece, part in self._parts(run):
            self._uffd.wake(piece.address_of(part.first), part.count * piece.page_size)

    def discard(self, run: Run) -> None:
        if self._second is not None:
            self._write_shared(run, None)

    def allocate(self, offset: int, size: int) -> None:
        """Allocate a part of the shared memory: ``size`` bytes of the region from ``offset`` on.

        Call it in a thread, for one part after another up to the region's end, before the first
        page comes. Memory that is not shared is left alone: a page that exists would be taken for
        one that has come. Raises :exc:`OSError` if the system does not have that much memory.
        """
        if self._second is not None:
            assert self._shared_fd is not None
            self._in_place = _native.populate(self._second.address + offset, size)
            if not self._in_place:
                os.posix_fallocate(self._shared_fd, offset, size)

    def native(self, wire: Region) -> NativeMemory:
        """The target as lanes in C see it. Page numbers on the wire are those of ``wire``."""
        return NativeMemory(
            uffd=self._uffd.fd,
            how=_HOW[self.placement],
            file=-1 if self._shared_fd is None or self._in_place else self._shared_fd,
            sealed=self._sealed,
            outside_is_zero=self._outside_is_zero,
            removes=bool(self._uffd.features & (Feature.EVENT_REMOVE | Feature.EVENT_UNMAP)),
            pieces=[self._native_piece(piece, wire) for piece in self._pieces],
            shares=self.shares,
        )

    def _native_piece(self, piece: _Piece, wire: Region) -> _native.Piece:
        offset = self.region.offset_of_page(piece.run.first)
        shift = (piece.page_size // wire.page_size_at(wire.page_at_offset(offset))).bit_length() - 1
        return _native.Piece(
            first=piece.run.first,
            count=piece.run.count,
            page_size=piece.page_size,
            address=piece.address,
            second=0 if self._second is None else self._second.address + offset,
            file_offset=offset,
            wire_first=wire.page_at_offset(offset),
            shift=shift,
        )

    def _write_shared(self, run: Run, data: memoryview | None) -> None:
        assert self._second is not None
        size, offset = self.region.size_of(run), self.region.offset_of_page(run.first)
        content = bytes(size) if data is None else data
        if self._sealed:
            self._second.buffer(offset, size)[:] = content
            return
        try:
            _native.store(self._second.address + offset, content)
        except OSError as error:
            if error.errno == errno.EFAULT:
                raise HandshakeError(_NOT_THERE) from None
            raise PagenetError(
                f"cannot write to the owner's memory file: {error.strerror}"
            ) from None

    def _place(
        self, run: Run, how: int, data: memoryview | None, *, given_up: bool = False
    ) -> Outcome:
        """Place ``run``, piece by piece, up to the first error. ``given_up``: the owner may have
        given pages up, so that the file does not have them any more."""
        placed = existed = absent = 0
        again = False
        for piece, part in self._parts(run):
            size, page_size = part.count * piece.page_size, piece.page_size
            skip = (part.first - run.first) * page_size
            source = data[skip : skip + size] if data is not None and how != _native.ZERO else data
            address = piece.address_of(part.first)
            result = self._uffd.place(how, address, source, size, page_size)
            placed += result.placed // page_size
            existed += result.existed // page_size
            absent += result.absent // page_size
            if given_up and result.error == errno.EFAULT:
                absent += 1
                break
            again = self._retry(result.error, address + result.done)
            if again:
                break
        return Outcome(placed, existed, absent, again)

    def _parts(self, run: Run) -> Iterator[tuple[_Piece, Run]]:
        first = run.first
        at = bisect_right(self._firsts, first) - 1
        while first < run.end:
            piece = self._pieces[at] if 0 <= at < len(self._pieces) else None
            if piece is None or not piece.run.first <= first < piece.run.end:
                what = f"page {first} is in no mapping"
                raise HandshakeError(f"the owner has written to the map of its pages: {what}")
            end = min(run.end, piece.run.end)
            yield piece, Run(first, end - first)
            first, at = end, at + 1

    def _retry(self, error: int, address: int) -> bool:
        match error:
            case 0:
                return False
            case errno.EAGAIN:
                return True
            case errno.ESRCH:
                raise OwnerGone("the owner of the memory is gone")
            case errno.EFAULT if self._second is not None:
                raise HandshakeError(_NOT_THERE)
        raise PagenetError(
            f"cannot place a page at {address:#x} of the owner: {os.strerror(error)}"
        )

    async def wait_gone(self) -> None:
        await self._wait_gone()

    def is_alive(self) -> bool:
        return _native.uffd_probe(self._uffd.fd, self._pieces[0].address) != errno.ESRCH

    # ---- when the source is lost ----

    def check_loss(self, on_loss: OnLoss) -> None:
        if on_loss == "poison" and not self._can_poison:
            raise Unsupported(NO_POISON)
        if on_loss == "kill":
            if self._process is None:
                raise Unsupported("the memory is this process's own, which does not kill itself")
            self._process.check_kill(self._pieces[0].address)

    def poison(self, run: Run) -> Outcome:
        piece, part = next(self._parts(run))
        address, size = piece.address_of(part.first), piece.page_size
        result = self._uffd.place(_native.POISON, address, None, part.count * size, size)
        placed, existed, absent = result.placed, result.existed, result.absent
        if result.error == errno.ESRCH:
            raise OwnerGone("the owner of the memory is gone")
        again = result.error == errno.EAGAIN
        if result.error and not again:
            existed += size  # EFAULT: part of a huge page that is there
        return Outcome(placed // size, existed // size, absent // size, again)

    def kill(self) -> int | None:
        assert self._process is not None, "check_loss() was not called"
        # after execve() the process is there, and the memory is not
        return self._process.pid if self.is_alive() and self._process.kill() else None

    def close(self, missing: Sequence[Run]) -> None:
        """Release everything.

        If no page is missing, stop watching, so that the owner never again waits for us. Otherwise
        keep the ranges watched; an owner that has no descriptor of its own would read zeros from
        then on, so its missing pages are poisoned and raise SIGBUS.
        """
        if self._uffd.fd < 0:
            return
        if self.shares:  # nobody keeps the pages of the cache any more
            missing = self.scope()
        if not missing:
            self._unregister()
        elif not self._keeps_uffd() and self._can_poison:
            self._poison_all(missing)
        self._uffd.close()
        for mapped in (self._second, self._zeros):
            if mapped is not None:
                mapped.close()
        for fd in (self._shared_fd, self._map_fd):
            if fd is not None:
                os.close(fd)
        self._on_close()

    def _poison_all(self, missing: Sequence[Run]) -> None:
        deadline = time.monotonic() + POISON_PATIENCE
        with suppress(OwnerGone):
            for run in missing:
                while run.count and time.monotonic() < deadline:
                    outcome = self.poison(run)
                    run = Run(run.first + outcome.done, run.count - outcome.done)
                    if outcome.done:
                        deadline = time.monotonic() + POISON_PATIENCE
                    if outcome.again:
                        self._uffd.read()
                        os.sched_yield()

    def _unregister(self) -> None:
        for piece in self._pieces:
            # it was unmapped meanwhile, or the owner is gone: nothing is watched there
            with suppress(OSError):
                self._uffd.unregister(piece.address, piece.size)
        # An owner that is giving up memory just now waits until its event is read, even if the
        # memory is not watched any more.
        while _native.uffd_probe(self._uffd.fd, self._pieces[0].address) == errno.EAGAIN:
            self._uffd.read()
            os.sched_yield()
