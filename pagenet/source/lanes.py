"""What the source asks of connections beside which destinations read its memory themselves."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from ..transport import LaneKind
from .memory import Source

__all__ = ["PIN_LIMIT", "OneSided"]

# Bytes of the source's memory that are registered at the same time, whoever reads it. Registered
# memory cannot be swapped or moved: a source pins as much as destinations are at work on, not all
# that it has.
PIN_LIMIT = 256 << 20


@runtime_checkable
class OneSided(Protocol):
    """A connection beside which the destination reads pages out of the source's memory itself. It
    carries but the words that this takes."""

    @property
    def peer(self) -> str:
        """As :attr:`pagenet.transport.Connection.peer`."""
        ...

    def find_path(self) -> str:
        """By which device and address its pages go, for people to read.
        :exc:`~pagenet.errors.Unsupported` if by none."""
        ...

    def open_memory(self, source: Source, pin_limit: int, lane: LaneKind) -> Any:
        """Make ready to let destinations on this path read ``source``, ``pin_limit`` bytes of it at
        a time. What comes of it is for :meth:`serve_reads` of any connection on the same path, and
        has a ``close``."""
        ...

    async def serve_reads(self, memory: Any, unread: bytes) -> None:
        """Let the peer read, until it closes. ``unread``: what was received from it already.

        :exc:`~pagenet.errors.SourceLost`, after the peer has been told, ends everything; else what
        ends the connection is :exc:`~pagenet.errors.ConnectionBroken`,
        :exc:`~pagenet.errors.RemoteProtocolError`, or :exc:`~pagenet.errors.Unsupported` if this
        process may not do what it takes, of which the peer has been told as well.
        """
        ...
