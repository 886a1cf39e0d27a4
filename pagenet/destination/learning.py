"""A snapshot's learned set on this host: what each restore shows is added to it, and kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import trio

from ..background.learned import LearnedSet, Restore, Waits, load_learned
from ..background.recording import UNIT
from ..errors import PagenetError
from ..region import Region
from ..residency import State
from ..whole_file import WholeFile
from .filling import Filling

__all__ = ["LearnedFile", "LearnedPlace", "Learning", "Restoring", "with_restores"]

#: seconds after which a restore that goes on counts as over
LEARN_SECONDS = 60.0
#: seconds between two times that a set is kept
_KEEP_SECONDS = 5.0


class LearnedPlace(Protocol):
    """Where a set is kept. Its methods block."""

    def load(self) -> LearnedSet | None:
        """None: there is none yet. :exc:`~pagenet.errors.UsageError` if it is broken."""
        ...

    def add(self, restores: Sequence[Restore], empty: LearnedSet) -> LearnedSet:
        """Add these restores to what is there, or else to ``empty``. Returns what is there then.
        Others may do the same at the same time."""
        ...


class LearnedFile:
    """A file. The last of several processes that add to it at the same time wins."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def load(self) -> LearnedSet | None:
        return load_learned(self._path) if self._path.exists() else None

    def add(self, restores: Sequence[Restore], empty: LearnedSet) -> LearnedSet:
        now = with_restores(self.load(), restores, empty)
        with WholeFile(self._path, "learned set") as file:
            file.write(now.encode())
            file.commit()
        return now


def with_restores(
    known: LearnedSet | None, restores: Sequence[Restore], empty: LearnedSet
) -> LearnedSet:
    """``known``, or ``empty`` if there is none, or it is another memory's, with these restores."""
    now = known if known is not None and known.blocks == empty.blocks else empty
    for restore in restores:
        now.learn(restore)
    return now


class Learning:
    """Learns what guests of one snapshot wait for. ``on_failure`` is called, with the reason, when
    the set cannot be kept."""

    def __init__(
        self, place: LearnedPlace, region: Region, on_failure: Callable[[str], None]
    ) -> None:
        self._place, self._region, self._on_failure = place, region, on_failure
        #: as it is kept, and what was learned since
        self.known = LearnedSet.of(region)
        self._new: list[Restore] = []
        self._changed = trio.Event()

    async def load(self) -> None:
        """:exc:`~pagenet.errors.UsageError` if it is broken."""
        found = await trio.to_thread.run_sync(self._place.load)
        if found is not None and found.fits(self._region):
            self.known = found

    async def keep(self) -> None:
        """Keep what is learned, until cancelled, and then once more."""
        try:
            while True:
                await self._changed.wait()
                await trio.sleep(_KEEP_SECONDS)
                await self._add()
        finally:
            with trio.CancelScope(shield=True):
                await self._add()

    async def _add(self) -> None:
        new, self._new, self._changed = self._new, [], trio.Event()
        if not new:
            return
        try:
            empty = LearnedSet.of(self._region)
            known = await trio.to_thread.run_sync(self._place.add, new, empty)
        except PagenetError as error:
            self._on_failure(str(error))
            return
        for restore in self._new:  # they have ended meanwhile
            known.learn(restore)
        self.known = known

    @contextmanager
    def restore(self, filling: Filling) -> Iterator[Restoring]:
        """Learn from the restore of a guest, which lasts as long as the block, or a minute."""
        restoring = Restoring(filling, self.known)
        try:
            yield restoring
        finally:
            self.end(restoring)

    def end(self, restoring: Restoring) -> None:
        if (restore := restoring.end()) is not None:
            self.known.learn(restore)
            self._new.append(restore)
            self._changed.set()

    async def end_later(self, restoring: Restoring) -> None:
        await trio.sleep(LEARN_SECONDS)
        self.end(restoring)


class Restoring:
    """One restore of a guest, of which ``known`` is known."""

    def __init__(self, filling: Filling, known: LearnedSet) -> None:
        self._filling = filling
        self._waits = Waits(filling.region, trio.current_time)
        probes = known.probes()
        #: the pages to bring to the guest at once
        self.units = [unit for unit in known.order(start_up=True) if unit not in probes]
        self._others = known.pages.keys() - set(self.units)
        self.note = self._waits.note
        self._is_over = False

    def end(self) -> Restore | None:
        """None: it has ended before."""
        if self._is_over:
            return None
        self._is_over = True
        region, shared = self._filling.region, self._filling.residency.shared
        untouched = [
            unit
            for unit in self._others
            if shared.state(region.page_at_offset(unit * UNIT)) == State.MISSING
        ]
        return Restore(dict(self._waits.waited), untouched)
