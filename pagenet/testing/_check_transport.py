"""The contract of :mod:`pagenet.transport`, as code that any backend can be checked with."""

from __future__ import annotations

import array
import functools
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
)
from typing import TypeVar
from urllib.parse import urlsplit

import trio

from ..errors import (
    ConnectionBroken,
    ConnectionBusy,
    ConnectionClosed,
    PagenetError,
    SourceUnreachable,
    UsageError,
)
from ..transport import Buffer, Connection, Detachable, Listener, Transport

__all__ = ["check_transport"]

# Seconds. No check takes more than one or two on a machine that is not overloaded. A check that
# takes this long hangs.
PATIENCE = 60.0

# The bytes of a transfer. They are random: a part that is lost, repeated or swapped shows.
BLOCK = random.Random("pagenet").randbytes(1 << 20)

# MiB: more than any connection buffers while its peer does not receive. The kernel's TCP autotuning
# grows a receive buffer only while it is read.
CLOG = 64

# Connections at once: more than any session has.
MANY = 50

# Seconds without progress after which a sender counts as blocked. They delay a check, and never
# fail one.
CUSHION = 0.01

T = TypeVar("T")
Check = Callable[["_Bench"], Awaitable[None]]
CheckOfEnds = Callable[[Connection, Connection], Awaitable[None]]


# trio.testing imports pytest where there is one: whoever imports pagenet.testing for a pattern has
# no use for it, and starts in two thirds of the time without.


def _checkpoints() -> AbstractContextManager[None]:
    from trio.testing import assert_checkpoints

    return assert_checkpoints()


async def _all_blocked() -> None:
    """Until every other task waits, and has waited for :data:`CUSHION`."""
    from trio.testing import wait_all_tasks_blocked

    await wait_all_tasks_blocked(CUSHION)


async def check_transport(transport: Transport, make_uri: Callable[[], str]) -> None:
    """Check that ``transport`` keeps the contract of :mod:`pagenet.transport`; AssertionError names
    what it broke.

    For the authors of backends. Call it in a test of yours, with a function that returns a URI to
    listen on, another one for each call if two listeners could not have the same::

        async def test_conformance():
            await check_transport(CarrierPigeons(), lambda: "pigeons://127.0.0.1:0")

    It dials :attr:`Listener.uri <pagenet.transport.Listener.uri>` within the same process; the
    transport need not be registered. :class:`~pagenet.transport.Detachable` is checked on
    connections that have it. Beyond the contract it takes for granted that a connection whose peer
    does not receive takes in 100 bytes, and does not take in 64 MiB.

    It takes a few seconds and the file descriptors of 50 connections. Call it under a real clock:
    on ``autojump_clock``, a task that waits for the kernel seems to hang.
    """
    for check in CHECKS:
        await run_check(check, transport, make_uri)


async def run_check(check: Check, transport: Transport, make_uri: Callable[[], str]) -> None:
    name = check.__name__.removeprefix("_").replace("_", " ")
    try:
        with trio.fail_after(PATIENCE):
            await check(_Bench(transport, make_uri))
    except trio.TooSlowError:
        raise AssertionError(f"{name}: something hangs, for {PATIENCE:g} s by now") from None
    except Exception as error:
        raise AssertionError(f"{name}: {' and '.join(map(_describe, _leaves(error)))}") from error


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, AssertionError) else repr(error)


# The bench: everything that the checks work with. No `assert`: the suite must work under -O and
# without pytest.


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


@contextmanager
def _expect(kind: type[PagenetError], when: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    except Exception as error:
        raise AssertionError(f"{when}: wanted {kind.__name__}, got {error!r}") from error
    raise AssertionError(f"{when}: wanted {kind.__name__}, and nothing was raised")


class _Bench:
    def __init__(self, transport: Transport, make_uri: Callable[[], str]) -> None:
        self.transport = transport
        self.make_uri = make_uri

    async def listen(self) -> Listener:
        return await self.transport.listen(urlsplit(self.make_uri()))

    async def connect(self, listener: Listener) -> tuple[Connection, Connection]:
        """Both ends of a new connection: the one that dialled, and the one that was accepted."""
        dialled, accepted = await _together(
            lambda: self.transport.dial(urlsplit(listener.uri)), listener.accept
        )
        return dialled, accepted

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Connection, Connection]]:
        with await self.listen() as listener:
            dialled, accepted = await self.connect(listener)
            with closing(dialled), closing(accepted):
                yield dialled, accepted


