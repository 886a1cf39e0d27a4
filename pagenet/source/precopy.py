"""How many rounds a precopy takes.

What is fetched after the switch is then only what the owner has written since. After each round it
is decided, from what the round brought, whether there is another.
"""

from __future__ import annotations

import mmap
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

import trio

from ..errors import UsageError
from ..events import EventHandler
from ..nurseries import open_failing_nursery, running_beside
from .rounds import Round, Rounds

__all__ = ["MAX_ROUNDS", "Precopy", "RoundCount", "about_round", "is_worth_another"]

#: ``auto``: for as long as another round makes less of what is left; a number: that many rounds
RoundCount = int | Literal["auto"]

MAX_ROUNDS = 100
# ``auto`` goes on for at most this many rounds, and stops when a round has left more than this
# share of what was left before, or what the link carries in this time (s). Not measured.
_MOST_AUTO = 10
_NO_BETTER = 0.9
_LITTLE_SECONDS = 0.02


def is_worth_another(rounds: Sequence[Round]) -> bool:
    """Whether another round will probably leave less than the last of ``rounds``, which are over,
    did. An owner that writes faster than the link carries gets one round, or two."""
    last = rounds[-1]
    if len(rounds) >= _MOST_AUTO or not last.left or not last.pages:
        return False
    # The next round takes this long, and meanwhile so many pages are written at the recent rate.
    seconds = last.left * _seconds_a_page(last)
    if seconds <= _LITTLE_SECONDS:
        return False
    if last.recently_written * seconds > _NO_BETTER * last.left * last.recent_seconds:
        return False
    return len(rounds) == 1 or last.left < _NO_BETTER * rounds[-2].left


def _seconds_a_page(last: Round) -> float:
    """How long the round took for each page that was not zero, as if zeros took no time."""
    return last.seconds / max(last.pages - last.zeros, 1)


class Precopy:
    """How many rounds there are before the switch, and those that are over.

    ``rounds``: 0 to :data:`MAX_ROUNDS`, or ``auto``. Any task may change it while the rounds run.
    :exc:`~pagenet.errors.UsageError` for another number.
    """

    def __init__(self, rounds: RoundCount = "auto") -> None:
        self._switches = False
        self._changed = trio.Event()
        #: the rounds that are over
        self.over: list[Round] = []
        self.set_rounds(rounds)

    @property
    def rounds(self) -> RoundCount:
        return self._rounds

    def switch(self) -> None:
        """End the rounds now: the switch comes as soon as nothing is in flight."""
        self._switches = True
        self._tell()

    def set_rounds(self, rounds: RoundCount) -> None:
        """Change the number of rounds."""
        if rounds != "auto" and not 0 <= rounds <= MAX_ROUNDS:
            raise UsageError(f"{rounds} rounds: there may be 0 to {MAX_ROUNDS}, or auto")
        self._rounds: RoundCount = rounds
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    @property
    def _must_end(self) -> bool:
        enough = self._rounds != "auto" and len(self.over) >= self._rounds
        return self._switches or enough

    async def run(self, rounds: Rounds, on_event: EventHandler) -> None:
        """Return when the owner is to be frozen; call :meth:`Rounds.pause` first. Event:
        ``round``."""
        while not self._must_end:
            async with running_beside(rounds.look_late):
                await _either(rounds.wait_over, self._wait_end)
            if self._must_end:
                break
            self.over.append(await rounds.look())
            on_event("round", **about_round(self.over[-1]))
            if self._must_end or (self._rounds == "auto" and not is_worth_another(self.over)):
                break
            await rounds.next()

    async def _wait_end(self) -> None:
        while not self._must_end:
            await self._changed.wait()


async def _either(*waits: Callable[[], Awaitable[None]]) -> None:
    """Return when one of ``waits`` returns."""
    async with open_failing_nursery() as nursery:

        async def wait(what: Callable[[], Awaitable[None]]) -> None:
            await what()
            nursery.cancel_scope.cancel()

        for what in waits:
            nursery.start_soon(wait, what)


def about_round(last: Round) -> dict[str, object]:
    """A round, as an event has it. ``rest_seconds``: how long the link takes for what is left."""
    sent = (last.pages - last.zeros) * mmap.PAGESIZE
    rate = sent / last.seconds if last.seconds else 0.0
    return {
        "round": last.number,
        "seconds": round(last.seconds, 3),
        "pages": last.pages,
        "zeros": last.zeros,
        "written": last.written,
        "left": last.left,
        "bytes_left": last.left * mmap.PAGESIZE,
        "bytes_per_s": round(rate),
        "dirty_bytes_per_s": round(last.written * mmap.PAGESIZE / max(last.seconds, 1e-3)),
        "rest_seconds": round(last.left * mmap.PAGESIZE / rate, 3) if rate else None,
    }
