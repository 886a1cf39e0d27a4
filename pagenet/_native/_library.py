"""The C core itself: ``ffi`` and ``lib``, with types. Only modules of this package touch them.

``-errno`` becomes :exc:`OSError` here. Every call drops the GIL, so one that waits for a page fault
stalls its own thread alone. Buffers are passed by address: the caller keeps them alive and mapped.
"""

from __future__ import annotations

import os
from typing import TypeVar, cast

from _cffi_backend import FFI

from .._pagenet import ffi as _ffi
from .._pagenet import lib as _lib
from ._declarations import Library
from ._pointers import Null, Struct

T = TypeVar("T")
S = TypeVar("S", bound=Struct)

ffi: FFI = _ffi
lib: Library = _lib
NULL = cast(Null, _ffi.NULL)


def new_struct(kind: type[S], value: object = None) -> S:
    """One that lives as long as it is referred to, zero throughout but for ``value``."""
    return cast(S, ffi.new(f"struct {kind.__name__} *", value))


def new_array(kind: type[S], values: object) -> S:
    """As many as ``values`` says, or has."""
    return cast(S, ffi.new(f"struct {kind.__name__}[]", values))


def struct_at(kind: type[S], address: int) -> S:
    return cast(S, ffi.cast(f"struct {kind.__name__} *", address))


def check(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def opened(thing: T | None) -> T:
    """What ``close`` has not given back. :exc:`TypeError` if it has: C would use memory that is
    gone."""
    if thing is None:
        raise TypeError("it is closed")
    return thing
