"""Peers that break the rules, over real sockets: what that costs them, and that it costs no other
peer anything."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
import trio.testing
from certificates import Authority

import pagenet
from pagenet import (
    Block,
    ConnectionBroken,
    Region,
    RemoteProtocolError,
    SourceDisconnected,
    SourceLost,
    SourceUnreachable,
    UsageError,
    transport,
)
from pagenet._native import Packer
from pagenet.protocol import (
    FRAME_HEADER,
    MAX_REASON_BYTES,
    REPLY_HEADER,
    REQUEST_HEADER,
    Bye,
    Channel,
    Encoding,
    Failure,
    Hello,
    Request,
    RequestDecoder,
    Role,
    encode_message,
)
from pagenet.session import HELLO_TIMEOUT, MessageStream, accept_forever, greet
from pagenet.testing import MemoryConnection, MemoryTransport
from pagenet.tls import Tls

SESSION = bytes(range(16))
PAGE = 4096
# More than one request may ask for. Every third page is zero, and no two others are alike.
PAGES = 1040
CONTENT = b"".join(
    bytes(PAGE) if page % 3 == 0 else struct.pack("<Q", page) * 512 for page in range(PAGES)
)

HTTP = b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"
TLS = bytes.fromhex("1603010200010001fc0303")


def frame(body: bytes, framing: int = 1, length: int | None = None) -> bytes:
    return FRAME_HEADER.pack(b"PGNT", framing, 0, len(body) if length is None else length) + body


def hello(role: Role, channel: Channel = Channel.CONTROL, **fields: Any) -> bytes:
    return encode_message(Hello(role, channel, **fields))


class Events:
    """What a side has reported, and a way to wait for it."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, dict[str, Any]]] = []
        self._changed = trio.Event()

    def __call__(self, event: str, /, **fields: object) -> None:
        self._seen.append((event, fields))
        self._changed.set()
        self._changed = trio.Event()

    def of(self, *names: str) -> list[tuple[str, dict[str, Any]]]:
        return [(name, fields) for name, fields in self._seen if name in names]

    async def wait(self, *names: str, count: int = 1) -> None:
        while len(self.of(*names)) < count:
            await self._changed.wait()

    async def check_one(self, name: str, reason: str) -> None:
        """Check that only this happened to a connection, once, and that its reason is one line."""
        await self.wait("refused", "lost")
        ((seen, fields),) = self.of("refused", "lost")
        assert seen == name
        assert reason in fields["reason"]
        assert fields["reason"].isprintable()
        assert len(fields["reason"]) < 300
        assert fields["peer"]


async def until_closed(connection: transport.Connection) -> bytes:
    """What came before the other side closed."""
    data = bytearray()
    buffer = memoryview(bytearray(PAGE))
    with suppress(ConnectionBroken):
        while count := await connection.receive_into(buffer):
            data += buffer[:count]
    return bytes(data)


# At most one: what every end of the test's connections has.
_encrypting: list[Tls] = []


def tls() -> Tls | None:
    return _encrypting[0] if _encrypting else None


def serving(*args: Any, **options: Any) -> Any:
    return pagenet.serve(*args, tls=tls(), **options)


def pulling(*args: Any, **options: Any) -> Any:
    return pagenet.pull(*args, tls=tls(), **options)


async def dial(uri: str) -> transport.Connection:
    return await transport.dial(uri, tls=tls())


async def listen(uri: str) -> transport.Listener:
    return await transport.listen(uri, tls=tls())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return Tls(directory=Authority().write(tmp_path_factory.mktemp("certificates")))


