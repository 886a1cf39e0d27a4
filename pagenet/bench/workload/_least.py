"""What no order can save that does not know the trace: as few blocked touches, and as little stall,
as chance allows."""

from __future__ import annotations

from array import array
from heapq import heappop, heappush
from typing import NamedTuple

__all__ = ["Least", "least_stall"]

_PAGE = 4096


class Least(NamedTuple):
    """``stall`` in seconds. Both are expectations, so no whole numbers."""

    blocked: float
    stall: float


def least_stall(
    trace: array[int], pages: int, alike: int, work: float, each: float, rate: float
) -> Least:
    """Of a program that works for ``work`` seconds before each touch, over a link that carries
    ``rate`` bytes a second.

    The trace's touches are drawn at random, each from a neighbourhood of ``alike`` pages, which all
    are as likely: however one orders pages, a touch finds its page missing as often as its
    neighbourhood is. The order here knows more than any that learns from faults: how often each
    neighbourhood will be touched, from its first touch on. So at any time the best that the link
    can carry are pages of the one that is touched most; where nothing is known to be needed, it
    carries neighbourhoods that nobody has touched yet. Nothing else is in the way of a page that is
    waited for, which takes ``each`` seconds.
    """
    touches: dict[int, int] = {}
    for page in trace:
        touches[page // alike] = touches.get(page // alike, 0) + 1
    there: dict[int, float] = {}  # pages of each neighbourhood
    wanted: list[tuple[int, int]] = []  # the one most touched first
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
