"""Memory of this process that a host cache keeps its pages in: one transfer fills it, and many
guests are filled from it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import trio

from .. import _native
from ..errors import Unsupported, UsageError
from ..region import Region, Run
from ._handshake import Mapping
from ._owners import HUGE_PAGE, Keeper, SharedFile, close_all, kept_map, note_in
from ._target import NativeMemory, UffdTarget
from ._userfaultfd import NO_FEATURES, Mode, Userfaultfd

__all__ = ["CacheMemory"]


class CacheMemory:
    """A file in memory, for the pages of one source. Attach it once. It stays until :meth:`close`,
    beyond the transfer that fills it.

    ``huge``: of huge pages (2 MiB). ``most``: bytes that it may take, about; None: as many as the
    source has. Beyond that, pages leave that were not used for long. ``keeper``: keeps the file and
    its map of pages for a process that comes after this one.
    """

    def __init__(
        self, *, huge: bool = False, most: int | None = None, keeper: Keeper | None = None
    ) -> None:
        self.page_size = HUGE_PAGE if huge else mmap.PAGESIZE
        self._huge = huge
        self._most = most
        self._keeper = keeper
        self._target: _CacheTarget | None = None
        self._mapped: _native.Mapped | None = None
        self._fd = self._read_only = -1

    async def attach(self, region: Region) -> UffdTarget:
        await trio.lowlevel.checkpoint()
        if self._mapped is not None:
            raise UsageError("this memory was attached before: each cache has memory of its own")
        if region.size % self.page_size:
            raise UsageError(
                f"{region.size} bytes is not a whole number of {self.page_size}-byte huge pages"
            )
        self._target = self._attach(region)
        return self._target

    def _attach(self, region: Region) -> _CacheTarget:
        fds: list[int] = []
        try:
            uffd = Userfaultfd.open(NO_FEATURES, user_mode_only=True)
            fds.append(uffd.fd)
            self._map(region.size)
            assert self._mapped is not None
            uffd.register(self._mapped.address, region.size, Mode.MISSING)
            fds.append(os.dup(self._fd))
            map_fd = None if self._keeper is None else kept_map(self._keeper)
            fds += [] if map_fd is None else [map_fd]
            return _CacheTarget(
                uffd,
                [Mapping(self._mapped.address, region.size, 0, self.page_size)],
                region,
                shared_fd=fds[1],
                map_fd=map_fd,
                recover=None if map_fd is None else note_in(map_fd, resumes=True),
                own=True,
                keeps_uffd=lambda: False,
                wait_gone=trio.sleep_forever,
                most=self._most_pages(region),
            )
        except BaseException:
            close_all(fds)
            self.close()
            raise

    def _most_pages(self, region: Region) -> int:
        if self._most is None or self._most >= region.size:
            return 0
        if self._most < LEAST:
            raise UsageError(f"a cache of {self._most} bytes: it needs {LEAST >> 20} MiB at least")
        return self._most // self.page_size

    def _map(self, size: int) -> None:
        kept = [] if self._keeper is None else self._keeper.get("file")
        self._fd = kept[0] if kept else self._make(size)
        # Guests get a descriptor to read by, and nobody else's user can make it another.
        os.fchmod(self._fd, 0o400)
        self._read_only = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._mapped = _native.Mapped(size, self._fd, alignment=self.page_size)
        except OSError as error:
            more = " (reserve huge pages: sysctl vm.nr_hugepages)" if self._huge else ""
            raise Unsupported(f"cannot map {size} bytes: {error.strerror}{more}") from None

    def _make(self, size: int) -> int:
        flags = os.MFD_HUGETLB if self._huge else 0
        made = os.memfd_create("pagenet-cache", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
        os.ftruncate(made, size)
        _native.seal_size(made)
        if self._keeper is not None:
            self._keeper.hold("file", made)
        return made

    @property
    def cache(self) -> _native.Cache:
        """Once it is attached, and lanes fill it."""
        assert self._target is not None
        assert self._target.cache is not None
        return self._target.cache

    @property
    def shared(self) -> SharedFile:
        """What owners may map. Once it is attached."""
        assert self._mapped is not None
        return SharedFile(self._read_only, self._mapped.size, self.page_size)

    def close(self) -> None:
        """Give the memory back. Idempotent. No lane may run."""
        if self._target is not None:
            self._target.release()
            self._target = None
        if self._mapped is not None:
            self._mapped.close()
        close_all([fd for fd in (self._fd, self._read_only) if fd >= 0])
        self._fd = self._read_only = -1

    def forget(self) -> None:
        """Have the keeper keep it no longer."""
        if self._keeper is not None:
            self._keeper.forget("file")
            self._keeper.forget("map")


#: Bytes that a cache must be allowed to take: what is in flight, and being placed, stays meanwhile.
LEAST = 16 << 20


class _CacheTarget(UffdTarget):
    """The memory as the transfer that fills it sees it. ``most``: pages that may take memory (0:
    all)."""

    def __init__(self, *args: object, most: int, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._most = most
        self.cache: _native.Cache | None = None

    def native(self, wire: Region) -> NativeMemory:
        memory = super().native(wire)
        if self.cache is None:
            assert self._shared is not None
            assert self._second is not None
            assert self._shared_fd is not None
            self.cache = _native.Cache(
                self._shared,
                self.region.pages,
                self._mappings[0].page_size,
                address=self._second.address,
                file=self._shared_fd,
                most=self._most,
            )
        memory.fills = self.cache
        return memory

    def close(self, missing: Sequence[Run]) -> None:
        """Nothing: guests are filled from it still."""

    def release(self) -> None:
        if self.cache is not None:
            self.cache.close()
        super().close(())
