"""Owners whose destination has died, and whose transfer another destination takes over: everything
that it needs is still in the owner's process."""

from __future__ import annotations

import errno
import os
import signal

from .. import _native
from ..errors import OwnerGone, Unsupported, UsageError
from ..region import Block, Region
from ._handshake import Mapping, Note
from ._owners import MAP_LINK, taking_from, wait_memory_gone
from ._process import OtherProcess
from ._target import UffdTarget
from ._userfaultfd import Mode, Userfaultfd

__all__ = ["AbandonedOwner"]


class AbandonedOwner:
    """A process that has handed over its memory to a destination that is gone, and has kept its
    userfaultfd and the map of pages (docs/protocol.md). Attach it like any owner; nothing is
    changed before.

    Raises :exc:`~pagenet.errors.UsageError` if the process is not one of these, or another pagenet
    still fills its memory; :exc:`~pagenet.errors.Unsupported` if this user may not look into it;
    :exc:`~pagenet.errors.OwnerGone` if it has ended.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._process = OtherProcess(pid)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"there is no process {pid}: {getattr(error, 'strerror', error)}"
            ) from None
        self._map_fd: int | None = None
        try:
            self._map_fd, found = self._find_map()
            self._note = Note.decode(found.note)
        except OSError as error:
            self.close()
            raise self._refused(error) from None
        except BaseException:
            self.close()
            raise
        #: the identity of the source that its memory was being filled from
        self.source = self._note.source
        #: every page is in place, and the source knows it: there is nothing left to do
        self.is_finished = found.finished
        #: the number of pages in scope, and of those that are in place or were given up
        self.pages, self.done = found.scope, found.done

    def _refused(self, error: OSError) -> OwnerGone | Unsupported:
        if error.errno in (errno.ESRCH, errno.ENOENT):
            return OwnerGone(f"process {self.pid} has ended")
        return Unsupported(
            f"may not take over the memory of process {self.pid}: {error.strerror}; run as root, or"
            " as its user with ptrace access (kernel.yama.ptrace_scope=0)"
        )

    def _find_map(self) -> tuple[int, _native.FoundMap]:
        """The map of a transfer that has not finished; if there is none, of one that has.

        Raises :exc:`~pagenet.errors.UsageError` if the process keeps neither, or no userfaultfd.
        """
        descriptors = self._process.descriptors()
        self._uffds = [number for number, link in descriptors if link == "anon_inode:[userfaultfd]"]
        kept: tuple[int, _native.FoundMap] | None = None
        for number, link in descriptors:
            if link != MAP_LINK or (kept and not kept[1].finished):
                continue
            file = self._process.take(number)
            try:
                found = _native.find_map(file)
            except ValueError:  # the file is no map, or its transfer never began
                os.close(file)
                continue
            if kept:
                os.close(kept[0])
            kept = file, found
        if not kept or not self._uffds:
            if kept:
                os.close(kept[0])
            what = "it has no userfaultfd" if not self._uffds else "it keeps no map of them"
            raise UsageError(
                f"the pages of process {self.pid} ({self._process.name}) do not come from pagenet:"
                f" {what}"
            )
        return kept[0] if kept[1].finished else self._lock(kept[0]), kept[1]

    def _lock(self, file: int) -> int:
        try:
            return _native.lock_map(file)
        except BlockingIOError:
            raise UsageError(
                f"another pagenet is at work on the memory of process {self.pid}: end that one"
                " first"
            ) from None
        finally:
            os.close(file)

    def region(self) -> Region:
        """Its memory, a block for each mapping. The source's blocks have other names."""
        blocks = [
            Block(f"{number}", mapping.size, mapping.page_size)
            for number, mapping in enumerate(self._mappings())
        ]
        return Region(blocks)

    def _mappings(self) -> list[Mapping]:
        return sorted(self._note.mappings, key=lambda mapping: mapping.offset)

    def memory_files(self) -> list[int]:
        """Duplicates of its descriptors of the files behind the blocks of :meth:`region`, for the
        caller to close. :exc:`~pagenet.errors.UsageError` if there are none."""
        files = list[int]()
        try:
            for each in self._mappings():
                alone = Mapping(each.address, each.size, 0, each.page_size)
                file = self._process.take_file([alone])
                if file is None:
                    raise UsageError(
                        f"process {self.pid} holds no descriptor of a file behind its memory"
                    )
                files.append(file)
        except BaseException as error:
            for file in files:
                os.close(file)
            if isinstance(error, OSError):
                raise self._refused(error) from None
            raise
        return files

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the very process that was found. :exc:`~pagenet.errors.OwnerGone` if it
        has ended."""
        try:
            signal.pidfd_send_signal(self._process.pidfd, number)
        except OSError as error:
            raise self._refused(error) from None

    async def attach(self, region: Region) -> UffdTarget:
        if self._map_fd is None:
            raise UsageError("this owner was attached before")
        with taking_from(self._process) as (peer, fds):
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
                recover=self._note,
                outside_is_zero=self._note.outside_is_zero,
                keeps_uffd=lambda: True,
                wait_gone=lambda: wait_memory_gone(target, peer),
                process=peer,
                on_close=peer.close,
            )
        return target

    def _memory_file(self) -> int:
        try:
            file = self._process.take_file(self._note.mappings)
        except OSError as error:
            raise self._refused(error) from None
        if file is None:
            raise UsageError(
                f"the memory of process {self.pid} is not what its map of pages says: no file that"
                " it holds open, to read and to write, is mapped there; start that process again"
            )
        return file

    def _take_uffd(self) -> Userfaultfd:
        """The userfaultfd that watches the memory. The kernel refuses the memory to any other."""
        first = self._note.mappings[0]
        for number in self._uffds:
            try:
                fd = self._process.take(number)
            except OSError as error:
                raise self._refused(error) from None
            try:
                # the process may have put another file under that number meanwhile
                uffd = Userfaultfd.received(fd)
                uffd.register(
                    first.address,
                    first.size,
                    Mode.MISSING | (Mode.MINOR if self._note.shared else Mode.MISSING),
                )
                return uffd
            except (ValueError, OSError):
                os.close(fd)
        raise UsageError(
            f"none of the userfaultfds of process {self.pid} watches its memory at"
            f" {first.address:#x}"
        )

    def close(self) -> None:
        """Release what :meth:`attach` has not taken over. Idempotent."""
        if self._map_fd is not None:
            os.close(self._map_fd)
            self._map_fd = None
        self._process.close()
