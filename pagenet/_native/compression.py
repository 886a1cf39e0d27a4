"""Compressed pages, and whether to compress them: at a source for one connection, at a destination
for what is waited for."""

from __future__ import annotations

from ._declarations import pn_choice, pn_demand_choice
from ._library import ffi, lib, new_struct


class Packer:
    """Compresses pages, and knows nothing from one call to the next."""

    def __init__(self) -> None:
        self._state = ffi.new("uint64_t[]", lib.pn_pack_state() // 8 + 1)
        self._room = bytearray()

    def pack(self, pages: memoryview) -> memoryview | None:
        """The pages, 2 MiB at most, as one LZ4 block behind their checksum, valid until the next
        call; None if that would save too little."""
        if len(self._room) < len(pages):
            self._room = bytearray(len(pages))
        length = lib.pn_pack(
            self._state, ffi.from_buffer(pages), len(pages), ffi.from_buffer(self._room)
        )
        return memoryview(self._room)[:length] if length else None


def unpack(data: memoryview, into: memoryview) -> bool:
    """Whether ``data`` is what as many bytes of pages as there is room for ``into`` become; they
    are there then."""
    return not lib.pn_unpack(ffi.from_buffer(data), len(data), ffi.from_buffer(into), len(into))


class Choice:
    """``struct pn_choice``: whether one connection of a source's compresses. Times in ns, on one
    clock."""

    def __init__(self) -> None:
        self._choice = new_struct(pn_choice)
        lib.pn_choice_init(self._choice)

    @property
    def packs(self) -> bool:
        return bool(lib.pn_choice_packs(self._choice))

    @property
    def for_demand(self) -> bool:
        """Whether it pays even for a page that somebody waits for."""
        return bool(lib.pn_choice_for_demand(self._choice))

    def wants_sample(self, now: int) -> bool:
        return bool(lib.pn_choice_wants_sample(self._choice, now))

    def tried(self, size: int, length: int, nanoseconds: int) -> None:
        """Compressing ``size`` bytes left ``length``, or (0) too many."""
        lib.pn_choice_tried(self._choice, size, length, nanoseconds)

    def resume(self, now: int) -> None:
        """There was nothing to do until now."""
        lib.pn_choice_resume(self._choice, now)

    def answered(self, size: int, wire: int, began: int, now: int) -> None:
        """So many bytes of pages were sent as so many on the wire, which took from ``began`` to
        ``now``."""
        lib.pn_choice_answered(self._choice, size, wire, began, now)


class DemandChoice:
    """``struct pn_demand_choice``: whether pages that somebody waits for come compressed. Times in
    ns."""

    def __init__(self) -> None:
        self._choice = new_struct(pn_demand_choice)
        lib.pn_demand_choice_init(self._choice)

    @property
    def packs(self) -> bool:
        """Whether they are to be asked for compressed, whatever that costs."""
        return bool(lib.pn_demand_choice_packs(self._choice))

    def came(self, packs: bool, nanoseconds: int) -> None:
        """A page that was asked for like that took so long for each of its 4 KiB. Not one of
        zeros."""
        lib.pn_demand_choice_came(self._choice, packs, nanoseconds)
