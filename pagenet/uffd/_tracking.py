"""Which pages of a process's memory were written since last asked. The process is not stopped, but
for a moment at the beginning, and knows nothing of it.

The kernel protects each page against writing, and takes the protection off by itself at the first
write, which costs that write one page fault. Nothing of it waits for this process: if this process
is killed, the kernel closes its userfaultfd, and with that takes all protection off. The process's
faults wait for that, tens of ms for each GiB; :meth:`WriteTracker.close` does it in pieces.

What is written otherwise than through the process's own mappings is not seen:

- other processes, or other mappings, of the same memory (vhost-user); ``write`` to the file behind
  it, or holes that are punched into it;
- devices, and reads with O_DIRECT, that write to pages that they were given before.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import cache
from itertools import chain
from typing import Self

from .. import _native
from ..errors import HandshakeError, OwnerGone, PagenetError, Unsupported, UsageError
from ..region import Region, Run
from ._handshake import Mapping, check_mappings, mapping_pieces
from ._process import Mapped, OtherProcess, refusal
from ._userfaultfd import Feature, Userfaultfd, is_userfaultfd

__all__ = ["WriteTracker"]

_FEATURES = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM
_TOO_OLD = "this kernel cannot say which pages were written: Linux 6.7 or newer can"

# A process whose memory has gone may be about to end.
_ENDING_SECONDS = 0.5

# device, inode, whether it is shared, and the address that byte 0 of the file would have
_Backing = tuple[int, int, bool, int]


def _names_empty(page_size: int) -> bool:
    """Whether the kernel names a page of this size as written if its entry is empty. It does on
    Linux 6.7 to 6.18, and says so nowhere."""
    return page_size == mmap.PAGESIZE and _try_names_empty()


@cache
def _try_names_empty() -> bool:
    """Discard a page that was written, and look."""
    with mmap.mmap(-1, mmap.PAGESIZE) as memory, ExitStack() as stack:
        try:
            uffd = Userfaultfd.open(_FEATURES, user_mode_only=True)
            stack.callback(uffd.close)
            pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, pagemap)
            address = _native.buffer_address(memory)
            track = _native.Track(uffd.fd, pagemap, address, len(memory), len(memory), 0, False)
            track.arm()
            memory[0] = 1
            memory.madvise(mmap.MADV_DONTNEED)
            return track.names_any_written()
        except (OSError, Unsupported):
            return False


class WriteTracker:
    """Tracks writes to ``mappings`` of process ``pid``, which are ``region``, from now until
    :meth:`close`. ``pid`` may be that of this process.

    A caller that reads each page after it was named, and once more after the last call, when the
    memory is at rest, has the last version of every page. The kernel names a page first, then
    protects it, and then the call returns. So a write to it came before the call returned, and is
    in the bytes that are read then; or it came after, and the next call names the page again. Pages
    may be named that nobody has written to.

    Raises :exc:`UsageError` if that memory is not mapped there, or another userfaultfd watches it,
    :exc:`Unsupported` if the kernel is too old (before 6.7) or this user may not do it, and
    :exc:`OwnerGone` if the process has ended. All methods take a few ms for each GiB: call them in
    a thread, one at a time.
    """

    def __init__(self, pid: int, mappings: Sequence[Mapping], region: Region) -> None:
        self._pid = pid
        self._mappings = tuple(mappings)
        self._pagemap = -1
        self._uffd: Userfaultfd | None = None
        self._tracks: list[_native.Track] = []
        try:
            #: the region, in the page sizes of the memory
            self.region = check_mappings(self._mappings, region)
            pieces = (mapping_pieces(mapping, self.region) for mapping in self._mappings)
            self._pieces = list(chain.from_iterable(pieces))
        except HandshakeError as error:
            raise UsageError(f"cannot track the memory of process {pid}: {error}") from None
        self._process = self._open_process()
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _open_process(self) -> OtherProcess:
        try:
            return OtherProcess(self._pid)
        except OSError as error:
            raise refusal(self._pid, error) from None

    def _refusal(self, error: OSError) -> PagenetError:
        # the kernel says EPERM of a process that has ended and is not waited for yet
        return _ended(self._pid) if self._process.has_ended else refusal(self._pid, error)

    def _begin(self) -> None:
        try:
            self._pagemap = os.open(f"/proc/{self._pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._check_kernel()
            self._backing = self._look()  # the pagemap is that process's if it still runs after it
            uffd = self._uffd = self._open_userfaultfd()
        except OSError as error:
            raise self._refusal(error) from None
        for run, address in self._pieces:
            size, page_size = self.region.size_of(run), self.region.page_size_at(run.first)
            track = _native.Track(
                uffd.fd, self._pagemap, address, size, page_size, run.first, _names_empty(page_size)
            )
            self._arm(track, address)
        self._check_kept()

    def _check_kernel(self) -> None:
        try:
            _native.track_probe(self._pagemap)
        except OSError:
            raise Unsupported(_TOO_OLD) from None

    def _open_userfaultfd(self) -> Userfaultfd:
        if self._pid == os.getpid():
            return Userfaultfd.open(_FEATURES, user_mode_only=True)
        closed = f"process {self._pid} has closed the userfaultfd that it was given"
        try:
            fd, refused = _native.borrow(self._pid, self._process.pidfd)
        except OSError as error:
            raise UsageError(closed) if error.errno == errno.EBADF else error from None
        if refused:
            why = os.strerror(refused)
            raise Unsupported(f"process {self._pid} cannot have a userfaultfd: {why}")
        # another thread of the process may have put another file under that number
        if not is_userfaultfd(fd):
            os.close(fd)
            raise UsageError(closed)
        return _switched_on(fd)

    def _arm(self, track: _native.Track, address: int) -> None:
        self._tracks.append(track)
        try:
            track.arm()
        except OSError as error:
            what = f"the memory of process {self._pid} at {address:#x}"
            if error.errno == errno.EBUSY:
                raise UsageError(
                    f"cannot track {what}: another userfaultfd watches it already"
                ) from None
            if error.errno == errno.ESRCH:
                raise self._refusal(error) from None
            raise UsageError(f"cannot track {what}: {error.strerror}") from None

    # ---- what is mapped there ----

    def _look(self) -> list[_Backing]:
        """What is behind each mapping."""
        low = min(mapping.address for mapping in self._mappings)
        high = max(mapping.address + mapping.size for mapping in self._mappings)
        parts = self._process.maps(low, high)
        return [self._backing_of(mapping, parts) for mapping in self._mappings]

    def _backing_of(self, mapping: Mapping, parts: Sequence[Mapped]) -> _Backing:
        end, found = mapping.address, set[_Backing]()
        for part in parts:
            if part.start <= end < part.end and end < mapping.address + mapping.size:
                end = part.end
                found.add(_backing(part))
        if end < mapping.address + mapping.size or len(found) != 1:
            raise UsageError(
                f"process {self._pid} has no memory of {mapping.size:#x} bytes, all of one kind, at"
                f" {mapping.address:#x}"
            )
        return found.pop()

    def _check_kept(self) -> None:
        """Check that the process and its memory are still there: what has been unmapped is not
        scanned, and the kernel does not say so."""
        uffd = self._uffd
        assert uffd is not None
        below = min(mapping.address for mapping in self._mappings) - 4096
        try:
            kept = self._look() == self._backing
        except UsageError:
            kept = False
        except OSError as error:
            raise self._refusal(error) from None
        if _native.uffd_probe(uffd.fd, below) == errno.ESRCH:
            raise _ended(self._pid)
        if not kept:
            raise self._changed()
        for track in self._tracks:
            try:
                track.check()
            except OSError:
                raise self._changed() from None

    def _changed(self) -> PagenetError:
        # QEMU unmaps its guest's memory when it ends.
        if select.select([self._process.pidfd], [], [], _ENDING_SECONDS)[0]:
            return _ended(self._pid)
        return UsageError(
            f"process {self._pid} has changed what it maps in the memory that is tracked: what it"
            " has written there is not known"
        )

    # ---- what was written ----

    def written(self) -> list[Run]:
        """The pages that were written since the last call, or since the tracker was made: runs,
        ascending and apart, none of which crosses a block.

        Raises :exc:`OwnerGone` if the process has ended, and :exc:`UsageError` if it has mapped
        something else there: then what it has written is not known.
        """
        found = list[Run]()
        try:
            for track in self._tracks:
                found += _joined(track.scan())
        except OSError as error:
            raise self._failed(error) from None
        self._check_kept()
        return sorted(found, key=lambda run: run.first)

    def mark(self, bits: bytearray) -> None:
        """Set the bit of each page that :meth:`written` would name; the lowest bit of the first
        byte is page 0. Whether they are all is for :meth:`check` to say. Errors as of
        :meth:`written`; :exc:`ValueError` if there are fewer bits than pages.
        """
        if 8 * len(bits) < self.region.pages:
            raise ValueError(f"{len(bits)} bytes have no bits for {self.region.pages} pages")
        try:
            for track in self._tracks:
                track.mark(bits)
        except OSError as error:
            raise self._failed(error) from None

    def check(self) -> None:
        """Check that all that was written has been named until now. Errors as of
        :meth:`written`, which does this, too."""
        self._check_kept()

    def _failed(self, error: OSError) -> PagenetError:
        if error.errno in (errno.EPERM, errno.ENOENT):
            return self._changed()
        if error.errno == errno.ESRCH or self._process.has_ended:
            return _ended(self._pid)
        return PagenetError(f"cannot track the memory of process {self._pid}: {error.strerror}")

    def close(self) -> None:
        """Take the protection off. Idempotent."""
        while self._tracks:
            with suppress(OSError):  # its memory, or the process, is gone
                self._tracks.pop().disarm()
        if self._uffd is not None:
            self._uffd.close()
        if self._pagemap >= 0:
            os.close(self._pagemap)
            self._pagemap = -1
        self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ended(pid: int) -> OwnerGone:
    return OwnerGone(f"process {pid} has ended, or runs another program")


def _switched_on(fd: int) -> Userfaultfd:
    """The userfaultfd ``fd``, which is closed if the kernel lacks what tracking needs."""
    try:
        _native.uffd_api(fd, _FEATURES)
    except OSError as error:
        os.close(fd)
        raise Unsupported(
            f"this kernel's userfaultfd cannot track writes (WP_ASYNC): {error.strerror}"
        ) from None
    return Userfaultfd(fd, _FEATURES)


def _backing(part: Mapped) -> _Backing:
    at = part.start - part.offset if part.inode else 0
    return part.device, part.inode, part.mode.endswith("s"), at


def _joined(numbers: Sequence[int]) -> list[Run]:
    """Runs from ``numbers``, which are first pages and counts of runs: ascending, without those
    that touch or overlap."""
    joined = list[Run]()
    for first, count in sorted(zip(numbers[::2], numbers[1::2], strict=True)):
        if joined and first <= joined[-1].end:
            before = joined.pop()
            first, count = before.first, max(before.end, first + count) - before.first
        joined.append(Run(first, count))
    return joined
