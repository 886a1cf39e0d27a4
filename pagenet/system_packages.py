"""Python packages that the system has, and no virtual environment of its Python."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder

__all__ = ["SYSTEM_PACKAGES", "make_importable"]

#: Debian's; a virtual environment does not look here
SYSTEM_PACKAGES = "/usr/lib/python3/dist-packages"


def make_importable(name: str) -> None:
    """Import the package or module ``name`` from there if it is nowhere else. Nothing is done if it
    is not there either. :exc:`ImportError` if it is not for this Python."""
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    spec = PathFinder.find_spec(name, [SYSTEM_PACKAGES])
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
