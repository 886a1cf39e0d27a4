"""How sessions end, and what they may cost before anything is known of the peer: which peer is told
what, and which waits for which."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

import pytest
import trio
import trio.testing

import pagenet
from pagenet import (
    Block,
    ConnectionBroken,
    Region,
    RemoteProtocolError,
    Run,
    SourceLost,
    UffdSocket,
    UsageError,
    transport,
)
from pagenet.destination.filling import Filling
from pagenet.destination.into_file import FileTarget
from pagenet.destination.sources import LANE_TIMEOUT
from pagenet.protocol import (
    MAX_REQUEST_BYTES,
    Bye,
    Channel,
    Class,
    Encoding,
    Failure,
    Hello,
    Message,
    OutstandingRequests,
    Request,
    Role,
    encode_message,
)
from pagenet.region import MAX_PAGES
from pagenet.residency import Residency, State
from pagenet.session import LAST_WORDS_TIMEOUT, MessageStream, greet
from pagenet.source.trio_lane import TrioSourceLane
from pagenet.testing import MemoryConnection, MemoryTransport, memory_pair
from pagenet.unix_socket import UnixSocketFile

PAGE = 4096
PAGES = 512
SESSION = bytes(range(16))
REGION = Region([Block("ram", 4 * PAGE)])
GREETING = Hello(Role.SOURCE, Channel.CONTROL, SESSION, region=REGION)
HERE = "memory://here"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryTransport:
    memory = MemoryTransport()
    monkeypatch.setitem(transport._transports, "memory", memory)
    return memory


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram"
    path.write_bytes(b"r" * PAGES * PAGE)
    return path


# ---- socket files ----


async def test_socket_file_is_closed_once(tmp_path: Path) -> None:
    file = UnixSocketFile(str(tmp_path / "socket"), "name", 1)
    file.close()
    (tmp_path / "socket").touch()
    with pytest.raises(UsageError, match=r"^name: the file there is no socket"):
        UnixSocketFile(str(tmp_path / "socket"), "name", 1)
    file.close()
    assert os.listdir(tmp_path) == ["socket"]


async def test_closing_a_socket_file_wakes_who_accepts(tmp_path: Path) -> None:
    file = UnixSocketFile(str(tmp_path / "socket"), "name", 1)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await file.socket.accept()

        await trio.testing.wait_all_tasks_blocked()
        file.close()


async def test_owners_socket_is_found_again_after_chdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    owner = UffdSocket("uffd.sock")
    await owner.listen()
    monkeypatch.chdir("/")
    owner.close()
    assert os.listdir(tmp_path) == []


# ---- listening ----


class Moved(MemoryTransport):
    """A name that was private when it was looked up, and bound to something that is not."""

    def is_private(self, uri: SplitResult) -> bool:
        return uri.netloc == "private"

    async def listen(self, uri: SplitResult) -> Any:
        return await super().listen(uri._replace(netloc="public"))


async def test_the_address_that_was_bound_must_be_private(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Moved()
    monkeypatch.setitem(transport._transports, "memory", moved)
    with pytest.raises(
        UsageError, match=r"^memory://public can be reached from other hosts.*--plaintext"
    ):
        await transport.listen("memory://private")
    assert not moved.listeners
    with await transport.listen("memory://private", plaintext=True) as listener:
        assert listener.uri == "memory://public"


# ---- the destination leaves a source that has dialled it ----


async def serve_to(uri: str, path: Path) -> None:
    async with pagenet.serve(str(path), connect=uri) as server:
        await server.wait_complete()


@asynccontextmanager
async def dialled(
    path: Path, *lanes: Channel
) -> AsyncIterator[tuple[MessageStream, list[transport.Connection]]]:
    """A destination's ends of the connections that a source has dialled: control, and the lanes.
    Raises the source's error."""
    connections = []
    try:
        async with pagenet.nurseries.open_failing_nursery() as nursery:
            with await transport.listen(HERE) as listener:
                nursery.start_soon(serve_to, HERE, path)
                connections.append(await listener.accept())
                control = MessageStream(connections[0])
                session = (await control.receive_hello(Role.SOURCE)).session
                await control.send(Hello(Role.DESTINATION, Channel.CONTROL, session, lanes=lanes))
                for _ in lanes:
                    connections.append(await listener.accept())
                    stream = MessageStream(connections[-1])
                    channel = (await stream.receive_hello(Role.SOURCE)).channel
                    await stream.send(Hello(Role.DESTINATION, channel, session))
                await trio.testing.wait_all_tasks_blocked()
                yield control, connections[1:]
    finally:
        for connection in connections:
            connection.close()


