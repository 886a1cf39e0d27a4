"""Conflict detection for backends: a second task in one direction of a connection is a mistake, and
does not wait for the first."""

from __future__ import annotations

from .errors import ConnectionBusy

__all__ = ["OneTask"]


class OneTask:
    """A lock around a stretch of code that does not wait: a second task that enters gets
    :exc:`ConnectionBusy`. ``where``: what the task does there, for the error."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.held = False

    def __enter__(self) -> None:
        if self.held:
            raise ConnectionBusy(f"another task is {self._where} already")
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False
