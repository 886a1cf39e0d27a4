"""A source that speaks the protocol up to its replies, and then says what a test wants."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress

import trio

from pagenet import Block, PagenetError, Region, Run, transport
from pagenet.protocol import (
    HELD,
    LANE_HEADER_SIZE,
    LZ4,
    Channel,
    Encoding,
    Hello,
    Reply,
    RequestDecoder,
    Role,
)
from pagenet.session import MessageStream

PAGE = 4096
PAYLOAD = random.Random(1).randbytes(4 * PAGE)
_SESSION = bytes(range(16))

#: given a connection, and the run, number and class of a request
Answer = Callable[[transport.Connection, Run, int, int], Awaitable[None]]


async def say(
    encoding: int,
    length: int,
    payload: bytes,
    shift: int,
    connection: transport.Connection,
    run: Run,
    number: int,
    class_: int,
) -> None:
    """A reply of that encoding and length, for the run as many pages further on as ``shift``."""
    run = Run(run.first + shift, run.count)
    reply = Reply(number, class_, Encoding.RAW, run, length).encode()  # type: ignore[arg-type]
    await connection.send(reply[:5] + bytes([encoding]) + reply[6:], payload)


@asynccontextmanager
async def hostile_source(
    answer: Answer, pages: int = 4, identity: bytes = b"1" * 16
) -> AsyncIterator[str]:
    """Where it listens. It answers each request as ``answer`` has it, and can be a peer."""
    region = Region([Block("mem", pages * PAGE, PAGE)])
    features = frozenset({HELD, LZ4})  # not that it is alive

    async def meet(connection: transport.Connection) -> None:
        stream = MessageStream(connection)
        channel = (await stream.receive_hello(Role.DESTINATION)).channel
        if channel is Channel.CONTROL:
            hello = Hello(Role.SOURCE, channel, _SESSION, identity, region, features=features)
            await stream.answer(hello)
            while await stream.receive() is not None:
                pass
        else:
            await stream.answer(Hello(Role.SOURCE, channel, _SESSION))
            await serve_lane(connection)

    async def serve_lane(connection: transport.Connection) -> None:
        decoder, buffer = RequestDecoder(region), memoryview(bytearray(LANE_HEADER_SIZE))
        while count := await connection.receive_into(buffer):
            decoder.feed(buffer[:count])
            for request in decoder.requests():
                await answer(connection, request.run, request.request_id, request.class_)

    async def quietly(connection: transport.Connection) -> None:
        with closing(connection), suppress(PagenetError):
            await meet(connection)

    async def accept() -> None:
        while True:
            nursery.start_soon(quietly, await listener.accept())

    with await transport.listen("tcp://127.0.0.1:0") as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            yield listener.uri
            nursery.cancel_scope.cancel()
