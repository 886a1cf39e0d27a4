"""Owners that connect, and their first faults, which are answered at once."""

from __future__ import annotations

import os
from typing import NamedTuple, cast

from ._declarations import pn_arrival, pn_greeted, pn_greeter, pn_greeting, pn_map, pn_note
from ._library import NULL, check, ffi, lib, new_array, new_struct, opened, struct_at
from .destination import Cache
from .residency import removals

__all__ = ["GREETINGS", "NOTE_BYTES", "Arrival", "Greeted", "Greeter", "Greeting", "Note"]

#: that there may be at a time, and so of notes
GREETINGS = lib.PN_GREETINGS
#: what one of the notes takes
NOTE_BYTES = ffi.sizeof("struct pn_note")
_EVENTS_AT = ffi.offsetof("struct pn_note", "map")


class Greeted(NamedTuple):
    """A page of 4 KiB that was put into place: its byte of the region, and how long a thread had
    waited for it, in ns."""

    offset: int
    waited: int


class Note:
    """``struct pn_note``, at an address: what was read last from an owner while it was greeted."""

    def __init__(self, address: int) -> None:
        self._address = address
        self._name = struct_at(pn_note, address).name

    @property
    def name(self) -> str:
        """Of the owner; empty: nothing is noted here."""
        return os.fsdecode(ffi.string(self._name, lib.PN_NAME))

    def removals(self) -> list[tuple[int, int]]:
        """What the owner gave up: addresses, start and end of each."""
        return removals(struct_at(pn_map, self._address + _EVENTS_AT))

    def clear(self) -> None:
        ffi.memmove(self._name, bytes(lib.PN_NAME), lib.PN_NAME)


class Greeting:
    """``struct pn_greeting``: what answers the first faults of an owner. Free it."""

    def __init__(self, greeting: pn_greeting) -> None:
        self._greeting: pn_greeting | None = greeting

    def stop_listening(self) -> None:
        """Note that others read the owner's socket from now on."""
        lib.pn_greeting_stop_listening(opened(self._greeting))

    def end(self) -> list[Greeted]:
        """Note that others read the owner's events from now on. Returns what was put into place.
        There may be faults that were read and not answered."""
        placed = new_array(pn_greeted, lib.PN_GREETED)
        count = lib.pn_greeting_end(opened(self._greeting), placed)
        return [Greeted(each.offset, each.waited) for each in placed[0:count]]

    def removals(self) -> list[tuple[int, int]]:
        """What the owner gave up, once it has ended: addresses, start and end of each."""
        return removals(lib.pn_greeting_notes(opened(self._greeting)))

    def free(self) -> None:
        """Forget it, and what was noted."""
        lib.pn_greeting_free(opened(self._greeting))
        self._greeting = None


class Arrival(NamedTuple):
    """An owner that has connected. ``sock``: for the caller to close. ``greeting``: None if there
    was no room for one, or no cache."""

    name: str
    sock: int
    greeting: Greeting | None


class Greeter:
    """``struct pn_greeter``: a thread that accepts owners, and greets them. Close it when no
    greeting and no arrival is left. :exc:`OSError` if it cannot be started.

    ``notes``: the address of ``GREETINGS`` notes. ``channel``: over which another process tells of
    the connections that it has accepted, or -1. ``last``: the number of the last owner that there
    was.
    """

    def __init__(self, notes: int, channel: int, last: int) -> None:
        self._greeter: pn_greeter | None = lib.pn_greeter_new(
            struct_at(pn_note, notes), channel, last
        )
        if self._greeter == NULL:
            check(-ffi.errno)
        #: readable when there are arrivals, or no more are accepted
        self.fd = lib.pn_greeter_arrived_fd(self.greeter)

    @property
    def greeter(self) -> pn_greeter:
        """The struct. :exc:`TypeError` once it is closed."""
        return opened(self._greeter)

    def open(self, key: str, listener: int = -1) -> None:
        """Owners whose names end in ``key`` are those of one snapshot. ``listener``: where they
        connect, if no other process accepts them. It must stay open until :meth:`shut`."""
        check(lib.pn_greeter_open(self.greeter, key.encode(), listener))

    def shut(self, key: str) -> None:
        lib.pn_greeter_shut(self.greeter, key.encode())

    def serve(self, key: str, cache: Cache, size: int, file: int, offer: bytes) -> None:
        """Greet those owners from the ``cache`` of a region of ``size`` bytes. ``file``: the
        cache's, which those get that ask for it; ``offer``: what they are told with it, 127 bytes
        at most. Cache and file must outlive their greetings."""
        lib.pn_greeter_serve(self.greeter, key.encode(), cache.cache, size, file, offer)

    def serve_no_longer(self, key: str) -> None:
        lib.pn_greeter_serve(self.greeter, key.encode(), NULL, 0, -1, b"")

    def allow(self, places: int) -> None:
        """How many connections it accepts from now on."""
        lib.pn_greeter_allow(self.greeter, places)

    def take(self) -> Arrival | None:
        """The next arrival. :exc:`OSError` if no more are accepted until they are allowed again."""
        arrival = new_struct(pn_arrival)
        if not check(lib.pn_greeter_take(self.greeter, arrival)):
            return None
        made = arrival.greeting
        greeting = None if made == NULL else Greeting(cast(pn_greeting, made))
        return Arrival(os.fsdecode(ffi.string(arrival.name)), arrival.sock, greeting)

    def close(self) -> None:
        """Idempotent."""
        if self._greeter is not None:
            lib.pn_greeter_free(self.greeter)
            self._greeter = None
