"""What brings pages, as the destination sees it, and what it asks of connections beside which it
reads the source's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from ..background.pacing import Background
from ..region import Region
from ..transport import LaneKind
from .filling import Filling

__all__ = ["Lanes", "OneSided"]


class Lanes(Protocol):
    """All that brings pages in one transfer."""

    @property
    def name(self) -> str:
        """``native`` or ``trio``."""
        ...

    async def run(self) -> None:
        """Answer faults and bring what the schedule says, until cancelled.

        :exc:`~pagenet.errors.SourceLost`, :exc:`~pagenet.errors.OwnerGone`,
        :exc:`~pagenet.errors.ProtocolError`, :exc:`~pagenet.errors.HandshakeError` (the owner did
        what it may not).
        """
        ...

    def close(self) -> None:
        """Give back what they own. Not while they run. Idempotent."""
        ...


@runtime_checkable
class OneSided(Protocol):
    """A connection beside which pages are read out of the source's memory."""

    def make_lanes(
        self,
        filling: Filling,
        wire: Region,
        connections: Sequence[Any],
        background: Background,
        kind: LaneKind,
    ) -> Lanes:
        """The lanes over ``connections``, which are all of this kind."""
        ...
