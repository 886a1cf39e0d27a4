"""The interface of connections beside which destinations read the source's memory themselves."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from ..transport import LaneKind
from .memory import Source

__all__ = ["PIN_LIMIT", "OneSided", "ReadableMemory"]

# Bytes of the source's memory that may be registered at a time, for all destinations together.
# Registered memory cannot be swapped or moved: a source pins what destinations are reading, not all
# that it has.
PIN_LIMIT = 256 << 20


class ReadableMemory(Protocol):
    """A source's memory on one path, of which destinations have the keys to parts."""

    @property
    def pinned(self) -> int:
        """Bytes to which a destination has a key now."""
        ...

    @property
    def granted(self) -> int:
        """Pages whose keys were granted until now, those that were granted again included."""
        ...

    def close(self) -> None:
        """Call after the last connection that it serves has ended. Idempotent."""
        ...


@runtime_checkable
class OneSided(Protocol):
    """A connection beside which the destination reads pages out of the source's memory itself. It
    carries only the messages that this takes."""

    @property
    def peer(self) -> str:
        """As :attr:`pagenet.transport.Connection.peer`."""
        ...

    def find_path(self) -> str:
        """The device and address by which its pages go, in readable form.

        Raises :exc:`~pagenet.errors.Unsupported` if there is none.
        """
        ...

    def open_memory(self, source: Source, pin_limit: int, lane: LaneKind) -> ReadableMemory:
        """Prepare ``source`` to be read by destinations on this path, at most ``pin_limit`` bytes
        of it at a time.

        The result is for :meth:`serve_reads` of any connection on the same path.
        """
        ...

    async def serve_reads(self, memory: Any, unread: bytes) -> None:
        """Let the peer read, until it closes. ``unread``: what was received from it already.

        Raises :exc:`~pagenet.errors.SourceLost`, after the peer has been told: it ends everything.
        The other errors end this connection alone: :exc:`~pagenet.errors.ConnectionBroken`,
        :exc:`~pagenet.errors.RemoteProtocolError`, and :exc:`~pagenet.errors.Unsupported` if this
        process may not do what it takes, of which the peer has been told as well.
        """
        ...
