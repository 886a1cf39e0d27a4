"""Conflict detection for backends: two tasks in one direction of a connection is a mistake, not a
queue."""

from __future__ import annotations

from .errors import ConnectionBusy

__all__ = ["OneTask"]


class OneTask:
    """Held by the task that is in a stretch of code; a second one that wants in gets
    ConnectionBusy, not a wait."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.held = False

    def __enter__(self) -> None:
        if self.held:
            raise ConnectionBusy(f"another task is {self._where} already")
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False
