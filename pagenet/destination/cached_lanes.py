"""The lane of a guest that is filled from a host cache, in C, by a thread of a crew."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from typing import Any

import trio

from .. import _native
from ..background.pacing import Background
from .filling import Filling
from .native_lanes import LoopLanes, lane_error

__all__ = ["CachedLanes"]


class CachedLanes(LoopLanes):
    """Fills ``filling`` from ``cache``: what its threads touch, from now on, and what
    ``background`` names, while :meth:`run` runs."""

    name = "cached"

    def __init__(
        self,
        filling: Filling,
        background: Background,
        cache: _native.Cache,
        crew: _native.Crew,
    ) -> None:
        # There is no wire: the cache finds pages by their offsets, whatever their sizes are.
        super().__init__(filling, filling.region, background, 1)
        # At once, and not by a task: many guests may arrive at a time.
        self._lane: _native.CrewedLane | None = self._dest.start_lane(
            crew, cache, self._stop_fd, self._rings[0], background.chunk
        )
        self._cleanup.callback(self._end)

    def resume(self, connections: Sequence[Any]) -> None:
        raise NotImplementedError("a host cache does not go away")

    def _start_loops(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._run_lane)

    async def _run_lane(self) -> None:
        assert self._lane is not None, "a lane runs once"
        with trio.CancelScope(shield=True):  # it is stopped by its descriptor
            await trio.lowlevel.wait_readable(self._lane.fd)
        lane, self._lane = self._lane, None
        end = lane.close()
        if end.kind != _native.END_STOPPED:
            raise lane_error(end, "the cache")

    def _end(self) -> None:
        """End a lane that nothing has run: it does so at once."""
        if self._lane is not None:
            os.eventfd_write(self._stop_fd, 1)
            ended = select.poll()  # not select(): a descriptor may have any number
            ended.register(self._lane.fd, select.POLLIN)
            ended.poll()
            self._lane.close()
            self._lane = None