@pytest.fixture(params=["tcp", "unix", "tls"])
def somewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A URI to listen on; ``tls``: over TCP, and every end has certificates."""
    if request.param == "tls":
        _encrypting.append(request.getfixturevalue("certificates"))
    yield f"unix:{tmp_path}/socket" if request.param == "unix" else "tcp://127.0.0.1:0"
    _encrypting.clear()


@pytest.fixture(scope="module")
def memory_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "ram"
    path.write_bytes(CONTENT)
    return path


@dataclass
class Served:
    """A real source, and an honest destination that pulls its pages beside the stranger."""

    server: pagenet.Server
    events: Events
    copy: Path

    @property
    def uri(self) -> str:
        return self.server.uri

    async def pull(self) -> None:
        async with pulling(self.uri, pagenet.IntoFile(self.copy)) as transfer:
            await transfer.wait_complete()
        assert self.copy.read_bytes() == CONTENT
        self.copy.unlink()


@pytest.fixture
async def served(somewhere: str, memory_file: Path, tmp_path: Path) -> AsyncIterator[Served]:
    events = Events()
    async with serving(str(memory_file), listen=somewhere, on_event=events) as server:
        yield Served(server, events, tmp_path / "copy")


# ---- strangers that dial a source ----

# what they send, whether they then close, and what the source reports
STRANGERS: dict[str, tuple[bytes, bool, str, str]] = {
    "garbage": (b"\x00\xff\r\n" * 50, False, "refused", "does not speak pagenet"),
    "HTTP": (HTTP, False, "refused", "it begins with b'GET / HTTP/1.1\\r\\n'"),
    "TLS": (TLS, False, "refused", "does not speak pagenet"),
    "a scan": (b"", True, "lost", "closed the connection instead of a hello"),
    "half a hello": (hello(Role.DESTINATION)[:40], True, "refused",
        "closed in the middle of a message (40 bytes"),
    "another framing": (frame(b"", framing=2), False, "refused",
        "frames its messages in version 2"),
    "4 GiB to come": (frame(b"", length=2**32 - 1), False, "refused",
        "announces a message of 4294967295 bytes"),
    "more than a destination has to say": (frame(b"", length=(64 << 10) + 1), False, "refused",
        "a message of 65537 bytes"),
    "nested deeply": (frame(b"\x91" * 60_000), False, "refused", "is not msgpack"),
    "not text": (frame(b"\x81\xa4type\xa2\xff\xff"), False, "refused", "is not msgpack"),
    "a long claim": (frame(b"\xdd\xff\xff\xff\xff"), False, "refused", "is not msgpack"),
    "an escape": (frame(msgpack.packb({"type": "\x1b[2J\n"})), False, "refused",
        r"of type '\x1b[2J\n', which is unknown"),
    "a source": (hello(Role.SOURCE), False, "refused", "the peer is a source too"),
    "another version": (hello(Role.DESTINATION, version=9, oldest=8), False, "refused",
        "speaks protocol versions 8 to 9"),
    "a lane": (hello(Role.DESTINATION, Channel.DEMAND, session=SESSION), False, "refused",
        "session that does not exist"),
    "a lane of nothing": (hello(Role.DESTINATION, Channel.DEMAND), False, "refused",
        "session that does not exist"),
    "bye": (encode_message(Bye(True)), False, "refused", "first message is not a hello"),
    "busy itself": (encode_message(Failure("busy", "no")), False, "refused",
        "the peer refused: no"),
    "a failure": (encode_message(Failure("x", "not\nyou")), False, "refused",
        "the peer refused: not?you"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "closes", "event", "reason"), STRANGERS.values(), ids=STRANGERS)
async def test_stranger(served: Served, data: bytes, closes: bool, event: str, reason: str) -> None:
    async with trio.open_nursery() as nursery:
        stranger = await dial(served.uri)
        nursery.start_soon(served.pull)
        await stranger.send(data)
        if closes:
            stranger.close()
        else:
            told = await until_closed(stranger)
            stranger.close()
            assert not told or told.startswith(b"PGNT")
    await served.events.check_one(event, reason)
    assert len(served.events.of("complete")) == 1


@pytest.mark.parametrize(
    "data", [b"", hello(Role.DESTINATION)[:-1]], ids=["nothing", "half a hello"]
)
async def test_stranger_who_waits(
    served: Served, mock_clock: trio.testing.MockClock, data: bytes
) -> None:
    stranger = await dial(served.uri)
    await stranger.send(data)
    # the clock stands still: however long this takes, it was not a timeout that let it in
    await served.pull()
    assert not served.events.of("refused", "lost")
    mock_clock.jump(HELLO_TIMEOUT)
    told = await until_closed(stranger)
    stranger.close()
    await served.events.check_one("refused", "sent no hello for 10 s")
    assert b"sent no hello" in told


async def test_flood(served: Served) -> None:
    async def stranger(number: int) -> None:
        connection = await dial(served.uri)
        if number % 2:
            await connection.send(HTTP)
            await until_closed(connection)
        connection.close()

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(stranger, number)
        nursery.start_soon(served.pull)
    await served.events.wait("refused", "lost", count=100)
    assert (len(served.events.of("refused")), len(served.events.of("lost"))) == (50, 50)
    assert len(served.events.of("complete")) == 1


# ---- destinations that break the rules later ----


@asynccontextmanager
async def connected(uri: str) -> AsyncIterator[tuple[MessageStream, transport.Connection]]:
    """A destination's control connection and one lane, both greeted."""
    control, lane = await dial(uri), await dial(uri)
    try:
        stream = MessageStream(control)
        session = (await greet(stream, Hello(Role.DESTINATION, Channel.CONTROL))).session
        await greet(MessageStream(lane), Hello(Role.DESTINATION, Channel.BACKGROUND, session))
        yield stream, lane
    finally:
        control.close()
        lane.close()


def request(first: int, count: int, *, class_: int = 2, unit: int = 0, reserved: int = 0) -> bytes:
    return REQUEST_HEADER.pack(0, class_, 3, unit, reserved, first, count, 0)


REQUESTS = {
    "behind the end": (request(PAGES, 1), "not within one block"),
    "across the end": (request(PAGES - 1, 2), "2 pages from page 1039 on: not within one block"),
    "wrapping": (request(2**64 - 1, 2), "not within one block"),
    "wrapping further": (request(2**64 - 2**32, 2**32 - 1), "not within one block"),
    "of nothing": (request(5, 0), "not within one block"),
    "oversized": (request(0, 1025), "4198400 bytes at once"),
    "half a unit": (request(1, 2, unit=1), "not made of whole units of 2**1 pages"),
    "an endless unit": (request(0, 1, unit=255), "not made of whole units of 2**255 pages"),
    "reserved bits": (request(0, 1, reserved=1), "reserved bits"),
    "unknown class": (request(0, 1, class_=7), "transfer class 7"),
    "garbage": (HTTP, "reserved bits"),
}


