"""The first phase of a transfer from a tracked source: pages come while their owner still writes to
them, and no thread at this side sees any of them.

The source goes through rounds. A round is over when no page is missing, or when the source ends it;
nothing is in flight then. The source answers with the pages that have changed since it sent them,
which are missing from then on. With the last answer the owner stands still, and what is left is an
ordinary transfer.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from ..background.pacing import Background
from ..background.schedule import Schedule, make_schedule
from ..errors import RemoteProtocolError, UsageError
from ..protocol import Pause, Stale
from ..region import Region
from ..residency import State
from .filling import Filling
from .lanes import Lanes
from .source_session import SourceSession

__all__ = ["Copying"]

# Seconds between two looks at the map, and how much of the time they may take: a look costs a ms
# for each 10 GiB.
_LOOK_SECONDS = 0.001
_LOOK_SHARE = 0.05


class Copying:
    """Copies the pages of a tracked source. The rounds fetch pages in the order of their numbers. A
    background that has not begun begins for the rounds, and waits again after them.

    :exc:`~pagenet.errors.UsageError` if this memory cannot be written to invisibly, and again.
    """

    def __init__(
        self,
        filling: Filling,
        wire: Region,
        lanes: Lanes,
        background: Background,
        session: SourceSession,
        schedule: Callable[[], Schedule | None],
    ) -> None:
        if filling.target.placement != "continue":
            raise UsageError(
                "the source's pages still change, and this memory cannot take a page twice: it must"
                " be shared memory whose file comes along, or the source go without rounds"
                " (pagenet-qemu migrate --precopy off)"
            )
        self._filling, self._lanes, self._background = filling, lanes, background
        self._wire, self._session = wire, session
        #: makes the schedule for what is left in the end
        self.schedule = schedule
        self._begins = background.begun
        self._round = 1
        self._told = 0  # the last round that the source knows to be over
        self._news = trio.Event()
        #: the source's owner stands still, and what it has changed is known
        self.frozen = trio.Event()
        filling.withhold(True)
        lanes.withhold(True)
        background.begin()
        self._fetch_in_order()

    @property
    def round(self) -> int:
        """The number of the round, from 1 on."""
        return self._round

    async def run(self) -> None:
        """Tell the source of the end of each round. Returns when the last one is over."""
        while not self.frozen.is_set():
            await self._wait_still()
            if self._told < self._round:
                await self._lanes.give_back()
                self._told = self._round
                await self._session.say_paused(self._round, self._missing())
            await self._news.wait()
            self._news = trio.Event()

    def _missing(self) -> int:
        """The number of the source's pages that are MISSING here."""
        region, missing = self._filling.region, 0
        for index in range(len(region.blocks)):
            first, end = region.first_pages[index : index + 2]
            here = self._filling.residency.missing_count(first, end)
            missing += here << region.unit_shift(index, self._wire)
        return missing

    async def _wait_still(self) -> None:
        """Return when nothing is in flight, and nothing will be."""
        residency = self._filling.residency
        while True:
            began = trio.current_time()
            is_over = self._background.paused or residency.find(State.MISSING, 0) is None
            if is_over and not residency.is_in_flight():
                return
            await trio.sleep(max(_LOOK_SECONDS, (trio.current_time() - began) / _LOOK_SHARE))

    def hear(self, message: Pause | Stale) -> None:
        """Act on what the source says. :exc:`~pagenet.errors.RemoteProtocolError` if it may not say
        that now."""
        if self.frozen.is_set():
            raise RemoteProtocolError("the source speaks of rounds after the last one")
        if isinstance(message, Pause):
            self._background.pause()
        else:
            self._drop(message)

    def _drop(self, stale: Stale) -> None:
        if stale.round != self._round or self._told != self._round:
            raise RemoteProtocolError(
                f"the source names stale pages of round {stale.round}, and round {self._round} is"
                " not over"
            )
        if stale.first >= self._wire.pages:
            raise RemoteProtocolError(
                f"the source names stale pages from page {stale.first} on, of {self._wire.pages}"
            )
        self._filling.drop_stale(self._wire, stale.first, stale.bits)
        if stale.more:
            return
        self._round += 1
        if stale.frozen:
            self._end()
        else:
            self._fetch_in_order()
        self._background.resume()
        self._news.set()

    def _fetch_in_order(self) -> None:
        """Fetch what is missing in the order of the pages' numbers."""
        filling = self._filling
        self._background.set_schedule(make_schedule("linear", filling.region, filling.residency))

    def _end(self) -> None:
        self._filling.keep_copied()
        self._lanes.withhold(False)
        self._filling.withhold(False)  # after the lanes: it has the faults come again
        self._background.set_max_bandwidth(None)
        self._background.set_schedule(self.schedule())
        if not self._begins:
            self._background.hold()
        self.frozen.set()
