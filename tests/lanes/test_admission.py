"""What a source that listens admits: strangers, sessions, lanes, file descriptors."""

from __future__ import annotations

import resource
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from processes import run, serve_command

import pagenet
from pagenet import RemoteProtocolError, SourceUnreachable, transport
from pagenet.admission import Admission
from pagenet.protocol import Channel, Hello, Role, encode_message
from pagenet.session import HELLO_TIMEOUT, MessageStream, greet
from pagenet.testing import MemoryTransport

PAGE = 4096
CONTENT = b"c" * (16 * PAGE)


class Events(list[tuple[str, str]]):
    """What a source has reported: event and reason."""

    def __init__(self) -> None:
        self._changed = trio.Event()

    def __call__(self, event: str, /, **fields: object) -> None:
        self.append((event, str(fields.get("reason", ""))))
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, name: str) -> None:
        while not any(event == name for event, _ in self):
            await self._changed.wait()


@pytest.fixture
def memory_file(tmp_path: Path) -> str:
    path = tmp_path / "ram"
    path.write_bytes(CONTENT)
    return str(path)


@contextmanager
def connections() -> Iterator[list[transport.Connection]]:
    with ExitStack() as stack:
        made: list[transport.Connection] = []
        stack.callback(lambda: close_all(made))
        yield made


def close_all(made: list[transport.Connection]) -> None:
    for connection in made:
        connection.close()


async def dial(uri: str, count: int, into: list[transport.Connection]) -> None:
    into.extend([await transport.dial(uri) for _ in range(count)])


async def check_pull(uri: str, copy: Path) -> None:
    async with pagenet.pull(uri, pagenet.IntoFile(copy)) as transfer:
        await transfer.wait_complete()
    assert copy.read_bytes() == CONTENT
    copy.unlink()


# ---- the count ----


async def test_the_oldest_stranger_gives_way() -> None:
    admission, gone = Admission(max_connections=100, max_strangers=3), []

    async def be_silent(number: int) -> None:
        with (
            pytest.raises(RemoteProtocolError, match="others wanted its place"),
            admission.stranger(),
        ):
            await trio.sleep_forever()
        gone.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(be_silent, number)
            await trio.testing.wait_all_tasks_blocked()
        assert (gone, admission.strangers) == ([0, 1], 3)
        nursery.cancel_scope.cancel()
    assert admission.strangers == 0


async def test_who_has_said_hello_does_not_give_way() -> None:
    admission = Admission(max_connections=1)
    accepted = trio.Event()

    async def accept() -> None:
        await admission.wait_place()
        accepted.set()

    async with trio.open_nursery() as nursery:
        with admission.connection():
            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked()
            assert not accepted.is_set()
        await accepted.wait()


async def test_a_stranger_gives_way_where_there_is_no_place_for_a_connection() -> None:
    admission = Admission(max_connections=1)

    async def be_silent() -> None:
        with admission.connection(), pytest.raises(RemoteProtocolError), admission.stranger():
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_silent)
        await trio.testing.wait_all_tasks_blocked()
        await admission.wait_place()
    assert admission.connections == 0


# ---- a source ----


async def test_silent_peers_hold_up_nobody(
    mock_clock: trio.testing.MockClock, memory_file: str, tmp_path: Path
) -> None:
    """The clock stands still, so it is not a timeout that ends them."""
    events = Events()
    async with small_server(memory_file, events) as server:
        with connections() as silent:
            await dial(server.uri, 100, silent)
            await check_pull(server.uri, tmp_path / "copy")
            assert server.admission.strangers <= 20
            refused = [reason for event, reason in events if event == "refused"]
            assert len(refused) >= 80
            assert set(refused) == {"the peer sent no hello, and others wanted its place"}


