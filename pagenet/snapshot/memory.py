"""A snapshot as memory to read.

Frames are unpacked when a page of theirs is wanted first, into a file that is laid out as the
memory is, with all their pages, wherever those are in the memory. So a frame is read and unpacked
once, in whatever order pages are wanted and however many layers there are. The file has no name,
has only the pages that were read, and is gone with its process.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from .. import _native
from ..errors import SourceLost, Unsupported
from .index import PAGE
from .opened import Snapshot, open_snapshot
from .peered import PeeredFrames

if TYPE_CHECKING:
    from ..peers import Peers

__all__ = ["SnapshotMemory"]


class SnapshotMemory:
    """The memory of a snapshot. ``owns``: closes the snapshot too. ``peers``: asked for frames
    before they are read from their objects; closed too. :exc:`SourceLost`, in one line, if there is
    no room for a file."""

    #: of no process
    owner: tuple[int, int | tuple[int, int]] | None = None
    is_native = False
    #: it is read from its directory
    remote: None = None

    def __init__(
        self, snapshot: Snapshot, owns: bool = False, peers: PeeredFrames | None = None
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
        self._lock = threading.Lock()
        #: by frame: whether its pages are in the file
        self._is_there = bytearray(self._index.frames)
        self._loading: dict[int, Future[None]] = {}

    @classmethod
    def open(
        cls, spec: str, find_peers: Callable[[str, int], Peers] | None = None
    ) -> SnapshotMemory:
        """That of the snapshot ``DIR/NAME``. ``find_peers``: peers of memory of that identity and
        size. :exc:`~pagenet.errors.UsageError` if there is none."""
        with ExitStack() as undo:
            snapshot = undo.enter_context(open_snapshot(spec))
            peers = None
            if find_peers is not None:
                found = find_peers(snapshot.identity, snapshot.index.size)
                peers = PeeredFrames(snapshot.index, found)
                undo.callback(peers.close)
            memory = cls(snapshot, owns=True, peers=peers)
            undo.pop_all()
            return memory

    def close(self) -> None:
        """Idempotent."""
        self._file.close()
        self._fd = -1  # the number may be another file's by now
        if self._peers is not None:
            self._peers.close()
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
        if not all(map(self._is_there.__getitem__, self._frames(offset, len(into)))):
            return False
        try:
            count = os.preadv(self._fd, [into], offset, os.RWF_NOWAIT)
        except OSError:
            return False
        return count == len(into)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill ``into``. Blocks. :exc:`SourceLost` if a frame cannot be read."""
        for frame in self._frames(offset, len(into)):
            if not self._is_there[frame]:
                self._load(frame)
        try:
            while into:
                count = os.preadv(self._fd, [into], offset)
                into, offset = into[count:], offset + count
        except OSError as error:
            why = f"its pages in {self._directory} (TMPDIR): {error.strerror}"
            raise self._snapshot.lost(why) from None

    def is_hole(self, offset: int, length: int) -> bool:
        return not self._frames(offset, length)

    def zero_map(self, offset: int, pages: int, page_size: int) -> tuple[bytes, int] | None:
        if not self.is_hole(offset, pages * page_size):
            return None
        return ((1 << pages) - 1).to_bytes(-(-pages // 8), "little"), pages

    def forget(self, end: int) -> None:
        """Give up the room of the first ``end`` bytes of the file: they are not read again."""
        with suppress(OSError):  # not every file system can
            _native.punch(self._fd, end)

    def _frames(self, offset: int, length: int) -> set[int]:
        return self._index.frames_in(offset // PAGE, length // PAGE)

    def pages_of(self, frame: int, pages: list[int]) -> dict[int, bytes]:
        """These pages of a frame. Blocks. :exc:`SourceLost`."""
        return self._snapshot.read_frame(
            frame,
            lambda all_: {page: bytes(all_[page * PAGE : (page + 1) * PAGE]) for page in pages},
        )

    # ---- unpacking ----

    def _load(self, frame: int) -> None:
        """Have the frame's pages in the file. Whoever comes first does it, and the others wait."""
        with self._lock:
            if self._is_there[frame]:
                return
            loading = self._loading.get(frame)
            is_ours = loading is None
            if loading is None:
                loading = self._loading[frame] = Future()
        if not is_ours:
            return loading.result()
        try:
            self._place(frame)
        except BaseException as error:
            self._loaded(frame, False)
            loading.set_exception(error)
            raise
        self._loaded(frame, True)
        loading.set_result(None)

    def _loaded(self, frame: int, is_there: bool) -> None:
        with self._lock:
            self._is_there[frame] = is_there
            del self._loading[frame]

    def _place(self, frame: int) -> None:
        if self._peers is not None and (pages := self._peers.read(frame)) is not None:
            self._index.scatter(frame, pages, self._write)
            return
        self._snapshot.read_frame(
            frame, lambda pages: self._index.scatter(frame, pages, self._write)
        )

    def _write(self, data: memoryview, offset: int) -> None:
        try:
            while (written := os.pwrite(self._fd, data, offset)) < len(data):
                data, offset = data[written:], offset + written
        except OSError as error:
            raise self._no_room(error) from None

    # ---- what sources are asked ----

    def check_unchanged(self) -> None:
        """Its objects never change."""

    def native(self, first: int, page_size: int) -> _native.SourceBlock:
        """:exc:`Unsupported`: loops in C read files and processes, and devices read memory."""
        raise Unsupported(
            f"snapshot {self._snapshot.name} is not memory that a device can read: serve it over"
            " tcp:// or unix:, or export it and serve the file"
        )
