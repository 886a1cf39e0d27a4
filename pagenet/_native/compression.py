"""Compressed pages, and whether to compress: the choice of a source for one connection, and that of
a destination for pages that threads wait for."""

from __future__ import annotations

from ._declarations import pn_choice, pn_demand_choice
from ._library import ffi, lib, new_struct


class Packer:
    """Compresses pages. Calls are independent of each other."""

    def __init__(self) -> None:
        self._state = ffi.new("uint64_t[]", lib.pn_pack_state() // 8 + 1)
        self._room = bytearray()

    def pack(self, pages: memoryview) -> memoryview | None:
        """Compress pages (2 MiB at most) into one LZ4 block behind their checksum.

        The result is valid until the next call. None: compressing would save too little.
        """
        if len(self._room) < len(pages):
            self._room = bytearray(len(pages))
        length = lib.pn_pack(
            self._state, ffi.from_buffer(pages), len(pages), ffi.from_buffer(self._room)
        )
        return memoryview(self._room)[:length] if length else None


def unpack(data: memoryview, into: memoryview) -> bool:
    """Decompress ``data`` into ``into``. False: ``data`` is not what ``len(into)`` bytes of pages
    become, and ``into`` may hold anything."""
    return not lib.pn_unpack(ffi.from_buffer(data), len(data), ffi.from_buffer(into), len(into))


class Choice:
    """``struct pn_choice``: whether one connection of a source compresses. Times are in ns, of one
    clock."""

    def __init__(self) -> None:
        self._choice = new_struct(pn_choice)
        lib.pn_choice_init(self._choice)

    @property
    def packs(self) -> bool:
        return bool(lib.pn_choice_packs(self._choice))

    @property
    def for_demand(self) -> bool:
        """Whether compressing pays even for a page that a thread waits for."""
        return bool(lib.pn_choice_for_demand(self._choice))

    def wants_sample(self, now: int) -> bool:
        return bool(lib.pn_choice_wants_sample(self._choice, now))

    def tried(self, size: int, length: int, nanoseconds: int) -> None:
        """Note that compressing ``size`` bytes took ``nanoseconds`` and left ``length`` bytes, or
        (0) too many."""
        lib.pn_choice_tried(self._choice, size, length, nanoseconds)

    def resume(self, now: int) -> None:
        """Note that there was nothing to do until ``now``."""
        lib.pn_choice_resume(self._choice, now)

    def answered(self, size: int, wire: int, began: int, now: int) -> None:
        """Note that ``size`` bytes of pages were sent, as ``wire`` bytes on the wire, from
        ``began`` to ``now``."""
        lib.pn_choice_answered(self._choice, size, wire, began, now)


class DemandChoice:
    """``struct pn_demand_choice``: whether pages that threads wait for come compressed. Times are
    in ns."""

    def __init__(self) -> None:
        self._choice = new_struct(pn_demand_choice)
        lib.pn_demand_choice_init(self._choice)

    @property
    def packs(self) -> bool:
        """Whether these pages are to be asked for compressed, whatever that costs."""
        return bool(lib.pn_demand_choice_packs(self._choice))

    def came(self, packs: bool, nanoseconds: int) -> None:
        """Note that a page, asked for compressed or not (``packs``), took ``nanoseconds`` for each
        of its 4 KiB. Not for pages of zeros."""
        lib.pn_demand_choice_came(self._choice, packs, nanoseconds)
