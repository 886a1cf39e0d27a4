"""One thing that was tried, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Check", "Level", "absent", "fine", "lacking", "useless"]

#: ``missing``: pagenet cannot fill memory on this host. ``warning``: something does not work, or
#: works less well. ``absent``: what not every host needs is not there.
Level = Literal["ok", "absent", "warning", "missing"]


@dataclass(frozen=True, slots=True)
class Check:
    """``found``: what is there. ``advice``: what does not work without, and what to do about it;
    empty if all is well."""

    name: str
    level: Level
    found: str
    advice: str = ""


def fine(name: str, found: str) -> Check:
    return Check(name, "ok", found)


def absent(name: str, found: str, advice: str) -> Check:
    return Check(name, "absent", found, advice)


def lacking(name: str, found: str, advice: str) -> Check:
    return Check(name, "warning", found, advice)


def useless(name: str, found: str, advice: str) -> Check:
    return Check(name, "missing", found, advice)
