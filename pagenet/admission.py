"""How many connections a listener accepts, and what happens to those whose peers send no hello."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from .errors import RemoteProtocolError

__all__ = ["GRACE", "MAX_STRANGERS", "Admission", "raise_descriptor_limit", "spare_descriptors"]

#: Limit of connections whose peers have not said hello. Each costs a task and at most 100 KiB (half
#: a hello, and the buffer that it is received into), so all of them 50 MiB. A peer that connects
#: while others do so 1,000 times a second has half a second to say hello.
MAX_STRANGERS = 512

#: Seconds that a stranger has, at the limit of connections, before it makes room. A hello comes
#: within a round trip.
GRACE = 0.5

# File descriptors that are kept for other uses: a control socket, a file to open.
_RESERVED = 32


class Admission:
    """Counts connections, and the strangers among them: connections whose peers have not said
    hello.

    A connection that comes when there are ``max_strangers`` takes the place of the stranger that
    has been silent for longest. When there are ``max_connections``, a new connection takes the
    place of a stranger that is older than GRACE; if there is no stranger, it waits in the
    listener's backlog.
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
    def free(self) -> int:
        """Places for connections; at least 1, because strangers make room."""
        return max(1, self._max_connections - self._connections)

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
        """Count a connection, from when it is accepted until it is closed."""
        self._connections += 1
        try:
            yield
        finally:
            self._connections -= 1
            self._left.set()

    @contextmanager
    def stranger(self) -> Iterator[None]:
        """Count a stranger, until its peer has said hello. :exc:`RemoteProtocolError` if its place
        was given to another connection."""
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
    """Raise the soft limit of file descriptors to the hard limit. The soft limit is low for the
    sake of select(2), which pagenet does not use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def spare_descriptors() -> int:
    """How many connections this process has file descriptors for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - len(os.listdir("/proc/self/fd")) - _RESERVED, 1)
