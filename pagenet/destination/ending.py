"""The end of a transfer that is not complete: what is missing, and what becomes of the owner."""

from __future__ import annotations

from typing import Self

from ..errors import GuestReclaimed, UsageError
from ..events import EventHandler
from ..target import OnLoss, Owned
from .filling import Filling

__all__ = ["Ending", "missing_of"]


def missing_of(filling: Filling) -> list[tuple[str, int, int]]:
    """Of each run of missing pages: the name of its block, its first page within that block, and
    the number of pages."""
    region, found = filling.region, []
    for run in filling.missing():
        index = region.block_index(run.first)
        found.append((region.blocks[index].name, run.first - region.first_pages[index], run.count))
    return found


class Ending:
    """The end of a transfer, as an asynchronous context manager around all of it. If the transfer
    is not complete, tells what is missing, unless that is not missed: a guest has gone back to its
    source. If the source is lost for good, does to the owner what ``on_loss`` says."""

    def __init__(self, on_loss: OnLoss, on_event: EventHandler) -> None:
        self._on_loss, self._on_event = on_loss, on_event
        self._filling: Filling | None = None
        self._target: Owned | None = None
        self._is_still = self._is_armed = self._is_lost = self._is_told = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, GuestReclaimed):
            self._tell()

    def begin(self, filling: Filling, is_still: bool) -> None:
        """``is_still``: the source's memory does not change any more, and so nobody but the owner
        may go on.

        Raises :exc:`~pagenet.errors.Unsupported` if ``on_loss`` cannot be done to this owner, and
        :exc:`~pagenet.errors.UsageError` for a file, which has none.
        """
        self._filling, self._is_still = filling, is_still
        target, on_loss = filling.target, self._on_loss
        if on_loss == "wait":
            return
        if not isinstance(target, Owned):
            raise UsageError(
                f"nobody touches a file that is filled: on_loss {on_loss} needs memory"
            )
        target.check_loss(on_loss)
        self._target = target

    def arm(self) -> None:
        """Note that faults are answered, and the source's memory does not change any more."""
        self._is_armed = True

    def lose(self) -> None:
        """Note that the source is lost for good."""
        self._is_lost = True
        self._is_armed |= self._is_still

    def deal_with_loss(self) -> None:
        """Call it when the lanes have ended, before the owner is let go."""
        if not self._is_lost or not self._is_armed:
            return
        try:
            self._tell()
        finally:
            self._deal_with_owner()

    def _tell(self) -> None:
        filling = self._filling
        if filling is None or not self._is_armed or self._is_told or filling.completed.is_set():
            return
        self._is_told = True
        blocks = [(block.name, block.size, block.page_size) for block in filling.region.blocks]
        runs = missing_of(filling)
        if not runs:  # an owner that shares pages may have all, and is never complete
            return
        self._on_event("missing", pages=sum(run[2] for run in runs), runs=runs, blocks=blocks)

    def _deal_with_owner(self) -> None:
        if self._target is None or self._filling is None or self._filling.completed.is_set():
            return
        if self._on_loss == "poison":
            self._on_event("poisoned", pages=self._filling.poison(self._target))
        elif (pid := self._target.kill()) is not None:
            self._on_event("killed", pid=pid)