async def leave(path: Path, *last_words: Message) -> None:
    async with dialled(path, Channel.DEMAND) as (control, _):
        for message in last_words:
            await control.send(message)
        control.connection.close()


async def test_destination_that_leaves_too_early(memory: MemoryTransport, ram: Path) -> None:
    with pytest.raises(
        ConnectionBroken, match=r"^the destination left before it had every page$"
    ) as caught:
        await leave(ram, Bye(False))
    assert caught.value.exit_code == 4


async def test_destination_that_dies(memory: MemoryTransport, ram: Path) -> None:
    with pytest.raises(ConnectionBroken, match="closed its connection before it was done"):
        await leave(ram)


async def test_destination_that_leaves_complete(memory: MemoryTransport, ram: Path) -> None:
    await leave(ram, Bye(True))


def breaks(lane: MemoryConnection) -> None:
    lane.break_after(0)


def closes(lane: MemoryConnection) -> None:
    lane.close()


@pytest.mark.parametrize("request_", [b"", b"half a request"])
@pytest.mark.parametrize("end", [breaks, closes])
async def test_lane_ends_before_bye_is_read(
    memory: MemoryTransport,
    ram: Path,
    mock_clock: trio.testing.MockClock,
    request_: bytes,
    end: Callable[[Any], None],
) -> None:
    async with dialled(ram, Channel.DEMAND) as (control, lanes):
        if request_:
            await lanes[0].send(request_)
        end(lanes[0])
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(LAST_WORDS_TIMEOUT * 0.9)
        await trio.testing.wait_all_tasks_blocked()
        await control.send(Bye(True))


async def test_lane_breaks_and_no_bye_comes(
    memory: MemoryTransport, ram: Path, mock_clock: trio.testing.MockClock
) -> None:
    async def stay() -> None:
        async with dialled(ram, Channel.DEMAND) as (_, lanes):
            breaks(lanes[0])  # type: ignore[arg-type]
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(LAST_WORDS_TIMEOUT)
            await trio.sleep_forever()

    with pytest.raises(ConnectionBroken, match="broke"):
        await stay()


# ---- peers that send nothing, or nonsense, after dialling or being dialled ----


async def pull_listening(path: Path) -> None:
    async with pagenet.pull(HERE, pagenet.IntoFile(path), listen=True) as transfer:
        await transfer.wait_complete()


@pytest.mark.parametrize("lanes", [(), (Channel.DEMAND,)], ids=["none", "one"])
async def test_source_that_dials_too_few_lanes(
    memory: MemoryTransport,
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    lanes: tuple[Channel, ...],
) -> None:
    told: list[Message | None] = []

    async def dial_too_little() -> None:
        await trio.testing.wait_all_tasks_blocked()
        connections = [await transport.dial(HERE) for _ in range(1 + len(lanes))]
        control = MessageStream(connections[0])
        await greet(control, GREETING)
        for connection, channel in zip(connections[1:], lanes, strict=True):
            await greet(MessageStream(connection), Hello(Role.SOURCE, channel, SESSION))
        told.append(await control.receive())
        for connection in connections:
            connection.close()

    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial_too_little)
        missing = "background" if lanes else "demand"
        with pytest.raises(RemoteProtocolError, match=f"dialled no {missing} lane for 10 s"):
            await pull_listening(tmp_path / "copy")
        assert trio.current_time() - begun == pytest.approx(LANE_TIMEOUT)
    assert told == [Bye(False)]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Hello(Role.SOURCE, Channel.DEMAND, SESSION), "answers on channel demand"),
        (Hello(Role.SOURCE, Channel.CONTROL, SESSION), "no block table"),
        (Bye(True), "first message is not a hello"),
    ],
)
async def test_source_is_told_what_is_wrong_with_its_answer(
    memory: MemoryTransport, tmp_path: Path, answer: Message, reason: str
) -> None:
    with await transport.listen(HERE) as listener:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def pull() -> None:
                with pytest.raises(RemoteProtocolError, match=reason):
                    async with pagenet.pull(HERE, pagenet.IntoFile(tmp_path / "copy")):
                        raise AssertionError("that was no source")

            stream = MessageStream(await listener.accept())
            assert isinstance(await stream.receive(), Hello)
            await stream.send(answer)
            told = await stream.receive()
            stream.connection.close()
    assert isinstance(told, Failure)
    assert reason in told.text


