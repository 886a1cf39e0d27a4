"""The C core itself: ``ffi`` and ``lib``, with types. Only modules of this package use them.

``-errno`` becomes :exc:`OSError` here. Every call releases the GIL, so a call that waits for a page
fault stalls its own thread alone. Buffers are passed by address: the caller keeps them alive and
mapped.
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
    """A new struct, zero except for ``value``. It lives as long as it is referenced."""
    return cast(S, ffi.new(f"struct {kind.__name__} *", value))


def new_array(kind: type[S], values: object) -> S:
    """A new array: of the structs in ``values``, or of that many zero ones if it is a number."""
    return cast(S, ffi.new(f"struct {kind.__name__}[]", values))


def struct_at(kind: type[S], address: int) -> S:
    return cast(S, ffi.cast(f"struct {kind.__name__} *", address))


def check(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def opened(thing: T | None) -> T:
    """``thing``. :exc:`TypeError` if ``close`` has set it to None: C would use memory that is
    gone."""
    if thing is None:
        raise TypeError("it is closed")
    return thing
