"""The lane of a guest that is filled from a host cache, in C, by a thread of a crew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from .. import _native
from ..background.pacing import Background
from ..region import Region
from .filling import Filling
from .native_lanes import LoopLanes, lane_error

__all__ = ["CachedLanes"]


class CachedLanes(LoopLanes):
    """Fills ``filling`` from ``cache``: what its threads touch, and what ``background`` names."""

    name = "cached"

    def __init__(
        self,
        filling: Filling,
        wire: Region,
        background: Background,
        cache: _native.Cache,
        crew: _native.Crew,
    ) -> None:
        super().__init__(filling, wire, background, 1)
        self._cache, self._crew = cache, crew

    def resume(self, connections: Sequence[Any]) -> None:
        raise NotImplementedError("a host cache does not go away")

    def _start_loops(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._run_lane)

    async def _run_lane(self) -> None:
        lane = self._dest.start_lane(
            self._crew, self._cache, self._stop_fd, self._rings[0], self._background.chunk
        )
        with trio.CancelScope(shield=True):  # it is stopped by its descriptor
            await trio.lowlevel.wait_readable(lane.fd)
        end = lane.close()
        if end.kind != _native.END_STOPPED:
            raise lane_error(end, "the cache")
