"""What the memory transport offers beyond the contract: short reads, breaks at an exact byte, a
hook on each connection."""

from __future__ import annotations

from contextlib import closing
from urllib.parse import urlsplit

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pagenet.errors import ConnectionBroken, SourceUnreachable, UsageError
from pagenet.testing import MemoryConnection, MemoryTransport, memory_pair


async def receive(connection: MemoryConnection, size: int = 1000) -> bytes:
    buffer = bytearray(size)
    return bytes(buffer[: await connection.receive_into(memoryview(buffer))])


async def test_a_pair_needs_no_transport() -> None:
    near, far = memory_pair()
    await near.send(b"a page", b" and ", b"another")
    assert await receive(far) == b"a page and another"
    near.close()
    assert await receive(far) == b""


async def test_byte_by_byte() -> None:
    near, far = memory_pair(max_receive=1)
    await near.send(b"page")
    assert [await receive(far) for _ in range(4)] == [b"p", b"a", b"g", b"e"]
    far.max_receive = None
    await near.send(b"page")
    assert await receive(far) == b"page"


async def test_exactly_the_capacity_fits() -> None:
    near, _far = memory_pair(capacity=10)
    with trio.fail_after(1):
        await near.send(bytes(10))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.send, b"x")
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert nursery.cancel_scope.cancelled_caught


@pytest.mark.parametrize("count", [1, 5, 9])
async def test_break_after(count: int) -> None:
    near, far = memory_pair()
    await far.send(b"under way")
    near.break_after(count)
    with pytest.raises(ConnectionBroken, match="told to"):
        await near.send(b"0123", b"456789")
    assert await receive(far) == b"0123456789"[:count]
    assert await receive(near) == b"under way"
    for end in near, far:
        with pytest.raises(ConnectionBroken):
            await end.send(b"x")
        with pytest.raises(ConnectionBroken):
            await receive(end)


async def test_break_with_the_last_byte() -> None:
    near, far = memory_pair()
    near.break_after(4)
    await near.send(b"page")
    assert await receive(far) == b"page"
    with pytest.raises(ConnectionBroken):
        await receive(far)


async def test_break_now_wakes_everybody() -> None:
    near, far = memory_pair(capacity=10)

    async def expect_broken(end: MemoryConnection, *, sends: bool) -> None:
        with pytest.raises(ConnectionBroken):
            await (end.send(bytes(11)) if sends else receive(end))

    near.max_receive = 0  # receivers wait although there are bytes
    far.max_receive = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: expect_broken(near, sends=True))
        nursery.start_soon(lambda: expect_broken(far, sends=False))
        await wait_all_tasks_blocked()
        far.break_after(0)


async def test_on_connect_comes_before_the_first_byte() -> None:
    seen: list[tuple[MemoryConnection, MemoryConnection]] = []

    def on_connect(dialled: MemoryConnection, accepted: MemoryConnection) -> None:
        seen.append((dialled, accepted))
        if len(seen) == 1:
            accepted.break_after(0)

    memory = MemoryTransport(max_receive=3, on_connect=on_connect)
    with await memory.listen(urlsplit("memory://source")) as listener:
        assert listener.uri == "memory://source"
        for broken in (True, False):
            dialled, accepted = await memory.dial(urlsplit(listener.uri)), await listener.accept()
            assert seen[-1] == (dialled, accepted)
            assert dialled.max_receive == accepted.max_receive == 3
            with closing(dialled), closing(accepted):
                if broken:
                    with pytest.raises(ConnectionBroken):
                        await dialled.send(b"x")
                else:
                    await dialled.send(b"x")


async def test_names_belong_to_one_transport() -> None:
    memory, another = MemoryTransport(), MemoryTransport()
    with await memory.listen(urlsplit("memory://Source")) as listener:
        assert listener.uri == "memory://Source"
        with pytest.raises(SourceUnreachable, match="no process listens"):
            await another.dial(urlsplit("memory://Source"))
        with pytest.raises(SourceUnreachable):
            await memory.dial(urlsplit("memory://source"))


async def test_unnamed_listeners_differ() -> None:
    memory = MemoryTransport()
    with (
        await memory.listen(urlsplit("memory://")) as one,
        await memory.listen(urlsplit("memory:")) as other,
    ):
        assert one.uri != other.uri


async def test_connections_that_nobody_accepted_break() -> None:
    memory = MemoryTransport()
    with await memory.listen(urlsplit("memory://source")) as listener:
        dialled = await memory.dial(urlsplit(listener.uri))
    with pytest.raises(ConnectionBroken):
        await receive(dialled)


@pytest.mark.parametrize(
    "uri",
    ["memory:source", "memory:///source", "memory://source/lane", "memory://s?x=1", "memory://s#x"],
)
async def test_senseless_uris(uri: str) -> None:
    with pytest.raises(UsageError, match="say memory://NAME"):
        await MemoryTransport().listen(urlsplit(uri))


async def test_an_empty_buffer_receives_nothing() -> None:
    near, _far = memory_pair()
    with pytest.raises(ValueError, match="empty buffer"):
        await near.receive_into(memoryview(b""))


def test_reprs() -> None:
    near, far = memory_pair(name="source")
    assert repr(near) == "<MemoryConnection to memory://source: open>"
    near.break_after(0)
    assert repr(far) == "<MemoryConnection to memory://source (dialled): broken>"
