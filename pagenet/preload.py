"""Libraries that the dynamic loader puts into a program which knows nothing of pagenet."""

from __future__ import annotations

from pathlib import Path

from .errors import Unsupported

__all__ = ["loadable"]


def loadable(path: Path) -> Path:
    """``path``, for LD_PRELOAD. :exc:`Unsupported` if there is no such file, or if the dynamic
    loader would not load it: the loader goes on without a library that it cannot load."""
    if not path.exists():
        raise Unsupported(
            f"{path} is missing: install pagenet again, or run python setup.py build_ext --inplace"
        )
    if any(character.isspace() or character in ":$" for character in str(path)):
        raise Unsupported(
            f"LD_PRELOAD cannot name {path}: install pagenet where no space, colon or dollar is in"
            " the path"
        )
    return path
