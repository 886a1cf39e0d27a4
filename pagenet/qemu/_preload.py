"""The path of the library that has an unmodified VMM hand over its memory (native/preload.c)."""

from __future__ import annotations

from pathlib import Path

from ..preload import loadable

__all__ = ["preload_library"]


def preload_library() -> Path:
    """The library's path, for LD_PRELOAD. :exc:`~pagenet.errors.Unsupported` if the library cannot
    be loaded: without it the guest would run on zeros."""
    return loadable(Path(__file__).resolve().with_name("pagenet.preload.so"))
