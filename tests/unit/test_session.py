"""pagenet/session.py over the in-memory transport: messages, hellos, and errors that are sent to
the peer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import pytest
import trio
import trio.testing

from pagenet import ConnectionBroken, ConnectionClosed, RemoteProtocolError, session
from pagenet.nurseries import open_failing_nursery
from pagenet.protocol import Bye, Channel, Failure, Hello, Role, encode_message
from pagenet.session import MessageStream, accept_forever, greet, receive_exactly, telling
from pagenet.testing import MemoryConnection, MemoryTransport, memory_pair
from pagenet.transport import Connection

SESSION = bytes(range(16))
SOURCE = Hello(Role.SOURCE, Channel.CONTROL, SESSION)
DESTINATION = Hello(Role.DESTINATION, Channel.CONTROL)
HERE = urlsplit("memory://here")


@pytest.fixture(params=[None, 1], ids=["whole", "one byte each"])
def pair(request: pytest.FixtureRequest) -> tuple[MessageStream, MemoryConnection]:
    """A stream, and the peer's end of its connection."""
    ours, theirs = memory_pair(max_receive=request.param)
    return MessageStream(ours), theirs


Pair = tuple[MessageStream, MemoryConnection]


async def one_line(
    reason: str, error: type[Exception], action: Callable[[], Awaitable[object]]
) -> None:
    with pytest.raises(error, match=reason) as caught:
        await action()
    assert "\n" not in str(caught.value)


# ---- messages ----


async def test_messages_until_the_peer_closes(pair: Pair) -> None:
    stream, peer = pair
    await peer.send(
        encode_message(SOURCE) + encode_message(Failure("x", "y")), encode_message(Bye(True))
    )
    peer.close()
    assert [await stream.receive() for _ in range(4)] == [
        SOURCE,
        Failure("x", "y"),
        Bye(True),
        None,
    ]
    assert await stream.receive() is None


async def test_send(pair: Pair) -> None:
    stream, peer = pair
    await stream.send(SOURCE)
    await stream.send(Bye(False))
    stream.connection.close()
    other = MessageStream(peer)
    assert [await other.receive() for _ in range(3)] == [SOURCE, Bye(False), None]


async def test_eof_in_the_middle_of_a_message(pair: Pair) -> None:
    stream, peer = pair
    await peer.send(encode_message(SOURCE)[:-1])
    peer.close()
    await one_line("closed in the middle of a message", RemoteProtocolError, stream.receive)


async def test_break_in_the_middle_of_a_message(pair: Pair) -> None:
    stream, peer = pair
    await peer.send(encode_message(SOURCE)[:-1])
    peer.break_after(0)
    await one_line("broke", ConnectionBroken, stream.receive)


async def test_receive_may_be_cancelled_and_loses_nothing(pair: Pair) -> None:
    stream, peer = pair
    data = encode_message(SOURCE)
    for part in (data[:5], data[5:40]):
        await peer.send(part)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    await peer.send(data[40:])
    assert await stream.receive() == SOURCE


async def test_what_follows_the_messages_is_handed_over() -> None:
    ours, theirs = memory_pair()
    stream = MessageStream(ours)
    await theirs.send(encode_message(SOURCE) + b"a lane header, perhaps")
    assert await stream.receive() == SOURCE
    assert stream.unread() == b"a lane header, perhaps"
    assert stream.unread() == b""


async def test_rest_of_a_connection_begins_with_what_came_too_early() -> None:
    ours, theirs = memory_pair()
    await theirs.send(encode_message(SOURCE) + b"abc")
    stream = MessageStream(ours)
    assert await stream.receive() == SOURCE
    rest, into = stream.rest(), bytearray(2)
    assert rest.peer == ours.peer
    await theirs.send(b"de")
    got = b""
    while len(got) < 5:
        count = await rest.receive_into(memoryview(into))
        got += into[:count]
    assert got == b"abcde"
    await rest.send(b"back")
    await receive_exactly(theirs, memoryview(bytearray(4)))
    rest.close()
    assert await theirs.receive_into(memoryview(into)) == 0


