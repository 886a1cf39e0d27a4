"""Objects that no snapshot in their place names."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import trio

from .index import decode_index
from .objects import FRAMES, INDEX, Entry, Objects, giving_up, open_objects

__all__ = ["SAFE_AGE", "Garbage", "prune"]

#: Seconds that a ``create`` may take: its objects have no index until its end.
SAFE_AGE = 86_400.0
_OURS = re.compile(r"[0-9a-f]{32}" + re.escape(FRAMES))


@dataclass(frozen=True, slots=True)
class Garbage:
    """``unused`` objects, and how many more there are that are younger than that."""

    unused: tuple[Entry, ...]
    young: int
    indexes: int


async def prune(where: str, age: float = SAFE_AGE, *, removes: bool) -> Garbage:
    """Find the objects in a directory, or a place in a store, that no index there names, and that
    were not written for ``age`` seconds. ``removes``: and remove them.

    :exc:`~pagenet.errors.UsageError` if the place cannot be used, or an index cannot be read: what
    that names is not known then, and nothing is removed.
    """
    objects = open_objects(where)
    try:
        async with giving_up(objects):
            found = await trio.to_thread.run_sync(_find, objects, age)
            for entry in found.unused if removes else ():
                await trio.to_thread.run_sync(objects.remove, entry.name)
        return found
    finally:
        objects.close()


def _find(objects: Objects, age: float) -> Garbage:
    # First the objects: an index that comes after that has younger ones, or those of its base.
    candidates = [entry for entry in objects.entries() if _OURS.fullmatch(entry.name)]
    named, indexes = set[str](), 0
    for names in _named(objects):
        named.update(names)
        indexes += 1
    now = time.time()
    free = [entry for entry in candidates if entry.name not in named]
    old = tuple(entry for entry in free if entry.modified <= now - age)
    return Garbage(old, len(free) - len(old), indexes)


def _named(objects: Objects) -> Iterator[tuple[str, ...]]:
    """The objects that each index names."""
    for entry in objects.entries():
        if entry.name.endswith(INDEX):
            try:
                yield decode_index(partial(objects.read, entry.name), entry.name).objects
            except FileNotFoundError:
                continue  # it was deleted meanwhile
