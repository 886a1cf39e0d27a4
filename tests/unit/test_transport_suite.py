"""The conformance suite itself: each of these backends breaks the contract in one way, and the
suite must name it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any
from urllib.parse import SplitResult

import pytest
import trio

from pagenet.errors import (
    ConnectionBroken,
    ConnectionClosed,
    PagenetError,
    SourceUnreachable,
    UsageError,
)
from pagenet.testing import (
    MemoryConnection,
    MemoryListener,
    MemoryTransport,
    _check_transport,
    check_transport,
)
from pagenet.transport import Buffer


class ReordersBuffers(MemoryConnection):
    async def send(self, *buffers: Buffer) -> None:
        await super().send(*reversed(buffers))


class TrustsTruth(MemoryConnection):
    """Takes an empty buffer for the end of the list."""

    async def send(self, *buffers: Buffer) -> None:
        end = next((index for index, buffer in enumerate(buffers) if not buffer), len(buffers))
        await super().send(*buffers[:end])


class CountsItems(MemoryConnection):
    async def receive_into(self, buffer: memoryview) -> int:
        return await super().receive_into(buffer) // buffer.itemsize


class KeepsViews(MemoryConnection):
    async def send(self, *buffers: Buffer) -> None:
        self.kept = [memoryview(buffer) for buffer in buffers]
        await super().send(*buffers)


class SendsLater(MemoryConnection):
    """send returns at once, as in a backend that posts work requests and does not wait for them."""

    async def send(self, *buffers: Buffer) -> None:
        self._check_open()
        await trio.lowlevel.checkpoint()
        trio.lowlevel.spawn_system_task(self._send_later, buffers)

    async def _send_later(self, buffers: tuple[Buffer, ...]) -> None:
        with suppress(PagenetError):
            for buffer in filter(len, buffers):
                await self._send_view(memoryview(buffer).cast("B"))


class MistakesTheEnd(MemoryConnection):
    async def receive_into(self, buffer: memoryview) -> int:
        if count := await super().receive_into(buffer):
            return count
        raise ConnectionBroken("the peer has closed")


class EndsTwice(MemoryConnection):
    """Is broken once it has reported the end of the stream."""

    async def receive_into(self, buffer: memoryview) -> int:
        count = await super().receive_into(buffer)
        if not count:
            self._wire.broken = True
        return count


class ClosesQuietly(MemoryConnection):
    """Its close wakes no task."""

    def close(self) -> None:
        self._closed = self._outgoing.sender_closed = self._incoming.receiver_closed = True


class ClosesOnce(MemoryConnection):
    def close(self) -> None:
        self._check_open()
        super().close()


class CloseBreaks(MemoryConnection):
    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionBroken("it is closed")


class SendsNothingWhenClosed(MemoryConnection):
    async def send(self, *buffers: Buffer) -> None:
        if any(buffers):
            await super().send(*buffers)
        else:
            await trio.lowlevel.checkpoint()


class SharesReceiving(MemoryConnection):
    _receiving = property(lambda self: nullcontext(), lambda self, value: None)


class SharesSending(MemoryConnection):
    _sending = property(lambda self: nullcontext(), lambda self, value: None)


class LosesBytesWhenCancelled(MemoryConnection):
    async def receive_into(self, buffer: memoryview) -> int:
        count = await super().receive_into(buffer)
        await trio.lowlevel.checkpoint()
        return count


class IgnoresCancellation(MemoryConnection):
    async def receive_into(self, buffer: memoryview) -> int:
        if count := self._incoming.get(buffer.cast("B")):
            await trio.lowlevel.cancel_shielded_checkpoint()
            return count
        return await super().receive_into(buffer)


class NeverBreaks(MemoryConnection):
    async def send(self, *buffers: Buffer) -> None:
        try:
            await super().send(*buffers)
        except ConnectionBroken:
            await trio.lowlevel.checkpoint()


CONNECTIONS: list[tuple[type[MemoryConnection], str]] = [
    (ReordersBuffers, "several buffers"),
    (TrustsTruth, "several buffers: something hangs"),
    (CountsItems, "shapes of buffers received into"),
    (KeepsViews, "buffers are the callers again: send has returned and still holds a view"),
    (SendsLater, "buffers are the callers again: 8 bytes came out different"),
    (MistakesTheEnd, "end of stream"),
    (EndsTwice, "end of stream"),
    (ClosesQuietly, "close wakes own tasks: something hangs"),
    (ClosesOnce, "ConnectionClosed\\(.* is closed on this side"),
    (CloseBreaks, "wanted ConnectionClosed, got ConnectionBroken"),
    (
        SendsNothingWhenClosed,
        "use after close: send of 1 buffers after close: wanted ConnectionClosed",
    ),
    (SharesReceiving, "two receivers: .* wanted ConnectionBusy, but it waits"),
    (SharesSending, "two senders: .* wanted ConnectionBusy, but it waits"),
    (LosesBytesWhenCancelled, "receive cancelled as bytes arrive: something hangs"),
    (IgnoresCancellation, "cancelled receive: receive_into with bytes at hand is no checkpoint"),
    (NeverBreaks, "close ends the peers send: .* wanted ConnectionBroken, and nothing was raised"),
]


async def expect_complaint(transport: Any, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        await check_transport(transport, lambda: "memory://")


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check_transport, "PATIENCE", 2)


@pytest.mark.parametrize(
    ("kind", "complaint"), CONNECTIONS, ids=[kind.__name__ for kind, _ in CONNECTIONS]
)
async def test_bad_connections(kind: type[MemoryConnection], complaint: str) -> None:
    def on_connect(*ends: MemoryConnection) -> None:
        for end in ends:
            end.__class__ = kind

    await expect_complaint(MemoryTransport(on_connect=on_connect), complaint)


@pytest.mark.parametrize("which", [0, 1])
async def test_one_bad_end_is_enough(which: int) -> None:
    def on_connect(*ends: MemoryConnection) -> None:
        ends[which].__class__ = ReordersBuffers

    await expect_complaint(MemoryTransport(on_connect=on_connect), "several buffers")


async def test_unbounded_connections() -> None:
    await expect_complaint(MemoryTransport(capacity=1 << 40), "backpressure: send took in 64 MiB")


class AnswersAfterClose(MemoryTransport):
    async def dial(self, uri: SplitResult) -> MemoryConnection:
        try:
            return await super().dial(uri)
        except SourceUnreachable:
            return await super().dial(uri._replace(netloc=next(iter(self.listeners), "")))


class LeaksErrors(MemoryTransport):
    async def dial(self, uri: SplitResult) -> MemoryConnection:
        try:
            return await super().dial(uri)
        except SourceUnreachable as error:
            raise ConnectionRefusedError from error


class SharesNames(MemoryTransport):
    async def listen(self, uri: SplitResult) -> MemoryListener:
        self.listeners.pop(uri.netloc, None)
        return await super().listen(uri)


class LeaksListenErrors(MemoryTransport):
    async def listen(self, uri: SplitResult) -> MemoryListener:
        try:
            return await super().listen(uri)
        except UsageError as error:
            raise OSError from error


class CannotDecide(MemoryTransport):
    def is_private(self, uri: SplitResult) -> bool:
        return not uri.netloc


class DialsWithoutCheckpoint(MemoryTransport):
    async def dial(self, uri: SplitResult) -> MemoryConnection:
        with trio.CancelScope(shield=True):
            connection = await super().dial(uri)
        return connection


class OwnsConnections(MemoryTransport):
    """Its listeners close their connections when they close."""

    async def listen(self, uri: SplitResult) -> MemoryListener:
        listener = await super().listen(uri)
        close = listener.close

        def close_all() -> None:
            close()
            for connection in connections:
                connection.break_after(0)

        connections: list[MemoryConnection] = []
        self.on_connect = lambda dialled, accepted: connections.append(accepted)
        listener.close = close_all  # type: ignore[method-assign]
        return listener


def with_listener(change: Callable[[MemoryListener], None]) -> type[MemoryTransport]:
    class Changed(MemoryTransport):
        async def listen(self, uri: SplitResult) -> MemoryListener:
            listener = await super().listen(uri)
            change(listener)
            return listener

    return Changed


def share_accept(listener: MemoryListener) -> None:
    listener._accepting = nullcontext()  # type: ignore[assignment]


def close_quietly(listener: MemoryListener) -> None:
    def close() -> None:
        listener._closed = True

    listener.close = close  # type: ignore[method-assign]


def close_once(listener: MemoryListener) -> None:
    close = listener.close

    def check_and_close() -> None:
        if listener._closed:
            raise ConnectionClosed("twice")
        close()

    listener.close = check_and_close  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (LeaksErrors, "nobody listens: .* wanted SourceUnreachable, got ConnectionRefusedError"),
        (SharesNames, "somebody listens already: .* nothing was raised"),
        (LeaksListenErrors, "somebody listens already: .* wanted UsageError, got OSError"),
        (CannotDecide, "names: one of memory:.* is private"),
        (DialsWithoutCheckpoint, "accept and dial are checkpoints: dial ignored"),
        (OwnsConnections, "many connections: ConnectionBroken"),
        (with_listener(share_accept), "two acceptors: .* wanted ConnectionBusy, but it waits"),
        (with_listener(close_quietly), "close wakes accept: something hangs"),
        (with_listener(close_once), "ConnectionClosed\\('twice'\\)"),
    ],
)
async def test_bad_transports(kind: type[MemoryTransport], complaint: str) -> None:
    await expect_complaint(kind(), complaint)


async def test_a_good_one_passes() -> None:
    await check_transport(MemoryTransport(), lambda: "memory://")