async def test_destination_is_told_what_is_wrong_with_its_answer(
    memory: MemoryTransport, ram: Path
) -> None:
    with await transport.listen(HERE) as listener:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def serve() -> None:
                with pytest.raises(RemoteProtocolError, match="a source too"):
                    await serve_to(HERE, ram)

            stream = MessageStream(await listener.accept())
            await stream.receive()
            await stream.send(GREETING)
            told = await stream.receive()
            stream.connection.close()
    assert isinstance(told, Failure)
    assert "a source too" in told.text


async def test_two_tasks_say_goodbye_at_once() -> None:
    ours, theirs = memory_pair(capacity=3)
    stream, peer = MessageStream(ours), MessageStream(theirs)
    messages: list[Message] = [Failure("protocol", "what you did"), Bye(False)]
    async with trio.open_nursery() as nursery:
        for message in messages:
            nursery.start_soon(stream.tell, message)
        heard = [await peer.receive() for _ in messages]
    assert sorted(map(repr, heard)) == sorted(map(repr, messages))


# ---- what a stranger's numbers may cost ----


def touched(residency: Residency) -> int:
    """Bytes of memory that the map takes."""
    return os.fstat(residency.shared.fd).st_blocks * 512


class Endless:
    """Memory of the maximum number of pages, of which few are in scope. A
    :class:`~pagenet.target.Target`."""

    placement = "fake"
    event_fd = None
    # these are not used
    read_events = pages_between = page_of = place = settle = wake = discard = wait_gone = None

    def __init__(self, pages: int, scope: list[Run]) -> None:
        self.region = Region([Block("ram", pages * PAGE)])
        self._scope = scope
        self.missing: list[Run] | None = None

    def scope(self) -> list[Run]:
        return self._scope

    def close(self, missing: list[Run]) -> None:
        self.missing = missing


async def test_map_of_an_endless_region_costs_nothing() -> None:
    target = Endless(MAX_PAGES, [Run(0, MAX_PAGES)])
    filling = Filling(target)  # type: ignore[arg-type]
    residency = filling.residency
    assert (residency.scope, residency.done) == (MAX_PAGES, 0)
    last = Run(MAX_PAGES - 2, 2)
    residency.set(last, State.RESIDENT)
    residency.set(Run(1 << 20, 1), State.REQUESTED)
    assert touched(residency) < 1 << 20
    filling.residency.missing()
    assert touched(residency) < 1 << 20
    filling.close()
    missing = target.missing
    assert missing
    assert missing[0].first == 0
    assert all(before.end == after.first for before, after in itertools.pairwise(missing))
    assert missing[-1].end == last.first


async def test_endless_file_costs_nothing(tmp_path: Path) -> None:
    try:
        target = FileTarget(tmp_path / "file", Region([Block("ram", 1 << 43)]))
    except UsageError as error:
        pytest.skip(str(error))
    filling = Filling(target)
    assert touched(filling.residency) < 1 << 20
    filling.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("scope", "outside"),
    [
        ([], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([Run(0, 8)], []),
        ([Run(2, 1)], [0, 1, 3, 4, 5, 6, 7]),
        ([Run(5, 3), Run(1, 2)], [0, 3, 4]),
        ([Run(0, 4), Run(4, 1)], [5, 6, 7]),
    ],
)
async def test_what_the_scope_leaves_out_is_outside(scope: list[Run], outside: list[int]) -> None:
    filling = Filling(Endless(8, scope))  # type: ignore[arg-type]
    states = [filling.residency.state(page) for page in range(8)]
    assert [page for page, state in enumerate(states) if state is State.OUTSIDE] == outside
    assert filling.residency.scope == 8 - len(outside)
    filling.close()


