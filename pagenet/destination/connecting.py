"""A transfer's connections to its source, which come back by themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from ..errors import PagenetError, SourceDisconnected, SourceLost
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


@dataclass(slots=True)
class _Opening:
    """A session whose lanes are being opened."""

    session: SourceSession
    connections: list[Connection] = field(default_factory=list)

    async def run(self, channels: Sequence[Channel]) -> None:
        """Open what is left. May be cancelled, and run again. Errors as of a session that ends."""
        async with running_beside(self.session.watch):
            while len(self.connections) < len(channels):
                channel = channels[len(self.connections)]
                self.connections.append(await self.session.open_lane(channel))


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
        self._next: _Opening | None = None
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
            try:
                self._go_over(await self._run_session(begun, settled, on_round))
            except SourceDisconnected as error:
                if self._patience <= 0 or not self._is_settled:
                    raise
                await self._reconnect(error)
            on_round = None

    async def _run_session(
        self,
        begun: Callable[[], Awaitable[None]],
        settled: Callable[[], Awaitable[None]],
        on_round: Callable[[Pause | Stale], None] | None,
    ) -> _Opening:
        """Run the lanes over this session. Returns the next session, with the same source, which
        answers there and not here, and its lanes."""
        self.session.heartbeat.count_lanes(lambda: self._filling.received)
        async with open_failing_nursery() as nursery:
            nursery.start_soon(self.session.watch, on_round)
            nursery.start_soon(self._run_lanes, begun)
            await settled()
            self._is_settled = True
            if self._patience <= 0:
                await trio.sleep_forever()
            successor = await self._successor()
            nursery.cancel_scope.cancel()
        return successor

    async def _successor(self) -> _Opening:
        """Another session with its lanes, if this one is still silent once they are open. If this
        is cancelled, :meth:`_connect` goes on with it, because the source may close the silent
        session first."""
        while True:
            if self._next is None:
                self._next = _Opening(await self._sources.successor(self.session))
            with suppress(*NOT_NOW):
                opening = await self._open_next(self._next)
                if self.session.may_be_followed:
                    return opening
                await self._sources.decline(opening.session)

    async def _open_next(self, opening: _Opening) -> _Opening:
        try:
            await opening.run(self._channels)
        except NOT_NOW:
            opening.session.close()
            self._next = None
            raise
        self._next = None
        return opening

    async def keep_alive(self) -> None:
        """Keep the session for a farewell, while no page is missing any more."""
        with suppress(PagenetError):
            await self.session.watch()

    async def _run_lanes(self, begun: Callable[[], Awaitable[None]]) -> None:
        await begun()
        await self._lanes.run()

    def _go_over(self, successor: _Opening) -> None:
        """Have the lanes go over another session from now on, because this one was silent."""
        silent = self.session.heartbeat.silent
        self._part(f"the source is silent: {self.session.peer}", silent)
        self._resume(successor)

    def _part(self, reason: str, silent: float = 0.0) -> None:
        self.session.close()
        self.away, self._since = reason, trio.current_time() - silent
        self._on_event("disconnected", peer=self.session.peer, reason=reason)

    def _resume(self, successor: _Opening) -> None:
        self.session = successor.session
        self._filling.ask_again()
        self._lanes.resume(successor.connections)
        seconds, self.away = round(self.seconds_away, 3), None
        self.reconnected += 1
        self._on_event("reconnected", peer=self.session.peer, seconds=seconds)

    async def _reconnect(self, error: SourceDisconnected) -> None:
        """Have the lanes go over the next session. :exc:`SourceLost` when the source has been
        waited for long enough."""
        self._part(str(error))
        found: _Opening | None = None
        with trio.move_on_after(self._patience):
            async with (
                running_beside(self._lanes.idle),
                running_beside(self._tell),
                running_beside(self._fail_when_given_up),
            ):
                found = await self._connect()
        if found is None:
            within = f"within {self._patience:g} s"
            raise SourceLost(f"the source does not come back {within}: {self.away}")
        self._resume(found)

    async def _connect(self) -> _Opening:
        while True:
            if self._next is None:
                met = await self._sources.meet_again(self.session, self._note_failure)
                self._next = _Opening(met)
            try:
                return await self._open_next(self._next)
            except NOT_NOW as error:
                self._note_failure(str(error))
                await trio.sleep(PAUSE)

    async def _fail_when_given_up(self) -> None:
        await self._given_up.wait()
        raise SourceLost(f"told to give up: {self.away}")

    def _note_failure(self, reason: str) -> None:
        self.away = reason

    async def _tell(self) -> None:
        while True:
            await trio.sleep(_TELL_SECONDS)
            seconds = round(self.seconds_away)
            self._on_event("reconnecting", seconds=seconds, reason=self.away)
