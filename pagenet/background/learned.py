"""What guests of one snapshot wait for when they are restored: learned from each restore, for the
next.

A guest that gets a page before it touches it does not show that it needed it. So in each restore
some pages of the set are not brought to the guest in advance: those that it waits for all the same
are confirmed, and those that it does not wait for fall out after a while.

A file is one msgpack map: ``format`` ("pagenet-learned"), ``version`` (1), ``restores`` (how many
were learned from), ``blocks`` (names, and sizes in bytes) and ``pages``. ``pages`` is a list of
numbers, five for each stretch of consecutive pages of 4 KiB: how many pages its first page lies
after the end of the stretch before (negative if it lies before that end), how many pages it has,
after how many milliseconds guests waited for them, on average, in how many restores they did, and
in how many they did not although the pages had not been brought. Pages are numbered through all
blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from ..errors import UsageError
from ..region import Region, Run
from ..residency import Residency, State
from ..whole_file import read_whole
from ._schedule import Schedule
from .recording import MOST_BYTES, UNIT, blocks_in, blocks_of, fields_of, units_of

__all__ = [
    "Learned",
    "LearnedSet",
    "Restore",
    "StartUp",
    "Waits",
    "learned_of",
    "load_learned",
]

FORMAT, VERSION = "pagenet-learned", 1
_WHAT = "learned set"
#: pages of 4 KiB that a set has at most: 1 GiB of them
MOST_PAGES = 1 << 18
#: milliseconds: what guests wait for sooner, on average, is brought to them at once; the rest only
#: into the host's cache
START_UP_MS = 1000
#: one page in so many is not brought, to see whether it is waited for; one that few restores have
#: told about, one in FEW_PROBES
PROBES, FEW_PROBES, FEW = 16, 4, 4
#: a page falls out once it was not waited for this many times as often as it was
VAIN = 3
# Numbers for each stretch of pages.
_FIELDS = 5
# A number that mixes well: 2**64 divided by the golden ratio.
_MIX = 0x9E3779B97F4A7C15


@dataclass(slots=True)
class Learned:
    """Of a page: milliseconds from the restore to the wait for it, on average; in how many restores
    it was waited for; in how many it was not, although it had not been brought."""

    ms: float
    hits: int
    misses: int


@dataclass(frozen=True, slots=True)
class Restore:
    """What a restore has shown. Pages are flat numbers of pages of 4 KiB.

    ``waited``: those that the guest waited for, and after how many milliseconds. ``untouched``:
    those that it had not got by the end.
    """

    waited: Mapping[int, float]
    untouched: Collection[int]


@dataclass
class LearnedSet:
    """The pages that guests wait for, of ``blocks`` (names, and sizes in bytes). ``pages``: by the
    flat number of a page of 4 KiB."""

    blocks: tuple[tuple[str, int], ...]
    restores: int = 0
    pages: dict[int, Learned] = field(default_factory=dict)

    @classmethod
    def of(cls, region: Region) -> LearnedSet:
        """An empty set."""
        return cls(blocks_of(region))

    def fits(self, region: Region) -> bool:
        return self.blocks == blocks_of(region)

    def order(self, *, start_up: bool = False) -> list[int]:
        """Its pages, what is waited for first first. ``start_up``: only those that are to be
        brought to a guest at once."""
        found = [page for page, it in self.pages.items() if it.ms < START_UP_MS or not start_up]
        return sorted(found, key=lambda page: (self.pages[page].ms, page))

    def probes(self) -> set[int]:
        """The pages that are not to be brought in the next restore; others in each."""
        return {
            page
            for page, it in self.pages.items()
            if _draw(page, self.restores, FEW_PROBES if it.hits + it.misses < FEW else PROBES)
        }

    def learn(self, restore: Restore) -> None:
        """Add what a restore has shown."""
        waited, probes = restore.waited, restore.untouched
        self.restores += 1
        for page, ms in waited.items():
            it = self.pages.setdefault(page, Learned(0.0, 0, 0))
            it.ms += (ms - it.ms) / (it.hits + 1)
            it.hits += 1
        for page in self.pages.keys() & set(probes) - waited.keys():
            it = self.pages[page]
            it.misses += 1
            if it.misses >= VAIN * it.hits:
                del self.pages[page]
        if len(self.pages) > MOST_PAGES:  # those that were waited for most stay
            by_use = sorted(self.pages.items(), key=lambda each: (-_share(each[1]), each[1].ms))
            self.pages = dict(by_use[:MOST_PAGES])

    def encode(self) -> bytes:
        """The content of a file."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "restores": self.restores,
            "blocks": [list(block) for block in self.blocks],
            "pages": list(_packed(self.pages)),
        }
        encoded: bytes = msgpack.packb(fields)
        return encoded