@pytest.mark.parametrize(("data", "reason"), REQUESTS.values(), ids=REQUESTS)
async def test_bad_request(served: Served, data: bytes, reason: str) -> None:
    async with trio.open_nursery() as nursery, connected(served.uri) as (control, lane):
        nursery.start_soon(served.pull)
        await lane.send(request(1, 1), data)
        answer = await until_closed(lane)
        assert (
            answer[24:] == CONTENT[PAGE : 2 * PAGE]
        )  # the answer to the valid request before it, and nothing else
        await control.send(Bye(False))  # the control connection still works
        await served.events.wait("left")
    await served.events.check_one("refused", reason)
    assert len(served.events.of("complete")) == 1


async def test_half_a_request_and_gone(served: Served) -> None:
    async with trio.open_nursery() as nursery, connected(served.uri) as (control, lane):
        nursery.start_soon(served.pull)
        await lane.send(request(1, 1)[:-1])
        lane.close()
        await served.events.wait("refused")
        await control.send(Bye(False))
        await served.events.wait("left")
    await served.events.check_one("refused", "closed in the middle of a request")


CONTROL = {
    "hello again": (hello(Role.DESTINATION), False, "refused", "says hello twice"),
    "garbage": (HTTP, False, "refused", "does not speak pagenet"),
    "a failure": (
        encode_message(Failure("x", "enough")),
        False,
        "refused",
        "the peer gave up: enough",
    ),
    "the end": (b"", True, "lost", "closed its connection before it was done"),
    "the end of half a message": (
        encode_message(Bye(True))[:-1],
        True,
        "refused",
        "closed in the middle of a message",
    ),
}


@pytest.mark.parametrize(("data", "closes", "event", "reason"), CONTROL.values(), ids=CONTROL)
async def test_bad_control(
    served: Served, data: bytes, closes: bool, event: str, reason: str
) -> None:
    async with trio.open_nursery() as nursery, connected(served.uri) as (control, lane):
        nursery.start_soon(served.pull)
        await control.connection.send(data)
        if closes:
            control.connection.close()
        assert await until_closed(lane) == b""  # lanes end with their session
    await served.events.check_one(event, reason)
    while served.server.sessions:  # noqa: ASYNC110
        await trio.sleep(0.001)


async def test_lane_whose_session_ends_while_it_is_greeted(
    monkeypatch: pytest.MonkeyPatch, memory_file: Path
) -> None:
    memory, events = MemoryTransport(), Events()
    monkeypatch.setitem(transport._transports, "memory", memory)
    async with serving(str(memory_file), listen="memory://source", on_event=events) as server:
        control = MessageStream(await dial(server.uri))
        session = (await greet(control, Hello(Role.DESTINATION, Channel.CONTROL))).session
        memory.capacity = 8  # the answer to the lane's hello gets stuck half-way
        lane = await dial(server.uri)
        await lane.send(hello(Role.DESTINATION, Channel.DEMAND, session=session))
        await trio.testing.wait_all_tasks_blocked()
        await control.send(Bye(False))
        await events.wait("left")
        answer = await until_closed(lane)
        assert answer == hello(Role.SOURCE, Channel.DEMAND, session=session)
        assert not events.of("refused", "lost")


async def test_reason_that_is_no_text(somewhere: str, tmp_path: Path) -> None:
    """A file's name may be any bytes, and is part of the block table and of the reason why the file
    cannot be read."""
    path = tmp_path / os.fsdecode(b"ram\xff")
    path.write_bytes(CONTENT)

    async def be_told() -> None:
        uri = await listening_uri(events)
        async with connected(uri) as (_, lane):
            os.truncate(path, 0)
            await lane.send(request(0, 1))
            assert b"ram? cannot be read any more: it ends at byte 0" in await until_closed(lane)

    events = Events()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_told)
        await expect_source_lost(partial(serve_at, somewhere, path, events))


async def listening_uri(events: Events) -> str:
    await events.wait("listening")
    ((_, fields),) = events.of("listening")
    return str(fields["uri"])


async def serve_at(uri: str, path: Path, events: Events) -> None:
    async with serving(str(path), listen=uri, on_event=events) as server:
        await server.wait_complete()


async def expect_source_lost(action: Callable[[], Any]) -> None:
    with pytest.raises(SourceLost):
        await action()


# ---- limits ----


async def test_more_sessions_than_there_may_be(
    somewhere: str, memory_file: Path, tmp_path: Path
) -> None:
    """A session over the limit is refused, with the reason and the option; a session that ends
    makes room."""
    events = Events()
    async with serving(
        str(memory_file), listen=somewhere, on_event=events, max_sessions=1
    ) as server:
        served = Served(server, events, tmp_path / "copy")
        async with connected(served.uri) as (control, lane):
            with pytest.raises(
                SourceUnreachable,
                match=r"is busy: 1 destinations are served already.*--max-sessions",
            ):
                await served.pull()
            await lane.send(request(1, 1))
            await control.send(Bye(False))  # a session that is served already does not notice
            await events.wait("left")
        await served.pull()
    await events.check_one("refused", "--max-sessions")