async def _together(*calls: Callable[[], Awaitable[T]]) -> list[T]:
    """What all the calls return, made at the same time."""
    results: dict[int, T] = {}

    async def run(index: int, call: Callable[[], Awaitable[T]]) -> None:
        results[index] = await call()

    async with trio.open_nursery() as nursery:
        for index, call in enumerate(calls):
            nursery.start_soon(run, index, call)
    return [results[index] for index in range(len(calls))]


def _from_either_end(check: CheckOfEnds) -> Check:
    """Run a check of two connected ends twice: what holds for the end that dialled must hold for
    the other."""

    @functools.wraps(check)
    async def run(bench: _Bench) -> None:
        async with bench.pair() as (dialled, accepted):
            await check(dialled, accepted)
        async with bench.pair() as (dialled, accepted):
            await check(accepted, dialled)

    return run


async def _receive(connection: Connection, size: int = 1 << 16) -> bytes:
    buffer = bytearray(size)
    with _checkpoints():
        count = await connection.receive_into(memoryview(buffer))
    _require(0 <= count <= size, f"receive_into of {size} bytes returned {count}")
    return bytes(buffer[:count])


async def _receive_exactly(connection: Connection, size: int) -> bytearray:
    buffer = bytearray(size)
    received = 0
    with memoryview(buffer) as view:
        while received < size:
            count = await connection.receive_into(view[received:])
            _require(count > 0, f"the stream ended after {received} of {size} bytes")
            received += count
    return buffer


async def _expect_bytes(connection: Connection, wanted: bytes) -> None:
    received = await _receive_exactly(connection, len(wanted))
    _require(received == wanted, f"{len(wanted)} bytes came out different")


