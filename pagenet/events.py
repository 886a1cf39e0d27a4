"""Events of a long-running side while it works: a name and some fields, for a log line or a JSON
object."""

from __future__ import annotations

from typing import Protocol

__all__ = ["EventHandler", "ignore_events"]


class EventHandler(Protocol):
    """Called from the Trio thread. Must not block. Field values are what JSON can hold."""

    def __call__(self, event: str, /, **fields: object) -> None: ...


def ignore_events(event: str, /, **fields: object) -> None:
    pass
