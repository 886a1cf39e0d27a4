"""The end of a transfer that is not complete: what is missing, and what becomes of the owner."""

from __future__ import annotations

from ..errors import UsageError
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
    """Ends a transfer that is not complete: tells what is missing, and if the source is lost for
    good, does to the owner what ``on_loss`` says.

    ``is_still``: the source's memory does not change any more from the beginning on, and so nobody
    but the owner may go on.

    Raises :exc:`~pagenet.errors.Unsupported` if that cannot be done to this owner, and
    :exc:`~pagenet.errors.UsageError` for a file, which has none.
    """

    def __init__(
        self, filling: Filling, on_loss: OnLoss, is_still: bool, on_event: EventHandler
    ) -> None:
        self._is_still = is_still
        self._filling, self._on_loss, self._on_event = filling, on_loss, on_event
        self._is_armed = self._is_lost = False
        self._target: Owned | None = None
        target = filling.target
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

    def call_off(self) -> None:
        """Note that nothing is missing, because the owner's guest has gone back to its pages."""
        self._is_armed = self._is_lost = False

    def run(self) -> None:
        """Call it when the lanes have ended. It does nothing if the transfer is complete, or has
        not begun."""
        has_begun = self._is_armed or (self._is_lost and self._is_still)
        if not has_begun or self._filling.completed.is_set():
            return
        try:
            self._tell()
        finally:
            if self._is_lost:
                self._deal_with_owner()

    def _tell(self) -> None:
        blocks = [
            (block.name, block.size, block.page_size) for block in self._filling.region.blocks
        ]
        runs = missing_of(self._filling)
        self._on_event("missing", pages=sum(run[2] for run in runs), runs=runs, blocks=blocks)

    def _deal_with_owner(self) -> None:
        if self._target is None:
            return
        if self._on_loss == "poison":
            self._on_event("poisoned", pages=self._filling.poison(self._target))
        elif (pid := self._target.kill()) is not None:
            self._on_event("killed", pid=pid)
