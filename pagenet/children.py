"""Processes that pagenet starts of itself."""

from __future__ import annotations

import sys

__all__ = ["module_command"]


def module_command(name: str, *args: str) -> list[str]:
    """The command that runs module ``name`` with ``args``, in this Python and of this pagenet.
    Nothing is imported from the current directory, which may be a stranger's."""
    return [sys.executable, "-P", "-m", name, *args]
