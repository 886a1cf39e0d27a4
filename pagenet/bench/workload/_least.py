"""A lower bound for orders that do not know the trace: the fewest blocked touches, and the shortest
stall, that chance allows."""

from __future__ import annotations

from array import array
from heapq import heappop, heappush
from typing import NamedTuple

__all__ = ["Least", "least_stall"]

_PAGE = 4096


class Least(NamedTuple):
    """``stall`` in seconds. Both are expectations, so not whole numbers."""

    blocked: float
    stall: float


def least_stall(
    trace: array[int], pages: int, alike: int, work: float, each: float, rate: float
) -> Least:
    """The lower bound for a program that works for ``work`` seconds before each touch, over a link
    that carries ``rate`` bytes a second.

    The trace's touches are drawn at random, each from a neighbourhood of ``alike`` pages that are
    equally likely. So in whatever order pages come, the probability that a touch finds its page
    missing is the missing share of its neighbourhood. The order assumed here knows more than any
    that learns from faults: from the first touch of a neighbourhood on, it knows how often that one
    will be touched. So at any time the best that the link can carry are pages of the neighbourhood
    that is touched most. While no page is known to be needed, the link carries pages of
    neighbourhoods that were not touched yet. Nothing else delays a page that is waited for, which
    takes ``each`` seconds.
    """
    touches: dict[int, int] = {}
    for page in trace:
        touches[page // alike] = touches.get(page // alike, 0) + 1
    there: dict[int, float] = {}  # resident pages of each neighbourhood
    wanted: list[tuple[int, int]] = []  # the most touched first
    blind, room, blocked = 0.0, 0.0, 0.0
    for page in trace:
        here = page // alike
        room += work * rate / _PAGE
        while room > 0 and wanted:
            hottest = wanted[0][1]
            taken = min(room, alike - there[hottest])
            there[hottest] += taken
            room -= taken
            if taken < room or there[hottest] >= alike:
                heappop(wanted)
        if room > 0:
            unknown = (pages - alike * len(there)) * (1 - blind)
            blind += (1 - blind) * (min(1.0, room / unknown) if unknown > 0 else 0)
            room = 0.0
        if here not in there:
            there[here] = alike * blind
            heappush(wanted, (-touches[here], here))
        missing = 1 - there[here] / alike
        blocked += missing
        there[here] += missing
        room += missing * (each * rate / _PAGE - 1)
    return Least(blocked, blocked * each)