async def test_receive_exactly() -> None:
    ours, theirs = memory_pair(max_receive=3)
    await theirs.send(b"0123456789")
    theirs.close()
    into = bytearray(8)
    await receive_exactly(ours, memoryview(into))
    assert into == b"01234567"
    await receive_exactly(ours, memoryview(b""))
    await one_line(
        "closed the connection", ConnectionBroken, lambda: receive_exactly(ours, memoryview(into))
    )


# ---- hellos ----


@pytest.mark.parametrize(
    ("data", "error", "reason"),
    [
        (encode_message(SOURCE), None, ""),
        (encode_message(DESTINATION), RemoteProtocolError,
            "the peer is a destination too: one side serves, the other"),
        (encode_message(Failure("protocol", "no\nthanks")), RemoteProtocolError,
            r"the peer refused: no\?thanks"),
        (encode_message(Bye(True)), RemoteProtocolError, "first message is not a hello"),
        (encode_message(Hello(Role.SOURCE, Channel.CONTROL, version=9, oldest=8)),
            RemoteProtocolError, "versions 8 to 9"),
        (b"GET / HTTP/1.1\r\n\r\n", RemoteProtocolError,
            "does not speak pagenet: it begins with b'G"),
        (encode_message(SOURCE)[:20], RemoteProtocolError, "closed in the middle of a message"),
        (b"", ConnectionBroken, "closed the connection instead of a hello"),
    ],
    ids=lambda parameter: parameter[:24].hex() if isinstance(parameter, bytes) else None,
)  # fmt: skip
async def test_receive_hello(
    pair: Pair, data: bytes, error: type[Exception] | None, reason: str
) -> None:
    stream, peer = pair
    await peer.send(data)
    peer.close()
    if error is None:
        assert await stream.receive_hello(Role.SOURCE) == SOURCE
    else:
        await one_line(reason, error, lambda: stream.receive_hello(Role.SOURCE))


async def test_both_are_sources(pair: Pair) -> None:
    stream, peer = pair
    await peer.send(encode_message(SOURCE))
    await one_line(
        "the peer is a source too",
        RemoteProtocolError,
        lambda: stream.receive_hello(Role.DESTINATION),
    )


async def test_half_a_hello_is_waited_for_no_longer_than_none(
    autojump_clock: trio.testing.MockClock, pair: Pair
) -> None:
    stream, peer = pair

    async def trickle() -> None:
        for byte in encode_message(SOURCE):
            await peer.send(bytes([byte]))
            await trio.sleep(session.HELLO_TIMEOUT / 4)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        begun = trio.current_time()
        await one_line(
            "the peer sent no hello for 10 s",
            RemoteProtocolError,
            lambda: stream.receive_hello(Role.SOURCE),
        )
        assert trio.current_time() - begun == pytest.approx(session.HELLO_TIMEOUT)
        nursery.cancel_scope.cancel()


async def test_silence_after_the_hello_is_no_timeout(
    autojump_clock: trio.testing.MockClock, pair: Pair
) -> None:
    stream, peer = pair
    await peer.send(encode_message(SOURCE))
    assert await stream.receive_hello(Role.SOURCE) == SOURCE

    async def later() -> None:
        await trio.sleep(100 * session.HELLO_TIMEOUT)
        await peer.send(encode_message(Bye(True)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(later)
        assert await stream.receive() == Bye(True)


async def test_greet(pair: Pair) -> None:
    stream, peer = pair
    await peer.send(encode_message(SOURCE))
    assert await greet(stream, DESTINATION) == SOURCE
    assert await MessageStream(peer).receive_hello(Role.DESTINATION) == DESTINATION


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        (
            DESTINATION,
            Hello(Role.SOURCE, Channel.DEMAND, SESSION),
            "answers on channel demand, not control",
        ),
        (
            Hello(Role.SOURCE, Channel.BACKGROUND, SESSION),
            DESTINATION,
            "answers on channel control, not background",
        ),
        (DESTINATION, DESTINATION, "the peer is a destination too"),
        (SOURCE, SOURCE, "the peer is a source too"),
        (DESTINATION, Failure("protocol", "go away"), "the peer refused: go away"),
    ],
)
async def test_greet_is_answered_wrongly(
    pair: Pair, ours: Hello, theirs: Hello | Failure, reason: str
) -> None:
    stream, peer = pair
    await peer.send(encode_message(theirs))
    await one_line(reason, RemoteProtocolError, lambda: greet(stream, ours))


