"""Rounds: a destination copies memory while its owner still writes to it.

Round 1 brings all pages. At the end of each round the tracker tells which pages were written since,
and the next round brings those again. What was written in each of the last two rounds is not sent
again before the end: it would be written once more. With :meth:`Rounds.freeze` the owner stands
still, and the destination learns of all that it has to fetch again. How much it learns then delays
the owner, so :meth:`Rounds.name_early`, just before, names all that was written until then.

Why no page is ever shown stale: the next scan after a write names the page, and a name is kept
until the destination is told of it. Nothing is in flight then. So bytes that were read before the
write have arrived, and the destination drops them; what it asks for after that is read after the
write. The last scan is made when the owner stands still. Over RDMA the destination has given back
every key then: a key is to the pages that the memory had when it was granted, and says which of
them were zero.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from ..errors import ConnectionBroken, RemoteProtocolError
from ..protocol import MAX_STALE_BYTES, Message, Pause, Paused, Stale
from ..region import Region

__all__ = ["Round", "Rounds", "Tracker"]

# The share of a round after which look_late() looks, and the seconds between two questions whether
# it has come to that. Each look costs the owner a fault for each page that it writes to again.
_LATE = 31 / 32
_LOOK_SECONDS = 0.005
# Stale pages are looked for in pieces of so many bytes of bits: of 32 MiB of memory.
_SPAN_BYTES = 1 << 10


class Tracker(Protocol):
    """Names the pages that were written: a :class:`~pagenet.WriteTracker`, or the like."""

    @property
    def region(self) -> Region:
        """The source's blocks, in page sizes that are not smaller than the source's."""
        ...

    def mark(self, bits: bytearray) -> None:
        """Set the bit of each page that was written since the last call, or since the tracker was
        made; the lowest bit of the first byte is page 0. It is called in a thread."""
        ...

    def check(self) -> None:
        """Raise if that may not have been all. It is called in a thread."""
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """A round that is over. ``seconds``: how long it took; ``pages``: those that it was to bring;
    ``zeros``: those of them that were zero, and took next to no time; ``written``: those that were
    written meanwhile; ``left``: those that are to be sent yet, if the owner is frozen now; at most
    so many, if the round was not brought to its end.
    ``recently_written``: those that were written in the last ``recent_seconds`` of it."""

    number: int
    seconds: float
    pages: int
    zeros: int
    written: int
    left: int
    recent_seconds: float
    recently_written: int


class Rounds:
    """The rounds of one destination. ``send`` sends it a message, ``asked`` tells how many pages it
    has asked for so far, ``zeros`` how many of those were zero, ``given_back`` returns when it has
    no key to the memory.

    Call :meth:`wait_over`, then :meth:`next`, as often as that is worth it; then :meth:`pause` and
    :meth:`name_early`, stop the owner, and call :meth:`freeze`.
    """

    def __init__(
        self,
        region: Region,
        tracker: Tracker,
        send: Callable[[Message], Awaitable[None]],
        asked: Callable[[], int] = lambda: 0,
        zeros: Callable[[], int] = lambda: 0,
        given_back: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
    ) -> None:
        self._region, self._tracker, self._send = region, tracker, send
        self._asked, self._zeros, self._given_back = asked, zeros, given_back
        self._asked_before, self._zeros_before = asked(), zeros()
        self._number = 1
        self._over: Paused | None = None
        self._news = trio.Event()
        self._began = self._scanned = trio.current_time()
        self._told = (1 << region.pages) - 1  # bits of what this round brings
        # bits of what was written in this round and in the one before
        self._written = self._before = 0
        self._left = 0  # bits of what is stale, and was not named yet
        self.is_frozen = self._is_gone = False

    @property
    def number(self) -> int:
        """The round's number, from 1 on."""
        return self._number

    def hear(self, paused: Paused) -> None:
        """Note that the destination says that a round is over.
        :exc:`~pagenet.errors.RemoteProtocolError` if it may not."""
        if paused.round != self._number or self._over is not None or self.is_frozen:
            raise RemoteProtocolError(f"the peer ends round {paused.round}, which is not the last")
        if paused.missing > self._region.pages:
            raise RemoteProtocolError(f"the peer misses {paused.missing} pages")
        self._over = paused
        self._news.set()
        self._news = trio.Event()

    def end(self) -> None:
        """Note that the destination is gone."""
        self._is_gone = True
        self._news.set()

    async def wait_over(self) -> None:
        """Return when the destination has every page of the round, or has paused.
        :exc:`~pagenet.errors.ConnectionBroken` if it is gone."""
        while self._over is None:
            if self._is_gone:
                raise ConnectionBroken(f"the destination has left in round {self._number}")
            await self._news.wait()
        await self._given_back()

    async def look_late(self) -> None:
        """Wait until the destination has asked for most of the round, and look once at what was
        written until then: :meth:`look` then knows what was written recently. To be cancelled when
        the round is over."""
        pages = self._told.bit_count()
        enough = self._asked_before + _LATE * pages
        while not pages or self._asked() < enough:  # noqa: ASYNC110
            await trio.sleep(_LOOK_SECONDS)
        await self._scan()

    async def pause(self) -> None:
        """End the round before it is over. Returns when nothing is in flight."""
        if self._over is None:
            await self._send(Pause())
        await self.wait_over()

    async def name_early(self) -> None:
        """After :meth:`pause`: name all that was written until now. What :meth:`freeze` is left to
        name, and the destination to drop while the owner stands still, was written since. Returns
        when nothing is in flight."""
        await self._scan()
        told, self._left = self._left, 0
        await self._name(told, frozen=False)
        await self.pause()

    async def look(self) -> Round:
        """After :meth:`wait_over`: what was written in this round."""
        before = self._scanned
        written = await self._scan()
        assert self._over is not None
        pages = self._told.bit_count()
        return Round(
            self._number,
            self._scanned - self._began,
            pages,
            min(self._zeros() - self._zeros_before, pages),
            self._written.bit_count(),
            self._at_most_left(self._over),
            self._scanned - before,
            written.bit_count(),
        )

    async def next(self) -> None:
        """After :meth:`look`: begin another round, for what was written in the last one, and not in
        the one before as well."""
        hot = self._written & self._before
        told, self._left = self._left & ~hot, hot
        self._before, self._written = self._written, 0
        await self._name(told, frozen=False)

    async def freeze(self) -> int:
        """After :meth:`pause`, with the owner at rest: name all that is stale. Returns how many
        pages the destination lacks then, at most."""
        await self._mark()
        assert self._over is not None
        missing = self._at_most_left(self._over)
        self.is_frozen = True
        await self._name(self._left, frozen=True)
        await trio.to_thread.run_sync(self._tracker.check)  # it need not delay the destination
        return missing

    def _at_most_left(self, over: Paused) -> int:
        """Pages to be sent yet. What is missing is of this round, and may be stale as well."""
        again = (self._left & self._told).bit_count()
        return self._left.bit_count() - again + min(again + over.missing, self._told.bit_count())

    async def _scan(self) -> int:
        written = await self._mark()
        await trio.to_thread.run_sync(self._tracker.check)
        return written

    async def _mark(self) -> int:
        """Note the pages that were written since the last scan. Returns their bits."""
        region = self._tracker.region
        bits = bytearray(-(-region.pages // 8))
        self._scanned = trio.current_time()
        await trio.to_thread.run_sync(self._tracker.mark, bits)
        written = _in_pages_of(self._region, region, bits)
        self._written |= written
        self._left |= written
        return written

    async def _name(self, stale: int, *, frozen: bool) -> None:
        number, pages = self._number, self._region.pages
        self._number, self._over, self._told = number + 1, None, stale
        self._began = trio.current_time()
        self._asked_before, self._zeros_before = self._asked(), self._zeros()
        spans = _spans(stale.to_bytes(-(-pages // 8), "little"))
        last = len(spans) - 1
        for index, (at, part) in enumerate(spans):
            await self._send(Stale(number, 8 * at, part, index < last, frozen))


def _spans(bits: bytes) -> list[tuple[int, bytes]]:
    """The parts of ``bits`` that are not zero, and where each begins: apart, none too long for a
    message, and one at least. Little is written between the last two scans, and mostly in few
    places."""
    spans: list[tuple[int, int]] = []
    for at in range(0, len(bits), _SPAN_BYTES):
        end = min(at + _SPAN_BYTES, len(bits))
        if bits.count(0, at, end) == end - at:
            continue
        if spans and spans[-1][1] == at and end - spans[-1][0] <= MAX_STALE_BYTES:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((at, end))
    return [(at, bits[at:end]) for at, end in spans or [(0, 1)]]


def _in_pages_of(ours: Region, theirs: Region, bits: bytearray) -> int:
    """``bits``, one for each page of ``theirs``, as one for each page of ``ours``: the same blocks
    in pages that are as large, or smaller. The lowest bit is page 0."""
    found = int.from_bytes(bits, "little")
    if ours.pages == theirs.pages:
        return found
    widened = 0
    for index, block in enumerate(theirs.blocks):
        first, end = theirs.first_pages[index : index + 2]
        here = found >> first & (1 << end - first) - 1
        times = block.page_size // ours.blocks[index].page_size
        if times > 1:
            digits = f"{here:0{end - first}b}"  # the last is the first page
            here = int("".join(digit * times for digit in digits), 2)
        widened |= here << ours.first_pages[index]
    return widened