@asynccontextmanager
async def small_server(memory_file: str, events: Events) -> AsyncIterator[pagenet.Server]:
    """A server that admits at most 20 strangers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagenet.source.serving.Admission", lambda most: Admission(most, 20))
        async with pagenet.serve(
            memory_file, listen="tcp://127.0.0.1:0", on_event=events
        ) as server:
            yield server


async def test_sessions_are_counted(memory_file: str, tmp_path: Path) -> None:
    events = Events()
    async with pagenet.serve(
        memory_file, listen="tcp://127.0.0.1:0", max_sessions=2, on_event=events
    ) as server:
        with connections() as held:
            await dial(server.uri, 2, held)
            for connection in held:
                await greet(MessageStream(connection), Hello(Role.DESTINATION, Channel.CONTROL))
            with pytest.raises(
                SourceUnreachable,
                match=r"is busy: 2 destinations are served already.*--max-sessions",
            ):
                await check_pull(server.uri, tmp_path / "copy")
            assert server.sessions == 2
            held[0].close()
            await events.wait("lost")
            await check_pull(server.uri, tmp_path / "copy")
    assert next(reason for event, reason in events if event == "refused").startswith(
        "2 destinations"
    )


async def test_lanes_are_counted(memory_file: str) -> None:
    async with pagenet.serve(memory_file, listen="tcp://127.0.0.1:0", max_lanes=3) as server:
        with connections() as made:
            await dial(server.uri, 5, made)
            control, *lanes, one_more = [MessageStream(connection) for connection in made]
            session = (await greet(control, Hello(Role.DESTINATION, Channel.CONTROL))).session
            ours = Hello(Role.DESTINATION, Channel.BACKGROUND, session)
            for lane in lanes:
                await greet(lane, ours)
            with pytest.raises(
                SourceUnreachable,
                match=r"a session may have 3 lanes.*--background-lanes.*--max-lanes",
            ):
                await greet(one_more, ours)
        with pytest.raises(SourceUnreachable, match="a session may have 3 lanes"):
            async with pagenet.pull(
                server.uri, pagenet.OwnMemory(), background_lanes=3
            ) as transfer:
                await transfer.wait_complete()


async def test_peer_that_does_not_read_the_answer(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, memory_file: str
) -> None:
    memory, events = MemoryTransport(), Events()
    monkeypatch.setitem(transport._transports, "memory", memory)
    memory.capacity = 120  # a hello fits, and the answer to it does not
    async with pagenet.serve(
        memory_file, listen="memory://source", lane="trio", on_event=events
    ) as server:
        stranger = await transport.dial(server.uri)
        await stranger.send(encode_message(Hello(Role.DESTINATION, Channel.CONTROL)))
        began = trio.current_time()
        await events.wait("lost")
        assert trio.current_time() - began == pytest.approx(HELLO_TIMEOUT)
        assert events[1] == (
            "lost",
            f"the peer did not read the answer to its hello for {HELLO_TIMEOUT:g} s",
        )
        assert server.sessions == 0
        stranger.close()


# ---- file descriptors ----


def limited(command: Sequence[str], soft: int, hard: int) -> list[str]:
    limit = (
        f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))"
    )
    code = f"{limit}; os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", code, *command]


async def test_more_peers_than_file_descriptors(memory_file: str, tmp_path: Path) -> None:
    """Each peer waits in the backlog until there is a descriptor for it; silent peers give way;
    none is reset."""
    async with run(
        limited(serve_command(memory_file, "--listen", "tcp://127.0.0.1:0"), 80, 80)
    ) as server:
        uri = (await server.event("listening"))["uri"]
        with connections() as silent:
            await dial(uri, 200, silent)
            await check_pull(uri, tmp_path / "copy")
            refused = [event for event in server.events if event["event"] == "refused"]
            assert all("others wanted its place" in event["reason"] for event in refused)


async def test_soft_limit_of_file_descriptors_is_raised(memory_file: str) -> None:
    async with run(
        limited(serve_command(memory_file, "--listen", "tcp://127.0.0.1:0"), 64, 512)
    ) as server:
        await server.event("listening")
        assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (512, 512)