def _share(it: Learned) -> float:
    """How likely a guest waits for it. Few restores tell little."""
    return it.hits / (it.hits + it.misses + 1)


def _draw(page: int, restore: int, one_in: int) -> bool:
    """True for one page in ``one_in``, and for each page in one restore in ``one_in``, about."""
    mixed = (page * _MIX) % 2**64 >> 32
    return (mixed + restore) % one_in == 0


def _packed(pages: Mapping[int, Learned]) -> Iterator[int]:
    end, order, at = 0, sorted(pages), 0
    while at < len(order):
        first = order[at]
        it = _numbers(pages[first])
        count = 1
        while at + count < len(order) and order[at + count] == first + count:
            if _numbers(pages[first + count]) != it:
                break
            count += 1
        yield from (first - end, count, *it)
        end, at = first + count, at + count


def _numbers(it: Learned) -> tuple[int, int, int]:
    return round(it.ms), it.hits, it.misses


def load_learned(path: str | os.PathLike[str]) -> LearnedSet:
    """The set at ``path``. :exc:`UsageError`, in one line, if there is none, or it is foreign,
    broken, or of a version that is not known."""
    return learned_of(read_whole(path, MOST_BYTES, _WHAT), os.fspath(path))


def learned_of(body: bytes, name: str) -> LearnedSet:
    """The set that is the content of a file of that name. :exc:`UsageError` as above."""
    fields = fields_of(body, {FORMAT: VERSION}, _WHAT, name)
    try:
        return _checked(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{name} is a broken {_WHAT}: {error}") from None


def _checked(fields: dict[str, Any]) -> LearnedSet:
    blocks, region = blocks_in(fields)
    restores, numbers = fields["restores"], fields["pages"]
    if type(restores) is not int or not 0 <= restores < 1 << 32 or type(numbers) is not list:
        raise ValueError("its numbers make no sense")
    if len(numbers) % _FIELDS or not all(
        type(number) is int and abs(number) < 1 << 52 for number in numbers
    ):
        raise ValueError("its numbers make no sense")
    found = LearnedSet(blocks, restores)
    end = 0
    for at in range(0, len(numbers), _FIELDS):
        skip, count, ms, hits, misses = numbers[at : at + _FIELDS]
        first, end = end + skip, end + skip + count
        if not (first >= 0 and 0 < count <= MOST_PAGES - len(found.pages) and end <= region.pages):
            raise ValueError("its pages make no sense")
        if not (ms >= 0 and 0 < hits <= restores and 0 <= misses <= restores):
            raise ValueError("its counts make no sense")
        for page in range(first, end):
            found.pages[page] = Learned(float(ms), hits, misses)
    return found


class Waits:
    """The pages that one guest waits for, and when: an observer of its background."""

    def __init__(self, region: Region, clock: Callable[[], float]) -> None:
        self._region, self._clock, self._began = region, clock, clock()
        #: milliseconds from the beginning to the first wait, by the flat number of a page of 4 KiB
        self.waited: dict[int, float] = {}

    def note(self, pages: Iterable[int]) -> None:
        ms = (self._clock() - self._began) * 1000
        for page in pages:
            if len(self.waited) >= MOST_PAGES:
                return
            for unit in units_of(self._region, page):
                self.waited.setdefault(unit, ms)


class StartUp:
    """An order: those of ``units`` (flat numbers of pages of 4 KiB) once, and then what ``after``
    says, or nothing."""

    name = "learned"

    def __init__(
        self,
        region: Region,
        residency: Residency,
        units: Sequence[int],
        after: Schedule | None = None,
    ) -> None:
        self._region, self._residency, self._after = region, residency, after
        self._pages = list(dict.fromkeys(region.page_at_offset(unit * UNIT) for unit in units))
        self._next = 0

    def note_faults(self, pages: Sequence[int], now: float) -> None:
        if self._after is not None:
            self._after.note_faults(pages, now)

    def next_run(self, max_bytes: int) -> Run | None:
        return self._next_of_set(max_bytes) or (
            None if self._after is None else self._after.next_run(max_bytes)
        )

    def _next_of_set(self, max_bytes: int) -> Run | None:
        while self._next < len(self._pages):
            first = self._pages[self._next]
            most = next(self._region.split(Run(first, self._region.pages - first), max_bytes)).count
            count = 1
            while (
                count < most
                and self._next + count < len(self._pages)
                and self._pages[self._next + count] == first + count
            ):
                count += 1
            self._next += count
            if self._residency.find(State.MISSING, first, first + count) is not None:
                return Run(first, count)
        return None
