"""The interface of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..region import Run

__all__ = ["Schedule"]


class Schedule(Protocol):
    name: str

    def note_faults(self, pages: Sequence[int], now: float) -> None:
        """Threads have waited for these pages, in this order, up to ``now`` (seconds of a monotonic
        clock)."""
        ...

    def next_run(self, max_bytes: int) -> Run | None:
        """MISSING pages to ask for next: within a block, at most ``max_bytes`` but at least one
        page. None: there are none."""
        ...