async def _transfer(sender: Connection, receiver: Connection, *buffers: Buffer) -> None:
    """Send ``buffers`` and receive them, at the same time, and nothing else."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_bytes, receiver, b"".join(map(bytes, buffers)))
        with _checkpoints():
            await sender.send(*buffers)


async def _clog(connection: Connection) -> None:
    """Send more than a connection takes in while its peer does not receive."""
    await connection.send(*[BLOCK] * CLOG)


async def _unclog(connection: Connection) -> None:
    for number in range(CLOG):
        block = await _receive_exactly(connection, len(BLOCK))
        _require(block == BLOCK, f"MiB {number} of {CLOG} came out different")


async def _expect_the_end(connection: Connection) -> None:
    """Receive until the end of the stream, or until the connection turns out to be broken."""
    try:
        while await _receive(connection):
            pass
    except ConnectionBroken:
        return


# Checks: bytes


@_from_either_end
async def _round_trip(near: Connection, far: Connection) -> None:
    await _transfer(near, far, b"fetch page 7")
    await _transfer(far, near, b"page 7")
    await _transfer(near, far, bytes(range(256)))


@_from_either_end
async def _several_buffers(near: Connection, far: Connection) -> None:
    await _transfer(near, far, b"header", bytearray(b"page"), memoryview(b"another page"))
    await _transfer(near, far, b"", b"head", bytearray(), b"", b"tail", memoryview(b""))
    await _transfer(near, far)
    await _transfer(near, far, b"")
    # More than sendmsg() takes at once.
    await _transfer(near, far, *[BLOCK[start : start + start % 8] for start in range(3000)])
    await _transfer(near, far, b"h" * 32, BLOCK, b"h" * 32, BLOCK[1:], b"end")


@_from_either_end
async def _shapes_of_buffers_sent(near: Connection, far: Connection) -> None:
    numbers = memoryview(array.array("Q", range(1000)))
    await _transfer(near, far, numbers, numbers[3:500], numbers[:0], numbers[-1:])
    await _transfer(near, far, memoryview(BLOCK)[4095:8193], memoryview(BLOCK)[1:2])
    await _transfer(
        near, far, memoryview(BLOCK)[:24].cast("B", (2, 3, 4)), numbers.cast("B").cast("H")
    )


@_from_either_end
async def _shapes_of_buffers_received_into(near: Connection, far: Connection) -> None:
    await far.send(b"12345")
    numbers = array.array("I", [0, 0, 0])
    count = await near.receive_into(memoryview(numbers))
    _require(
        0 < count <= 5,
        f"receive_into counts bytes, whatever the buffer's items are; of 5 it returned {count}",
    )
    _require(
        numbers.tobytes() == b"12345"[:count].ljust(12, b"\0"),
        "receive_into filled an array with something else",
    )
    await _receive_exactly(near, 5 - count)

    await far.send(BLOCK[:64])
    frame = bytearray(64)
    received = 0
    while received < 64:
        end = min(received + 7, 64)
        received += await near.receive_into(memoryview(frame)[received:end])
        _require(
            frame == BLOCK[:received].ljust(64, b"\0"),
            "receive_into wrote beside its part of a buffer",
        )


@_from_either_end
async def _buffers_are_the_callers_again(near: Connection, far: Connection) -> None:
    page = bytearray(b"old page")
    await near.send(page)
    page[:] = b"new page"
    _require_released(page, "send")
    await _expect_bytes(far, b"old page")

    blocks = [bytearray(BLOCK) for _ in range(4)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_bytes, far, BLOCK * 4)
        await near.send(*blocks)
        for block in blocks:
            block[:] = bytes(len(BLOCK))
            _require_released(block, "send")

    await near.send(b"x")
    await far.receive_into(memoryview(page))
    _require_released(page, "receive_into")


def _require_released(buffer: bytearray, by: str) -> None:
    try:
        buffer.append(0)
    except BufferError:
        raise AssertionError(
            f"{by} has returned and still holds a view of the caller's buffer"
        ) from None


async def _large_transfers_both_ways_at_once(bench: _Bench) -> None:
    halves = BLOCK * 8, BLOCK[::-1] * 8
    async with bench.pair() as (dialled, accepted), trio.open_nursery() as nursery:
        nursery.start_soon(_transfer, dialled, accepted, halves[0])
        nursery.start_soon(_transfer, accepted, dialled, halves[1])


@_from_either_end
async def _backpressure(near: Connection, far: Connection) -> None:
    sent = trio.Event()

    async def send() -> None:
        await _clog(near)
        sent.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await _all_blocked()
        _require(
            not sent.is_set(),
            f"send took in {CLOG} MiB that were not received: nothing bounds the memory it takes",
        )
        await _unclog(far)
    await _transfer(near, far, b"and it goes on")


# Checks: the end


@_from_either_end
async def _end_of_stream(near: Connection, far: Connection) -> None:
    await near.send(b"last words")
    near.close()
    _require(
        await _receive_exactly(far, 10) == b"last words",
        "what was sent before close did not arrive",
    )
    for _ in range(3):
        _require(not await _receive(far), "there were bytes after the end of the stream")


@_from_either_end
async def _close_wakes_own_tasks(near: Connection, far: Connection) -> None:
    async def send() -> None:
        with _expect(ConnectionClosed, "close during send"):
            await _clog(near)

    async def receive() -> None:
        with _expect(ConnectionClosed, "close during receive_into"):
            await _receive(near)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        nursery.start_soon(receive)
        await _all_blocked()
        near.close()


@_from_either_end
async def _close_ends_the_peers_receive(near: Connection, far: Connection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_the_end, far)
        await _all_blocked()
        near.close()


@_from_either_end
async def _close_ends_the_peers_send(near: Connection, far: Connection) -> None:
    async def send() -> None:
        with _expect(ConnectionBroken, "the peer's close during send"):
            await _clog(far)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await _all_blocked()
        near.close()
    for _ in range(2):
        with _expect(ConnectionBroken, "send on a connection that broke"):
            await far.send(b"x")


@_from_either_end
async def _send_after_the_peers_close(near: Connection, far: Connection) -> None:
    near.close()
    with _expect(ConnectionBroken, f"sending up to {CLOG} MiB to a peer that has closed"):
        for _ in range(CLOG):
            await far.send(BLOCK)


@_from_either_end
async def _use_after_close(near: Connection, far: Connection) -> None:
    near.close()
    near.close()
    for buffers in ([b"x"], [b""], []):
        with _expect(ConnectionClosed, f"send of {len(buffers)} buffers after close"):
            await near.send(*buffers)
    with _expect(ConnectionClosed, "receive_into after close"):
        await _receive(near)
    near.close()
    far.close()
    with _expect(ConnectionClosed, "receive_into after both sides have closed"):
        await _receive(far)


# Checks: tasks


async def _expect_busy(when: str, call: Callable[[], Awaitable[object]]) -> None:
    async def attempt() -> None:
        with _expect(ConnectionBusy, when):
            await call()
        refused.set()

    refused = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt)
        await _all_blocked()
        _require(refused.is_set(), f"{when}: wanted ConnectionBusy, but it waits")


@_from_either_end
async def _two_receivers(near: Connection, far: Connection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_bytes, near, b"for the first")
        await _all_blocked()
        await _expect_busy(
            "receive_into during another task's",
            lambda: near.receive_into(memoryview(bytearray(1))),
        )
        await _transfer(near, far, b"and so is this")
        await far.send(b"for the first")


@_from_either_end
async def _two_senders(near: Connection, far: Connection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_clog, near)
        await _all_blocked()
        await _expect_busy("send during another task's", lambda: near.send(b"x"))
        await _transfer(far, near, b"the other direction")
        await _unclog(far)
    await _transfer(near, far, b"nothing in between")


@_from_either_end
async def _cancelled_receive(near: Connection, far: Connection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_receive, near)
        await _all_blocked()
        nursery.cancel_scope.cancel()
    await _transfer(far, near, b"the next one")

    await far.send(b"kept")
    with trio.CancelScope() as scope:
        scope.cancel()
        await near.receive_into(memoryview(bytearray(4)))
    _require(
        scope.cancelled_caught,
        "receive_into with bytes at hand is no checkpoint: it ignored a cancellation",
    )
    await _expect_bytes(near, b"kept")


@_from_either_end
async def _receive_cancelled_as_bytes_arrive(near: Connection, far: Connection) -> None:
    received = bytearray()

    async def receive() -> None:
        received.extend(await _receive(near, 1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await _all_blocked()
        await far.send(b"12")
        nursery.cancel_scope.cancel()
    received += await _receive_exactly(near, 2 - len(received))
    _require(received == b"12", "a receive_into that was cancelled took bytes with it")


@_from_either_end
async def _cancelled_send(near: Connection, far: Connection) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_clog, near)
        await _all_blocked()
        nursery.cancel_scope.cancel()
    near.close()
    received = bytearray()
    try:
        while part := await _receive(far):
            received += part
    except ConnectionBroken:
        pass
    whole, rest = divmod(len(received), len(BLOCK))
    _require(
        received == BLOCK * whole + BLOCK[:rest],
        "what a cancelled send has sent is no beginning of its buffers",
    )


async def _many_connections(bench: _Bench) -> None:
    with ExitStack() as stack:
        with await bench.listen() as listener:
            dialled, accepted = await _connect_many(bench, listener)
        for connection in dialled + accepted:
            stack.enter_context(closing(connection))
        for number, connection in enumerate(dialled):
            await connection.send(b"%2d" % number)
        numbers = await _together(
            *[functools.partial(_receive_exactly, connection, 2) for connection in accepted]
        )
        _require(sorted(map(int, numbers)) == list(range(MANY)), "connections got mixed up")
        for name, connection in zip(numbers, accepted, strict=True):
            await _transfer(connection, dialled[int(name)], name)


async def _connect_many(bench: _Bench, listener: Listener) -> list[list[Connection]]:
    async def dial() -> Connection:
        return await bench.transport.dial(urlsplit(listener.uri))

    async def dial_all() -> list[Connection]:
        return await _together(*[dial] * MANY)

    async def accept_all() -> list[Connection]:
        return [await listener.accept() for _ in range(MANY)]

    return await _together(dial_all, accept_all)


# Checks: dialling and listening


async def _names(bench: _Bench) -> None:
    asked = urlsplit(bench.make_uri())
    with await bench.transport.listen(asked) as listener:
        got = urlsplit(listener.uri)
        _require(
            got.scheme == asked.scheme, f"a listener on {asked.scheme}: calls itself {listener.uri}"
        )
        _require(
            bench.transport.is_private(got) is bench.transport.is_private(asked),
            f"one of {asked.geturl()} and {listener.uri} is private, and the other is not",
        )
        dialled, accepted = await bench.connect(listener)
        with closing(dialled), closing(accepted):
            _require(
                bool(dialled.peer) and bool(accepted.peer), "a connection does not name its peer"
            )


async def _accept_and_dial_are_checkpoints(bench: _Bench) -> None:
    with await bench.listen() as listener:
        with trio.CancelScope() as scope:
            scope.cancel()
            (await bench.transport.dial(urlsplit(listener.uri))).close()
        _require(scope.cancelled_caught, "dial ignored a cancellation")
    with await bench.listen() as listener:
        with trio.CancelScope() as scope:
            scope.cancel()
            (await listener.accept()).close()
        _require(scope.cancelled_caught, "accept ignored a cancellation")


async def _cancelled_accept(bench: _Bench) -> None:
    with await bench.listen() as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.accept)
            await _all_blocked()
            nursery.cancel_scope.cancel()
        await _require_connects(bench, listener)


async def _require_connects(bench: _Bench, listener: Listener) -> None:
    dialled, accepted = await bench.connect(listener)
    with closing(dialled), closing(accepted):
        await _transfer(dialled, accepted, b"hello")


async def _two_acceptors(bench: _Bench) -> None:
    async def accept() -> None:
        (await listener.accept()).close()

    with await bench.listen() as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            await _all_blocked()
            await _expect_busy("accept during another task's", accept)
            (await bench.transport.dial(urlsplit(listener.uri))).close()


async def _close_wakes_accept(bench: _Bench) -> None:
    async def accept() -> None:
        with _expect(ConnectionClosed, "close during accept"):
            await listener.accept()

    with await bench.listen() as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            await _all_blocked()
            listener.close()
        listener.close()
        with _expect(ConnectionClosed, "accept after close"):
            await listener.accept()


async def _listener_is_a_context_manager(bench: _Bench) -> None:
    listener = await bench.listen()
    with listener as entered:
        _require(entered is listener, "entering a listener gives something else")
    with _expect(ConnectionClosed, "accept after the listener's with block"):
        await listener.accept()


async def _nobody_listens(bench: _Bench) -> None:
    with await bench.listen() as listener:
        uri = urlsplit(listener.uri)
    for _ in range(2):
        with _expect(SourceUnreachable, f"dial of {listener.uri} after its listener has closed"):
            (await bench.transport.dial(uri)).close()
    with await bench.transport.listen(uri) as successor:
        await _require_connects(bench, successor)


async def _somebody_listens_already(bench: _Bench) -> None:
    with (
        await bench.listen() as listener,
        _expect(UsageError, f"a second listener on {listener.uri}"),
    ):
        (await bench.transport.listen(urlsplit(listener.uri))).close()


async def _connections_outlive_their_listener(bench: _Bench) -> None:
    with await bench.listen() as listener:
        dialled, accepted = await bench.connect(listener)
    with closing(dialled), closing(accepted):
        await _transfer(dialled, accepted, b"still here")
        await _transfer(accepted, dialled, b"so am I")


# Checks: what only some have


@_from_either_end
async def _detach(near: Connection, far: Connection) -> None:
    if not isinstance(near, Detachable):
        return
    await _transfer(near, far, b"before")
    is_encrypted = near.is_encrypted
    fd, tls = near.detach()
    if tls is not None:
        tls.close()
    try:
        near.close()
        with _expect(ConnectionClosed, "send after detach"):
            await near.send(b"x")
        with _expect(ConnectionClosed, "a second detach"):
            near.detach()
        _require(not os.get_blocking(fd), "the detached socket blocks")
        _require((tls is not None) == is_encrypted, "it does not say whether it is encrypted")
        if is_encrypted:
            return
        os.write(fd, b"after")
        await _expect_bytes(far, b"after")
        await far.send(b"answer")
        await trio.lowlevel.wait_readable(fd)
        _require(os.read(fd, 6) == b"answer", "the answer did not come out of the detached socket")
    finally:
        trio.lowlevel.notify_closing(fd)
        os.close(fd)
    await _expect_the_end(far)


CHECKS: tuple[Check, ...] = (
    _names,
    _round_trip,
    _several_buffers,
    _shapes_of_buffers_sent,
    _shapes_of_buffers_received_into,
    _buffers_are_the_callers_again,
    _large_transfers_both_ways_at_once,
    _backpressure,
    _end_of_stream,
    _close_wakes_own_tasks,
    _close_ends_the_peers_receive,
    _close_ends_the_peers_send,
    _send_after_the_peers_close,
    _use_after_close,
    _two_receivers,
    _two_senders,
    _cancelled_receive,
    _receive_cancelled_as_bytes_arrive,
    _cancelled_send,
    _many_connections,
    _accept_and_dial_are_checkpoints,
    _cancelled_accept,
    _two_acceptors,
    _close_wakes_accept,
    _listener_is_a_context_manager,
    _nobody_listens,
    _somebody_listens_already,
    _connections_outlive_their_listener,
    _detach,
)
