"""Learned sets in a store of objects, beside the snapshots that they are of."""

from __future__ import annotations

from collections.abc import Sequence

from .background.learned import LearnedSet, Restore, learned_of
from .destination.learning import with_restores
from .errors import SourceLost
from .objects import open_store
from .source.memory import STORE_TIMEOUT

__all__ = ["LearnedObject"]


class LearnedObject:
    """An object: ``name`` at a place in a store, such as ``s3://BUCKET/PREFIX``. The last of
    several processes that add to it at the same time wins."""

    def __init__(self, place: str, name: str, deadline: float = STORE_TIMEOUT) -> None:
        self._place, self._name, self._deadline = place, name, deadline

    def load(self) -> LearnedSet | None:
        with open_store(self._place, self._deadline) as store:
            try:
                size = store.size(self._name)
            except SourceLost:
                return None
            body = store.read(self._name, 0, size)
        return learned_of(body, f"{self._place}/{self._name}")

    def add(self, restores: Sequence[Restore], empty: LearnedSet) -> LearnedSet:
        now = with_restores(self.load(), restores, empty)
        with open_store(self._place, self._deadline) as store:
            store.write(self._name, now.encode())
        return now
