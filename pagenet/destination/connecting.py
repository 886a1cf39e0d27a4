"""A transfer's connections to its source, which come back by themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from math import inf

import trio

from ..errors import SourceDisconnected, SourceLost
from ..events import EventHandler
from ..nurseries import open_failing_nursery, running_beside
from ..protocol import Channel, Pause, Stale
from ..redialling import NOT_NOW, PAUSE
from ..transport import Connection
from .filling import Filling
from .lanes import Lanes
from .source_session import SourceSession
from .sources import Sources

__all__ = ["Connecting"]

# Seconds between two events about a source that is still away.
_TELL_SECONDS = 60.0


class Connecting:
    """Keeps the lanes connected to the source, session by session, from ``session`` on.

    ``channels``: those that pages go over. ``patience``: seconds for which a source that is away is
    waited for; infinity: for ever.
    """

    def __init__(
        self,
        sources: Sources,
        session: SourceSession,
        lanes: Lanes,
        channels: Sequence[Channel],
        filling: Filling,
        patience: float,
        on_event: EventHandler,
    ) -> None:
        self._sources, self.session, self._lanes = sources, session, lanes
        self._channels, self._filling = channels, filling
        self._patience = patience
        self._on_event = on_event
        #: why the source is away; None: it is there
        self.away: str | None = None
        #: how often it has come back
        self.reconnected = 0
        self._since = 0.0  # time when it went away
        self._is_settled = False
        self._given_up = trio.Event()

    def give_up(self) -> None:
        """Wait no longer for a source that is away, now or later."""
        self._patience = 0.0
        self._given_up.set()

    @property
    def seconds_away(self) -> float:
        return 0.0 if self.away is None else trio.current_time() - self._since

    async def run(
        self,
        begun: Callable[[], Awaitable[None]],
        settled: Callable[[], Awaitable[None]],
        on_round: Callable[[Pause | Stale], None] | None,
    ) -> None:
        """Run the lanes, from the time when ``begun`` has returned, until cancelled.

        :exc:`~pagenet.errors.SourceLost` when the source is gone for good, or before ``settled``
        has returned. ``on_round``: what a tracked source says of its rounds, in the first session.
        """
        while True:
            successor: SourceSession | None = None
            try:
                successor = await self._run_session(begun, settled, on_round)
                error = SourceDisconnected(f"the source is silent: {self.session.peer}")
            except SourceDisconnected as lost:
                if self._patience <= 0 or not self._is_settled:
                    raise
                error = lost
            await self._reconnect(error, successor)
            on_round = None

    async def _run_session(
        self,
        begun: Callable[[], Awaitable[None]],
        settled: Callable[[], Awaitable[None]],
        on_round: Callable[[Pause | Stale], None] | None,
    ) -> SourceSession:
        """Run the lanes over this session. Returns the next session, with the same source, which
        answers there and not here."""
        async with open_failing_nursery() as nursery:
            nursery.start_soon(self.session.watch, on_round)
            nursery.start_soon(self._run_lanes, begun)
            await settled()
            self._is_settled = True
            if self._patience <= 0:
                await trio.sleep_forever()
            successor = await self._sources.successor(self.session)
            nursery.cancel_scope.cancel()
        return successor

    async def _run_lanes(self, begun: Callable[[], Awaitable[None]]) -> None:
        await begun()
        await self._lanes.run()

    async def _reconnect(self, error: SourceDisconnected, successor: SourceSession | None) -> None:
        """Have the lanes go over ``successor``, or the next session that there is.
        :exc:`SourceLost` when the source has been waited for long enough."""
        former = self.session
        former.close()
        self.away, self._since = str(error), trio.current_time()
        self._on_event("disconnected", peer=former.peer, reason=self.away)
        connections: list[Connection] = []
        with trio.move_on_after(self._patience):
            async with (
                running_beside(self._lanes.idle),
                running_beside(self._tell),
                running_beside(self._hear_of_surrender),
            ):
                connections = await self._connect(former, successor)
        if not connections:
            for_long = "" if self._patience in (0.0, inf) else f" within {self._patience:g} s"
            raise SourceLost(f"the source does not come back{for_long}: {self.away}")
        self._filling.ask_again()
        self._lanes.resume(connections)
        seconds = round(self.seconds_away, 3)
        self.away = None
        self.reconnected += 1
        self._on_event("reconnected", peer=self.session.peer, seconds=seconds)

    async def _connect(
        self, former: SourceSession, session: SourceSession | None
    ) -> list[Connection]:
        while True:
            if session is None:
                session = await self._sources.meet_again(former, self._note_failure)
            try:
                connections = [await session.open_lane(channel) for channel in self._channels]
            except NOT_NOW as error:
                self._note_failure(str(error))
                session.close()
                session = None
                await trio.sleep(PAUSE)
            else:
                self.session = session
                return connections

    async def _hear_of_surrender(self) -> None:
        await self._given_up.wait()
        raise SourceLost(f"told to give up: {self.away}")

    def _note_failure(self, reason: str) -> None:
        self.away = reason

    async def _tell(self) -> None:
        while True:
            await trio.sleep(_TELL_SECONDS)
            seconds = round(self.seconds_away)
            self._on_event("reconnecting", seconds=seconds, reason=self.away)
