"""How a peer that does not answer any more is dialled again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import trio

from .errors import ConnectionBroken, ProtocolError, SourceLost, SourceUnreachable
from .heartbeat import Heartbeat
from .nurseries import open_failing_nursery, running_beside

__all__ = ["NOT_NOW", "PAUSE", "dial_again", "dial_beside"]

#: Seconds from the beginning of one attempt to that of the next. They overlap: on a path that comes
#: back, the packet that opens an older attempt would come again only after a second or more.
PAUSE = 0.5
# Seconds that an attempt may take: more than any path takes for its few round trips.
_ATTEMPT = 5.0

#: errors of an attempt after which another one may succeed
NOT_NOW = (SourceUnreachable, ConnectionBroken, ProtocolError, SourceLost)


class Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


async def dial_again(dial: Callable[[], Awaitable[T]], on_failure: Callable[[str], None]) -> T:
    """What ``dial`` returns, which is called again and again until it succeeds. ``on_failure`` is
    called with the reason of each failure."""
    found: list[T] = []
    async with open_failing_nursery() as nursery:

        async def attempt() -> None:
            with trio.move_on_after(_ATTEMPT) as waiting:
                try:
                    answer = await dial()
                except NOT_NOW as error:
                    on_failure(str(error))
                    return
                if found:  # another attempt was faster
                    answer.close()
                else:
                    found.append(answer)
                    nursery.cancel_scope.cancel()
            if waiting.cancelled_caught:
                on_failure(f"no answer within {_ATTEMPT:g} s")

        while True:
            nursery.start_soon(attempt)
            await trio.sleep(PAUSE)
    return found[0]


async def dial_beside(heartbeat: Heartbeat, dial: Callable[[], Awaitable[T]]) -> T:
    """What ``dial`` returns, which is called once the peer of ``heartbeat`` is silent, and again
    until it succeeds or the peer is sound."""
    while True:
        await heartbeat.wait_silent()
        with trio.CancelScope() as scope:
            async with running_beside(_cancel_when_sound, heartbeat, scope):
                return await dial_again(dial, lambda reason: None)


async def _cancel_when_sound(heartbeat: Heartbeat, scope: trio.CancelScope) -> None:
    await heartbeat.wait_sound()
    scope.cancel()
