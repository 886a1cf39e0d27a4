"""The types of cffi's objects, for the type checker: each struct is a type of its own, so that no
pointer is taken for another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Self, TypeAlias, overload

from _cffi_backend import FFI

#: a pointer to, or an array of, anything but structs
CData: TypeAlias = FFI.CData


class Null:
    """``ffi.NULL``, as a pointer to any struct."""


class Struct:
    """A struct, a pointer to one, or an array of them: cffi lets all three be used alike.

    This class and those derived from it never have instances: they are only names of types.
    """

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, index: int, /) -> Self: ...
        @overload
        def __getitem__(self, index: slice[int, int, None], /) -> Sequence[Self]: ...
        def __getitem__(self, index: int | slice[int, int, None], /) -> Self | Sequence[Self]: ...
        def __iter__(self) -> Iterator[Self]: ...
        def __eq__(self, other: object, /) -> bool: ...
        def __hash__(self) -> int: ...
