"""Owners that know nothing of pagenet: a process is stopped for a moment and given a userfaultfd
(native/attach.c)."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import trio

from .. import _native
from ..errors import Unsupported, UsageError
from ..region import Region
from ._handshake import Mapping
from ._owners import taking_from, wait_memory_gone
from ._process import OtherProcess, refusal
from ._target import UffdTarget
from ._userfaultfd import DEVICE, NO_FEATURES, Feature, Mode, Userfaultfd, is_userfaultfd

__all__ = ["AttachedOwner"]

# Bytes of the device's path: what there is room for on the stack of the process.
_MAX_DEVICE = 255


class AttachedOwner:
    """The shared memory of process ``pid`` at ``mappings``. Each mapping is the whole of a file
    that the process holds open.

    Nothing is changed before :meth:`plant`; :meth:`uproot` restores everything.
    """

    def __init__(self, pid: int, mappings: Sequence[Mapping]) -> None:
        self.pid = pid
        self._mappings = mappings
        self._planted: _native.Planted | None = None
        #: descriptors of the file behind each mapping
        self._files: list[int] = []
        try:
            self._process = OtherProcess(pid)
        except OSError as error:
            raise refusal(self.pid, error) from None
        try:
            for mapping in mappings:
                self._files.append(self._take_file(mapping))
        except BaseException:
            self.close()
            raise

    def _take_file(self, mapping: Mapping) -> int:
        """The file behind ``mapping``. Needs the same rights as attaching, but does not stop the
        process."""
        try:
            file = self._process.take_file([replace(mapping, offset=0)])
        except OSError as error:
            raise refusal(self.pid, error) from None
        if file is None:
            raise UsageError(
                f"process {self.pid} holds no file open, to read and to write, for its memory at "
                f"{mapping.address:#x}: give it a memory-backend-memfd or memory-backend-file"
            )
        return file

    async def plant(self) -> None:
        """Give the process a userfaultfd, and a memfd for the map of its pages, which it keeps."""
        device = os.environ.get("PAGENET_UFFD_DEVICE", DEVICE)
        if len(os.fsencode(device)) > _MAX_DEVICE:
            raise UsageError(
                f"PAGENET_UFFD_DEVICE is longer than {_MAX_DEVICE} bytes: name a device node with a"
                " shorter path"
            )
        try:
            planted = await trio.to_thread.run_sync(
                _native.plant, self.pid, self._process.pidfd, device
            )
        except OSError as error:
            raise refusal(self.pid, error) from None
        if planted.refused in (errno.EPERM, errno.EACCES):
            raise Unsupported(
                f"process {self.pid} may not use userfaultfd: run it as root, give its user access"
                f" to {device} (setfacl -m u:{self._user()}:rw {device}, of Debian's package acl),"
                " or set sysctl vm.unprivileged_userfaultfd=1"
            )
        if planted.refused:
            raise Unsupported(
                f"process {self.pid} cannot have a userfaultfd: {os.strerror(planted.refused)}"
            )
        self._planted = planted

    def _user(self) -> int:
        return Path(f"/proc/{self.pid}").stat().st_uid

    async def uproot(self) -> None:
        """Take both away again: the kernel stops watching when the last descriptor is closed.

        For a process whose guest has not arrived.
        """
        if self._planted is not None:
            planted, self._planted = self._planted, None
            with trio.CancelScope(shield=True), suppress(OSError):  # the process has ended
                await trio.to_thread.run_sync(
                    _native.uproot, self.pid, self._process.pidfd, planted
                )

    @property
    def files(self) -> list[str]:
        """Paths of the files behind the memory, through this process's descriptors."""
        return [f"/proc/self/fd/{file}" for file in self._files]

    def empty(self) -> None:
        """Discard what the process has put into its memory so far, so that the source's pages can
        come."""
        try:
            for file, mapping in zip(self._files, self._mappings, strict=True):
                _native.punch(file, mapping.size)
        except OSError as error:
            raise UsageError(
                f"cannot empty the memory of process {self.pid}: {error.strerror}"
            ) from None

    async def attach(self, region: Region) -> UffdTarget:
        if self._planted is None:
            await self.plant()
        assert self._planted is not None
        with taking_from(self._process) as (peer, fds):
            uffd = self._watch(self._take(self._planted.uffd, fds))
            # Only if there is a single file are offsets in the region offsets in the file.
            shared_fd = os.dup(self._files[0]) if len(self._files) == 1 else None
            if shared_fd is not None:
                fds.append(shared_fd)
            map_fd = self._take(self._planted.map, fds)
            fds.append(locked := self._lock(map_fd))
            fds.remove(map_fd)
            os.close(map_fd)
            target = UffdTarget(
                uffd,
                self._mappings,
                region,
                shared_fd=shared_fd,
                map_fd=locked,
                keeps_uffd=lambda: True,
                wait_gone=lambda: wait_memory_gone(target, peer),
                process=peer,
                on_close=peer.close,
            )
        return target

    def _take(self, number: int, fds: list[int]) -> int:
        try:
            fds.append(self._process.take(number))
        except OSError as error:
            raise refusal(self.pid, error) from None
        return fds[-1]

    def _lock(self, map_fd: int) -> int:
        try:
            return _native.lock_map(map_fd)
        except OSError as error:
            what = f"process {self.pid} has closed what it was given for the map of pages"
            raise UsageError(f"{what}: {error.strerror}") from None

    def _watch(self, fd: int) -> Userfaultfd:
        # another thread of the process may have put another file under that number meanwhile
        if not is_userfaultfd(fd):
            raise UsageError(f"process {self.pid} has closed the userfaultfd that it was given")
        features = Feature.EVENT_REMOVE
        what = f"the memory of process {self.pid}"
        try:
            try:
                _native.uffd_api(fd, features)
            except OSError:  # a kernel older than 4.11
                features = NO_FEATURES
                _native.uffd_api(fd, features)
            uffd = Userfaultfd(fd, features)
            for mapping in self._mappings:
                what = f"the memory of process {self.pid} at {mapping.address:#x}"
                uffd.register(mapping.address, mapping.size, Mode.MISSING)
        except OSError as error:
            # Another pagenet watches it, and was killed before the guest came: otherwise its
            # transfer would be resumed.
            if error.errno == errno.EBUSY:
                raise UsageError(
                    f"cannot watch {what}: another process has begun to; start that process again"
                ) from None
            raise UsageError(
                f"cannot watch {what}: {error.strerror}; put it on tmpfs (/dev/shm) or hugetlbfs"
            ) from None
        return uffd

    def close(self) -> None:
        """Release the descriptors. Idempotent. A process that was attached stays attached."""
        self._process.close()
        while self._files:
            os.close(self._files.pop())
