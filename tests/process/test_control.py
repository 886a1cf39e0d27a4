"""pagenet.control and pagenet-ctl: a daemon is asked for its status, given commands, and sent
nonsense, while it works."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
from commands import tell_at_random
from hypothesis import given
from hypothesis import strategies as st
from processes import (
    LANES,
    PAGE,
    check_verified,
    pull,
    pull_command,
    run,
    run_server,
    run_workload,
    serve_command,
    write_pattern,
)

import pagenet
from pagenet import (
    ConnectionBroken,
    RemoteProtocolError,
    SourceUnreachable,
    UsageError,
    __version__,
)
from pagenet.cli import ctl
from pagenet.control import COMMANDS, _channel, _client, _server, connect_control, serve_control
from pagenet.control._protocol import MAX_MESSAGE, Decoder, decode_request, encode

SIZE = 4 << 20
PAGES = SIZE // PAGE
# Pages that no thread touches do not come before a command.
LATER = {"start_background": "after=1000000", "compress": "none"}


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_pattern(tmp_path / "source", SIZE))


class Told:
    """Events of a daemon in this process."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, /, **fields: Any) -> None:
        self.said.append((event, fields))

    @property
    def refused(self) -> list[str]:
        return [fields["reason"] for event, fields in self.said if event == "refused"]


@asynccontextmanager
async def controlled_transfer(
    source: str, path: Path, lane: str = "native", told: Told | None = None, **options: Any
) -> AsyncIterator[tuple[pagenet.Transfer, pagenet.OwnMemory]]:
    memory = pagenet.OwnMemory("anonymous")
    try:
        async with (
            pagenet.serve(source, listen="tcp://127.0.0.1:0") as server,
            pull(server.uri, memory, lane=lane, **{**LATER, **options}) as transfer,
            serve_control(transfer, path, on_event=told or Told()),
        ):
            yield transfer, memory
    finally:
        memory.close()


async def until_placed(transfer: pagenet.Transfer, pages: int) -> None:
    """Wait until that many pages are counted: a thread that waits for a page may resume before the
    page is counted."""
    with trio.fail_after(20):
        while transfer.statistics().done < pages:  # noqa: ASYNC110
            await trio.sleep(0.001)


# ---- messages ----


def test_messages_come_whole_and_byte_by_byte() -> None:
    maps: list[dict[str, object]] = [{"a": 1}, {"command": "status", "id": 2}, {}]
    data = b"".join(map(encode, maps))
    for size in (1, 5, len(data)):
        decoder, found = Decoder(), []
        for at in range(0, len(data), size):
            decoder.feed(data[at : at + size])
            while (fields := decoder.next()) is not None:
                found.append(fields)
        assert found == maps
        decoder.check_eof()


@pytest.mark.parametrize("length", range(1, len(encode({"a": 1}))))
def test_a_message_that_ends_early(length: int) -> None:
    decoder = Decoder()
    decoder.feed(encode({"a": 1})[:length])
    assert decoder.next() is None
    with pytest.raises(RemoteProtocolError, match="in the middle of a message"):
        decoder.check_eof()


def framed(body: bytes) -> bytes:
    return b"PGNC\1\0\0\0" + len(body).to_bytes(4, "little") + body