async def test_greet_is_not_answered(autojump_clock: trio.testing.MockClock, pair: Pair) -> None:
    await one_line("no hello for 10 s", RemoteProtocolError, lambda: greet(pair[0], DESTINATION))


# ---- errors that are sent ----


async def test_telling_tells_the_peer_and_raises(pair: Pair) -> None:
    stream, peer = pair
    with pytest.raises(RemoteProtocolError, match="what it did"):
        async with telling(stream):
            raise RemoteProtocolError("what it did")
    assert await MessageStream(peer).receive() == Failure("protocol", "what it did")


async def test_telling_says_nothing_about_other_errors() -> None:
    ours, theirs = memory_pair()
    with pytest.raises(ValueError, match="of ours"):
        async with telling(MessageStream(ours)):
            raise ValueError("of ours")
    async with telling(MessageStream(ours)):
        pass
    ours.close()
    assert await theirs.receive_into(memoryview(bytearray(9))) == 0


@pytest.mark.parametrize("text", ["x" * (4 << 20), "two\nlines", "\ud800"])
async def test_telling_sends_one_line_whatever_the_text(text: str) -> None:
    """The text may quote the peer: longer than a message may be, or not even text."""
    ours, theirs = memory_pair()
    with pytest.raises(RemoteProtocolError):
        async with telling(MessageStream(ours)):
            raise RemoteProtocolError(text)
    told = await MessageStream(theirs).receive()
    assert isinstance(told, Failure)
    assert told.text.isprintable()
    assert 0 < len(told.text) <= 1024


@pytest.mark.parametrize(
    "end", [lambda ours, theirs: theirs.close(), lambda ours, theirs: ours.close()]
)
async def test_telling_a_peer_that_is_gone(
    end: Callable[[MemoryConnection, MemoryConnection], None],
) -> None:
    ours, theirs = memory_pair()
    end(ours, theirs)
    with pytest.raises(RemoteProtocolError, match="the cause"):
        async with telling(MessageStream(ours)):
            raise RemoteProtocolError("the cause")


async def test_telling_a_peer_that_does_not_listen(autojump_clock: trio.testing.MockClock) -> None:
    ours, _theirs = memory_pair(capacity=1)
    begun = trio.current_time()
    with pytest.raises(RemoteProtocolError, match="the cause"):
        async with telling(MessageStream(ours)):
            raise RemoteProtocolError("the cause")
    assert trio.current_time() - begun == pytest.approx(1)


# ---- accepting ----


async def test_connections_are_met_side_by_side() -> None:
    memory = MemoryTransport()
    met: list[str] = []

    async def meet(connection: Connection) -> None:
        hello = await MessageStream(connection).receive_hello(Role.SOURCE)
        met.append(hello.channel.value)
        connection.close()

    async with trio.open_nursery() as nursery:
        with await memory.listen(HERE) as listener:
            nursery.start_soon(accept_forever, listener, meet)
            silent = await memory.dial(HERE)
            for channel in (Channel.DEMAND, Channel.BACKGROUND):
                connection = await memory.dial(HERE)
                await connection.send(encode_message(Hello(Role.SOURCE, channel, SESSION)))
                assert await connection.receive_into(memoryview(bytearray(1))) == 0
            await silent.send(encode_message(SOURCE))
            assert await silent.receive_into(memoryview(bytearray(1))) == 0
            nursery.cancel_scope.cancel()
    assert met == ["demand", "background", "control"]


async def test_a_listener_that_is_closed_ends_the_accepting() -> None:
    listener = await MemoryTransport().listen(HERE)

    async def meet(connection: Connection) -> None:
        connection.close()

    async def accept_until_closed() -> None:
        async with open_failing_nursery() as nursery:
            nursery.start_soon(accept_forever, listener, meet)
            await trio.testing.wait_all_tasks_blocked()
            listener.close()

    with pytest.raises(ConnectionClosed):
        await accept_until_closed()
