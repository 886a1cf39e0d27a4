"""Why the loops in C end."""

from __future__ import annotations

from dataclasses import dataclass

from ._declarations import pn_end
from ._library import ffi, lib


@dataclass(frozen=True, slots=True)
class End:
    """Why a loop in C ended: one of the ``END_`` constants, an errno, a line of text."""

    kind: int
    error: int
    text: str


END_STOPPED, END_CLOSED, END_BROKEN = lib.PN_END_STOPPED, lib.PN_END_CLOSED, lib.PN_END_BROKEN
END_PROTOCOL, END_FAILED = lib.PN_END_PROTOCOL, lib.PN_END_FAILED
END_OWNER_GONE, END_OWNER_WRONG = lib.PN_END_OWNER_GONE, lib.PN_END_OWNER_WRONG


def end_of(end: pn_end) -> End:
    text = ffi.string(end.text)
    assert isinstance(text, bytes)
    return End(end.kind, end.error, text.decode(errors="replace"))
