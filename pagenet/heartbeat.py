"""Whether the peer of a session still runs: both sides say so twice a second on the control
connection.

The kernel answers for a process that is stopped or hangs, and a path that swallows everything tells
nobody. A beat comes from the program itself, so a side that hears none knows. What comes on the
session's lanes counts too: on a path that loses much, each connection alone stands still for
seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import trio

from .errors import ConnectionBroken, ConnectionClosed
from .nurseries import open_failing_nursery
from .protocol import Alive
from .session import MessageStream
from .transport import is_near, resumes_at_once

__all__ = ["PATIENCE", "SHORT_SILENCE", "SILENCE", "Heartbeat"]

# Seconds between two beats.
BEAT = 0.5
#: Seconds without a byte after which the peer may have lost us, or we the peer: another session is
#: tried beside this one. A path of 50 ms that loses 30 % of its packets is silent for 2 s now and
#: then.
SILENCE = 3.0
#: The same on a short path. It is down: a long one may only have lost many packets.
SHORT_SILENCE = 1.0
#: Seconds without a byte after which the peer is lost.
PATIENCE = 10.0
# Seconds within which TCP sends again on each connection, once the path is back: at most one, and a
# round trip.
_RESUMING = 1.25
# Seconds between two looks. If this process stands still for longer than two of them, that is not
# the peer's silence.
_LOOK = 0.25


class Heartbeat:
    """The beats on ``stream``, whose messages somebody else receives. ``expects``: the peer sends
    beats, too; otherwise it is never silent."""

    def __init__(self, stream: MessageStream, expects: bool) -> None:
        self._stream = stream
        self._on_lanes: Callable[[], int] = lambda: 0
        self._expects = expects
        #: seconds since a byte of the peer came, without those in which this process stood still
        self.silent = 0.0
        self._silence = trio.Event()
        self._silent_at = -inf  # time of the last silence
        self._lanes_then = 0
        self._resumes = resumes_at_once(stream.connection)
        self._is_near = is_near(stream.connection)

    def count_lanes(self, on_lanes: Callable[[], int]) -> None:
        """Have a change of what ``on_lanes`` returns mean that something of the peer has come on
        the session's lanes."""
        self._on_lanes = on_lanes

    async def run(self) -> None:
        """Beat until cancelled. :exc:`ConnectionBroken` once the peer has sent nothing for
        ``PATIENCE`` seconds."""
        if not self._expects:
            return
        async with open_failing_nursery() as nursery:
            nursery.start_soon(self._beat)
            await self._listen()

    async def _beat(self) -> None:
        while True:
            await trio.sleep(BEAT)
            try:
                await self._stream.send(Alive())
            except (ConnectionBroken, ConnectionClosed):
                return  # whoever receives on this connection learns it too, and knows why

    async def _listen(self) -> None:
        heard, looked = self._heard(), trio.current_time()
        while self.silent < PATIENCE:
            await trio.sleep(_LOOK)
            past, looked = trio.current_time() - looked, trio.current_time()
            if heard != (heard := self._heard()):
                self.silent = 0.0
                if self._silence.is_set():
                    self._silence = trio.Event()
            else:
                self.silent += min(past, 2 * _LOOK)
            if self.is_silent:
                self._silent_at, self._lanes_then = looked, self._on_lanes()
                self._silence.set()
        peer = self._stream.connection.peer
        raise ConnectionBroken(f"{peer} has sent nothing for {PATIENCE:g} s")

    def _heard(self) -> tuple[int, int]:
        return self._stream.received, self._on_lanes()

    @property
    def is_silent(self) -> bool:
        """Whether nothing has come for ``SILENCE`` seconds, or ``SHORT_SILENCE``."""
        return self.silent >= (SHORT_SILENCE if self._is_near else SILENCE)

    @property
    def is_doubtful(self) -> bool:
        """Whether another session would be better: this one is silent, or was so a short while ago,
        and its lanes, which are other connections, may stand still for as long again as the path
        was down; for a second where TCP resumes at once. Where such a path is long, they may have
        lost packets as this connection has, and are left their time."""
        since = trio.current_time() - self._silent_at
        if not self._resumes:
            has_resumed = since >= PATIENCE
        elif self._is_near:
            has_resumed = since >= _RESUMING or self._on_lanes() != self._lanes_then
        else:
            has_resumed = True
        return self.is_silent or not has_resumed

    async def wait_silent(self) -> None:
        """Return when nothing has come for as long as :attr:`is_silent` has it."""
        while not self.is_silent:
            await self._silence.wait()

    async def wait_sound(self) -> None:
        """Return when no other session would be better."""
        while self.is_doubtful:  # noqa: ASYNC110
            await trio.sleep(_LOOK)