async def test_more_lanes_than_there_may_be(somewhere: str, memory_file: Path) -> None:
    events = Events()
    async with (
        serving(str(memory_file), listen=somewhere, on_event=events, max_lanes=1) as server,
        connected(server.uri) as (control, lane),
    ):
        session = next(iter(server._sessions))
        another = await dial(server.uri)
        with pytest.raises(
            SourceUnreachable, match=r"is busy: a session may have 1 lanes.*--max-lanes"
        ):
            await greet(
                MessageStream(another), Hello(Role.DESTINATION, Channel.BACKGROUND, session)
            )
        another.close()
        await lane.send(request(1, 1))
        await control.send(Bye(False))
        await events.wait("left")
    await events.check_one("refused", "--max-lanes")


@pytest.mark.parametrize(
    "data", [b"", hello(Role.DESTINATION)[:-1]], ids=["nothing", "half a hello"]
)
async def test_silent_peers_make_room(
    served: Served, mock_clock: trio.testing.MockClock, data: bytes
) -> None:
    """At the limit the oldest silent peer is closed. The clock stands still, so it is not a
    timeout."""
    served.server.admission._max_strangers = 3
    silent = []
    for number in range(3):
        silent.append(await dial(served.uri))
        await silent[-1].send(data)
        while served.server.admission.strangers <= number:
            await trio.lowlevel.checkpoint()
    newcomer = await dial(served.uri)
    assert b"others wanted its place" in await until_closed(silent[0])
    await served.events.check_one("refused", "others wanted its place")
    assert served.server.admission.strangers == 3
    for connection in (*silent, newcomer):
        connection.close()
    await served.pull()


# ---- sources that break the rules ----

REGION = Region([Block("ram", 3 * PAGE)])
CLOSE = None  # among things to send: close the connection
GREETING = hello(Role.SOURCE, session=SESSION, identity=b"i" * 16, region=REGION)
Sends = Sequence[bytes | None]


def reply(request: Request, payload: bytes = b"", **changes: int) -> bytes:
    """A reply of zeros that fits ``request``, but for ``changes``."""
    fields = {
        "request_id": request.request_id,
        "class_": request.class_,
        "encoding": Encoding.ZERO,
        "reserved": 0,
        "first": request.run.first,
        "count": request.run.count,
        "length": len(payload),
    }
    assert changes.keys() <= fields.keys()
    return REPLY_HEADER.pack(*{**fields, **changes}.values()) + payload


def honest(request: Request) -> Sends:
    """The first page only: a transfer that fails later has something to lose."""
    return [first_page(request)]


def first_page(request: Request) -> bytes:
    return reply(request, b"1" * PAGE, encoding=Encoding.RAW, count=1)


@dataclass
class Impostor:
    """A source that keeps the rules until it sends what the test is about."""

    control: Sends = (GREETING,)
    lane: Callable[[Channel], Sends] = lambda channel: [
        hello(Role.SOURCE, channel, session=SESSION)
    ]
    replies: Callable[[Request], Sends] = honest

    async def meet(self, connection: transport.Connection) -> None:
        try:
            stream = MessageStream(connection)
            theirs = await stream.receive_hello(Role.DESTINATION)
            if theirs.channel is Channel.CONTROL:
                await _send(connection, self.control)
            else:
                await _send(connection, self.lane(theirs.channel))
                await self._serve_lane(connection, stream.unread())
            await until_closed(connection)
        except (ConnectionBroken, pagenet.ConnectionClosed):
            pass
        finally:
            connection.close()

    async def _serve_lane(self, connection: transport.Connection, unread: bytes) -> None:
        decoder = RequestDecoder(REGION)
        decoder.feed(unread)
        buffer = memoryview(bytearray(PAGE))
        while True:
            for request in decoder.requests():
                await _send(connection, self.replies(request))
            count = await connection.receive_into(buffer)
            if not count:
                return
            decoder.feed(buffer[:count])

    @asynccontextmanager
    async def listening(self, uri: str) -> AsyncIterator[str]:
        async with trio.open_nursery() as nursery:
            with await listen(uri) as listener:
                nursery.start_soon(accept_forever, listener, self.meet)
                yield listener.uri
                nursery.cancel_scope.cancel()


async def _send(connection: transport.Connection, sends: Sends) -> None:
    for data in sends:
        if data is CLOSE:
            connection.close()
        else:
            await connection.send(data)


