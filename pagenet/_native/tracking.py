"""Which pages were written since last asked (native/track.c)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from ._declarations import pn_run, pn_track
from ._library import check, ffi, lib, new_array, new_struct

# Runs that one call returns at most.
_ROOM = 4096
_PASSES = (lib.PN_TRACK_WRITTEN, lib.PN_TRACK_GONE)


def borrow(pid: int, pidfd: int) -> tuple[int, int]:
    """A userfaultfd for the memory of process ``pid``, which is the one behind ``pidfd``, and 0; or
    -1, and the errno with which the kernel refuses that process one. That process keeps nothing.
    Call it in a thread.

    Raises :exc:`OSError`, as ``pn_plant`` describes, if the process cannot be traced.
    """
    refused = ffi.new("int *")
    fd = check(lib.pn_borrow(pid, pidfd, refused))
    return (-1 if refused[0] else fd), -int(refused[0])


def track_probe(pagemap: int) -> None:
    """:exc:`OSError` (ENOTTY) if this kernel cannot say which pages were written."""
    check(lib.pn_track_probe(pagemap))


class Track:
    """``struct pn_track``, and room for the runs of one call. The descriptors stay the caller's.

    All methods may raise :exc:`OSError`, and take a few ms for each GiB: call them in a thread, one
    at a time.
    """

    def __init__(
        self,
        uffd: int,
        pagemap: int,
        address: int,
        size: int,
        page_size: int,
        first: int,
        names_empty: bool,
    ) -> None:
        values = (uffd, pagemap, address, size, page_size, first, names_empty)
        self._track = new_struct(pn_track, values)
        self._runs = new_array(pn_run, _ROOM)
        self._at = ffi.new("uint64_t *")

    def arm(self) -> None:
        check(lib.pn_track_arm(self._track))

    def disarm(self) -> None:
        check(lib.pn_track_disarm(self._track))

    def check(self) -> None:
        """EPERM if something else is mapped there by now."""
        check(lib.pn_track_check(self._track))

    def _counts(self) -> Iterator[int]:
        """How many runs are in ``_runs``, again and again until all were named."""
        for what in _PASSES:
            yield from self._pass_counts(what)

    def _pass_counts(self, what: int) -> Iterator[int]:
        self._at[0] = 0
        while self._at[0] < self._track.size:
            yield check(lib.pn_track_scan(self._track, what, self._at, self._runs, _ROOM))

    def names_any_written(self) -> bool:
        """Whether the pass for written pages names any."""
        return any(self._pass_counts(lib.PN_TRACK_WRITTEN))

    def scan(self) -> array[int]:
        """First page and number of pages of each run; both passes ascend."""
        found = array("Q")
        for count in self._counts():
            found.frombytes(ffi.buffer(self._runs)[: 16 * count])
        return found

    def mark(self, bits: bytearray) -> None:
        """Set the bit of each page that :meth:`scan` would name."""
        into = ffi.from_buffer("uint8_t[]", bits)
        for count in self._counts():
            lib.pn_track_mark(into, self._runs, count)
