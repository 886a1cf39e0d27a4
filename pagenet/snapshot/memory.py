"""A snapshot as memory to read.

Frames are unpacked when a page of theirs is wanted first, into a file that is laid out as the
memory is, with all their pages, wherever those are in the memory. So a frame is read and unpacked
once, in whatever order pages are wanted and however many layers there are. The file has no name,
has only the pages that were read, and is gone with its process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from .. import _native
from ..errors import SourceLost
from ..protocol import Class, printable
from .index import PAGE
from .objects import StoreObjects
from .opened import Snapshot, open_snapshot
from .peered import PeeredFrames
from .remote import Cache, RemoteFrames

if TYPE_CHECKING:
    from ..peers import Peers

__all__ = ["SnapshotMemory"]


class SnapshotMemory:
    """The memory of a snapshot. ``owns``: closes the snapshot too. ``cache``: where objects of a
    store are kept. ``peers``: asked for frames before their objects are read; closed too.
    :exc:`SourceLost`, in one line, if there is no room for a file."""

    #: of no process
    owner: tuple[int, int | tuple[int, int]] | None = None
    is_native = True
    is_filled = True

    def __init__(
        self,
        snapshot: Snapshot,
        owns: bool = False,
        cache: Cache | None = None,
        peers: PeeredFrames | None = None,
    ) -> None:
        self._snapshot, self._index, self._owns = snapshot, snapshot.index, owns
        self._peers = peers
        self.size = self._index.size
        self.identity = snapshot.identity
        self._directory = os.environ.get("TMPDIR") or "/var/tmp"
        try:
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._no_room(error) from None
        self._fd = self._file.fileno()
        try:
            self._file.truncate(self.size)
        except OSError as error:
            self._file.close()
            raise self._no_room(error) from None
        is_brought = peers is not None or isinstance(snapshot.objects, StoreObjects)
        self._frames = snapshot.unpacked_into(self._fd, self._directory, is_brought)
        #: what brings frames from a store or from peers; None: they are in a directory
        self.remote: RemoteFrames | None = None
        if is_brought:
            self.remote = RemoteFrames(snapshot, self._frames, cache or Cache(), peers)

    @classmethod
    def open(
        cls,
        spec: str,
        cache: Cache | None = None,
        find_peers: Callable[[str, int], Peers] | None = None,
    ) -> SnapshotMemory:
        """That of the snapshot ``DIR/NAME`` or ``s3://BUCKET/PREFIX/NAME``. ``find_peers``: peers
        of memory of that identity and size. Raises what :func:`open_snapshot` does."""
        cache = cache or Cache()
        with ExitStack() as undo:
            snapshot = undo.enter_context(open_snapshot(spec, cache.timeout))
            peers = None
            if find_peers is not None:
                found = find_peers(snapshot.identity, snapshot.index.size)
                peers = PeeredFrames(snapshot.index, found)
                undo.callback(peers.close)
            memory = cls(snapshot, owns=True, cache=cache, peers=peers)
            undo.pop_all()
            return memory

    def close(self) -> None:
        """Idempotent. Not to be called while anybody reads."""
        if self._peers is not None:
            self._peers.close()
        if self.remote is not None:
            self.remote.close()
        self._frames.close()
        self._file.close()
        self._fd = -1  # the number may be another file's by now
        if self._owns:
            self._snapshot.close()

    def _no_room(self, error: OSError) -> SourceLost:
        return self._snapshot.lost(
            f"no room for its pages in {self._directory} (TMPDIR): {error.strerror}"
        )

    # ---- reading ----

    def read_nowait(self, offset: int, into: memoryview) -> bool:
        """Fill ``into``, from byte ``offset`` on, if its frames are unpacked, and that waits for no
        disk. False: it would; ``into`` may be overwritten."""
        if not self._frames.are_there(offset, len(into)):
            return False
        try:
            count = os.preadv(self._fd, [into], offset, os.RWF_NOWAIT)
        except OSError:
            return False
        return count == len(into)

    async def fetch(self, offset: int, length: int) -> None:
        """Have these bytes fetched from a store, before :meth:`read`. Bytes are fetched ahead.
        :exc:`SourceLost` if they cannot be."""
        if self.remote is not None:
            await self.remote.fetch(offset, length, Class.BACKGROUND)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill ``into``. Blocks. :exc:`SourceLost` if a frame cannot be read, or was not
        fetched."""
        try:
            self._frames.need(offset, len(into))
        except LookupError as error:
            raise SourceLost(str(error)) from None
        try:
            while into:
                count = os.preadv(self._fd, [into], offset)
                into, offset = into[count:], offset + count
        except OSError as error:
            why = f"its pages in {self._directory} (TMPDIR): {error.strerror}"
            raise self._snapshot.lost(why) from None

    def is_hole(self, offset: int, length: int) -> bool:
        return self._frames.are_zero(offset, length)

    def zero_map(self, offset: int, pages: int, page_size: int) -> tuple[bytes, int] | None:
        if not self.is_hole(offset, pages * page_size):
            return None
        return ((1 << pages) - 1).to_bytes(-(-pages // 8), "little"), pages

    def forget(self, end: int) -> None:
        """Give up the room of the first ``end`` bytes of the file: they are not read again."""
        with suppress(OSError):  # not every file system can
            _native.punch(self._fd, end)

    def pages_of(self, frame: int, pages: list[int]) -> dict[int, bytes]:
        """These pages of a frame. Blocks. :exc:`SourceLost`."""
        return self._snapshot.read_frame(
            frame,
            lambda all_: {page: bytes(all_[page * PAGE : (page + 1) * PAGE]) for page in pages},
        )

    # ---- what sources are asked ----

    def check_unchanged(self) -> None:
        """Its objects never change. :exc:`SourceLost` if one could not be fetched."""
        if self.remote is not None:
            self.remote.check()

    def native(self, first: int, page_size: int) -> _native.SourceBlock:
        return _native.SourceBlock(
            first,
            self.size // page_size,
            page_size,
            0,
            printable(self._snapshot.name),
            fd=self._fd,
            pid=0,
            pidfd=-1,
            frames=self._frames,
        )