@pytest.fixture(params=["file", "anonymous", "memfd"])
def owner(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "file":
        yield pagenet.IntoFile(tmp_path / "copy")
        assert not list(tmp_path.glob("copy*"))
        return
    try:
        pagenet.uffd.probe()
    except pagenet.Unsupported as error:
        pytest.skip(str(error))
    memory = pagenet.OwnMemory(request.param)
    yield memory
    memory.close()


async def check_pull_fails(
    uri: str, owner: Any, error: type[Exception], reason: str
) -> pagenet.Transfer | None:
    """Check that at most the first page was placed, and that it is right."""
    transfers: list[pagenet.Transfer] = []

    async def pull() -> None:
        async with pulling(uri, owner) as transfer:
            transfers.append(transfer)
            await transfer.wait_complete()

    with pytest.raises(error) as caught:
        await pull()
    assert type(caught.value) is error
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
    for transfer in transfers:
        placed = transfer.statistics().done
        assert placed <= 1
        # A page that never came would be SIGBUS here.
        if placed and isinstance(owner, pagenet.OwnMemory):
            assert await owner.read(0, PAGE) == b"1" * PAGE
    return transfers[0] if transfers else None


def after_the_first_page(**changes: int) -> Callable[[Request], Sends]:
    """A reply for the rest of the request, with something wrong with it."""

    def replies(request: Request) -> Sends:
        length = changes.get("length", 0)
        payload = b"2" * min(length, 1 << 20)
        return [
            first_page(request),
            reply(request, payload, **{"first": 1, "count": 2, "length": length, **changes}),
        ]

    return replies


RAW = Encoding.RAW
REPLIES: dict[str, tuple[Callable[[Request], Sends], type[Exception], str]] = {
    "too little": (after_the_first_page(encoding=RAW, length=2 * PAGE - 1), RemoteProtocolError,
        "8191 bytes for 2 pages"),
    "too much": (after_the_first_page(encoding=RAW, length=2 * PAGE + 1), RemoteProtocolError,
        "8193 bytes for 2 pages"),
    "4 GiB": (after_the_first_page(encoding=RAW, length=2**32 - 1), RemoteProtocolError,
        "4294967295 bytes for 2 pages"),
    "bytes of zero": (after_the_first_page(length=PAGE), RemoteProtocolError,
        "4096 bytes for 2 pages of 0 bytes"),
    "unasked": (after_the_first_page(request_id=77), RemoteProtocolError,
        "answers request 77, which is not open"),
    "again": (after_the_first_page(first=0), RemoteProtocolError, "out of turn"),
    "out of turn": (after_the_first_page(first=2, count=1), RemoteProtocolError, "out of turn"),
    "too far": (after_the_first_page(count=3), RemoteProtocolError, "out of turn"),
    "outside": (after_the_first_page(first=2**64 - 1), RemoteProtocolError, "out of turn"),
    "nothing": (after_the_first_page(count=0), RemoteProtocolError, "out of turn"),
    "another class": (after_the_first_page(class_=0), RemoteProtocolError, "of another class"),
    "unknown encoding": (after_the_first_page(encoding=9), RemoteProtocolError,
        "encoding 9, which is unknown"),
    "lz4": (after_the_first_page(encoding=Encoding.LZ4, length=100), RemoteProtocolError,
        "lz4, which was not asked for"),
    "garbage": (lambda request: [first_page(request), b"\xa5" * 100], RemoteProtocolError,
        "which is not open"),
    "text": (lambda request: [first_page(request), HTTP], RemoteProtocolError, "which is not open"),
    "a long reason": (
        after_the_first_page(encoding=Encoding.FAILED, length=MAX_REASON_BYTES + 1),
        RemoteProtocolError,
        "a reason of 1025 bytes",
    ),
    "a failure": (
        lambda request: [
            first_page(request),
            reply(request, b"disk\non fire \xff", encoding=Encoding.FAILED),
        ],
        SourceLost,
        "the source cannot go on: disk?on fire \ufffd",
    ),
    "the end": (lambda request: [first_page(request), CLOSE],
        SourceDisconnected, "the source is gone"),
    "the end of half a header": (
        lambda request: [first_page(request), reply(request)[:10], CLOSE],
        SourceDisconnected,
        "the source is gone",
    ),
    "the end of half a payload": (
        lambda request: [
            first_page(request),
            reply(request, b"2" * 2 * PAGE, encoding=RAW, first=1, count=2)[:-1],
            CLOSE,
        ],
        SourceDisconnected,
        "the source is gone",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("replies", "error", "reason"), REPLIES.values(), ids=REPLIES)
async def test_bad_reply(
    somewhere: str,
    owner: Any,
    replies: Callable[[Request], Sends],
    error: type[Exception],
    reason: str,
) -> None:
    async with Impostor(replies=replies).listening(somewhere) as uri:
        transfer = await check_pull_fails(uri, owner, error, reason)
        assert transfer is not None
        assert transfer.statistics().done == 1


PACKED = bytes(Packer().pack(memoryview(b"2" * 2 * PAGE)) or b"")


def packed(payload: bytes, **changes: int) -> Callable[[Request], Sends]:
    """The rest of the request, as a compressed reply."""

    def replies(request: Request) -> Sends:
        assert request.may_pack
        return [
            first_page(request),
            reply(request, payload, **{"encoding": LZ4, "first": 1, "count": 2, **changes}),
        ]

    return replies


def flipped(place: int) -> bytes:
    return PACKED[:place] + bytes([PACKED[place] ^ 1]) + PACKED[place + 1 :]


LZ4 = Encoding.LZ4
NOT_PAGES = f"the peer's {len(PACKED)} compressed bytes are not 2 pages"
# A block that would unpack to 256 MiB, if there were room.
BOMB = bytes(8) + b"\x1f2\1\0" + b"\xff" * 5000
COMPRESSED: dict[str, tuple[Callable[[Request], Sends], type[Exception], str]] = {
    "checksum": (packed(flipped(0)), RemoteProtocolError, NOT_PAGES),
    "literal": (packed(flipped(9)), RemoteProtocolError, NOT_PAGES),
    "the last byte": (packed(flipped(len(PACKED) - 1)), RemoteProtocolError, NOT_PAGES),
    "cut": (packed(PACKED[:-1]), RemoteProtocolError,
        f"the peer's {len(PACKED) - 1} compressed bytes are not 2 pages"),
    "with a tail": (packed(PACKED + b"\0"), RemoteProtocolError,
        "compressed bytes are not 2 pages"),
    "a page more": (packed(PACKED, count=1), RemoteProtocolError,
        "compressed bytes are not 1 pages"),
    "a checksum alone": (packed(PACKED[:8]), RemoteProtocolError,
        "the peer's 8 compressed bytes are not 2 pages"),
    "a byte": (packed(b"x"), RemoteProtocolError, "the peer's 1 compressed bytes are not 2 pages"),
    "nothing": (packed(b""), RemoteProtocolError, "0 bytes for 2 pages of 8192 bytes"),
    "no shorter": (packed(b"2" * 2 * PAGE), RemoteProtocolError,
        "8192 bytes for 2 pages of 8192 bytes"),
    "4 GiB": (packed(PACKED, length=2**32 - 1), RemoteProtocolError,
        "4294967295 bytes for 2 pages of 8192 bytes"),
    "a bomb": (packed(BOMB), RemoteProtocolError,
        f"the peer's {len(BOMB)} compressed bytes are not 2 pages"),
    "the end of half a payload": (
        lambda request: [
            *packed(PACKED)(request)[:1],
            (packed(PACKED)(request)[1] or b"")[:-1],
            CLOSE,
        ],
        SourceDisconnected,
        "the source is gone",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("replies", "error", "reason"), COMPRESSED.values(), ids=COMPRESSED)
async def test_bad_compressed_reply(
    somewhere: str,
    owner: Any,
    replies: Callable[[Request], Sends],
    error: type[Exception],
    reason: str,
) -> None:
    greeting = hello(Role.SOURCE, session=SESSION, region=REGION, features=frozenset({"lz4"}))
    async with Impostor([greeting], replies=replies).listening(somewhere) as uri:
        transfer = await check_pull_fails(uri, owner, error, reason)
        assert transfer is not None
        assert transfer.statistics().done == 1
        assert transfer.statistics().lz4_bytes == 0


@pytest.mark.parametrize("compress", ["auto", "lz4"])
async def test_source_that_knows_nothing_of_compression(
    somewhere: str, compress: Any, tmp_path: Path
) -> None:
    asked: list[int] = []

    def replies(request: Request) -> Sends:
        asked.append(request.encodings)
        return [reply(request, b"1" * PAGE * request.run.count, encoding=RAW)]

    async with (
        Impostor(replies=replies).listening(somewhere) as uri,
        pulling(uri, pagenet.IntoFile(tmp_path / "copy"), compress=compress) as transfer,
    ):
        await transfer.wait_complete()
    assert asked == [0b011]
    assert (tmp_path / "copy").read_bytes() == b"1" * 3 * PAGE


def table(*blocks: Any) -> bytes:
    """A source's hello with that block table, which pagenet's own encoder would refuse."""
    fields = {
        "type": "hello",
        "version": 1,
        "oldest": 1,
        "role": "source",
        "channel": "control",
        "session": SESSION,
    }
    return frame(msgpack.packb({**fields, "blocks": blocks}))


GREETINGS: dict[str, tuple[Sends, type[Exception], str]] = {
    "garbage": ([b"\x00\xff"], RemoteProtocolError, "does not speak pagenet"),
    "HTTP": ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], RemoteProtocolError, "does not speak pagenet"),
    "the end": ([CLOSE], SourceDisconnected,
        "the source is gone: the peer closed the connection instead of a hello"),
    "half a hello": ([GREETING[:40], CLOSE], RemoteProtocolError,
        "closed in the middle of a message"),
    "another version": ([hello(Role.SOURCE, version=9, oldest=8)], RemoteProtocolError,
        "bring both to releases"),
    "a destination": ([hello(Role.DESTINATION)], RemoteProtocolError,
        "the peer is a destination too"),
    "a lane": ([hello(Role.SOURCE, Channel.DEMAND, session=SESSION)], RemoteProtocolError,
        "answers on channel demand"),
    "a failure": ([encode_message(Failure("x", "go\naway"))], RemoteProtocolError,
        "the peer refused: go?away"),
    "no blocks": ([hello(Role.SOURCE, session=SESSION)], RemoteProtocolError, "no block table"),
    "an empty table": ([table()], RemoteProtocolError, "1 to 4096 blocks, not 0"),
    "negative": ([table(["a", -PAGE, PAGE])], RemoteProtocolError, "makes no sense"),
    "half a page": ([table(["a", 2048, 2048])], RemoteProtocolError, "makes no sense"),
    "no such pages": ([table(["a", 2**63, 2**63])], RemoteProtocolError, "makes no sense"),
    "too large": ([table(["a", 2**63, PAGE])], RemoteProtocolError, "limit 17179869184"),
    "too large in all": ([table(*([str(i), 2**46, PAGE] for i in range(2)))], RemoteProtocolError,
        "limit 17179869184"),
    "twins": ([table(["a", PAGE, PAGE], ["a", PAGE, PAGE])], RemoteProtocolError, "same name"),
    "a thousand too many": ([table(*([str(i), PAGE, PAGE] for i in range(5096)))],
        RemoteProtocolError, "5096 blocks"),
    "hello, hello": ([GREETING, GREETING], RemoteProtocolError, "the source says hello twice"),
    "hello, garbage": ([GREETING + b"\0" * 100], RemoteProtocolError, "does not speak pagenet"),
    "hello, failure": ([GREETING, encode_message(Failure("x", "oh"))], SourceLost, "gave up: oh"),
    "hello, bye": ([GREETING + encode_message(Bye(True))], SourceDisconnected,
        "has closed the session"),
    "hello, the end": ([GREETING, CLOSE], SourceDisconnected, "has closed the session"),
    "hello, half a message": ([GREETING + GREETING[:20], CLOSE], RemoteProtocolError,
        "in the middle of a message"),
}  # fmt: skip


@pytest.mark.parametrize(("control", "error", "reason"), GREETINGS.values(), ids=GREETINGS)
async def test_bad_control_of_a_source(
    somewhere: str, owner: Any, control: Sends, error: type[Exception], reason: str
) -> None:
    async with Impostor(control).listening(somewhere) as uri:
        await check_pull_fails(uri, owner, error, reason)


LANES: dict[str, tuple[Callable[[Channel], Sends], type[Exception], str]] = {
    "garbage": (lambda channel: [HTTP], RemoteProtocolError, "does not speak pagenet"),
    "the end": (lambda channel: [CLOSE], SourceDisconnected, "the source is gone"),
    "the hello of control": (lambda channel: [GREETING], RemoteProtocolError,
        "answers on channel control"),
    "a failure": (lambda channel: [encode_message(Failure("x", "no"))], RemoteProtocolError,
        "the peer refused: no"),
    "pages at once": (
        lambda channel: [hello(Role.SOURCE, channel, session=SESSION) + b"\0" * 24],
        RemoteProtocolError,
        "sent pages on lane demand before it was asked",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lane", "error", "reason"), LANES.values(), ids=LANES)
async def test_bad_lane_of_a_source(
    somewhere: str,
    owner: Any,
    lane: Callable[[Channel], Sends],
    error: type[Exception],
    reason: str,
) -> None:
    async with Impostor(lane=lane).listening(somewhere) as uri:
        await check_pull_fails(uri, owner, error, reason)


async def test_source_that_never_says_hello(
    somewhere: str, owner: Any, mock_clock: trio.testing.MockClock
) -> None:
    async with Impostor(control=[]).listening(somewhere) as uri, trio.open_nursery() as nursery:
        nursery.start_soon(
            check_pull_fails, uri, owner, RemoteProtocolError, "the peer sent no hello for 10 s"
        )
        await trio.testing.wait_all_tasks_blocked(0.01)
        mock_clock.jump(HELLO_TIMEOUT)


@pytest.mark.parametrize("owner", ["anonymous", "memfd"], indirect=True)
async def test_source_whose_pages_are_larger_than_the_owners(owner: Any) -> None:
    huge = hello(Role.SOURCE, session=SESSION, region=Region([Block("ram", 2 << 20, 2 << 20)]))
    async with Impostor([huge]).listening("tcp://127.0.0.1:0") as uri:
        await check_pull_fails(
            uri, owner, UsageError, "'ram' in pages of 2097152 bytes, and the owner in smaller ones"
        )


# ---- the source dials ----


async def pull_listening(uri: str, path: Path, events: Events) -> None:
    async with pulling(uri, pagenet.IntoFile(path), listen=True, on_event=events) as transfer:
        await transfer.wait_complete()


async def serve_to(uri: str, path: Path) -> None:
    async with serving(str(path), connect=uri) as server:
        await server.wait_complete()


LISTENED: dict[str, tuple[bytes, bool, str]] = {
    "nobody": (b"", True, "closed the connection instead of a hello"),
    "HTTP": (HTTP, False, "does not speak pagenet"),
    "half a hello": (GREETING[:40], True, "closed in the middle of a message"),
    "a destination": (hello(Role.DESTINATION), False, "the peer is a destination too"),
    "another version": (
        hello(Role.SOURCE, version=9, oldest=8),
        False,
        "speaks protocol versions 8 to 9",
    ),
    "a lane": (
        hello(Role.SOURCE, Channel.DEMAND, session=SESSION),
        False,
        "session that does not exist",
    ),
    "a lane of nothing": (hello(Role.SOURCE, Channel.DEMAND), False, "session that does not exist"),
    "no blocks": (hello(Role.SOURCE, session=SESSION), False, "no block table or no session"),
    "no session": (hello(Role.SOURCE, region=REGION), False, "no block table or no session"),
    "an absurd table": (table(["a", 2**63, PAGE]), False, "makes no sense"),
}


@pytest.mark.parametrize(("data", "closes", "reason"), LISTENED.values(), ids=LISTENED)
async def test_stranger_comes_before_the_source(
    somewhere: str, memory_file: Path, tmp_path: Path, data: bytes, closes: bool, reason: str
) -> None:
    events = Events()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull_listening, somewhere, tmp_path / "copy", events)
        uri = await listening_uri(events)
        stranger = await dial(uri)
        await stranger.send(data)
        if not closes:
            await until_closed(stranger)
        stranger.close()
        await events.wait("refused")
        nursery.start_soon(serve_to, uri, memory_file)
    await events.check_one("refused", reason)
    assert (tmp_path / "copy").read_bytes() == CONTENT


async def test_stranger_who_waits_holds_nobody_up(
    somewhere: str, memory_file: Path, tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    events = Events()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull_listening, somewhere, tmp_path / "copy", events)
        uri = await listening_uri(events)
        stranger = await dial(uri)
        await serve_to(uri, memory_file)
        await until_closed(stranger)  # it ends with the transfer
        stranger.close()
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert not events.of("refused")


async def test_second_source_is_refused(somewhere: str, tmp_path: Path) -> None:
    events = Events()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            expect_source_lost, partial(pull_listening, somewhere, tmp_path / "copy", events)
        )
        uri = await listening_uri(events)
        first, second = await dial(uri), await dial(uri)
        await greet(
            MessageStream(first), Hello(Role.SOURCE, Channel.CONTROL, SESSION, region=REGION)
        )
        await second.send(GREETING)
        await until_closed(second)
        second.close()
        await events.check_one("refused", "another source is being pulled from here already")
        first.close()
    assert list(tmp_path.glob("copy*")) == []


async def test_source_that_is_gone_before_it_is_answered_keeps_nobody_out(
    monkeypatch: pytest.MonkeyPatch, memory_file: Path, tmp_path: Path
) -> None:
    def first_one_breaks(dialled: MemoryConnection, accepted: MemoryConnection) -> None:
        accepted.break_after(1)
        memory.on_connect = None

    memory, events = MemoryTransport(on_connect=first_one_breaks), Events()
    monkeypatch.setitem(transport._transports, "memory", memory)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull_listening, "memory://destination", tmp_path / "copy", events)
        uri = await listening_uri(events)
        await (await dial(uri)).send(GREETING)
        await events.wait("refused")
        nursery.start_soon(serve_to, uri, memory_file)
    await events.check_one("refused", "broke")
    assert (tmp_path / "copy").read_bytes() == CONTENT


