"""Userfaultfds: opening, registering, events, and placing pages; and taking descriptors of other
processes."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from ._declarations import pn_event, pn_placed, pn_planted
from ._library import NULL, check, ffi, lib, new_array, new_struct
from .memory import Buffer
from .residency import SharedMap

COPY, ZERO, CONTINUE, MOVE, POISON = (
    lib.PN_COPY,
    lib.PN_ZERO,
    lib.PN_CONTINUE,
    lib.PN_MOVE,
    lib.PN_POISON,
)


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
    return check(lib.pn_uffd_open(device.encode(), user_mode_only))


def uffd_api(uffd: int, wanted: int) -> int:
    features = ffi.new("uint64_t *")
    check(lib.pn_uffd_api(uffd, wanted, features))
    return int(features[0])


def uffd_register(uffd: int, start: int, length: int, mode: int) -> int:
    ioctls = ffi.new("uint64_t *")
    check(lib.pn_uffd_register(uffd, start, length, mode, ioctls))
    return int(ioctls[0])


def uffd_unregister(uffd: int, start: int, length: int) -> None:
    check(lib.pn_uffd_unregister(uffd, start, length))


def uffd_wake(uffd: int, start: int, length: int) -> None:
    check(lib.pn_uffd_wake(uffd, start, length))


def uffd_read(uffd: int, shared: SharedMap | None = None) -> list[NativeEvent]:
    """The events that are queued, at most 64; :exc:`BlockingIOError` if there are none. They stay
    in ``shared`` too, until the next ones are read."""
    events = new_array(pn_event, lib.PN_EVENTS)
    to = NULL if shared is None else shared.map
    count = check(lib.pn_uffd_read(uffd, to, events, lib.PN_EVENTS))
    return [
        NativeEvent(e.kind, e.start, e.end, e.length, e.flags, e.thread, e.fd)
        for e in events[0:count]
    ]


def uffd_probe(uffd: int, address: int) -> int:
    """0 or an errno: ``EAGAIN`` while the owner's memory is changing, ``ESRCH`` if it is gone."""
    return -lib.pn_uffd_probe(uffd, address)


@dataclass(frozen=True, slots=True)
class Planted:
    """Descriptors in another process, by number. ``refused``: an errno, if the kernel refused them
    to that process."""

    uffd: int
    map: int
    refused: int


def plant(pid: int, pidfd: int, device: str) -> Planted:
    """Have process ``pid``, which is the one behind ``pidfd``, open a userfaultfd, and a memfd for
    the map of pages. Call it in a thread.

    Raises :exc:`OSError`, as ``pn_plant`` describes, if the process cannot be traced; it is then
    unchanged.
    """
    planted = new_struct(pn_planted)
    check(lib.pn_plant(pid, pidfd, device.encode(), planted))
    return Planted(planted.uffd, planted.map, -planted.refused)


def uproot(pid: int, pidfd: int, planted: Planted) -> None:
    """Have the process close these descriptors again. Call it in a thread."""
    check(lib.pn_uproot(pid, pidfd, new_struct(pn_planted, astuple(planted))))


def take_descriptor(pidfd: int, theirs: int) -> int:
    """A duplicate of descriptor ``theirs`` of the process behind ``pidfd``. Needs ptrace access to
    that process."""
    return check(lib.pn_take_descriptor(pidfd, theirs))


def same_file(ours: int, pid: int, theirs: int) -> bool:
    return bool(check(lib.pn_same_file(ours, pid, theirs)))


@dataclass(frozen=True, slots=True)
class Placed:
    """Bytes that were handled, from the beginning on: placed by us, found there already
    (``existed``), without a mapping (``absent``). ``error``: an errno, or 0."""

    placed: int
    existed: int
    absent: int
    error: int

    @property
    def done(self) -> int:
        return self.placed + self.existed + self.absent


def place(
    uffd: int, how: int, address: int, data: Buffer | None, length: int, page_size: int
) -> Placed:
    source = NULL if data is None else ffi.from_buffer(data)
    return _placed(lib.pn_place(uffd, how, address, source, length, page_size))


def settle(uffd: int, address: int, minor: bool, zeros: Buffer, page_size: int) -> Placed:
    return _placed(lib.pn_settle(uffd, address, minor, ffi.from_buffer(zeros), page_size))


def answer_outside(uffd: int, address: int, flags: int, zero: bool) -> int:
    """0 or an errno: ``EAGAIN`` or ``ESRCH``, as of :func:`place`."""
    return -lib.pn_answer_outside(uffd, address, flags, zero)


def _placed(result: pn_placed) -> Placed:
    return Placed(result.placed, result.existed, result.absent, -result.error)
