"""How many connections a listener takes on, and what becomes of those whose peers say nothing."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from .errors import RemoteProtocolError

__all__ = ["GRACE", "MAX_STRANGERS", "Admission", "raise_descriptor_limit", "spare_descriptors"]

# : Connections whose peers have not said hello. Each costs a task and 100 KiB at most (half a
# hello, and what it is received : into), so all of them 50 MiB. A peer that connects while others
# do so 1,000 times a second has half a second to say hello.
MAX_STRANGERS = 512

# : Seconds that a stranger has at the limit of connections, before it makes room. A hello comes
# within a round trip.
GRACE = 0.5

# Of the descriptors that this process may have, so many are for what it does besides: a control
# socket, a file to open.
_RESERVED = 32


class Admission:
    """Counts connections and strangers, which are those among them whose peers have not said hello.

    Whoever comes when there are ``max_strangers`` takes the place of the one who has been silent
    for longest. When there are ``max_connections``, a stranger goes too, after GRACE; without one,
    whoever comes waits in the listener's backlog.
    """

    def __init__(self, max_connections: int, max_strangers: int = MAX_STRANGERS) -> None:
        self._max_connections = max_connections
        self._max_strangers = max_strangers
        self._connections = 0
        self._strangers: dict[trio.CancelScope, float] = {}  # when they came, in that order
        self._left = trio.Event()

    @property
    def connections(self) -> int:
        return self._connections

    @property
    def strangers(self) -> int:
        return len(self._strangers)

    async def wait_place(self) -> None:
        """Return once another connection may be accepted."""
        while self._connections >= self._max_connections:
            self._left = trio.Event()
            with trio.move_on_at(
                min(self._strangers.values(), default=trio.current_time()) + GRACE
            ) as waiting:
                await self._left.wait()
            if waiting.cancelled_caught:
                self._evict()

    @contextmanager
    def connection(self) -> Iterator[None]:
        """From when it is accepted until it is closed."""
        self._connections += 1
        try:
            yield
        finally:
            self._connections -= 1
            self._left.set()

    @contextmanager
    def stranger(self) -> Iterator[None]:
        """Until its peer has said hello. :exc:`RemoteProtocolError` if its place was given to
        another."""
        if len(self._strangers) >= self._max_strangers:
            self._evict()
        with trio.CancelScope() as scope:
            self._strangers[scope] = trio.current_time()
            try:
                yield
            finally:
                self._strangers.pop(scope, None)
        if scope.cancelled_caught:
            raise RemoteProtocolError("the peer sent no hello, and others wanted its place")

    def _evict(self) -> None:
        if self._strangers:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.cancel()


def raise_descriptor_limit() -> None:
    """Take the file descriptors that this process may have at all. The soft limit is low for the
    sake of select(2), which pagenet does not use for them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def spare_descriptors() -> int:
    """How many connections this process has file descriptors for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - len(os.listdir("/proc/self/fd")) - _RESERVED, 1)
