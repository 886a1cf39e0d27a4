"""A destination's session with a source: the control connection, and lanes on request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from .. import transport
from ..errors import ConnectionBroken, RemoteProtocolError, SourceDisconnected, SourceLost
from ..heartbeat import Heartbeat
from ..nurseries import open_failing_nursery
from ..protocol import (
    ALIVE,
    TRACKED,
    Alive,
    Bye,
    Channel,
    Failure,
    Hello,
    Pause,
    Paused,
    Stale,
    printable,
)
from ..region import Region
from ..session import MessageStream, telling
from ..transport import Connection

__all__ = ["SourceSession"]


def _sizes(region: Region) -> list[tuple[int, int]]:
    """What makes the numbers of the pages. The names of blocks do not: they come from the path by
    which the memory was opened."""
    return [(block.size, block.page_size) for block in region.blocks]


class SourceSession:
    """A source that has said hello. ``open_lane`` opens a connection for a channel of it. Owns the
    connections of the session, that of ``stream`` first.

    :exc:`~pagenet.errors.RemoteProtocolError` if the source's hello is none of a source.
    """

    def __init__(
        self,
        stream: MessageStream,
        hello: Hello,
        open_lane: Callable[[SourceSession, Channel], Awaitable[Connection]],
    ) -> None:
        if hello.region is None:
            raise RemoteProtocolError("the source's hello has no block table")
        self._stream = stream
        self._open_lane = open_lane
        self.region = hello.region
        self.identity = hello.identity
        self.features = hello.features
        self.session_id = hello.session
        self.peer = stream.connection.peer
        #: the source's names, where it is authenticated
        self.names = transport.identity_of(stream.connection)
        self.heartbeat = Heartbeat(stream, ALIVE in hello.features)
        self.connections = [stream.connection]
        #: it was closed
        self.is_over = False

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self.is_over = True
        for connection in self.connections:
            connection.close()

    async def open_lane(self, channel: Channel) -> Connection:
        """Open a connection for that channel. The hellos are exchanged, and its lane may begin."""
        return await self._open_lane(self, channel)

    @property
    def is_tracked(self) -> bool:
        """Whether the source's memory changes while it is served."""
        return TRACKED in self.features

    @property
    def may_be_followed(self) -> bool:
        """Whether another session may take the place of this one."""
        return self.is_over or self.heartbeat.is_doubtful

    def check_follows(self, former: SourceSession) -> None:
        """Raise :exc:`SourceLost` unless this session is with the source of ``former``, and serves
        the same pages."""
        if self.names != former.names:
            names = ", ".join(self.names) or "no name"
            raise SourceLost(f"another source answers: {names}")
        if (self.identity, _sizes(self.region)) != (former.identity, _sizes(former.region)):
            was, now = (session.identity.hex()[:8] for session in (former, self))
            raise SourceLost(
                "another source answers, or it has other pages now"
                + (f": {now} instead of {was}" if was != now else "")
            )
        if self.is_tracked:
            raise SourceLost("the source answers, and its memory changes again")

    async def watch(self, on_round: Callable[[Pause | Stale], None] | None = None) -> None:
        """Raise the error that ends the session.

        The destination is the side that says goodbye, so an end that comes from the source is
        always an error: :exc:`SourceLost` or :exc:`RemoteProtocolError`. ``on_round``: called with
        what a tracked source says of its rounds.
        """
        try:
            async with open_failing_nursery() as nursery:
                nursery.start_soon(self.heartbeat.run)
                async with telling(self._stream):
                    while True:
                        await self._watch_once(on_round)
        except ConnectionBroken as error:
            raise SourceDisconnected(f"the source is gone: {error}") from None

    async def _watch_once(self, on_round: Callable[[Pause | Stale], None] | None) -> None:
        match await self._stream.receive():
            case Pause() | Stale() as message if on_round is not None:
                on_round(message)
            case Alive():
                pass
            case None | Bye():
                raise SourceDisconnected(f"the source {self.peer} has closed the session")
            case Failure("source-lost", text):
                raise SourceLost(f"the source cannot go on: {text}")
            case Failure(_, text):
                raise SourceLost(f"the source {self.peer} gave up: {text}")
            case Hello():
                raise RemoteProtocolError("the source says hello twice")
            case Pause() | Paused() | Stale():
                raise RemoteProtocolError(
                    "the source speaks of rounds, and did not say that it is tracked"
                )

    async def say_paused(self, round_: int, missing: int) -> None:
        """Tell a tracked source that nothing is in flight."""
        try:
            await self._stream.send(Paused(round_, missing))
        except ConnectionBroken as error:
            raise SourceDisconnected(f"the source is gone: {error}") from None

    async def say_bye(self, complete: bool, reason: str = "") -> None:
        """Tell the source, if it still listens, that we are done, or why we give up."""
        with trio.CancelScope(shield=True):
            await self._stream.tell(
                Failure("gave-up", printable(reason)) if reason else Bye(complete)
            )