async def test_missing_pages_beside_touched_ones() -> None:
    with Residency(1 << 20) as residency:
        residency.set(Run(500_000, 10_000), State.RESIDENT)
        residency.set(Run(700_000, 1), State.PLACING)
        missing = [page for run in residency.missing() for page in (run.first, run.end - 1)]
        assert sum(run.count for run in residency.missing()) == (1 << 20) - 10_000
        assert missing == sorted(missing)
        assert {0, 499_999, 510_000, 700_000, (1 << 20) - 1} <= set(missing)


async def test_owner_of_another_machine(
    memory: MemoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's pages that the owner does not map are marked one by one, so their number is
    limited."""
    target = Endless(MAX_PAGES, [Run(0, 1000)])

    class Owner:
        async def attach(self, region: Region) -> Endless:
            return target

    async def impostor() -> None:
        stream = MessageStream(await listener.accept())
        await stream.receive()
        await stream.send(Hello(Role.SOURCE, Channel.CONTROL, SESSION, region=target.region))
        farewell = await stream.receive()
        assert isinstance(farewell, Failure)
        assert farewell.code == "gave-up"
        assert "that is another machine" in farewell.text
        stream.connection.close()

    with await transport.listen(HERE) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(impostor)
            with pytest.raises(UsageError, match="maps 1000 of the source's 17179869184 pages"):
                async with pagenet.pull(HERE, Owner()):  # type: ignore[arg-type]
                    raise AssertionError("it fits")
    assert target.missing == [Run(0, 1000)]


async def test_source_lane_does_not_keep_a_large_unit(tmp_path: Path) -> None:
    path = tmp_path / "large"
    size = 2 * MAX_REQUEST_BYTES
    path.write_bytes(b"l" * size)
    shift = (size // PAGE).bit_length() - 1
    with pagenet.open_source(path) as source:
        ours, theirs = memory_pair(capacity=2 * size)
        requests = OutstandingRequests(source.region)
        lane = TrioSourceLane(ours, source)
        for run, unit_shift in [
            (Run(0, size // PAGE), shift),
            (Run(0, 1), 0),
            (Run(0, size // PAGE), shift),
        ]:
            await theirs.send(requests.open(Class.DEMAND, run, unit_shift).encode())
        theirs_closed = trio.Event()

        async def read() -> None:
            buffer, count = memoryview(bytearray(1 << 20)), 0
            while count < 2 * size + PAGE + 3 * 24:
                count += await theirs.receive_into(buffer)
            theirs.close()
            theirs_closed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await lane.run(b"")
        assert len(lane._pages) <= 256 << 10
    ours.close()


# ---- the source's memory is lost ----


@asynccontextmanager
async def losing(uri: str, ram: Path) -> AsyncIterator[str]:
    """A source whose file was truncated, which is not noticed before a page is asked for. Yields
    where it listens. Raises :exc:`SourceLost`, and nothing else, in the end."""

    async def serve(task_status: trio.TaskStatus[str]) -> None:
        # a clock that jumps waits for no thread
        async with pagenet.serve(str(ram), listen=uri, lane="trio") as server:
            os.truncate(ram, 0)
            task_status.started(server.uri)
            await trio.sleep_forever()

    async def expect_lost(task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        with pytest.raises(SourceLost, match="cannot be read any more"):
            await serve(task_status)

    async with trio.open_nursery() as nursery:
        yield await nursery.start(expect_lost)


@asynccontextmanager
async def connected(
    uri: str, *lanes: Channel
) -> AsyncIterator[tuple[MessageStream, list[transport.Connection]]]:
    """A destination's ends of connections that it has dialled: control, and lanes."""
    connections = [await transport.dial(uri) for _ in range(1 + len(lanes))]
    try:
        control = MessageStream(connections[0])
        session = (await greet(control, Hello(Role.DESTINATION, Channel.CONTROL))).session
        for connection, channel in zip(connections[1:], lanes, strict=True):
            await greet(MessageStream(connection), Hello(Role.DESTINATION, channel, session))
        yield control, connections[1:]
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("uri", ["tcp://127.0.0.1:0", "unix:{}", HERE])
async def test_every_destination_reads_why_the_source_is_lost(
    memory: MemoryTransport, ram: Path, tmp_path: Path, uri: str
) -> None:
    async def pull(number: int) -> None:
        with pytest.raises(
            SourceLost,
            match=r"^the source cannot go on: source .*ram cannot be read any more: it ends at",
        ):
            async with pagenet.pull(
                where, pagenet.IntoFile(tmp_path / f"copy-{number}")
            ) as transfer:
                await transfer.wait_complete()

    async def idle() -> None:
        """A destination that asks for nothing, and is told nevertheless."""
        async with connected(where) as (control, _):
            is_idle.set()
            told = await control.receive()
            assert isinstance(told, Failure)
            assert told.code == "source-lost"
            assert "cannot be read any more" in told.text

    is_idle = trio.Event()
    async with (
        losing(uri.format(tmp_path / "socket"), ram) as where,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(idle)
        await is_idle.wait()
        nursery.start_soon(pull, 0)
    assert os.listdir(tmp_path) == ["ram"]


REQUEST = Request(0, Class.DEMAND, Run(0, 1)).encode()


async def test_lost_source_waits_for_destinations_to_leave(
    memory: MemoryTransport, ram: Path, mock_clock: trio.testing.MockClock
) -> None:
    """The clock stands still, so it is not the timeout that ends it."""
    async with (
        losing(HERE, ram) as uri,
        connected(uri, Channel.DEMAND) as (control, lanes),
        connected(uri) as (other, _),
    ):
        await lanes[0].send(REQUEST)
        for stream in (other, control):
            assert isinstance(await stream.receive(), Failure)
            await trio.testing.wait_all_tasks_blocked()
            await stream.send(Bye(False))


@pytest.mark.parametrize("capacity", [64 << 10, 1], ids=["listening", "deaf"])
async def test_lost_source_does_not_wait_for_ever(
    memory: MemoryTransport,
    ram: Path,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    capacity: int,
) -> None:
    """It waits neither for a destination that was told and stays, nor for one that does not
    read."""

    async def read_into(*_: object) -> bool:  # not in a thread, for which the clock would not wait
        raise SourceLost("it cannot be read any more")

    monkeypatch.setattr(pagenet.Source, "read_into", read_into)
    async with losing(HERE, ram) as uri, connected(uri, Channel.DEMAND) as (control, lanes):
        for connection in (control.connection, lanes[0]):
            assert isinstance(connection, MemoryConnection)
            connection._incoming._capacity = capacity
        await lanes[0].send(REQUEST)
        await trio.sleep(LAST_WORDS_TIMEOUT / 2)
        assert memory.listeners
        await trio.sleep(2 * LAST_WORDS_TIMEOUT)
        assert not memory.listeners


async def test_source_that_dialled_is_lost(memory: MemoryTransport, ram: Path) -> None:
    async def lose() -> None:
        async with dialled(ram, Channel.DEMAND) as (control, lanes):
            os.truncate(ram, 0)
            await lanes[0].send(REQUEST)
            header = memoryview(bytearray(24))
            await lanes[0].receive_into(header)
            assert header[5] == Encoding.FAILED
            told = await control.receive()
            assert isinstance(told, Failure)
            assert told.code == "source-lost"
            await control.send(Bye(False))
            control.connection.close()

    with pytest.raises(SourceLost, match="cannot be read any more"):
        await lose()


async def test_destination_says_the_reason_of_a_lost_source(
    memory: MemoryTransport, tmp_path: Path
) -> None:
    async def impostor() -> None:
        stream = MessageStream(await listener.accept())
        await stream.receive()
        await stream.connection.send(
            encode_message(GREETING), encode_message(Failure("source-lost", "disk\non fire"))
        )
        while await stream.receive():
            pass
        stream.connection.close()

    with await transport.listen(HERE) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(impostor)
            with pytest.raises(SourceLost, match=r"^the source cannot go on: disk\?on fire$"):
                async with pagenet.pull(HERE, pagenet.IntoFile(tmp_path / "copy")) as transfer:
                    await transfer.wait_complete()
            nursery.cancel_scope.cancel()
