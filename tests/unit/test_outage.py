"""How long an outage delays a page: both sides and their sessions together, in virtual time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from itertools import chain, pairwise, repeat
from math import inf
from pathlib import Path
from typing import Self
from urllib.parse import SplitResult

import pytest
import trio
import trio.testing
from processes import PAGE, write_pattern

from pagenet import (
    ConnectionClosed,
    IntoFile,
    PagenetError,
    Source,
    open_source,
    pull,
    serve,
    transport,
)
from pagenet.nurseries import open_failing_nursery
from pagenet.testing import MemoryConnection, MemoryListener, MemoryTransport
from pagenet.transport import Buffer

PAGES = 1000
#: seconds that a packet travels; each page is asked for once the one before has come
DELAY = 0.02
#: seconds until TCP sends again what was not acknowledged, and then again: a second at most
REPETITIONS = (0.2, 0.4, 0.8)
LONGEST = 1.0


class Carried:
    """A connection to whose peer bytes travel over ``wire``."""

    def __init__(self, connection: MemoryConnection, wire: Wire) -> None:
        self._connection, self._wire = connection, wire
        self._closed = False
        self._sent, sent = trio.open_memory_channel[bytes](inf)
        wire.nursery.start_soon(self._carry, sent)

    @property
    def peer(self) -> str:
        return self._connection.peer

    async def send(self, *buffers: Buffer) -> None:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise ConnectionClosed("closed on this side")
        self._sent.send_nowait(b"".join(bytes(buffer) for buffer in buffers))

    async def receive_into(self, buffer: memoryview) -> int:
        if self._closed:
            raise ConnectionClosed("closed on this side")
        return await self._connection.receive_into(buffer)

    def close(self) -> None:
        self._closed = True
        self._sent.close()

    async def _carry(self, sent: trio.MemoryReceiveChannel[bytes]) -> None:
        async for data in sent:
            await self._wire.travel(chain(REPETITIONS, repeat(LONGEST)))
            with suppress(PagenetError):
                await self._connection.send(data)
        await self._wire.travel(repeat(LONGEST))
        self._connection.close()


class Wire(MemoryTransport):
    """Connections over a path that swallows everything from ``down`` to ``up``, times of Trio."""

    def __init__(self, nursery: trio.Nursery, down: float, up: float) -> None:
        super().__init__()
        self.nursery, self.down, self.up = nursery, down, up

    async def travel(self, pauses: Iterator[float]) -> None:
        """Return when a packet has come that is sent now, and again after each of ``pauses``."""
        while self.down <= trio.current_time() < self.up:  # noqa: ASYNC110
            await trio.sleep(next(pauses))
        await trio.sleep(DELAY)

    async def dial(self, uri: SplitResult) -> Carried:  # type: ignore[override]
        await self.travel(repeat(LONGEST))
        return Carried(await super().dial(uri), self)

    async def listen(self, uri: SplitResult) -> Listening:  # type: ignore[override]
        return Listening(await super().listen(uri), self)


class Listening:
    def __init__(self, listener: MemoryListener, wire: Wire) -> None:
        self._listener, self._wire = listener, wire
        self.uri, self.close = listener.uri, listener.close

    async def accept(self) -> Carried:
        return Carried(await self._listener.accept(), self._wire)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def longest_stall(source: Source, into: Path, source_dials: bool, wire: Wire) -> float:
    """In seconds, of a transfer that the outage comes in the middle of."""
    uri, came = "memory://here", list[float]()
    async with AsyncExitStack() as stack:
        if not source_dials:
            await stack.enter_async_context(serve(source, listen=uri, lane="trio"))
        else:
            wire.nursery.start_soon(keep_serving, source, uri)
        transfer = await stack.enter_async_context(
            pull(
                uri,
                IntoFile(into),
                listen=source_dials,
                lane="trio",
                chunk=PAGE,
                background_window=PAGE,
                compress="none",
                reconnect_for=inf,
            )
        )
        count = 0
        while trio.current_time() < wire.up + 2:
            if transfer.filling.received != count:
                count = transfer.filling.received
                came.append(trio.current_time())
            await trio.sleep(0.01)
        assert came[-1] > wire.up + 1
        assert transfer.region.size > count
    return max(later - earlier for earlier, later in pairwise(came))


async def keep_serving(source: Source, uri: str) -> None:
    await trio.sleep(0.1)
    with suppress(PagenetError):
        async with serve(source, connect=uri, lane="trio", reconnect_for=inf):
            await trio.sleep_forever()


@pytest.mark.parametrize("source_dials", [False, True])
@pytest.mark.parametrize("seconds", [0.5, 1.05, 1.45, 1.7, 3.0, 15.0])
def test_outage(seconds: float, source_dials: bool, tmp_path: Path) -> None:
    """Clearly less than a second passes after it is over, whenever it begins."""
    path = write_pattern(tmp_path / "source", PAGES * PAGE)

    async def move(begin: float) -> float:
        with open_source(str(path)) as source:
            async with open_failing_nursery() as nursery:
                now = trio.current_time()
                wire = Wire(nursery, now + begin, now + begin + seconds)
                transport.register("memory", wire)
                stall = await longest_stall(source, tmp_path / "into", source_dials, wire)
                nursery.cancel_scope.cancel()
        return stall

    for begin in (2.0, 2.35):
        stall = trio.run(move, begin, clock=trio.testing.MockClock(autojump_threshold=0))
        assert stall < seconds + 0.8