DIALLED: dict[str, tuple[Sends, type[Exception], str]] = {
    "garbage": ([HTTP], RemoteProtocolError, "does not speak pagenet"),
    "the end": ([CLOSE], ConnectionBroken, "closed the connection instead of a hello"),
    "a source": ([GREETING], RemoteProtocolError, "the peer is a source too"),
    "control for a lane": (
        [frame(msgpack.packb({
            "type": "hello", "version": 1, "oldest": 1, "role": "destination",
            "channel": "control", "session": b"", "lanes": ["control"],
        }))],
        RemoteProtocolError,
        "asks for its control channel as a lane",
    ),
    "hello, garbage": ([hello(Role.DESTINATION), HTTP], RemoteProtocolError,
        "does not speak pagenet"),
    "hello, the end": ([hello(Role.DESTINATION), CLOSE], ConnectionBroken, "before it was done"),
    "a lane with garbage": ([hello(Role.DESTINATION, lanes=(Channel.DEMAND,))], RemoteProtocolError,
        "reserved bits"),
}  # fmt: skip


@pytest.mark.parametrize(("control", "error", "reason"), DIALLED.values(), ids=DIALLED)
async def test_bad_destination_that_is_dialled(
    somewhere: str, memory_file: Path, control: Sends, error: type[Exception], reason: str
) -> None:
    async def meet(connection: transport.Connection) -> None:
        theirs = await MessageStream(connection).receive_hello(Role.SOURCE)
        is_control = theirs.channel is Channel.CONTROL
        with suppress(pagenet.ConnectionClosed):
            await _send(
                connection,
                control if is_control else [hello(Role.DESTINATION, theirs.channel), HTTP],
            )
            await until_closed(connection)
        connection.close()

    with await listen(somewhere) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_forever, listener, meet)
            with pytest.raises(error) as caught:
                await serve_to(listener.uri, memory_file)
            nursery.cancel_scope.cancel()
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
