"""Which pages a program touches, in which order: made up by a rule, or as a program really did."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from ...background.recording import FORMAT, VERSION, load_fields, recording_of
from ...background.schedule import RECORDED
from ...errors import UsageError
from ._touches import TOUCHES_FORMAT, TOUCHES_VERSION, touches_of

__all__ = ["TRACES", "Trace", "alike", "make_trace"]

# Touches that lie close together do so within this many pages: 256 KiB.
_NEIGHBOURHOOD = 64
# The share of neighbourhoods that are used (of those of 1 GiB, 1350), and the exponent of Zipf's
# law by which they are.
_SHARE, _EXPONENT = 1350 / 4096, 1.25
_STRIDE = 100


def _neighbourhoods(pages: int, touches: int, pick: random.Random) -> list[int]:
    """Zipf over neighbourhoods that are scattered over all of the memory; within one, any page."""
    all_of_them = max(1, pages // _NEIGHBOURHOOD)
    used = pick.sample(range(all_of_them), max(1, round(all_of_them * _SHARE)))
    shares = list(accumulate((rank + 1) ** -_EXPONENT for rank in range(len(used))))
    chosen = pick.choices(used, cum_weights=shares, k=touches)
    return [first * _NEIGHBOURHOOD + pick.randrange(min(_NEIGHBOURHOOD, pages)) for first in chosen]


def _sequential(pages: int, touches: int, pick: random.Random) -> list[int]:
    start = pick.randrange(pages)
    return [(start + number) % pages for number in range(touches)]


def _strided(pages: int, touches: int, pick: random.Random) -> list[int]:
    start = pick.randrange(pages)
    return [(start + number * _STRIDE) % pages for number in range(touches)]


def _phases(pages: int, touches: int, pick: random.Random) -> list[int]:
    """Neighbourhoods of the first half of the memory, and from the middle on those of the
    second."""
    half = pages // 2
    first, second = (
        _neighbourhoods(half, count, pick) for count in (touches // 2, touches - touches // 2)
    )
    return [*first, *(half + page for page in second)]


def _random(pages: int, touches: int, pick: random.Random) -> list[int]:
    return [pick.randrange(pages) for _ in range(touches)]


#: how to make each, and how many touches it usually has
TRACES: dict[str, tuple[Callable[[int, int, random.Random], list[int]], int]] = {
    "zipf": (_neighbourhoods, 140_000),
    "sequential": (_sequential, 60_000),
    "strided": (_strided, 20_000),
    "phases": (_phases, 80_000),
    "random": (_random, 40_000),
}


def alike(name: str, pages: int) -> int | None:
    """The size, in pages, of areas in which all pages are equally likely to be touched. None if
    touches are not drawn by one rule from the first to the last."""
    return {"zipf": min(_NEIGHBOURHOOD, pages), "random": pages}.get(name)


class Trace(NamedTuple):
    """``pages``: of 4 KiB, in the order in which they are touched; ``work_ns``: how many ns the
    program works before each touch, if that is known."""

    pages: array[int]
    work_ns: array[int] | None = None


def make_trace(name: str, size: int, touches: int | None = None, seed: int = 1) -> Trace:
    """A trace in ``size`` bytes of memory. ``recorded=FILE`` reads what ``pagenet-bench trace`` or
    ``--record`` wrote.

    :exc:`UsageError` if there is no such trace, or nothing in it.
    """
    pages = size // 4096
    if name.startswith(RECORDED):
        trace = _recorded(name.removeprefix(RECORDED), pages)
        if not trace.pages:
            raise UsageError(f"{name}: no page of it lies within {size >> 20} MiB")
        return trace
    if name not in TRACES:
        raise UsageError(f"no trace {name!r}: there are {', '.join(TRACES)}, {RECORDED}FILE")
    make, usual = TRACES[name]
    return Trace(
        array("Q", make(pages, usual if touches is None else touches, random.Random(seed)))
    )


def _recorded(path: str, pages: int) -> Trace:
    """The touches within the first ``pages`` pages. The blocks of a recording lie one behind the
    other here."""
    fields = load_fields(path, {FORMAT: VERSION, TOUCHES_FORMAT: TOUCHES_VERSION}, "recording")
    if fields["format"] == FORMAT:
        return Trace(
            array("Q", [page for page in recording_of(fields, path).order if page < pages])
        )
    inside, work_ns, work = array("Q"), array("Q"), 0
    for page, before in touches_of(fields, path).touches:
        work += before  # also the work before a touch of a page that is left out
        if page < pages:
            inside.append(page)
            work_ns.append(work)
            work = 0
    return Trace(inside, work_ns)