NONSENSE = [
    (b"GET / HTTP/1.1\r\n\r\n", "this is no control message: it begins with b'GET / HTTP/1.1"),
    (b"PX", "this is no control message"),
    (b"PGNT\1\0\0\0\0\0\0\0", "this is no control message"),  # the other protocol
    (b"PGNC\2\0\0\0\0\0\0\0", "framed in version 2"),
    (
        b"PGNC\1\0\0\0" + (MAX_MESSAGE + 1).to_bytes(4, "little"),
        f"a message of {MAX_MESSAGE + 1} bytes is announced",
    ),
    (framed(b""), "not msgpack"),
    (framed(b"\xc1"), "not msgpack"),
    (framed(b"\x80\x80"), "not msgpack"),  # bytes behind the message
    (framed(msgpack.packb([1])), "not a map"),
    (framed(msgpack.packb({b"command": "status"})), "not a map of names"),
    (encode({}), "no proper 'id'"),
    (encode({"command": "status"}), "no proper 'id'"),
    (encode({"command": "status", "id": True}), "no proper 'id'"),
    (encode({"command": "status", "id": -1}), "no proper 'id'"),
    # too deep to be printed
    (framed(b"\x82\xa7command\xa6status\xa2id" + b"\x91" * 1020 + b"\0"), "no proper 'id': "),
    (framed(b"\x82\xa2id\x01\xa7command" + b"\x91" * 1020 + b"\0"), "no command "),
    (encode({"id": 1}), "no command None"),
    (encode({"command": "explode", "id": 1}), "no command 'explode': there are status, pause, "),
    (encode({"command": ["status"], "id": 1}), "no command "),
    (encode({"command": "status", "id": 1, "now": 1}), "status takes no 'now'"),
    (encode({"command": "schedule", "id": 1}), "schedule has no proper 'name'"),
    (encode({"command": "schedule", "id": 1, "name": "a\0b"}), "schedule has no proper 'name'"),
    (encode({"command": "bandwidth", "id": 1, "rate": "60M"}), "bandwidth has no proper 'rate'"),
    (encode({"command": "bandwidth", "id": 1, "rate": 0}), "bandwidth has no proper 'rate'"),
    (encode({"command": "bandwidth", "id": 1, "rate": 2**60}), "bandwidth has no proper 'rate'"),
    (encode({"command": "prefetch", "id": 1, "window": [1]}), "prefetch has no proper 'window'"),
    (
        encode({"command": "prefetch", "id": 1, "window": [1, 1000]}),
        "prefetch has no proper 'window'",
    ),
    (
        encode({"command": "prefetch", "id": 1, "window": [1, True]}),
        "prefetch has no proper 'window'",
    ),
]


@pytest.mark.parametrize(("data", "says"), NONSENSE)
def test_nonsense(data: bytes, says: str) -> None:
    decoder = Decoder()
    with pytest.raises(RemoteProtocolError) as caught:  # noqa: PT012 - either step may find it
        decoder.feed(data)
        while (fields := decoder.next()) is not None:
            decode_request(fields)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_request_or_an_error(data: bytes) -> None:
    for received in (data, framed(data)):
        decoder = Decoder()
        decoder.feed(received)
        try:
            while (fields := decoder.next()) is not None:
                decode_request(fields)
        except RemoteProtocolError:
            continue


# ---- the status, and what commands do ----


STATUS = {
    *(
        "program",
        "pid",
        "release",
        "state",
        "peer",
        "disconnected",
        "reconnected",
        "lane",
        "placement",
        "pages",
        "bytes",
        "pages_resident",
        "bytes_resident",
    ),
    *(
        "share",
        "seconds",
        "seconds_left",
        "bytes_per_s",
        "wire_bytes_per_s",
        "faults_per_s",
        "bytes_wire",
        "zero_pages",
    ),
    *("faults", "fault_us", "classes", "schedule", "begun", "paused", "max_bandwidth", "prefetch"),
    *("prefetch_unused", "compressed"),
}


