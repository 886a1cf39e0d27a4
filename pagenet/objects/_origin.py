"""The seam to where the bytes of one object come from."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from ..errors import PagenetError, SourceUnreachable
from ..protocol import printable

__all__ = ["ObjectStat", "Origin", "Refused", "Transient", "object_identity", "unreachable"]


class Transient(Exception):
    """A request has failed, and may be made again: busy, broken, cut off, wrong in a way that is
    not the object's."""


class Refused(Exception):
    """A request has failed, and would fail again. ``is_absent``: there is no such object;
    ``is_changed``: another one than before."""

    def __init__(self, text: str, is_absent: bool = False, is_changed: bool = False) -> None:
        super().__init__(text)
        self.is_absent, self.is_changed = is_absent, is_changed


@dataclass(frozen=True, slots=True)
class ObjectStat:
    size: int
    #: as the store names this content; None: it does not
    etag: str | None
    #: whether another ETag is another object: not so where bytes are checked otherwise
    is_pinned: bool = True

    def is_of(self, size: int, etag: str | None) -> bool:
        """Whether an object of that size and ETag is the one."""
        return self.size == size and (not self.is_pinned or self.etag == etag)


class Origin(Protocol):
    """One object. Requests are made once each; await them in a :class:`~._loop.Loop`. They raise
    :exc:`Transient` and :exc:`Refused`."""

    @property
    def name(self) -> str:
        """Its URI."""
        ...

    @property
    def kind(self) -> str:
        """What answers, for people: ``store``."""
        ...

    @property
    def names_content(self) -> bool:
        """Whether another content has another ETag."""
        ...

    async def stat(self) -> ObjectStat: ...

    def read(
        self, start: int, end: int, stat: ObjectStat, is_urgent: bool
    ) -> AsyncGenerator[bytes, None]:
        """Bytes ``start`` to ``end`` of that very content, part by part. What is handed out is
        right even if the rest does not come. ``is_urgent``: a thread waits for them."""
        ...

    def close(self) -> None:
        """Drop the connections. Idempotent."""
        ...


def object_identity(name: str, etag: str | None) -> str:
    """What distinguishes its content from that of any other object."""
    return f"object {name} {etag}"


def unreachable(origin: str, kind: str, deadline: float, error: Transient) -> PagenetError:
    return SourceUnreachable(
        f"{printable(origin)}: the {kind} has not answered for {deadline:g} s: {error}"
    )
