"""userfaultfd(2), typed."""

from __future__ import annotations

import errno
import os
import re
from enum import IntFlag
from pathlib import Path

from .. import _native
from ..errors import HandshakeError, Unsupported
from ..target import Event, Fault, Forked, Remapped, Removed, Unmapped

__all__ = ["NO_POISON", "Feature", "Mode", "Userfaultfd", "check_poison", "probe"]

DEVICE = "/dev/userfaultfd"


class Feature(IntFlag):
    """UFFD_FEATURE_*, as linux/userfaultfd.h numbers them."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


NO_FEATURES = Feature(0)


class Mode(IntFlag):
    """UFFDIO_REGISTER_MODE_*."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


_FLAG_WRITE, _FLAG_WP, _FLAG_MINOR = 1, 2, 4
_UFFDIO_POISON = 0x08
NO_POISON = "this kernel cannot poison pages: that takes Linux 6.6"


class Userfaultfd:
    """One userfaultfd: opened here, or received from the process that owns the memory.

    Owns its descriptor. ``features`` are those that were switched on for it.
    """

    def __init__(self, fd: int, features: Feature) -> None:
        self.fd = fd
        self.features = features

    @classmethod
    def open(cls, wanted: Feature = NO_FEATURES, *, user_mode_only: bool = False) -> Userfaultfd:
        """A new userfaultfd, for memory of this process.

        Raises :exc:`Unsupported` where the kernel lacks userfaultfd or one of the features, or does
        not permit it to this user.
        """
        fd = _open(user_mode_only)
        try:
            return cls(fd, Feature(_native.uffd_api(fd, wanted)) & wanted)
        except OSError as error:
            os.close(fd)
            raise Unsupported(_missing_features(wanted, error)) from None

    @classmethod
    def received(cls, fd: int) -> Userfaultfd:
        """A userfaultfd that came from another process. Takes over the descriptor.

        Raises :exc:`ValueError` if ``fd`` is something else; it stays the caller's then.
        """
        if not is_userfaultfd(fd):
            raise ValueError("the file descriptor is not a userfaultfd")
        os.set_blocking(fd, False)  # poll() of a blocking one returns POLLERR for ever
        return cls(fd, _enabled_features(fd))

    def close(self) -> None:
        """Idempotent. Closing the last descriptor unregisters: from then on missing pages silently
        read as zeros."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def register(self, start: int, length: int, mode: Mode) -> bool:
        """Watch [start, start + length). Returns whether pages of it can be poisoned.
        :exc:`OSError` if that memory cannot be watched in ``mode``."""
        ioctls = _native.uffd_register(self.fd, start, length, mode)
        return bool(ioctls >> _UFFDIO_POISON & 1)

    def unregister(self, start: int, length: int) -> None:
        """Stop watching [start, start + length): threads that wait there go on, and missing pages
        read as zeros."""
        _native.uffd_unregister(self.fd, start, length)

    def wake(self, start: int, length: int) -> None:
        """Let the threads that wait in [start, start + length) try again."""
        _native.uffd_wake(self.fd, start, length)

    def read(self, shared: _native.SharedMap | None = None) -> list[Event]:
        """The events that are queued; empty if there are none. ``shared`` keeps them for whoever
        goes on if this process is killed before it has acted on them. :exc:`HandshakeError` if the
        owner has made it blocking: poll reports an error of such a one, for ever."""
        try:
            return [_typed(event) for event in _native.uffd_read(self.fd, shared)]
        except BlockingIOError:
            if os.get_blocking(self.fd):
                raise HandshakeError("the owner has made its userfaultfd blocking") from None
            return []

    def place(
        self, how: int, address: int, data: _native.Buffer | None, length: int, page_size: int
    ) -> _native.Placed:
        """Fill [address, address + length) and wake the threads that wait there. The rules are in
        ``native/place.c``.

        ``error`` of the result: ``EAGAIN`` means that events must be read first, ``ESRCH`` that the
        owner is gone.
        """
        return _native.place(self.fd, how, address, data, length, page_size)

    def settle(
        self, fault: Fault, address: int, zeros: _native.Buffer, page_size: int
    ) -> _native.Placed:
        """Answer ``fault`` on the page at ``address``, which was placed or given up before.
        ``error`` is as in :meth:`place`."""
        return _native.settle(self.fd, address, fault.minor, zeros, page_size)

    def answer_outside(self, fault: Fault, zero: bool) -> int:
        """Poison the page that ``fault`` waits for, or fill it with zeros if ``zero``, whatever the
        page size is there. Returns an errno as in :meth:`place`, or 0."""
        flags = _FLAG_WP * fault.protected | _FLAG_MINOR * fault.minor
        return _native.answer_outside(self.fd, fault.address, flags, zero)


def is_userfaultfd(fd: int) -> bool:
    """Whether it is a userfaultfd, by its name: no file can have that name, because the names of
    files begin with a slash."""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"


def _typed(event: _native.NativeEvent) -> Event:
    match event.kind:
        case 0x12:
            write, protected, minor = (
                bool(event.flags & flag) for flag in (_FLAG_WRITE, _FLAG_WP, _FLAG_MINOR)
            )
            return Fault(event.start, write, minor, event.thread, protected)
        case 0x13:
            return Forked(event.fd)
        case 0x14:
            return Remapped(event.start, event.end, event.length)
        case 0x15:
            return Removed(event.start, event.end)
        case 0x16:
            return Unmapped(event.start, event.end)
    raise Unsupported(f"userfaultfd event {event.kind:#x} is unknown to this pagenet")


def _open(user_mode_only: bool) -> int:
    try:
        return _native.uffd_open(DEVICE, user_mode_only)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise Unsupported(
                f"userfaultfd is not permitted to this user: make {DEVICE} readable and writable"
                f" for it (setfacl -m u:{os.getuid()}:rw {DEVICE}, of Debian's package acl), or set"
                " sysctl vm.unprivileged_userfaultfd=1, or give CAP_SYS_PTRACE"
            ) from None
        if error.errno == errno.ENOSYS:
            raise Unsupported("this kernel is built without CONFIG_USERFAULTFD") from None
        raise


def probe() -> Feature:
    """All features that this kernel has. :exc:`Unsupported` if this process can have no
    userfaultfd."""
    fd = _open(user_mode_only=False)
    try:
        return Feature(_native.uffd_api(fd, 0))
    finally:
        os.close(fd)


def check_poison() -> None:
    """:exc:`Unsupported` if this kernel cannot poison pages. If this process may have no
    userfaultfd it cannot ask: what the owner hands over tells."""
    try:
        features = probe()
    except Unsupported:
        return
    if Feature.POISON not in features:
        raise Unsupported(NO_POISON)


def _missing_features(wanted: Feature, error: OSError) -> str:
    missing = wanted & ~probe()
    names = ", ".join(str(feature.name) for feature in Feature if feature & missing)
    return f"this kernel's userfaultfd lacks {names}" if names else f"userfaultfd: {error.strerror}"


def _enabled_features(fd: int) -> Feature:
    # "API:	aa:<enabled>:<ioctls>", in hexadecimal. No ioctl tells the features after UFFDIO_API.
    match = re.search(
        r"^API:\s*[0-9a-f]+:([0-9a-f]+):", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE
    )
    return Feature(int(match[1], 16) & 0x7FFFFFFF) if match else Feature(0)