@pytest.mark.parametrize("lane", LANES)
async def test_status_and_commands(lane: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    async with (
        controlled_transfer(source, path, lane) as (transfer, memory),
        connect_control(path) as client,
    ):
        assert client.hello["pid"] == os.getpid()
        assert client.hello["release"] == __version__
        assert client.hello["commands"] == list(COMMANDS)
        await memory.read(5 * PAGE, 1)
        await until_placed(transfer, 1)
        status = await client.command("status")
        assert status.keys() == STATUS
        expected = {"state": "running", "lane": lane, "pages": PAGES, "bytes": SIZE}
        expected |= {"pages_resident": 1, "bytes_resident": PAGE}
        expected |= {
            "faults": 1,
            "schedule": "hot",
            "begun": False,
            "paused": False,
            "max_bandwidth": None,
            "prefetch": [0, 0],
        }
        assert {name: status[name] for name in expected} == expected
        assert status["share"] == pytest.approx(1 / PAGES, rel=0.01)
        assert status["fault_us"]["p50"] > 0
        assert status["classes"]["demand"]["pages"] == 1
        assert status["classes"]["background"]["pages"] == 0
        assert status["wire_bytes_per_s"] > 0

        assert (await client.command("pause"))["paused"] is True
        assert transfer.background_paused
        assert (
            (await client.command("bandwidth", rate=60_000_000))["max_bandwidth"]
            == transfer.max_bandwidth
            == 60_000_000
        )
        assert (
            (await client.command("schedule", name="linear"))["schedule"]
            == transfer.background
            == "linear"
        )
        with pytest.raises(UsageError, match="no background order 'sideways'"):
            await client.command("schedule", name="sideways")
        with pytest.raises(UsageError, match="cannot read the recording"):
            await client.command("schedule", name=f"recorded={tmp_path}/nothing")
        with pytest.raises(UsageError, match="cannot be stopped"):
            await client.command("stop")
        assert (await client.command("prefetch", window=None))["prefetch"] is None
        assert (await client.command("bandwidth", rate=None))["max_bandwidth"] is None
        assert not transfer.background_begun
        resumed = await client.command("resume")
        assert (resumed["begun"], resumed["paused"]) == (True, False)
        with trio.fail_after(20):
            await transfer.wait_complete()
        status = await client.command("status")
        assert (status["state"], status["share"], status["seconds_left"]) == ("complete", 1.0, 0.0)
        with pytest.raises(UsageError, match="pause: the transfer is over"):
            await client.command("pause")


@pytest.mark.parametrize("lane", LANES)
async def test_another_window_from_now_on(lane: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    async with (
        controlled_transfer(source, path, lane) as (transfer, memory),
        connect_control(path) as client,
    ):
        await memory.read(100 * PAGE, 1)
        assert transfer.statistics().prefetch.requests == 0
        await client.command("prefetch", window=[3, 2])
        await memory.read(200 * PAGE, 1)
        with trio.fail_after(20):
            while transfer.statistics().prefetch.pages < 5:  # noqa: ASYNC110
                await trio.sleep(0.005)
        await client.command("prefetch", window=[0, 0])
        await memory.read(300 * PAGE, 1)
        assert transfer.statistics().prefetch.pages == 5


async def test_time_left_follows_the_rate(source: str, tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    async with (
        controlled_transfer(source, path, start_background=None, max_bandwidth=200_000),
        connect_control(path) as client,
    ):
        with trio.fail_after(20):
            while not (status := await client.command("status"))["bytes_per_s"]:  # noqa: ASYNC110
                await trio.sleep(0.01)
        rest = status["bytes"] - status["bytes_resident"]
        assert status["seconds_left"] == pytest.approx(rest / status["bytes_per_s"], rel=0.05)


async def test_a_source_shows_its_destinations(source: str, tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    async with (
        pagenet.serve(source, listen="tcp://127.0.0.1:0") as server,
        serve_control(server, path, program="mine"),
        connect_control(path) as client,
    ):
        status = await client.command("status")
        assert (status["program"], status["state"], status["destinations"]) == (
            "mine",
            "waiting",
            [],
        )
        assert (status["pages"], status["bytes"], status["uri"]) == (PAGES, SIZE, server.uri)
        async with pull(
            server.uri, pagenet.IntoFile(tmp_path / "into"), lane="trio", max_bandwidth=1
        ):
            status = await client.command("status")
            assert (status["state"], len(status["destinations"])) == ("serving", 1)
        with pytest.raises(UsageError, match="bandwidth: this is a source"):
            await client.command("bandwidth", rate=1)


async def test_before_there_is_a_transfer(tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    async with serve_control(None, path) as control, connect_control(path) as client:
        assert (await client.command("status"))["state"] == "starting"
        with pytest.raises(UsageError, match="pause: the transfer has not begun yet"):
            await client.command("pause")
        assert control.subject is None


# ---- clients ----


async def converse(path: Path, data: bytes, *, shut: bool = False) -> list[dict[str, Any]]:
    """All that a daemon answers to these bytes until it closes the connection."""
    decoder, answers = Decoder(), []
    with trio.fail_after(20):
        stream = await trio.open_unix_socket(str(path))
        async with stream:
            await stream.send_all(data)
            if shut:
                await stream.send_eof()
            try:
                async for chunk in stream:
                    decoder.feed(chunk)
            except trio.BrokenResourceError:
                pass  # closed with unread bytes of this side
    while (fields := decoder.next()) is not None:
        answers.append(fields)
    return answers


async def test_whoever_talks_nonsense_is_told_and_let_go(source: str, tmp_path: Path) -> None:
    path, told = tmp_path / "ctl", Told()
    async with (
        controlled_transfer(source, path, told=told) as (_, memory),
        connect_control(path) as client,
    ):
        for data, says in NONSENSE:
            hello, error = await converse(path, data)
            assert hello["type"] == "hello"
            assert (error["type"], error["code"]) == ("error", "protocol")
            assert says in error["text"]
            assert says in told.refused[-1]
        _, error = await converse(path, encode({"command": "status", "id": 1})[:-1], shut=True)
        assert "in the middle of a message" in error["text"]
        _, reply, error = await converse(
            path, encode({"command": "status", "id": 7}) + b"x" * 100_000
        )
        assert (reply["type"], reply["id"]) == ("reply", 7)
        assert "no control message" in error["text"]
        assert len(told.refused) == len(NONSENSE) + 2
        # a client that sends nothing is no error
        assert len(await converse(path, b"", shut=True)) == 1
        await memory.read(0, 1)
        assert (await client.command("status"))["faults"] == 1
        assert len(told.refused) == len(NONSENSE) + 2


async def test_half_a_message_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_channel, "PATIENCE", 0.05)
    told = Told()
    async with serve_control(None, tmp_path / "ctl", on_event=told):
        _, error = await converse(tmp_path / "ctl", b"PGNC")
        assert "the rest of a message did not come" in error["text"]
    assert len(told.refused) == 1


async def test_whoever_does_not_read_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_channel, "PATIENCE", 0.05)
    path = tmp_path / "ctl"
    async with serve_control(None, path):
        stream = await trio.open_unix_socket(str(path))
        async with stream:
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(20):
                await stream.send_all(encode({"command": "status", "id": 1}) * 100_000)
        async with connect_control(path) as client:
            await client.command("status")


async def test_many_at_once(source: str, tmp_path: Path) -> None:
    path, answered = tmp_path / "ctl", []

    async def ask(number: int) -> None:
        async with connect_control(path) as client:
            for _ in range(5):
                await client.command("bandwidth", rate=1000 + number)
                answered.append((await client.command("status"))["max_bandwidth"])

    async with controlled_transfer(source, path) as (transfer, memory):
        async with trio.open_nursery() as nursery:
            for number in range(_server.MAX_CLIENTS - 4):
                nursery.start_soon(ask, number)
            await memory.read(0, SIZE // 2)  # touched pages come all the time
        await until_placed(transfer, PAGES // 2)
    assert len(answered) == 5 * (_server.MAX_CLIENTS - 4)
    assert all(1000 <= rate < 1000 + _server.MAX_CLIENTS for rate in answered)


async def test_too_many_at_once(tmp_path: Path) -> None:
    path, told = tmp_path / "ctl", Told()
    async with serve_control(None, path, on_event=told):
        streams = [await trio.open_unix_socket(str(path)) for _ in range(_server.MAX_CLIENTS)]
        for stream in streams:
            await stream.receive_some()  # its hello
        with pytest.raises(RemoteProtocolError, match="64 others are connected"):
            async with connect_control(path) as client:
                await client.command("status")
        for stream in streams:
            await stream.aclose()
        with trio.fail_after(20):
            while True:
                try:
                    async with connect_control(path) as client:
                        await client.command("status")
                    break
                except RemoteProtocolError:
                    await trio.sleep(0.01)


# ---- the socket file ----


async def test_socket_file(tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(path))  # and does not listen
    async with serve_control(None, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(UsageError, match="another process listens there already"):
            async with serve_control(None, path):
                raise AssertionError("not reached")
        async with connect_control(path) as client:
            await client.command("status")
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(UsageError, match="the file there is no socket"):
        async with serve_control(None, path):
            raise AssertionError("not reached")
    assert path.read_text() == "precious"


@pytest.mark.parametrize("name", ["", "x" * 200, "no/such/directory", "a\0b"])
async def test_no_place_for_a_socket(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        async with serve_control(None, f"{tmp_path}/{name}" if name else ""):
            raise AssertionError("not reached")
    assert "\n" not in str(caught.value)


async def test_names_that_a_uri_would_not_take(tmp_path: Path) -> None:
    path = tmp_path / "what? 100%25 #1\n"
    async with serve_control(None, path), connect_control(path) as client:
        assert path.exists()
        await client.command("status")


# ---- daemons ----


def ctl_command(path: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "pagenet.cli.ctl", str(path), *args]


async def told_by(command: Sequence[str]) -> tuple[int, str, str]:
    async with run(command) as process:
        lines = await process.rest()
        return await process.wait_end(), "\n".join(lines), process.stderr


async def test_a_transfer_from_beginning_to_end(source: str, tmp_path: Path) -> None:
    path, owner = tmp_path / "pull.ctl", tmp_path / "owner"
    options = (
        "--uffd-socket",
        str(owner),
        "--control",
        str(path),
        "--start-background",
        "after=1000",
    )
    async with run_server(source, "--control", str(tmp_path / "serve.ctl")) as (server, uri):
        async with run(pull_command(uri, *options, lane="native")) as puller:
            await puller.event("waiting")
            async with connect_control(path) as client:
                assert (await client.command("status"))["state"] == "starting"
            code, out, err = await told_by(ctl_command(path, "resume"))
            assert (code, out, err) == (
                2,
                "",
                "pagenet-ctl: resume: the transfer has not begun yet\n",
            )
            async with run_workload(
                owner, "--size", SIZE, "--order", "none", "--wait-complete"
            ) as workload:
                await puller.event("owner")
                code, out, err = await told_by(
                    [sys.executable, "-m", "pagenet.cli.pull", uri, *options]
                )
                assert (code, out) == (2, "")
                assert "another process listens there already" in err
                assert err.count("\n") == 1
                code, out, _ = await told_by(ctl_command(path, "bandwidth", "800Mbit"))
                assert (code, out) == (
                    0,
                    "background: hot, at most 100.0 MB/s, not begun yet; prefetch: 0,0",
                )
                code, out, _ = await told_by(ctl_command(path, "status"))
                assert code == 0
                assert {line.split()[0] for line in out.splitlines()} >= {
                    "daemon",
                    "state",
                    "resident",
                    "faults",
                    "background",
                }
                async with run(ctl_command(path, "--json", "status", "--watch", "0.05")) as watcher:
                    assert json.loads(await watcher.line() or "")["begun"] is False
                    code, out, _ = await told_by(ctl_command(path, "resume", "--json"))
                    assert (code, json.loads(out)["begun"]) == (0, True)
                    await check_verified(workload)
                    assert await puller.wait() == 0
                    seen = [json.loads(line) for line in await watcher.rest()]
                    assert await watcher.wait_end() == 0
                assert seen[-1]["pages_resident"] >= seen[0]["pages_resident"]
        assert not path.exists()
        code, out, _ = await told_by(ctl_command(tmp_path / "serve.ctl", "stop"))
        assert (code, out) == (0, "stopping")
        assert await server.wait() == 128 + signal.SIGTERM
    assert not (tmp_path / "serve.ctl").exists()


async def test_stop_half_way(source: str, tmp_path: Path) -> None:
    path, into = tmp_path / "ctl", tmp_path / "into"
    async with run_server(source) as (_, uri):
        command = pull_command(
            uri, "--into", str(into), "--max-bandwidth", "100k", "--control", str(path), lane="trio"
        )
        async with run(command) as puller:
            await puller.event("owner")
            async with connect_control(path) as client:
                assert await client.command("stop") == {}
            assert await puller.wait() == 128 + signal.SIGTERM
    assert sorted(os.listdir(tmp_path)) == ["source"]


async def test_nonsense_is_a_line_of_the_daemons(source: str, tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    command = serve_command(
        source, "--listen", "tcp://127.0.0.1:0", "--control", str(path), as_json=False
    )
    async with run(command) as server:
        await server.line()
        await converse(path, b"hello?")
        line = await server.line()
        assert line is not None
        assert "refused: this is no control message: it begins with b'hello?'" in line
        server.send_signal(signal.SIGTERM)
        assert (await server.rest(), await server.wait_end(), server.stderr) == ([], 143, "")
    assert not path.exists()


async def test_a_killed_daemons_socket_is_replaced(source: str, tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    async with run_server(source, "--control", str(path)) as (server, _):
        await server.kill()
    assert path.exists()
    async with serve_control(None, path), connect_control(path) as client:
        await client.command("status")
    assert not path.exists()


# ---- every page is right, whatever the commands ----


async def record(source: str, path: Path) -> None:
    memory = pagenet.OwnMemory("memfd")
    try:
        async with (
            pagenet.serve(source, listen="tcp://127.0.0.1:0") as server,
            pagenet.pull(
                server.uri, memory, background="off", prefetch=(0, 0), record=path
            ) as transfer,
        ):
            for page in range(0, PAGES, 7):
                await memory.read(page * PAGE, 1)
            transfer.set_background("linear")
            await transfer.wait_complete()
    finally:
        memory.close()


@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.soak), pytest.param(3, marks=pytest.mark.soak)]
)
@pytest.mark.parametrize(
    ("lane", "memory"), [("native", "anonymous"), ("native", "memfd"), ("trio", "anonymous")]
)
async def test_commands_at_random(
    lane: str, memory: str, seed: int, source: str, tmp_path: Path
) -> None:
    path, owner, recording, draw = (
        tmp_path / "ctl",
        tmp_path / "owner",
        tmp_path / "recording",
        random.Random(seed),
    )
    await record(source, recording)
    work = [
        "--memory",
        memory,
        "--threads",
        "4",
        "--write-share",
        "30",
        "--touches",
        str(3 * PAGES),
        "--think-us",
        "100",
    ]
    work += ["--seed", "0", "--remove-share", "10"]
    async with run_server(source) as (_, uri):
        options = (
            "--uffd-socket",
            str(owner),
            "--control",
            str(path),
            "--max-bandwidth",
            "1M",
            "--background-lanes",
            "2",
        )
        command = pull_command(
            uri, *options, "--start-background", draw.choice(["after=0.1", "rate=100"]), lane=lane
        )
        async with run(command) as puller:
            await puller.event("waiting")
            async with run_workload(owner, "--size", SIZE, *work) as workload:
                await puller.event("owner")
                await tell_at_random(path, draw, recording, 0.7)
                if not puller.has_ended:
                    await let_it_finish(path)
                await check_verified(workload)
            await puller.event("complete")
            assert await puller.wait() == 0


async def let_it_finish(path: Path) -> None:
    try:
        async with connect_control(path) as client:
            await client.command("bandwidth", rate=None)
            await client.command("schedule", name="hot")
            await client.command("resume")
    except (ConnectionBroken, SourceUnreachable, UsageError):
        return  # the transfer is over


# ---- pagenet-ctl, and what is no daemon ----


@pytest.mark.parametrize(("arguments", "reason"), [
    ([], "required: COMMAND"),
    (["s"], "invalid choice: 's'"),
    (["s", "explode"], "invalid choice: 'explode'"),
    (["s", "schedule", "sideways"], "'sideways': there are hot"),
    (["s", "schedule"], "required: NAME"),
    (["s", "bandwidth", "fast"], "'fast' is no rate"),
    (["s", "bandwidth", "0"], "'0' is no rate"),
    (["s", "prefetch", "8"], "'8' is not auto, or FWD,BACK"),
    (["s", "status", "--watch", "0"], "'0' is no number of seconds"),
    (["s", "pause", "now"], "unrecognized arguments: now"),
])  # fmt: skip
def test_ctl_arguments(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        ctl.main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


def test_ctl_finds_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.main([str(tmp_path / "nowhere"), "status"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing answers: No such file or directory" in line
    assert ctl.main(["--json", str(tmp_path / "nowhere"), "status"]) == 3
    assert json.loads(capsys.readouterr().out)["error"] == "SourceUnreachable"


@asynccontextmanager
async def impostor(path: Path, says: bytes, *, stays: bool = False) -> AsyncIterator[None]:
    """A server that sends ``says`` to every client."""
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen()

        async def answer() -> None:
            peer, _ = await listener.accept()
            async with trio.SocketStream(peer) as stream:
                await stream.send_all(says)
                if stays:
                    await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            yield
            nursery.cancel_scope.cancel()


HELLO = {
    "type": "hello",
    "version": 1,
    "oldest": 1,
    "program": "x",
    "pid": 1,
    "release": "1",
    "commands": [],
}


@pytest.mark.parametrize(("says", "error", "reason"), [
    (b"220 smtp ready\r\n", RemoteProtocolError, "no control message"),
    (b"", ConnectionBroken, "the daemon has ended"),
    (encode(HELLO)[:-3], RemoteProtocolError, "in the middle of a message"),
    (encode({"type": "reply"}), RemoteProtocolError, "not a hello"),
    (encode({**HELLO, "version": 3, "oldest": 2}), RemoteProtocolError,
        "speaks control versions 2 to 3"),
    (encode(HELLO) + encode({"type": "reply", "id": 9, "result": {}}), RemoteProtocolError,
        "does not fit the request"),
    (encode(HELLO) + encode({"type": "reply", "id": 1}), RemoteProtocolError,
        "does not fit the request"),
    (encode(HELLO) + encode({"type": "error", "code": "usage", "text": "no\nway"}), UsageError,
        "^no.way$"),
    (encode({**HELLO, "version": 2, "more": 1}) + encode({"type": "error", "text": 5}),
        RemoteProtocolError, ": 5$"),
    (framed(b"\x82\xa4type\xa5error\xa4text" + b"\x91" * 1020 + b"\0"), RemoteProtocolError,
        r"\[\["),
])  # fmt: skip
async def test_what_is_no_daemon(
    says: bytes, error: type[Exception], reason: str, tmp_path: Path
) -> None:
    async with impostor(tmp_path / "ctl", says):
        with pytest.raises(error, match=reason) as caught:
            async with connect_control(tmp_path / "ctl") as client:
                await client.command("status")
    assert "\n" not in str(caught.value)


SOURCE = {
    "program": "x",
    "release": "1",
    "pid": 1,
    "state": "running",
    "destinations": [],
    "pages": 1,
    "bytes": 4096,
}


@pytest.mark.parametrize("status", [
    {},
    {**SOURCE, "destinations": ["x"]},
    {**SOURCE, "pages_asked": 1, "pages_demanded": 0, "uri": "", "destinations": 5},
    {**SOURCE, "pages_asked": 1, "pages_demanded": 0, "uri": "", "bytes": "many"},
    {"program": "x", "release": "1", "pid": 1, "schedule": "hot"},
    {"program": "x", "release": "1", "pid": 1, "schedule": "hot", "seconds_left": None,
        "fault_us": [1]},
])  # fmt: skip
async def test_a_status_that_makes_no_sense(status: dict[str, Any], tmp_path: Path) -> None:
    async with impostor(
        tmp_path / "ctl", encode(HELLO) + encode({"type": "reply", "id": 1, "result": status})
    ):
        code, out, err = await told_by(ctl_command(tmp_path / "ctl", "status"))
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert "the status of the daemon makes no sense" in err


async def test_a_status_is_shown_as_text_alone(tmp_path: Path) -> None:
    status = {
        **SOURCE,
        "pages_asked": 1,
        "pages_demanded": 0,
        "uri": "[/red] \x1b[2J",
        "destinations": ["[link=x]\n"],
    }
    async with impostor(
        tmp_path / "ctl", encode(HELLO) + encode({"type": "reply", "id": 1, "result": status})
    ):
        code, out, err = await told_by(ctl_command(tmp_path / "ctl", "status"))
    assert (code, err) == (0, "")
    assert "[/red] ?[2J" in out
    assert "[link=x]?" in out


async def test_a_daemon_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_client, "ANSWER_TIMEOUT", 0.05)
    async with impostor(tmp_path / "ctl", encode(HELLO), stays=True):
        with pytest.raises(ConnectionBroken, match="does not answer: is it stopped"):
            async with connect_control(tmp_path / "ctl") as client:
                await client.command("status")
