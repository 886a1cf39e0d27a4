"""Owners that connect, however many at once. What their threads touch first is put into place in C,
from the host cache, while Python prepares the rest of their transfers."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress

import trio

from .. import _native
from ..uffd import Keeper, SharedFile

__all__ = ["Greeter", "Greeting"]

_NOTES = -(-_native.GREETINGS * _native.NOTE_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE


class Greeting:
    """What answers an owner's first faults. Close it."""

    def __init__(self, greeting: _native.Greeting) -> None:
        self._greeting: _native.Greeting | None = greeting
        self._use = ExitStack()

    def use(self, cache: AbstractContextManager[object]) -> None:
        """Enter this for as long as it lasts."""
        self._use.enter_context(cache)

    def stop_listening(self) -> None:
        """Note that others read the owner's socket from now on."""
        assert self._greeting is not None
        self._greeting.stop_listening()

    def end(self) -> tuple[list[_native.Greeted], list[tuple[int, int]]]:
        """Note that others read the owner's events from now on. Returns the pages that were put
        into place, and what the owner gave up: addresses, start and end of each. There may be
        faults that were read and not answered."""
        assert self._greeting is not None
        return self._greeting.end(), self._greeting.removals()

    def close(self) -> None:
        """Forget what was noted: the map of pages has it by now. Idempotent."""
        if self._greeting is not None:
            self._greeting.free()
            self._greeting = None
            self._use.close()


class _Noted(Greeting):
    """What a process that was killed has noted of an owner that it greeted."""

    def __init__(self, note: _native.Note) -> None:
        self._note = note

    def use(self, cache: AbstractContextManager[object]) -> None:
        pass

    def stop_listening(self) -> None:
        pass

    def end(self) -> tuple[list[_native.Greeted], list[tuple[int, int]]]:
        return [], self._note.removals()

    def close(self) -> None:
        self._note.clear()


class Greeter:
    """Accepts owners, or hears of those that ``keeper`` accepts, and greets them. Close it when no
    greeting is left.

    ``keeper``: keeps notes of what was read from owners, for a process that comes after this one: a
    page that an owner gave up while it was greeted must never get the source's bytes. ``last``: the
    number of the last owner that there was.
    """

    def __init__(self, keeper: Keeper | None, last: int) -> None:
        self._keeper = keeper
        with ExitStack() as stack:
            notes = self._open_notes()
            stack.callback(os.close, notes)
            self._notes = _native.Mapped(_NOTES, notes)
            # of owners that a process which was killed has greeted, by their names
            self._left = {} if keeper is None else self._find_left(keeper)
            self._native = _native.Greeter(self._notes.address, self._channel(stack), last)
        self._due = 0  # connections that may come still

    def _open_notes(self) -> int:
        if self._keeper is not None and (kept := self._keeper.get("greetings")):
            return kept[0]
        made = os.memfd_create("pagenet-greetings", os.MFD_CLOEXEC)
        os.ftruncate(made, _NOTES)
        if self._keeper is not None:
            self._keeper.hold("greetings", made)
        return made

    def _find_left(self, keeper: Keeper) -> dict[str, _native.Note]:
        names, left = set(keeper.names()), {}
        for at in range(_native.GREETINGS):
            note = _native.Note(self._notes.address + at * _native.NOTE_BYTES)
            if note.name in names:
                left[note.name] = note
            else:
                note.clear()
        return left

    def _channel(self, stack: ExitStack) -> int:
        if self._keeper is None:
            return -1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(ours)
        with theirs:
            self._keeper.hold("arrivals", theirs.fileno())
        return ours.fileno()

    @property
    def notes(self) -> int:
        """Their address."""
        return self._notes.address

    def open(self, key: str, listener: int) -> None:
        """Take owners that connect to ``listener``, or of which the keeper says that they have: the
        names of those end in ``key``. The listener must stay open until :meth:`shut`.
        :exc:`OSError` if there are too many."""
        self._native.open(key, -1 if self._keeper is not None else listener)

    def shut(self, key: str) -> None:
        """No longer."""
        self._native.shut(key)

    def serve(self, key: str, cache: _native.Cache, file: SharedFile) -> None:
        """Greet those owners from the ``cache``; ``file`` is for those that ask for it. Both must
        outlive their greetings."""
        self._native.serve(key, cache, file.size, file.fd, file.offer)

    def serve_no_longer(self, key: str) -> None:
        self._native.serve_no_longer(key)

    @property
    def wants_places(self) -> bool:
        """Whether no more are accepted until they are allowed."""
        return self._due <= 0

    def allow(self, first: int, places: int) -> None:
        """How many owners may come from now on. ``first``: the number of the next, if the keeper
        accepts them."""
        self._due = places
        if self._keeper is None:
            self._native.allow(places)
        else:
            self._keeper.accept_many(first, places)

    async def wait(self) -> None:
        """Return when there are arrivals, perhaps."""
        await trio.lowlevel.wait_readable(self._native.fd)
        with suppress(BlockingIOError):
            os.eventfd_read(self._native.fd)

    def take(self) -> Iterator[tuple[str, socket.socket, Greeting | None]]:
        """The owners that have come: name, connection, and what greets them. :exc:`OSError` if no
        more can be accepted now."""
        try:
            while (arrival := self._native.take()) is not None:
                self._due -= 1
                if self._keeper is not None:
                    self._keeper.note_accepted(arrival.name, arrival.sock)
                greeting = None if arrival.greeting is None else Greeting(arrival.greeting)
                yield arrival.name, socket.socket(fileno=arrival.sock), greeting
        except OSError:
            self._due = 0
            raise

    def left_of(self, name: str) -> Greeting | None:
        """What a process that was killed has noted of the owner, if it has greeted it."""
        note = self._left.pop(name, None)
        return None if note is None else _Noted(note)

    def close(self) -> None:
        for _, sock, greeting in self.take():
            sock.close()
            if greeting is not None:
                greeting.close()
        self._native.close()
        self._notes.close()
