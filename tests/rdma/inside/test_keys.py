"""The source hands out keys, in C and in Trio: what a peer may not send, and what becomes of its
keys when it leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from processes import write_pattern

from pagenet import Server, serve
from pagenet.protocol import Channel, Hello, Role
from pagenet.rdma import default_path
from pagenet.rdma._constants import KEYS_IN_ANY_CASE
from pagenet.rdma._lanes import exchange
from pagenet.rdma._wire import (
    KEY_HEADER,
    Answer,
    Asking,
    Endpoint,
    Key,
    Kind,
    decode_answer,
    read_key,
)
from pagenet.region import Run
from pagenet.session import MessageStream, greet, receive_exactly
from pagenet.transport import Connection, dial

MIB = 1 << 20
PAGE = 4096
SIZE = 2 * MIB + 3 * PAGE
CHUNKS = [Run(0, 256), Run(256, 256), Run(512, 3)]
LANES = ["native", "trio"]


@pytest.fixture
def source() -> Iterator[Path]:
    """A source whose second chunk is a hole, and so zero; every seventh page of the other chunks is
    zero."""
    path = write_pattern(Path("/dev/shm/source"), SIZE, zero_every=7)
    with path.open("r+b") as file:
        last = path.read_bytes()[2 * MIB :]
        file.truncate(MIB)
        file.seek(2 * MIB)
        file.write(last)
    yield path
    path.unlink()


class Peer:
    """A destination's demand connection, on which keys are asked for by hand."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def say(self, *askings: Asking) -> None:
        await self.connection.send(b"".join(asking.encode() for asking in askings))

    async def answer(self) -> Key:
        header = bytearray(KEY_HEADER.size)
        await receive_exactly(self.connection, memoryview(header))
        answer, run, length = decode_answer(bytes(header))
        body = bytearray(length)
        await receive_exactly(self.connection, memoryview(body))
        return read_key(answer, run, bytes(body))

    async def until_closed(self) -> None:
        with trio.fail_after(30):
            while await self.connection.receive_into(memoryview(bytearray(4096))):
                pass


@asynccontextmanager
async def peer_of(server: Server) -> AsyncIterator[Peer]:
    control, lane = await dial(server.uri), await dial(server.uri)
    try:
        hello = await greet(MessageStream(control), Hello(Role.DESTINATION, Channel.CONTROL))
        await greet(MessageStream(lane), Hello(Role.DESTINATION, Channel.DEMAND, hello.session))
        path = default_path()
        await exchange(lane, Endpoint(path.gid, path.lid, 1, 1, path.mtu, path.reads))
        yield Peer(lane)
    finally:
        lane.close()
        control.close()


def ask(run: Run) -> Asking:
    return Asking(Kind.ASK, run)


def give_back(run: Run) -> Asking:
    return Asking(Kind.RETURN, run)


def zeros_of(source: Path, run: Run) -> list[int]:
    content = source.read_bytes()
    return [
        page
        for page in range(run.first, run.end)
        if not any(content[page * PAGE : (page + 1) * PAGE])
    ]


async def none_pinned(server: Server) -> None:
    [memory] = server._readable.values()
    with trio.fail_after(30):
        while memory.pinned:  # noqa: ASYNC110 - nothing tells of it
            await trio.sleep(0.005)


@pytest.mark.parametrize("lane", LANES)
async def test_keys(lane: Any, source: Path) -> None:
    """Answers come in order, zeros are marked, and every key is given back in the end: by a peer
    that returns them, or by one that leaves."""
    async with (
        serve(str(source), listen="rdma://127.0.0.1:0", lane=lane) as server,
        peer_of(server) as peer,
    ):
        await peer.say(*map(ask, CHUNKS))
        keys = [await peer.answer() for _ in CHUNKS]
        assert [key.run for key in keys] == CHUNKS
        assert [key.answer for key in keys] == [Answer.HERE, Answer.ZERO, Answer.HERE]
        for key in keys:
            assert [
                page for page in range(key.run.first, key.run.end) if key.is_zero(page)
            ] == zeros_of(source, key.run)
        assert zeros_of(source, CHUNKS[0])
        await peer.say(give_back(CHUNKS[0]), give_back(CHUNKS[2]))
        await none_pinned(server)
        async with peer_of(server) as other:
            await other.say(ask(CHUNKS[0]))
            assert (await other.answer()).answer is Answer.HERE
        await none_pinned(server)
        await peer.say(ask(CHUNKS[0]))
        assert (await peer.answer()).answer is Answer.HERE


@pytest.mark.parametrize("lane", LANES)
async def test_key_that_another_connection_has_counts_too(lane: Any, tmp_path: Path) -> None:
    """Or two connections would pin more and more, by sharing what they have in turn."""
    chunks = [Run(256 * number, 256) for number in range(2 * KEYS_IN_ANY_CASE)]
    mine, others = chunks[:KEYS_IN_ANY_CASE], chunks[KEYS_IN_ANY_CASE:]
    path = write_pattern(tmp_path / "source", len(chunks) * MIB)
    async with (
        serve(str(path), listen="rdma://127.0.0.1:0", rdma_pin_limit=MIB, lane=lane) as server,
        peer_of(server) as peer,
        peer_of(server) as other,
    ):
        for asks, runs in ((peer, mine), (other, others)):
            await asks.say(*map(ask, runs))
            assert [(await asks.answer()).answer for _ in runs] == [Answer.HERE] * len(runs)
        await peer.say(ask(others[0]))
        assert (await peer.answer()).answer is Answer.REFUSED
        await peer.say(give_back(mine[0]), ask(others[0]))
        assert (await peer.answer()).answer is Answer.HERE


@pytest.mark.parametrize("lane", LANES)
async def test_senseless_askings(lane: Any, source: Path) -> None:
    """They end that connection, and no other."""
    refused = trio.Event()
    reasons: list[str] = []

    def on_event(event: str, /, **fields: Any) -> None:
        if event == "refused":
            reasons.append(fields["reason"])
            refused.set()

    async with serve(
        str(source), listen="rdma://127.0.0.1:0", lane=lane, on_event=on_event
    ) as server:
        for askings, complaint in [
            ([ask(CHUNKS[0]), ask(CHUNKS[0])], "asks for a key that it has"),
            ([give_back(CHUNKS[0])], "gives back a key that it does not have"),
            ([ask(Run(0, 255))], "that is no chunk"),
            ([ask(Run(1, 256))], "that is no chunk"),
            ([ask(Run(512, 256))], "that is no chunk"),
            ([ask(Run(1 << 40, 256))], "that is no chunk"),
        ]:
            refused = trio.Event()
            async with peer_of(server) as peer:
                await peer.say(*askings)
                with trio.fail_after(30):
                    await refused.wait()
                await peer.until_closed()
            assert complaint in reasons[-1]
        await none_pinned(server)
        async with peer_of(server) as peer:
            refused = trio.Event()
            await peer.connection.send(KEY_HEADER.pack(0, 9, 0, 256, 0))
            await refused.wait()
            assert "asks for no key" in reasons[-1]
