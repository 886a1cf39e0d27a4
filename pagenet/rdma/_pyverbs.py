"""pyverbs: where it is found, and its errors in pagenet's terms."""

from __future__ import annotations

import errno
import importlib
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import Unsupported
from ..system_packages import make_importable

__all__ = ["is_limit", "load", "locked_memory_hint", "registering", "translated"]


def load(name: str) -> Any:
    """Import ``pyverbs.NAME``. :exc:`Unsupported` if there is no pyverbs for this Python."""
    try:
        make_importable("pyverbs")
        return importlib.import_module(f"pyverbs.{name}")
    except ImportError as error:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise Unsupported(
            f"RDMA takes pyverbs for this Python {version}, and it cannot be imported ({error}): "
            "install it (Debian: apt install python3-pyverbs ibverbs-providers)"
        ) from None


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn errors of pyverbs into :exc:`OSError`, which tells what failed (``doing``) and why."""
    errors = load("pyverbs_error")
    try:
        yield
    except errors.PyverbsError as error:
        number = getattr(error, "error_code", 0) or errno.EIO
        raise OSError(number, f"cannot {doing}: {os.strerror(number)}") from None


@contextmanager
def registering() -> Iterator[None]:
    """As :func:`translated`, but :exc:`Unsupported` if this process may lock no more memory."""
    try:
        with translated("register memory for RDMA"):
            yield
    except OSError as error:
        if hint := locked_memory_hint(error):
            raise Unsupported(f"{error.strerror}{hint}") from None
        raise


def is_limit(number: int | None) -> bool:
    """Whether this errno of a registration means the limit of locked memory. It is EPERM where
    nothing may be locked at all."""
    return number in (errno.ENOMEM, errno.EPERM)


def locked_memory_hint(error: OSError) -> str:
    """What to do, if a registration failed because of the limit of locked memory; otherwise
    empty."""
    if not is_limit(error.errno):
        return ""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    may = "any of it" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
    return (
        f" (RDMA locks memory, and this process may lock {may}: say `ulimit -l unlimited` before,"
        " or give it CAP_IPC_LOCK)"
    )
