"""Owners whose destination has died, and whom another one takes over: all that it needs is still in the owner's process."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .. import _native
from ..errors import OwnerGone, Unsupported, UsageError
from ..region import Region
from ._handshake import Note
from ._owners import MAP_LINK, taking_from, wait_memory_gone
from ._target import UffdTarget
from ._userfaultfd import Mode, Userfaultfd

__all__ = ["AbandonedOwner", "file_behind", "mapped_at"]


class AbandonedOwner:
    """A process that has handed over its memory to a destination that is gone, and has kept its userfaultfd and the map of
    pages (docs/protocol.md). Attach it as any owner; nothing is changed before.

    :exc:`~pagenet.errors.UsageError`: it is no such process, or another pagenet still fills its memory;
    :exc:`~pagenet.errors.Unsupported`: this user may not look into it; :exc:`~pagenet.errors.OwnerGone`: it has ended.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, OverflowError) as error:
            raise UsageError(f"there is no process {pid}: {getattr(error, 'strerror', error)}") from None
        self._map_fd: int | None = None
        try:
            self._uffds = [number for number, link in self._descriptors() if link == "anon_inode:[userfaultfd]"]
            self._map_fd, found = self._find_map()
            self._note = Note.decode(found.note)
        except BaseException:
            self.close()
            raise
        #: the identity of what it was being filled from
        self.source = self._note.source
        #: every page is in place, and the source knows it: there is nothing left to do
        self.is_finished = found.finished
        #: all of them, and those that are in place or were given up
        self.pages, self.done = found.scope, found.done

    def _descriptors(self) -> Iterator[tuple[int, str]]:
        """The numbers of the process's descriptors, and what they are."""
        try:
            for name in os.listdir(f"/proc/{self.pid}/fd"):
                with suppress(FileNotFoundError):  # closed meanwhile
                    yield int(name), os.readlink(f"/proc/{self.pid}/fd/{name}")
        except (PermissionError, ProcessLookupError, FileNotFoundError) as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> OwnerGone | Unsupported:
        if error.errno in (errno.ESRCH, errno.ENOENT):
            return OwnerGone(f"process {self.pid} has ended")
        return Unsupported(
            f"may not take over the memory of process {self.pid}: {error.strerror}; run as root, or as its user with ptrace "
            "access (kernel.yama.ptrace_scope=0)"
        )

    def _find_map(self) -> tuple[int, _native.FoundMap]:
        """The map of a transfer that has not finished, if there is one."""
        kept: tuple[int, _native.FoundMap] | None = None
        for number, link in self._descriptors():
            if link != MAP_LINK or (kept and not kept[1].finished):
                continue
            file = self._open(number)
            try:
                found = _native.find_map(file)
            except ValueError:  # its transfer never began
                os.close(file)
                continue
            if kept:
                os.close(kept[0])
            kept = file, found
        if not kept or not self._uffds:
            if kept:
                os.close(kept[0])
            what = "it has no userfaultfd" if not self._uffds else "it keeps no map of them"
            raise UsageError(f"the pages of process {self.pid} ({self._name()}) do not come from pagenet: {what}")
        return kept[0] if kept[1].finished else self._lock(kept[0]), kept[1]

    def _lock(self, file: int) -> int:
        try:
            return _native.lock_map(file)
        except BlockingIOError:
            raise UsageError(f"another pagenet is at work on the memory of process {self.pid}: end that one first") from None
        finally:
            os.close(file)

    def _open(self, number: int) -> int:
        try:
            return os.open(f"/proc/{self.pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise self._refused(error) from None

    def _name(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/comm").read_text().strip()
        except OSError:
            return "it has ended"

    async def attach(self, region: Region) -> UffdTarget:
        if self._map_fd is None:
            raise UsageError("this owner was attached before")
        with taking_from(self.pid, self._pidfd) as (peer, fds):
            shared_fd = self._memory_file() if self._note.shared else None
            if shared_fd is not None:
                fds.append(shared_fd)
            uffd = self._take_uffd()
            fds.append(uffd.fd)
            map_fd, self._map_fd = self._map_fd, None
            fds.append(map_fd)
            target = UffdTarget(
                uffd,
                self._note.mappings,
                region,
                shared_fd=shared_fd,
                map_fd=map_fd,
                recover=True,
                keeps_uffd=lambda: True,
                wait_gone=lambda: wait_memory_gone(target, peer),
                on_close=peer.close,
            )
        return target

    def _memory_file(self) -> int:
        first = self._note.mappings[0]
        try:
            return os.open(file_behind(self.pid, first.address) or "", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"the file behind the memory of process {self.pid} is not to be had: {error.strerror}") from None

    def _take_uffd(self) -> Userfaultfd:
        """The one that watches the memory: to any other the kernel says that it is taken."""
        first = self._note.mappings[0]
        for number in self._uffds:
            try:
                uffd = Userfaultfd.received(_native.take_descriptor(self._pidfd, number))
            except OSError as error:
                raise self._refused(error) from None
            try:
                uffd.register(first.address, first.size, Mode.MISSING | (Mode.MINOR if self._note.shared else Mode.MISSING))
                return uffd
            except OSError:
                uffd.close()
        raise UsageError(f"none of the userfaultfds of process {self.pid} watches its memory at {first.address:#x}")

    def close(self) -> None:
        """Idempotent. What was attached stays so."""
        if self._map_fd is not None:
            os.close(self._map_fd)
            self._map_fd = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


@dataclass(frozen=True, slots=True)
class Mapped:
    """A line of /proc/PID/maps: bytes [start, end) of a process, with the access ``mode``, are those from ``offset`` on of the
    file with those device and inode numbers."""

    start: int
    end: int
    mode: str
    offset: int
    device: int
    inode: int


def mapped_at(pid: int) -> list[Mapped]:
    """All of the process's mappings, ascending. :exc:`OSError` if we may not look."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, mode, offset, device, inode, *_ = line.split()
        start, end = (int(number, 16) for number in span.split("-"))
        major, minor = (int(number, 16) for number in device.split(":"))
        found.append(Mapped(start, end, mode, int(offset, 16), os.makedev(major, minor), int(inode)))
    return found


def file_behind(pid: int, address: int) -> str | None:
    """The file that the process has mapped there, as the process holds it: it may have no name any more, or one that means
    another file here. None: it holds none. :exc:`OSError`: it has ended, or we may not look."""
    mapped = next((mapped for mapped in mapped_at(pid) if mapped.start <= address < mapped.end), None)
    for entry in Path(f"/proc/{pid}/fd").iterdir() if mapped else ():
        with suppress(FileNotFoundError):  # closed meanwhile
            status = entry.stat()
            if mapped and (status.st_dev, status.st_ino) == (mapped.device, mapped.inode):
                return str(entry)
    return None
