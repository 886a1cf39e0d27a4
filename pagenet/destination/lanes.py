"""The interface of the destination's lanes, and of connections beside which the destination reads
the source's memory itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from ..background.pacing import Background
from ..region import Region
from ..transport import LaneKind
from .filling import Filling

__all__ = ["Lanes", "OneSided"]


class Lanes(Protocol):
    """Everything that fetches pages in one transfer."""

    @property
    def name(self) -> str:
        """``native`` or ``trio``."""
        ...

    async def run(self) -> None:
        """Answer faults and fetch what the schedule names, until cancelled.

        Raises :exc:`~pagenet.errors.SourceLost`, :exc:`~pagenet.errors.OwnerGone`,
        :exc:`~pagenet.errors.ProtocolError`, :exc:`~pagenet.errors.HandshakeError` (the owner did
        what it may not).
        """
        ...

    async def idle(self) -> None:
        """Answer what needs no source, until cancelled: pages that are in place, and those that
        their owner gives up. To be run while the source is away, and :meth:`run` does not run."""
        ...

    def resume(self, connections: Sequence[Any]) -> None:
        """Have :meth:`run` go over ``connections`` the next time. They are of the same kind as the
        first ones. To be called while neither :meth:`run` nor :meth:`idle` runs, and nothing is in
        flight (:meth:`Filling.ask_again`)."""
        ...

    def withhold(self, withhold: bool) -> None:
        """Make pages that come COPIED, not visible, and leave faults unanswered; or no longer do.

        To be called while no page is in flight.
        """
        ...

    async def give_back(self) -> None:
        """Give back the keys to the source's memory, if it grants any, and forget what it said of
        its memory.

        To be called while no page is in flight.
        """
        ...

    def close(self) -> None:
        """Release what the lanes own. Not to be called while they run. Idempotent."""
        ...


@runtime_checkable
class OneSided(Protocol):
    """A connection beside which the destination reads pages out of the source's memory."""

    def make_lanes(
        self,
        filling: Filling,
        wire: Region,
        connections: Sequence[Any],
        background: Background,
        kind: LaneKind,
    ) -> Lanes:
        """The lanes over ``connections``, all of which are of this class. ``wire``: the region in
        the page sizes of the wire."""
        ...
