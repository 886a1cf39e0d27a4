"""What is taken out of another process, which may be hostile: descriptors, checked against what the
process has mapped.

A descriptor is duplicated by way of the process's pidfd, and so keeps the mode in which it was
opened. It is never opened anew by its name in /proc/PID/fd: that checks *our* rights, and root may
write to any file that another process holds open for reading. The pid of a process that has ended
may be given to another one. So the pidfd is opened first, and what /proc tells about a pid counts
only if the process is still there afterwards.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .. import _native
from ..errors import OwnerGone, PagenetError, Unsupported
from ._handshake import Mapping

__all__ = [
    "Mapped",
    "MappedPages",
    "OtherProcess",
    "is_memory_file",
    "is_watched",
    "is_writable",
    "refusal",
]

_WHY_NOT = {
    errno.EBUSY: "it is stopped (by Ctrl-Z, or SIGSTOP): let it go on first",
    errno.ENOEXEC: "it is no 64-bit process",
    errno.ETIMEDOUT: "it does not stop for us: it hangs in the kernel",
    errno.ENOSYS: "attaching is for x86-64: start QEMU by pagenet-qemu incoming instead",
}


@dataclass(frozen=True, slots=True)
class Mapped:
    """A line of /proc/PID/maps.

    Bytes [start, end) of a process, with the access ``mode``, are the bytes from ``offset`` on of
    the file with the given ``device`` and ``inode`` numbers.
    """

    start: int
    end: int
    mode: str
    offset: int
    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class MappedPages:
    """A mapping as /proc/PID/smaps has it. ``page_size``: that of the kernel there, in bytes."""

    start: int
    end: int
    mode: str
    name: str
    page_size: int


# Of VmFlags: userfaultfd watches for missing pages, for minor faults.
_WATCHED = {"um", "ui"}
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)")


class OtherProcess:
    """The process ``pid``. Each method raises :exc:`OSError` if it has ended or this user may not
    look into it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = -1
        self.pidfd = os.pidfd_open(pid)

    def descriptors(self) -> list[tuple[int, str]]:
        """Numbers and names of its descriptors. A name proves nothing."""
        found = []
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                found.append((int(name), os.readlink(f"/proc/{self.pid}/fd/{name}")))
        self._check_alive()
        return found

    def take(self, number: int) -> int:
        """A duplicate of its descriptor ``number``, with the mode in which it was opened."""
        return _native.take_descriptor(self.pidfd, number)

    def maps(self, low: int = 0, high: int = 1 << 64) -> list[Mapped]:
        """Its mappings between the addresses ``low`` and ``high``, ascending."""
        found = []
        for line in Path(f"/proc/{self.pid}/maps").read_text(errors="surrogateescape").splitlines():
            start, end = (int(number, 16) for number in line[: line.index(" ")].split("-"))
            if end <= low or start >= high:
                continue
            _, mode, offset, device, inode, *_ = line.split()
            major, minor = (int(number, 16) for number in device.split(":"))
            found.append(
                Mapped(start, end, mode, int(offset, 16), os.makedev(major, minor), int(inode))
            )
        self._check_alive()
        return found

    def mapped_pages(self) -> list[MappedPages]:
        """Its mappings with their page sizes, ascending. Takes longer than :meth:`maps`: the kernel
        looks at each page."""
        text = Path(f"/proc/{self.pid}/smaps").read_text(errors="surrogateescape")
        self._check_alive()
        found, head = list[MappedPages](), None
        for line in text.splitlines():
            if match := _HEAD.fullmatch(line):
                head = match
            elif head and line.startswith("KernelPageSize:"):
                start, end = int(head[1], 16), int(head[2], 16)
                page_size = int(line.split()[1]) << 10
                found.append(MappedPages(start, end, head[3], head[4], page_size))
        return found

    def file_at(self, mappings: Sequence[Mapping]) -> tuple[int, int] | None:
        """Device and inode of the one file that is mapped at ``mappings``.

        It must be mapped shared and writable, with each byte of the region at its own offset in the
        file. Parts may be unmapped. None: the process has mapped something else there.
        """
        maps, found = self.maps(), set[tuple[int, int]]()
        for mapping in mappings:
            for part in maps:
                if part.end <= mapping.address or part.start >= mapping.address + mapping.size:
                    continue
                if (
                    not re.fullmatch("rw.s", part.mode)
                    or part.offset - part.start != mapping.offset - mapping.address
                ):
                    return None
                found.add((part.device, part.inode))
        return found.pop() if len(found) == 1 else None

    def take_file(self, mappings: Sequence[Mapping]) -> int | None:
        """A duplicate of the process's descriptor of the file behind ``mappings``, open for reading
        and writing.

        The file may have no name any more, or a name that means another file here. None: the
        process holds none.
        """
        wanted = self.file_at(mappings)
        for number, link in self.descriptors() if wanted else ():
            if not link.startswith("/") or not self._may_be(number, wanted):
                continue
            with suppress(FileNotFoundError):
                fd = self._take_open(number)
                if is_writable(fd) and _identity(fd) == wanted:
                    return fd
                os.close(fd)
        return None

    def _take_open(self, number: int) -> int:
        try:
            return self.take(number)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise FileNotFoundError from None  # closed meanwhile
            raise

    def _may_be(self, number: int, wanted: tuple[int, int] | None) -> bool:
        """Whether descriptor ``number`` may be the file with device and inode ``wanted``.

        Asks /proc: a call on the file itself may wait for the server of its file system, which may
        be any process.
        """
        with suppress(FileNotFoundError):
            found = re.search(
                r"^ino:\s*(\d+)$",
                Path(f"/proc/{self.pid}/fdinfo/{number}").read_text(),
                re.MULTILINE,
            )
            # found is None before Linux 5.14
            return wanted is not None and (found is None or int(found[1]) == wanted[1])
        return False

    @property
    def has_ended(self) -> bool:
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def _check_alive(self) -> None:
        if self.has_ended:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    @property
    def name(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/comm").read_text(errors="replace").strip()
        except OSError:
            return "it has ended"

    def close(self) -> None:
        """Idempotent."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def refusal(pid: int, error: OSError) -> PagenetError:
    """What ``error`` means for one who wants to attach to process ``pid``."""
    if error.errno in (errno.ESRCH, errno.ENOENT):
        return OwnerGone(f"process {pid} has ended")
    if error.errno in _WHY_NOT:
        return Unsupported(f"cannot attach to process {pid}: {_WHY_NOT[error.errno]}")
    hint = (
        "run as root, or as its user with ptrace access (kernel.yama.ptrace_scope=0), and with"
        " no debugger on it"
    )
    return Unsupported(f"may not attach to process {pid}: {error.strerror}; {hint}")


def is_watched(pid: int, address: int) -> bool:
    """Whether a userfaultfd watches the memory of process ``pid`` at ``address``. :exc:`OSError` as
    of :class:`OtherProcess`.

    Of the process that has handed over a userfaultfd, or of another one: a descriptor does not tell
    whose memory it is about.
    """
    is_there = False
    with open(f"/proc/{pid}/smaps", errors="surrogateescape") as lines:
        for line in lines:  # no further than needed: the kernel looks at every page of a mapping
            if match := _HEAD.fullmatch(line.rstrip("\n")):
                is_there = int(match[1], 16) <= address < int(match[2], 16)
            elif is_there and line.startswith("VmFlags:"):
                return not _WATCHED.isdisjoint(line.split())
    return False


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def is_writable(fd: int) -> bool:
    """Whether the descriptor was opened for reading and writing."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH) == os.O_RDWR


def is_memory_file(fd: int) -> bool:
    """Whether it is a memfd, or a file of tmpfs or hugetlbfs: userfaultfd can watch those, and
    their file systems never wait for another process.

    The check asks the kernel alone, whatever the file is.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True
