"""Peers: sources that may have the same pages, and are asked first."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import trio

from ..errors import PagenetError, SourceLost, UsageError
from ..events import EventHandler, ignore_events
from ..nurseries import open_failing_nursery
from ..objects import ObjectStat, Origin, object_identity
from ..protocol import Class, content_identity, printable
from ..region import Block, Region, Run
from ..tls import Tls
from ._session import OnPart
from ._source import NOT_NOW, PeerSource
from ._thread import Call

__all__ = ["PeeredObject", "Peers", "check_peers"]

# Seconds for all peers together to send what they are asked for: then the store is asked. At 100
# MB/s a chunk takes 0.02 s.
_PATIENCE = 1.0
# Seconds for which a peer that has failed is not asked, at first and at most.
_FIRST_REST, _LONGEST_REST = 5.0, 60.0


def check_peers(uris: Sequence[str]) -> None:
    """Raise :exc:`UsageError` if one cannot be a peer."""
    for uri in uris:
        if not uri.startswith(("tcp://", "unix:")):
            raise UsageError(f"peer {printable(uri)}: a peer is asked over tcp:// or unix:")


@dataclass(eq=False, slots=True)
class Peer:
    source: PeerSource
    #: of trio.current_time(): not to be asked before
    until: float = 0.0
    rest: float = field(default_factory=lambda: _FIRST_REST)
    #: never to be asked again
    is_out: bool = False


class Peers:
    """Sources at ``uris``, each of one block of ``size`` bytes and with that ``identity``, which
    are asked for what they hold. Close it.

    One that does not answer in time is left alone for a while; one that breaks the protocol, or
    that lies, for good: the event ``peer``, in another thread, has its ``uri`` and the ``reason``.
    """

    def __init__(
        self,
        uris: Sequence[str],
        tls: Tls | None,
        identity: bytes,
        size: int,
        on_event: EventHandler = ignore_events,
    ) -> None:
        check_peers(uris)
        self._on_event = on_event
        expected = identity, Region([Block("memory", size, mmap.PAGESIZE)])
        self._peers = [
            Peer(PeerSource(uri, tls if uri.startswith("tcp://") else None, True, expected))
            for uri in uris
        ]

    def close(self) -> None:
        """Idempotent."""
        while self._peers:
            self._peers.pop().source.close()

    def fetch(self, runs: Sequence[Run], class_: Class) -> tuple[bytearray, Peer] | None:
        """The pages of ``runs``, 4 MiB at most, one behind the other, and who has sent them. None:
        no peer has in time. Blocks."""
        return self._peers[0].source.thread.run(partial(self.ask, runs, class_))

    def start(self, runs: Sequence[Run], class_: Class) -> Call[tuple[bytearray, Peer] | None]:
        """As :meth:`fetch`, and does not wait."""
        return self._peers[0].source.thread.start(partial(self.ask, runs, class_))

    def distrust(self, peer: Peer, reason: str) -> None:
        """Ask it no more. From any thread."""
        if not peer.is_out:
            peer.is_out = True
            self._on_event("peer", uri=peer.source.uri, reason=reason)

    async def ask(self, runs: Sequence[Run], class_: Class) -> tuple[bytearray, Peer] | None:
        """As :meth:`fetch`, in the peers' thread."""
        deadline = trio.current_time() + _PATIENCE
        first = runs[0].first // 512 % len(self._peers)  # not all chunks of the first one
        for peer in self._peers[first:] + self._peers[:first]:
            if peer.is_out or trio.current_time() < peer.until:
                continue
            with trio.move_on_at(deadline) as scope:
                pages = await self._ask(peer, runs, class_)
                if pages is not None:
                    return pages, peer
            if scope.cancelled_caught:
                _rest(peer)
                return None
        return None

    async def _ask(self, peer: Peer, runs: Sequence[Run], class_: Class) -> bytearray | None:
        try:
            session = await peer.source.meet()
            sizes = [session.region.size_of(run) for run in runs]
            pages = bytearray(sum(sizes))
            is_there = True

            async def read(run: Run, at: int) -> None:
                nonlocal is_there
                put = _writer(memoryview(pages), at)
                is_there &= await session.read(run, class_, put)

            async with open_failing_nursery() as nursery:
                for run, at in zip(runs, accumulate([0, *sizes]), strict=False):
                    nursery.start_soon(read, run, at)
        except (*NOT_NOW, SourceLost):
            _rest(peer)
            return None
        except PagenetError as error:
            self.distrust(peer, str(error))
            return None
        peer.rest = _FIRST_REST
        return pages if is_there else None


def _rest(peer: Peer) -> None:
    now = trio.current_time()
    if now >= peer.until:  # the first of several that have waited
        peer.until = now + peer.rest
        peer.rest = min(2 * peer.rest, _LONGEST_REST)


def _writer(pages: memoryview, at: int) -> OnPart:
    def put(part: memoryview) -> None:
        nonlocal at
        pages[at : at + len(part)] = part
        at += len(part)

    return put


class PeeredObject:
    """An :class:`~pagenet.objects.Origin` whose bytes peers are asked for before it is. Owns it.

    Nothing can tell whether a peer lies: so peers are trusted, and have to be authenticated.
    """

    def __init__(
        self, origin: Origin, uris: Sequence[str], tls: Tls | None, on_event: EventHandler
    ) -> None:
        self._origin, self._on_event = origin, on_event
        self._uris, self._tls = uris, tls
        self._peers: Peers | None = None
        self.name, self.kind = origin.name, origin.kind
        self.names_content = origin.names_content
        check_peers(uris)
        plain = [uri for uri in uris if tls is None or not uri.startswith("tcp://")]
        if plain:
            raise UsageError(
                f"peer {printable(plain[0])}: an object has no checksums that could tell whether a"
                " peer lies: name the credentials of peers that you trust (--tls-dir), or make a"
                " snapshot of it"
            )

    def close(self) -> None:
        if self._peers is not None:
            self._peers.close()
        self._origin.close()

    async def stat(self) -> ObjectStat:
        return await self._origin.stat()

    async def read(
        self, start: int, end: int, stat: ObjectStat, is_urgent: bool
    ) -> AsyncGenerator[bytes, None]:
        pages = await self._ask_peers(start, end, stat, is_urgent)
        if pages is not None:
            yield bytes(pages)
            return
        async with aclosing(self._origin.read(start, end, stat, is_urgent)) as parts:
            async for part in parts:
                yield part

    async def _ask_peers(
        self, start: int, end: int, stat: ObjectStat, is_urgent: bool
    ) -> bytearray | None:
        if start % mmap.PAGESIZE or end % mmap.PAGESIZE:  # the store broke off there
            return None
        if self._peers is None:
            identity = content_identity(object_identity(self.name, stat.etag))
            self._peers = Peers(self._uris, self._tls, identity, stat.size, self._on_event)
        run = Run(start // mmap.PAGESIZE, (end - start) // mmap.PAGESIZE)
        class_ = Class.DEMAND if is_urgent else Class.BACKGROUND
        call = self._peers.start([run], class_)
        try:
            found = await asyncio.wrap_future(call.future)
        except asyncio.CancelledError:
            call.cancel()
            raise
        return None if found is None else found[0]
