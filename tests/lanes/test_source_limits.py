"""What peers may cost a source: strangers, slow peers, and peers that ask for more than they
read."""

from __future__ import annotations

import re
import resource
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from processes import LANES, PAGE, pull_command, run, run_server, serve_command

from pagenet import RemoteProtocolError, Run
from pagenet.admission import GRACE, MAX_STRANGERS, Admission
from pagenet.destination.sources import dial_source
from pagenet.protocol import LANE_HEADER_SIZE, Channel, Class, Encoding, Request
from pagenet.session import receive_exactly

MiB = 1 << 20
UNIT = 64 * MiB
ZERO_OR_LZ4 = 1 << Encoding.ZERO | 1 << Encoding.LZ4


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of one unit, which can be compressed."""
    path = tmp_path_factory.mktemp("source") / "large"
    path.write_bytes(b"words of a guest " * (UNIT // 17) + bytes(UNIT % 17))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small"
    path.write_bytes(bytes(range(1, 9)) * (PAGE // 8) * 16)
    return path


def private_memory(pid: int) -> int:
    """Bytes that the process has allocated and written to."""
    found = re.search(
        r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE
    )
    assert found
    return int(found[1]) << 10


async def check_pulls(uri: str, path: Path) -> None:
    """Check that an honest destination gets every page."""
    copy = path.with_name("copy")
    async with run(pull_command(uri, "--into", str(copy), lane="native")) as pulling:
        assert await pulling.wait() == 0, pulling.stderr
    assert copy.read_bytes() == path.read_bytes()
    copy.unlink()


# ---- pages that are asked for and not read ----


@pytest.mark.parametrize("lane", LANES)
async def test_huge_units_that_nobody_reads(lane: str, large: Path) -> None:
    """Each request is 24 bytes. If the answers were kept, eight requests would cost half a
    gigabyte."""
    async with run_server(str(large), "--lane", lane) as (server, uri):
        await check_pulls(uri, large)  # what every transfer allocates is allocated from here on
        before = private_memory(server.pid)
        async with dial_source(uri) as session, AsyncExitStack() as stack:
            lanes = [await session.open_lane(Channel.BACKGROUND) for _ in range(8)]
            for connection in lanes:
                stack.callback(connection.close)
                request = Request(1, Class.BACKGROUND, Run(0, UNIT // PAGE), 14, ZERO_OR_LZ4)
                await connection.send(request.encode())
                # and not a byte of the pages
                await receive_exactly(connection, memoryview(bytearray(LANE_HEADER_SIZE)))
            await check_pulls(uri, large)
            assert private_memory(server.pid) - before < UNIT // 4


@pytest.mark.parametrize("lane", LANES)
async def test_huge_unit_that_is_read(lane: str, large: Path, tmp_path: Path) -> None:
    half_zero = tmp_path / "half zero"
    content = bytes(UNIT // 2) + large.read_bytes()[: UNIT // 2] + bytes(UNIT)
    half_zero.write_bytes(content)
    async with run_server(str(half_zero), "--lane", lane) as (_, uri), dial_source(uri) as session:
        connection = await session.open_lane(Channel.BACKGROUND)
        for first, whole in ((0, content[:UNIT]), (UNIT // PAGE, b"")):
            await connection.send(
                Request(1, Class.BACKGROUND, Run(first, UNIT // PAGE), 14, ZERO_OR_LZ4).encode()
            )
            header, pages = (
                memoryview(bytearray(LANE_HEADER_SIZE)),
                memoryview(bytearray(len(whole))),
            )
            await receive_exactly(connection, header)
            await receive_exactly(connection, pages)  # no bytes, for the unit that is zero
            assert pages == whole
        connection.close()


# ---- sessions and lanes ----


async def test_as_many_sessions_as_there_may_be(small: Path) -> None:
    async with run_server(str(small), "--max-sessions", "1") as (server, uri):
        async with dial_source(uri):
            await server.event("connected")
            async with run(
                pull_command(uri, "--into", str(small.with_name("no")), lane="native")
            ) as refused:
                assert await refused.wait() == 3
                (line,) = refused.stderr.splitlines()
            assert "busy: 1 destinations are served already: wait until one is done" in line
        await server.event("lost")
        await check_pulls(uri, small)


async def test_as_many_lanes_as_there_may_be(small: Path) -> None:
    async with run_server(str(small), "--max-lanes", "2") as (_, uri):
        for lanes, code in (("2", 3), ("1", 0)):
            into = str(small.with_name("copy"))
            async with run(
                pull_command(uri, "--into", into, "--background-lanes", lanes, lane="native")
            ) as pulling:
                assert await pulling.wait() == code
                assert (
                    "a session may have 2 lanes: ask for fewer --background-lanes" in pulling.stderr
                ) == (code != 0)


@pytest.mark.parametrize("option", ["--max-sessions", "--max-lanes"])
async def test_limits_that_are_none(option: str, small: Path) -> None:
    async with run(
        serve_command(str(small), option, "0", "--listen", "tcp://127.0.0.1:0")
    ) as server:
        assert await server.wait() == 2
        assert option in server.stderr


# ---- strangers ----


async def admission_of_silent(admission: Admission, task_status: trio.TaskStatus[None]) -> None:
    with admission.stranger():
        task_status.started()
        await trio.sleep_forever()


async def test_oldest_stranger_makes_room() -> None:
    admission = Admission(max_connections=10, max_strangers=2)
    gone: list[int] = []

    async def be_silent(number: int, task_status: trio.TaskStatus[None]) -> None:
        with pytest.raises(
            RemoteProtocolError, match=r"^the peer sent no hello, and others wanted its place$"
        ):
            await admission_of_silent(admission, task_status)
        gone.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(2):
            await nursery.start(be_silent, number)
        with admission.stranger():
            await trio.testing.wait_all_tasks_blocked()
            assert (gone, admission.strangers) == ([0], 2)
        with admission.stranger():
            await trio.testing.wait_all_tasks_blocked()
            assert gone == [0], "there was room"
        with admission.stranger(), admission.stranger():
            await trio.testing.wait_all_tasks_blocked()
            assert gone == [0, 1]


async def test_a_place_is_waited_for() -> None:
    admission = Admission(max_connections=2)
    accepted = trio.Event()

    async def accept() -> None:
        await admission.wait_place()
        accepted.set()

    async with trio.open_nursery() as nursery:
        with admission.connection():
            with admission.connection():
                nursery.start_soon(accept)
                await trio.testing.wait_all_tasks_blocked()
                assert not accepted.is_set()
            with trio.fail_after(60):
                await accepted.wait()


async def test_a_stranger_makes_room_once_it_has_been_silent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """At the limit of descriptors, a peer that has just connected gets a moment to send its
    hello."""
    admission = Admission(max_connections=1)
    with admission.connection():
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(admission.wait_place)
            with pytest.raises(RemoteProtocolError, match="no hello"), admission.stranger():
                await trio.sleep_forever()
            assert trio.current_time() - began == pytest.approx(GRACE)
            nursery.cancel_scope.cancel()


def connected(stack: ExitStack, uri: str) -> socket.socket:
    host, _, port = uri.removeprefix("tcp://").partition(":")
    return stack.enter_context(socket.create_connection((host, int(port)), timeout=60))


async def test_more_strangers_than_there_may_be(small: Path) -> None:
    async with run_server(str(small)) as (_, uri):
        with ExitStack() as stack:
            first = connected(stack, uri)
            for _ in range(MAX_STRANGERS):
                connected(stack, uri)
            assert await trio.to_thread.run_sync(first.recv, 1 << 16) != b"", "it is told why"
            await check_pulls(uri, small)


@asynccontextmanager
async def few_descriptors(path: Path, limit: int) -> AsyncIterator[str]:
    """A source that may have ``limit`` descriptors. Yields where it listens."""
    program = (
        "import os, resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit // 2}, {limit}))\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [
        sys.executable,
        "-c",
        program,
        *serve_command(str(path), "--listen", "tcp://127.0.0.1:0")[1:],
    ]
    async with run(command) as server:
        uri = (await server.event("listening"))["uri"]
        assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE)[0] == limit, (
            "the soft limit is raised"
        )
        yield uri


async def test_no_descriptor_left(small: Path) -> None:
    """No peer is reset: a peer that finds no room waits, and silent peers make room."""
    async with few_descriptors(small, 80) as uri:
        with ExitStack() as stack:
            peers = [connected(stack, uri) for _ in range(120)]
            await check_pulls(uri, small)
            for peer in peers:  # each was told why, or still waits; a reset would be an error
                peer.setblocking(False)
                try:
                    peer.recv(1 << 16)
                except BlockingIOError:
                    continue
