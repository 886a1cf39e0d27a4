"""Frames of a snapshot out of the memory of peers that have it too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..protocol import Class
from ..region import Run
from .index import Index
from .opened import digest_of

if TYPE_CHECKING:
    from ..peers import Peers

__all__ = ["PeeredFrames"]


class PeeredFrames:
    """Frames of the snapshot with that ``index``, each compared with its digest, which no peer
    controls. Owns ``peers``."""

    def __init__(self, index: Index, peers: Peers) -> None:
        self._index, self._peers = index, peers

    def close(self) -> None:
        """Idempotent."""
        self._peers.close()

    def read(self, frame: int) -> memoryview | None:
        """The pages of ``frame``; None if no peer has them in time, or some are nowhere in the
        memory. Blocks. A peer that lies is asked no more."""
        runs = self._runs_of(frame)
        while runs is not None and (found := self._peers.fetch(runs, Class.DEMAND)):
            pages, peer = found
            if digest_of(memoryview(pages)) == self._index.digest(frame):
                return memoryview(pages)
            self._peers.distrust(peer, f"it has sent other pages than those of frame {frame}")
        return None

    def _runs_of(self, frame: int) -> list[Run] | None:
        """Pages of the memory that are all of the frame's, in its order."""
        runs, page, end = [], 0, self._index.columns.frame_pages[frame]
        for run in sorted(self._index.runs_of(frame), key=lambda run: run.at):
            if run.at > page:
                return None
            skip = page - run.at
            if skip < run.pages:
                runs.append(Run(run.first + skip, run.pages - skip))
                page = run.at + run.pages
        return runs if page == end else None
