"""Chaos: a seeded hand that strikes transfers, and the record of what it did and what it cost.

What can be struck, and how, is the business of chaos_sites.py: here are only names and times.
"""

from __future__ import annotations

import array
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import trio

__all__ = ["Fault", "Hand", "Record", "Stall", "Strike", "read_stalls"]

#: does something bad; returns when that is over
Fault = Callable[[], Awaitable[None]]
# Seconds between the end of one fault and the next.
_PAUSE = (0.1, 0.8)


class Stall(NamedTuple):
    """An owner stood still. Seconds of time.monotonic(), and seconds."""

    end: float
    seconds: float


def read_stalls(path: Path) -> list[Stall]:
    """Those that a workload has written (--stalls-out)."""
    found = array.array("Q")
    found.frombytes(path.read_bytes())
    return [Stall(end / 1e9, took / 1e9) for end, took in zip(found[::2], found[1::2], strict=True)]


class Strike(NamedTuple):
    name: str
    began: float


@dataclass
class Record:
    """``transfers``: by kind of owner; ``faults`` and ``longest`` (stall, in seconds): by kind of
    fault."""

    transfers: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    longest: dict[str, float] = field(default_factory=dict)

    def add(self, strikes: Sequence[Strike], stalls: Sequence[Stall]) -> None:
        """Count the strikes at one transfer, and what its owner noticed. A stall during which
        several faults came is that of the one that it lasted longest after."""
        self.faults.update(strike.name for strike in strikes)
        ends = [*(strike.began for strike in strikes[1:]), inf]
        for stall in stalls:
            began = stall.end - stall.seconds
            shares = [
                (min(stall.end, end) - max(began, strike.began), strike.name)
                for strike, end in zip(strikes, ends, strict=False)
            ]
            share, name = max(shares, default=(0.0, ""))
            if share > 0:
                self.longest[name] = max(self.longest.get(name, 0.0), stall.seconds)

    def merge(self, transfers: Mapping[str, int], faults: Mapping[str, Sequence[float]]) -> None:
        """Add another record, as :meth:`fields` has it."""
        self.transfers.update(transfers)
        for name, (count, longest) in faults.items():
            self.faults[name] += int(count)
            self.longest[name] = max(self.longest.get(name, 0.0), longest)

    def fields(self) -> dict[str, Any]:
        """For JSON. ``faults``: of each kind, how many, and the longest stall in seconds."""
        return {
            "transfers": dict(sorted(self.transfers.items())),
            "faults": {
                name: [count, round(self.longest.get(name, 0.0), 2)]
                for name, count in sorted(self.faults.items())
            },
        }

    def lines(self) -> list[str]:
        """Tables in Markdown."""
        said = self.fields()
        return [
            "| owner | transfers |",
            "|---|---|",
            *[f"| {name} | {count} |" for name, count in said["transfers"].items()],
            "",
            "| fault | times | longest stall |",
            "|---|---|---|",
            *[
                f"| {name} | {count} | {longest:.2f} s |"
                for name, (count, longest) in said["faults"].items()
            ],
            "",
            f"{self.transfers.total()} transfers, {self.faults.total()} faults,"
            f" longest stall {max(self.longest.values(), default=0.0):.2f} s;"
            " 0 wrong pages, 0 lost owners, 0 words typed",
        ]


class Hand:
    """Strikes at random. ``most``: faults after which it leaves everything alone."""

    def __init__(self, seed: str, most: float = inf) -> None:
        self.chance = random.Random(seed)
        self.record = Record()
        self._most = most
        self._strikes: list[Strike] = []
        self._decks: dict[str, list[Any]] = {}

    def story(self) -> str:
        """What it has done to the transfer that is under way, with the seconds since the first."""
        strikes = self._strikes
        told = [f"{strike.began - strikes[0].began:.1f} s {strike.name}" for strike in strikes]
        return ", ".join(told)

    @property
    def is_done(self) -> bool:
        return self.record.faults.total() + len(self._strikes) >= self._most

    def draw(self, name: str, cards: Sequence[Any]) -> Any:
        """One of ``cards``; none comes twice before each has come once."""
        deck = self._decks.setdefault(name, [])
        if not deck:
            deck += cards
            self.chance.shuffle(deck)
        return deck.pop()

    @asynccontextmanager
    async def striking(self, faults: Mapping[str, Fault]) -> Any:
        """Strike for as long as the block runs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._strike, faults)
            yield
            nursery.cancel_scope.cancel()

    async def _strike(self, faults: Mapping[str, Fault]) -> None:
        while not self.is_done:
            await trio.sleep(self.chance.uniform(*_PAUSE))
            name = self.chance.choice(sorted(faults))
            self._strikes.append(Strike(name, time.monotonic()))
            await faults[name]()

    def note(self, kind: str, stalls: Sequence[Stall]) -> None:
        """A transfer of that kind is over, and everything was right."""
        self.record.transfers[kind] += 1
        self.record.add(self._strikes, stalls)
        self._strikes = []
