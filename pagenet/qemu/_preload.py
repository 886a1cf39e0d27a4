"""Where the library is that has an unmodified VMM hand over its memory (native/preload.c)."""

from __future__ import annotations

from pathlib import Path

from ..preload import loadable

__all__ = ["preload_library"]


def preload_library() -> Path:
    """What to put into LD_PRELOAD. :exc:`~pagenet.errors.Unsupported` if it cannot be loaded: the
    guest would run on zeros."""
    return loadable(Path(__file__).resolve().with_name("pagenet.preload.so"))
