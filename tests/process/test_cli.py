"""pagenet/cli/: what the commands print, on which stream and in which form, how they end, and what
they leave behind."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from processes import (
    LANES,
    PAGE,
    Process,
    check_verified,
    pull_command,
    run,
    run_relay,
    run_server,
    run_workload,
    serve_command,
    wait_in_faults,
    write_pattern,
)

import pagenet
from pagenet import __version__
from pagenet.cli import pull, serve
from pagenet.cli._command import Report

MIB = 1 << 20
SIZE = 4 * MIB
PAGES = SIZE // PAGE
CODES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 130, 143]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def lane() -> str:
    """What a command prints does not depend on the kind of its lanes. Where it might, a test takes
    both kinds."""
    return LANES[-1]


both_lanes = pytest.mark.parametrize("lane", LANES)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_pattern(tmp_path / "source", SIZE, zero_every=4))


@pytest.fixture
def listing(tmp_path: Path) -> Callable[[], list[str]]:
    return lambda: sorted(os.listdir(tmp_path))


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address on which no process listens, and which no other process can take meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield "tcp://{}:{}".format(*taken.getsockname())


async def ended(command: Sequence[str], **options: Any) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of stdout, lines of stderr."""
    async with run(command, **options) as process:
        lines = await process.rest()
        return await process.wait_end(), lines, process.stderr.splitlines()


Main = Callable[[Sequence[str]], int]


def check_bad_usage(
    main: Main, arguments: Sequence[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert re.search(reason, line), line
    assert captured.out == ""


# ---- arguments ----


@pytest.mark.parametrize("main", [serve.main, pull.main], ids=["serve", "pull"])
def test_help_names_every_exit_code(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out.partition("exit codes:\n")[2]
    assert [int(line.split()[0]) for line in text.splitlines()] == CODES
    assert all(len(line.split(maxsplit=1)[1]) > 10 for line in text.splitlines())


@pytest.mark.parametrize(
    ("main", "name"), [(serve.main, "pagenet-serve"), (pull.main, "pagenet-pull")]
)
def test_version(main: Main, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"{name} {__version__}\n"


@pytest.mark.parametrize(("main", "arguments", "reason"), [
    (serve.main, [], "required: SOURCE"),
    (serve.main, ["source"], "one of the arguments --listen --connect is required"),
    (serve.main, ["source", "--listen", "a", "--connect", "b"], "not allowed with"),
    (serve.main, ["source", "--listen"], "expected one argument"),
    (serve.main, ["source", "--listen", "a", "--colour"], "unrecognized arguments: --colour"),
    (pull.main, [], "required: URI"),
    (pull.main, ["uri"], "one of the arguments --uffd-socket --into --resume is required"),
    (pull.main, ["uri", "--into", "a", "--uffd-socket", "b"], "not allowed with"),
    (pull.main, ["uri", "--into", "a", "--background", "sideways"], "'sideways': there are hot"),
    (pull.main, ["uri", "other", "--into", "a"], "unrecognized arguments: other"),
])  # fmt: skip
def test_arguments_that_make_no_sense(
    main: Main, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert line.endswith("(--help explains)")


# ---- the first line ----


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://localhost:0", "tcp://[::1]:0"])
async def test_first_line_names_the_address(address: str, source: str) -> None:
    if "::1" in address and not has_ipv6():
        pytest.skip("this host has no IPv6")
    async with run(serve_command(source, "--listen", address, as_json=False)) as server:
        match = re.fullmatch(
            rf"serving {PAGES} pages \({SIZE} bytes\) on (tcp://\S+:(\d+))",
            await server.line() or "",
        )
        assert match
        assert int(match[2]) > 0
        await check_served(match[1])


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def check_served(uri: str) -> None:
    """A region can be pulled from there: the source answers, and the pull fails only because there
    is no place for the region."""
    with pytest.raises(pagenet.UsageError, match="/proc/nothing"):
        async with pagenet.pull(uri, pagenet.IntoFile("/proc/nothing/can/be/here")):
            pass


async def test_first_line_in_json(source: str) -> None:
    async with run(serve_command(source, "--listen", "tcp://127.0.0.1:0")) as server:
        first = json.loads(await server.line() or "")
        assert first["event"] == "listening"
        assert (first["pages"], first["bytes"]) == (PAGES, SIZE)
        assert re.fullmatch(r"tcp://127\.0\.0\.1:[1-9]\d*", first["uri"])
        await check_served(first["uri"])


async def test_first_line_of_a_unix_listener(source: str, tmp_path: Path) -> None:
    async with run_server(source, listen=f"unix:{tmp_path}/s.sock") as (_, uri):
        assert uri == f"unix:{tmp_path}/s.sock"
        await check_served(uri)


# ---- exit codes, one after the other ----


@both_lanes
async def test_0_complete(source: str, tmp_path: Path, lane: str) -> None:
    async with run_server(source, "--once") as (server, uri):
        code, _, errors = await ended(
            pull_command(uri, "--into", str(tmp_path / "copy"), lane=lane)
        )
        assert (code, errors) == (0, [])
        assert (await server.wait(), server.stderr) == (0, "")
    assert (tmp_path / "copy").read_bytes() == Path(source).read_bytes()


@pytest.mark.parametrize(("spec", "reason"), [
    ("/nowhere/at/all",
        "^pagenet-serve: cannot open source /nowhere/at/all: No such file or directory$"),
    ("/", "is not a regular file"),
    ("/dev/null", "is not a regular file"),
    ("pid:1:2", "is not pid:PID:START-END"),
    ("pid:999999999:0x1000+0x1000", "No such process"),
])  # fmt: skip
def test_2_unknown_source(spec: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_bad_usage(serve.main, [spec, "--listen", "tcp://127.0.0.1:0"], reason, capsys)


@pytest.mark.parametrize(("address", "reason"), [
    ("carrier-pigeon://roof", "carrier-pigeon"),
    ("127.0.0.1:80", "127.0.0.1"),
    ("tcp://127.0.0.1", "the port is missing"),
    ("tcp://127.0.0.1:99999", "the port is no number from 0 to 65535"),
    ("unix:/nowhere/at/all/s.sock", "cannot listen"),
    ("tcp://192.0.2.1:0", "--plaintext"),
])  # fmt: skip
def test_2_address_that_cannot_be_listened_on(
    address: str, reason: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_bad_usage(serve.main, [source, "--listen", address], reason, capsys)


async def test_2_address_that_another_has(source: str, tmp_path: Path) -> None:
    for listen in ("tcp://127.0.0.1:0", f"unix:{tmp_path}/s.sock"):
        async with pagenet.serve(source, listen=listen) as server:
            code, output, errors = await ended(
                serve_command(source, "--listen", server.uri, as_json=False)
            )
            assert (code, output, len(errors)) == (2, [], 1)
            assert re.search("another|already|in use", errors[0])
            await check_served(server.uri)


NO_PLACE = [
    (["--into", "{dir}/directory"], "is not a regular file"),
    (["--into", "{dir}/missing/copy"], "No such file or directory"),
    (["--into", "{dir}/source/copy"], "Not a directory"),
    (["--uffd-socket", "{dir}/source"], "socket"),
    (["--uffd-socket", "{dir}/missing/uffd.sock"], "No such file or directory"),
    (["--into", "{dir}/copy", "--background", "off"], "no thread touches the pages of a file"),
]


async def test_2_no_place_for_the_pages(
    source: str, tmp_path: Path, listing: Callable[[], list[str]], lane: str
) -> None:
    (tmp_path / "directory").mkdir()
    async with (
        pagenet.serve(source, listen="tcp://127.0.0.1:0") as server,
        trio.open_nursery() as nursery,
    ):
        for place, reason in NO_PLACE:
            arguments = [argument.format(dir=tmp_path) for argument in place]
            nursery.start_soon(
                check_refused, pull_command(server.uri, *arguments, lane=lane), reason
            )
    assert listing() == ["directory", "source"]


async def check_refused(command: Sequence[str], reason: str) -> None:
    code, _, errors = await ended(command)
    assert (code, len(errors)) == (2, 1), errors
    assert re.search(reason, errors[0]), errors[0]


async def test_3_nobody_there(source: str, nowhere: str, tmp_path: Path, lane: str) -> None:
    for uri in (nowhere, f"unix:{tmp_path}/nobody.sock"):
        for command in (
            pull_command(uri, "--into", str(tmp_path / "copy"), lane=lane, as_json=False),
            serve_command(source, "--connect", uri, as_json=False),
        ):
            code, output, errors = await ended(command)
            assert (code, output, len(errors)) == (3, [], 1), errors
            assert f"{uri}: nothing answers" in errors[0]


@both_lanes
async def test_4_source_truncated(
    source: str, tmp_path: Path, listing: Callable[[], list[str]], lane: str
) -> None:
    async with run_server(source) as (server, uri):
        os.truncate(source, SIZE // 2)
        code, _, errors = await ended(
            pull_command(uri, "--into", str(tmp_path / "copy"), lane=lane)
        )
        assert (code, len(errors)) == (4, 1), errors
        assert "cannot go on" in errors[0]
        assert "it ends at byte" in errors[0]
        assert await server.wait() == 4
        (line,) = server.stderr.splitlines()
        assert line.startswith(f"pagenet-serve: source {source} cannot be read any more")
        assert server.events[-1]["event"] == "error"
    assert listing() == ["source"]


@asynccontextmanager
async def run_impostor(says: bytes) -> AsyncIterator[str]:
    """A server that sends ``says`` to every client and closes the connection."""

    async def meet(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(says)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, meet, listeners)
        yield "tcp://{}:{}".format(*listeners[0].socket.getsockname())
        nursery.cancel_scope.cancel()


async def test_4_hangs_up(source: str, tmp_path: Path, lane: str) -> None:
    async with run_impostor(b"") as uri:
        code, _, errors = await ended(
            pull_command(uri, "--into", str(tmp_path / "copy"), lane=lane)
        )
        assert (code, len(errors)) == (4, 1), errors
        code, _, errors = await ended(serve_command(source, "--connect", uri))
        assert (code, len(errors)) == (4, 1), errors


async def test_4_destination_that_we_dialled_leaves(source: str, tmp_path: Path, lane: str) -> None:
    """It is killed, or stopped: either way the pages do not arrive."""
    for how, word in ((signal.SIGKILL, "closed|broke|reset"), (signal.SIGTERM, "left")):
        command = pull_command(
            "tcp://127.0.0.1:0", "--listen", "--uffd-socket", str(tmp_path / "uffd.sock"), lane=lane
        )
        async with run(command) as puller:
            uri = (await puller.event("listening"))["uri"]
            dialling = serve_command(source, "--connect", uri, "--reconnect-for", "0")
            async with run(dialling) as server:
                await puller.event("waiting")
                puller.send_signal(how)
                await puller.wait()
                assert await server.wait() == 4
                assert re.search(word, server.stderr), server.stderr
                assert len(server.stderr.splitlines()) == 1
        (tmp_path / "uffd.sock").unlink(missing_ok=True)


@both_lanes
async def test_5_owner_killed(
    source: str, tmp_path: Path, uffd_permitted: None, listing: Callable[[], list[str]], lane: str
) -> None:
    path = tmp_path / "uffd.sock"
    async with (
        run_server(source) as (_, uri),
        run(
            pull_command(uri, "--uffd-socket", str(path), "--background", "off", lane=lane)
        ) as puller,
        run_workload(path, "--size", SIZE, "--order", "none", "--wait-complete") as workload,
    ):
        await puller.event("owner")
        await workload.kill()
        assert await puller.wait() == 5
        assert puller.stderr == "pagenet-pull: the owner of the memory is gone\n"
        assert puller.events[-1] == {
            "event": "error",
            "error": "OwnerGone",
            "message": "the owner of the memory is gone",
            "exit_code": 5,
        }
    assert listing() == ["source"]


@pytest.mark.parametrize(
    "says",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(100), os.urandom(100)],
    ids=["http", "zeros", "noise"],
)
async def test_6_not_pagenet(says: bytes, source: str, tmp_path: Path, lane: str) -> None:
    async with run_impostor(says) as uri:
        for command in (
            pull_command(uri, "--into", str(tmp_path / "copy"), lane=lane, as_json=False),
            serve_command(source, "--connect", uri, as_json=False),
        ):
            code, output, errors = await ended(command)
            assert (code, output, len(errors)) == (6, [], 1), errors


# A stand-in for a kernel that lacks something, which a test cannot have.
LACKING = """
import sys
from pagenet import Unsupported
from pagenet.cli.pull import main
from pagenet.uffd import Userfaultfd
def received(fd):
    raise Unsupported("this kernel lacks it")
Userfaultfd.received = received
sys.exit(main(sys.argv[1:]))
"""


async def test_7_kernel_lacks_something(
    source: str, tmp_path: Path, uffd_permitted: None, lane: str
) -> None:
    path = tmp_path / "uffd.sock"
    async with run_server(source) as (_, uri):
        arguments = pull_command(uri, "--uffd-socket", str(path), lane=lane)[3:]
        async with run([sys.executable, "-c", LACKING, *arguments]) as puller:
            await puller.event("waiting")
            async with run_workload(path, "--size", SIZE):
                assert await puller.wait() == 7
            assert puller.stderr == "pagenet-pull: this kernel lacks it\n"


@pytest.mark.parametrize("number", SIGNALS)
async def test_130_and_143_of_a_server(number: signal.Signals, source: str, tmp_path: Path) -> None:
    async with run_server(source, listen=f"unix:{tmp_path}/s.sock") as (server, uri):
        await check_served(uri)
        server.send_signal(number)
        assert (await server.wait(), server.stderr) == (128 + number, "")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("number", SIGNALS)
async def test_130_and_143_while_waiting_for_an_owner(
    number: signal.Signals, source: str, tmp_path: Path, lane: str
) -> None:
    async with (
        run_server(source) as (server, uri),
        run(pull_command(uri, "--uffd-socket", str(tmp_path / "uffd.sock"), lane=lane)) as puller,
    ):
        await puller.event("waiting")
        puller.send_signal(number)
        assert (await puller.wait(), puller.stderr) == (128 + number, "")
        await server.event("left")
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("number", SIGNALS)
async def test_130_and_143_while_waiting_for_a_source(
    number: signal.Signals, tmp_path: Path, lane: str
) -> None:
    arguments = ["--listen", "--into", str(tmp_path / "copy")]
    async with run(pull_command(f"unix:{tmp_path}/s.sock", *arguments, lane=lane)) as puller:
        await puller.event("listening")
        puller.send_signal(number)
        assert (await puller.wait(), puller.stderr) == (128 + number, "")
    assert os.listdir(tmp_path) == []


@both_lanes
@pytest.mark.parametrize("number", SIGNALS)
async def test_130_and_143_half_way(
    number: signal.Signals, source: str, tmp_path: Path, uffd_permitted: None, lane: str
) -> None:
    """Threads of the owner wait, and continue to wait after the end."""
    path = tmp_path / "uffd.sock"
    async with (
        run_server(source) as (server, uri),
        run_relay(uri, MIB) as relay,
        run(pull_command(relay.uri, "--uffd-socket", str(path), lane=lane)) as puller,
    ):
        await puller.event("waiting")
        async with run_workload(
            path, "--size", SIZE, "--order", "random", "--zero-every", 4
        ) as workload:
            await relay.held.wait()
            await wait_in_faults(workload.pid, 2)
            puller.send_signal(number)
            assert (await puller.wait(), puller.stderr) == (128 + number, "")
            await server.event("left")
            assert not workload.has_ended
            await wait_in_faults(workload.pid, 2)
    assert os.listdir(tmp_path) == ["source"]


# ---- JSON lines ----


@both_lanes
async def test_events_of_a_transfer(
    source: str, tmp_path: Path, uffd_permitted: None, lane: str
) -> None:
    path = tmp_path / "uffd.sock"
    async with (
        run_server(source, "--once") as (server, uri),
        run_relay(uri, MIB) as relay,
        run(pull_command(relay.uri, "--uffd-socket", str(path), lane=lane)) as puller,
        run_workload(
            path, "--size", SIZE, "--order", "random", "--zero-every", 4, "--wait-complete"
        ) as workload,
    ):
        # a second later: the source is held back until then
        progress = await puller.event("progress")
        relay.release()
        await check_verified(workload)
        assert await puller.wait() == 0
        assert await server.wait() == 0
    first, *_, last = puller.events
    assert first == {"event": "connected", "peer": relay.uri, "pages": PAGES, "bytes": SIZE}
    assert {"event": "waiting", "uffd_socket": str(path)} in puller.events
    assert {"event": "owner", "placement": "copy", "lane": lane, "pages": PAGES} in puller.events
    assert sum(event["event"] == "complete" for event in puller.events) == 1
    check_progress(progress)
    check_complete(last)
    assert [event["event"] for event in server.events] == ["listening", "connected", "complete"]
    assert all(event["peer"].startswith("tcp://127.0.0.1:") for event in server.events[1:])


def check_progress(event: dict[str, Any]) -> None:
    numbers = {
        "share",
        "bytes",
        "bytes_per_s",
        "bytes_wire",
        "compressed",
        "faults",
        "fault_us",
        "seconds_left",
    }
    assert set(event) == {"event", *numbers}
    assert 0 < event["bytes_wire"] < 2 * SIZE
    assert set(event["compressed"]) == {"bytes", "share", "ratio"}
    assert 0 < event["share"] < 1
    assert event["bytes"] == pytest.approx(event["share"] * SIZE, rel=0.01)
    assert event["faults"] > 0
    assert set(event["fault_us"]) == {"p50", "p99"}
    assert event["seconds_left"] is None or event["seconds_left"] > 0


def check_complete(event: dict[str, Any]) -> None:
    assert event["event"] == "complete"
    assert event["pages"] == PAGES
    assert event["demand"] + event["prefetch"] + event["background"] == PAGES
    assert event["demand"] > 0
    assert event["background"] > 0
    assert event["removed"] == 0
    assert 0 < event["zero"] < PAGES
    assert SIZE / 2 < event["bytes_wire"] < 2 * SIZE
    assert event["seconds"] > 0
    assert event["faults"] >= event["demand"]
    assert set(event["fault_us"]) == {"p50", "p99"}
    assert 0 < event["fault_us"]["p50"] <= event["fault_us"]["p99"]
    assert event["placement"] == "copy"


async def test_complete_without_a_fault(source: str, tmp_path: Path, lane: str) -> None:
    async with (
        run_server(source) as (_, uri),
        run(pull_command(uri, "--into", str(tmp_path / "copy"), lane=lane)) as puller,
    ):
        complete = await puller.event("complete")
        assert (complete["demand"], complete["background"], complete["faults"]) == (0, PAGES, 0)
        assert complete["fault_us"] == {"p50": None, "p99": None}
        assert complete["placement"] == "file"
        assert await puller.line() is None


async def test_server_tells_how_each_peer_left(source: str, tmp_path: Path, lane: str) -> None:
    command = ["--uffd-socket", str(tmp_path / "uffd.sock")]
    async with run_server(source) as (server, uri):
        for how, word in ((signal.SIGTERM, "left"), (signal.SIGKILL, "lost")):
            async with run(pull_command(uri, *command, lane=lane)) as puller:
                await puller.event("waiting")
                puller.send_signal(how)
                await puller.wait()
            told = await server.event(word)
            assert told["peer"].startswith("tcp://127.0.0.1:")
        async with await trio.open_tcp_stream("127.0.0.1", int(uri.rpartition(":")[2])) as stranger:
            await stranger.send_all(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
            refused = await server.event("refused")
        assert refused["reason"]
        assert "\n" not in refused["reason"]
        await check_served(uri)


async def test_refused_owner_is_an_event(
    source: str, tmp_path: Path, uffd_permitted: None, lane: str
) -> None:
    path = tmp_path / "uffd.sock"
    async with (
        run_server(source) as (_, uri),
        run(pull_command(uri, "--uffd-socket", str(path), lane=lane)) as puller,
        run_workload(path, "--size", SIZE, "--bad-handshake", "empty") as bad,
    ):
        refused = await puller.event("refused")
        assert refused["peer"] == f"owner on {path}"
        assert refused["reason"] == "the owner's handshake is not a JSON array of mappings"
        assert await bad.wait() == 0


# ---- what is loaded ----

LOADED = """
import importlib, pathlib, sys
importlib.import_module(sys.argv[1])
maps = pathlib.Path("/proc/self/maps").read_text()
print(*("pagenet." + name in sys.modules for name in ("_pagenet", "_pagenet_testing")))
print(*(f"/{name}." in maps for name in ("_pagenet", "_pagenet_testing")))
"""


@pytest.mark.parametrize("command", ["serve", "pull", "qemu", "ctl", "snapshot"])
async def test_command_loads_nothing_of_the_tests(command: str) -> None:
    code, lines, _ = await ended([sys.executable, "-c", LOADED, f"pagenet.cli.{command}"])
    assert code == 0
    assert lines == ["True False", "True False"]


async def test_what_the_tests_need_is_seen_where_it_is_loaded() -> None:
    _, lines, _ = await ended([sys.executable, "-c", LOADED, "pagenet.testing.workload"])
    assert lines == ["True True", "True True"]


def extensions_of(process: Process) -> set[str]:
    """pagenet's extension modules that a process has mapped."""
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    return set(re.findall(r"/(_pagenet\w*)\.", maps))


async def test_transfer_loads_nothing_of_the_tests(
    source: str, tmp_path: Path, uffd_permitted: None, lane: str
) -> None:
    """Looked at in the middle of the transfer, so that what is loaded late shows."""
    path = tmp_path / "uffd.sock"
    async with (
        run_server(source) as (server, uri),
        run_relay(uri, hold_after=SIZE // 2) as relay,
        run(pull_command(relay.uri, "--uffd-socket", str(path), lane=lane)) as puller,
        run_workload(path, "--size", SIZE, "--wait-complete") as workload,
    ):
        await relay.held.wait()
        assert extensions_of(server) == extensions_of(puller) == {"_pagenet"}
        assert extensions_of(workload) == {"_pagenet_testing"}


# ---- words ----


async def test_words_of_a_transfer(
    source: str, tmp_path: Path, uffd_permitted: None, lane: str
) -> None:
    """Not on a terminal: a line for each event, a line of progress a second, and the summary."""
    path = tmp_path / "uffd.sock"
    async with (
        run_server(source) as (_, uri),
        run_relay(uri, MIB) as relay,
        run(
            pull_command(relay.uri, "--uffd-socket", str(path), lane=lane, as_json=False)
        ) as puller,
        run_workload(path, "--size", SIZE, "--zero-every", 4, "--wait-complete") as workload,
    ):
        assert await puller.line() == f"{relay.uri}: {PAGES} pages, {SIZE} bytes"
        assert await puller.line() == f"waiting for the owner of the memory on {path}"
        assert await puller.line() == f"filling {PAGES} pages (placement: copy, lanes: {lane})"
        check_moment(await puller.line() or "")
        relay.release()
        await check_verified(workload)
        lines = await puller.rest()
        assert await puller.wait_end() == 0
        assert puller.stderr == ""
    summary = [line for line in lines if "resident" not in line]
    assert re.fullmatch(
        r"complete: 4\.0 MiB in \d+\.\d\d s \(\d+ MiB/s\), placement copy", summary[0]
    )
    assert [line.split()[0] for line in summary[-4:]] == [
        "demand",
        "prefetch",
        "background",
        "faults:",
    ]
    assert "\x1b" not in "".join(lines)


def check_moment(line: str) -> None:
    assert re.fullmatch(
        r" *\d+\.\d% resident, \d+ of 4 MiB, \d+ MiB/s, \d+ faults \(p50 .+, p99 .+\)(, \d+ s"
        r" left)?",
        line,
    ), line


async def test_words_of_a_server(source: str, tmp_path: Path, lane: str) -> None:
    async with run(
        serve_command(source, "--listen", f"unix:{tmp_path}/s.sock", "--once", as_json=False)
    ) as server:
        assert (
            await server.line() == f"serving {PAGES} pages ({SIZE} bytes) on unix:{tmp_path}/s.sock"
        )
        await ended(
            pull_command(f"unix:{tmp_path}/s.sock", "--into", str(tmp_path / "copy"), lane=lane)
        )
        assert re.search(r": connected$", await server.line() or "")
        assert re.search(r": has every page$", await server.line() or "")
        assert await server.line() is None
        assert await server.wait_end() == 0


class Screen:
    """A terminal, from the side of its user."""

    def __init__(self, columns: int) -> None:
        ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        self._stream = trio.lowlevel.FdStream(ours)
        self.text = ""

    async def look_until(self, wanted: str) -> None:
        while not re.search(wanted, self.text):
            self.text += (await self._stream.receive_some()).decode()

    async def look_to_the_end(self) -> None:
        """Read until the end of the process, which alone has the other side by now."""
        try:
            while data := await self._stream.receive_some():
                self.text += data.decode()
        except trio.BrokenResourceError:
            pass  # EIO: the other side is closed

    async def close(self) -> None:
        await self._stream.aclose()


@asynccontextmanager
async def run_on_screen(
    command: Sequence[str], columns: int = 160
) -> AsyncIterator[tuple[Process, Screen]]:
    screen = Screen(columns)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": ""}
    try:
        async with run(command, stdout=screen.theirs, env=environment) as process:
            os.close(screen.theirs)
            yield process, screen
    finally:
        await screen.close()


@pytest.mark.parametrize("columns", [160, 80, 40])
async def test_progress_on_a_terminal(columns: int, source: str, tmp_path: Path, lane: str) -> None:
    """One line, drawn again and again, and erased at the end."""
    async with run_server(source) as (_, uri), run_relay(uri, MIB) as relay:
        command = pull_command(
            relay.uri, "--into", str(tmp_path / "copy"), lane=lane, as_json=False
        )
        async with run_on_screen(command, columns) as (puller, screen):
            await relay.held.wait()
            await screen.look_until(r"(?s)%.*%.*%")
            before_the_end = screen.text
            assert "\x1b[2K" in before_the_end, "it was not drawn over"
            assert "complete:" not in before_the_end
            relay.release()
            await screen.look_to_the_end()
            assert await puller.wait_end() == 0
            last_words = screen.text.rpartition("\x1b[2K")[2]
            assert "complete: 4.0 MiB" in last_words
            assert "resident" not in last_words
            assert screen.text.count("\x1b[?25l") == screen.text.count("\x1b[?25h"), (
                "the cursor is still hidden"
            )


@pytest.mark.parametrize("number", SIGNALS)
async def test_terminal_is_left_as_it_was(
    number: signal.Signals, source: str, tmp_path: Path, lane: str
) -> None:
    async with run_server(source) as (_, uri), run_relay(uri, MIB) as relay:
        command = pull_command(
            relay.uri, "--into", str(tmp_path / "copy"), lane=lane, as_json=False
        )
        async with run_on_screen(command) as (puller, screen):
            await screen.look_until("resident")
            puller.send_signal(number)
            await screen.look_to_the_end()
            assert await puller.wait_end() == 128 + number
            left = re.sub(r"\d+ pages are missing$", "", screen.text.rstrip())
            assert left.endswith(("\x1b[?25h", "\x1b[2K")), repr(screen.text[-100:])
            assert screen.text.count("\x1b[?25l") == screen.text.count("\x1b[?25h")
            assert puller.stderr == ""


# ---- options ----


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://:0", "tcp://[::]:0"])
def test_plaintext_has_to_be_asked_for(
    address: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_bad_usage(serve.main, [source, "--listen", address], "--plaintext", capsys)
    check_bad_usage(
        pull.main, [address, "--listen", "--into", str(tmp_path / "copy")], "--plaintext", capsys
    )


async def test_plaintext(source: str, tmp_path: Path, lane: str) -> None:
    async with run_server(source, "--plaintext", listen="tcp://0.0.0.0:0") as (_, uri):
        await check_served(f"tcp://127.0.0.1:{uri.rpartition(':')[2]}")
    arguments = ["tcp://0.0.0.0:0", "--listen", "--plaintext", "--into", str(tmp_path / "copy")]
    async with run(pull_command(*arguments, lane=lane)) as puller:
        assert (await puller.event("listening"))["uri"].startswith("tcp://0.0.0.0:")


async def test_once_means_one_that_has_it_all(source: str, tmp_path: Path, lane: str) -> None:
    async with run_server(source, "--once") as (server, uri):
        async with run(
            pull_command(uri, "--uffd-socket", str(tmp_path / "uffd.sock"), lane=lane)
        ) as puller:
            await puller.event("waiting")
            puller.send_signal(signal.SIGINT)
            await puller.wait()
        await server.event("left")
        assert not server.has_ended
        async with run(pull_command(uri, "--into", str(tmp_path / "copy"), lane=lane)) as puller:
            assert await puller.wait() == 0
        assert await server.wait() == 0


async def test_without_once_it_goes_on(source: str, tmp_path: Path, lane: str) -> None:
    async with run_server(source) as (server, uri):
        for copy in ("first", "second"):
            async with run(pull_command(uri, "--into", str(tmp_path / copy), lane=lane)) as puller:
                assert await puller.wait() == 0
            await server.event("complete")
        assert not server.has_ended


async def test_several_sources_are_several_blocks(source: str, tmp_path: Path, lane: str) -> None:
    (tmp_path / "rom").write_bytes(b"r" * 3 * PAGE)
    async with (
        run_server(source, f"pc.rom={tmp_path / 'rom'}") as (_, uri),
        run(pull_command(uri, "--into", str(tmp_path / "copy"), lane=lane)) as puller,
    ):
        assert (await puller.event("connected"))["pages"] == PAGES + 3
        assert await puller.wait() == 0
    assert (tmp_path / "copy").read_bytes() == Path(source).read_bytes() + b"r" * 3 * PAGE


# ---- the file that is filled ----


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, "source", "complete"])
async def test_file_appears_when_it_is_complete(
    end: signal.Signals | str,
    source: str,
    tmp_path: Path,
    listing: Callable[[], list[str]],
    lane: str,
) -> None:
    """Only then does it replace an older file."""
    copy = tmp_path / "copy"
    copy.write_bytes(b"older")
    async with (
        run_server(source) as (server, uri),
        run_relay(uri, MIB) as relay,
        run(pull_command(relay.uri, "--into", str(copy), lane=lane)) as puller,
    ):
        await relay.held.wait()
        assert copy.read_bytes() == b"older"
        assert listing() == ["copy", "source"]
        if isinstance(end, signal.Signals):
            puller.send_signal(end)
            assert await puller.wait() == 128 + end
        elif end == "source":
            await server.kill()
            await relay.cut()
            assert await puller.wait() == 4
        else:
            relay.release()
            assert await puller.wait() == 0
    assert listing() == ["copy", "source"]
    assert copy.read_bytes() == (Path(source).read_bytes() if end == "complete" else b"older")


async def test_zeros_are_holes_in_the_file(source: str, tmp_path: Path, lane: str) -> None:
    os.truncate(source, 1 << 30)
    async with (
        run_server(source) as (_, uri),
        run(pull_command(uri, "--into", str(tmp_path / "copy"), lane=lane)) as puller,
    ):
        assert await puller.wait() == 0
    status = (tmp_path / "copy").stat()
    assert status.st_size == 1 << 30
    assert status.st_blocks * 512 < 2 * SIZE


# ---- stopped at any moment ----

ROUNDS = 6


def left_in(directory: Path) -> set[str]:
    return set(os.listdir(directory)) | {
        name for name in os.listdir("/dev/shm") if "pagenet" in name
    }


async def stop_some_time(process: Process, number: signal.Signals, seconds: float) -> None:
    """Python sometimes loses a Ctrl-C while it is still importing, so that signal is sent after the
    first output. The process ends with the code for the signal, unless it had completed, or had not
    begun."""
    if number == signal.SIGINT:
        process.events.append(json.loads(await process.line() or '{"event": "error"}'))
    await trio.sleep(seconds)  # the moment is random on purpose
    process.send_signal(number)
    code = await process.wait()
    words = [event["event"] for event in process.events]
    if words and words[-1] != "complete":
        assert (code, process.stderr) == (128 + number, "")
    else:
        assert code in (0, 128 + number, -number)


async def at_once(stop_one: Callable[[int, signal.Signals], Any]) -> None:
    async with trio.open_nursery() as nursery:
        for index in range(ROUNDS):
            nursery.start_soon(stop_one, index, SIGNALS[index % 2])


async def test_servers_stopped_at_any_moment(source: str, tmp_path: Path, lane: str) -> None:
    moments = random.Random(1)
    before = left_in(tmp_path)

    async def keep_pulling(uri: str, copy: Path) -> None:
        while True:
            with suppress(pagenet.SourceUnreachable, pagenet.SourceLost):
                async with pagenet.pull(uri, pagenet.IntoFile(copy)) as transfer:
                    await transfer.wait_complete()
            await trio.sleep(0.01)

    async def stop_one(index: int, number: signal.Signals) -> None:
        uri, copy = f"unix:{tmp_path}/{index}.sock", tmp_path / f"copy-{index}"
        async with (
            run(serve_command(source, "--listen", uri)) as server,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(keep_pulling, uri, copy)
            await stop_some_time(server, number, moments.uniform(0, 0.5))
            nursery.cancel_scope.cancel()
        copy.unlink(missing_ok=True)

    await at_once(stop_one)
    assert left_in(tmp_path) == before


@both_lanes
@pytest.mark.parametrize("into", ["--into", "--uffd-socket"])
async def test_pullers_stopped_at_any_moment(
    into: str, source: str, tmp_path: Path, uffd_permitted: None, lane: str
) -> None:
    moments = random.Random(into)
    before = left_in(tmp_path)

    async def stop_one(index: int, number: signal.Signals) -> None:
        path = tmp_path / f"{index}"
        async with (
            run(pull_command(server.uri, into, str(path), lane=lane)) as puller,
            run_workload(path, "--size", SIZE, "--zero-every", 4, "--wait-complete") as workload,
        ):
            await stop_some_time(
                puller, number, moments.uniform(0, 0.1 if number == signal.SIGINT else 0.6)
            )
            await workload.kill()
        if into == "--into":
            path.unlink(missing_ok=True)

    async with pagenet.serve(source, listen="tcp://127.0.0.1:0") as server:
        await at_once(stop_one)
    assert left_in(tmp_path) == before


# ---- its output is not read ----


async def test_reader_of_a_pullers_output_goes_away(
    source: str, tmp_path: Path, listing: Callable[[], list[str]], lane: str
) -> None:
    for as_json in (True, False):
        async with run_server(source) as (_, uri), run_relay(uri, MIB) as relay:
            command = pull_command(
                relay.uri, "--into", str(tmp_path / "copy"), lane=lane, as_json=as_json
            )
            async with run(command) as puller:
                await puller.line()
                await puller.close_stdout()
                assert await puller.wait_end() == 1
                assert puller.stderr == ""
        assert listing() == ["source"]


async def test_error_is_told_to_whoever_still_listens(
    source: str, tmp_path: Path, lane: str
) -> None:
    async with (
        run_server(source) as (server, uri),
        run(pull_command(uri, "--uffd-socket", str(tmp_path / "uffd.sock"), lane=lane)) as puller,
    ):
        await puller.event("waiting")
        await puller.close_stdout()
        await server.kill()
        assert await puller.wait_end() == 1
        (line,) = puller.stderr.splitlines()
        assert line.startswith("pagenet-pull: the source ")


async def test_reader_of_a_servers_output_goes_away(
    source: str, tmp_path: Path, listing: Callable[[], list[str]], lane: str
) -> None:
    for as_json in (True, False):
        command = serve_command(source, "--listen", f"unix:{tmp_path}/s.sock", as_json=as_json)
        async with run(command) as server:
            await server.line()
            await server.close_stdout()
            await ended(
                pull_command(f"unix:{tmp_path}/s.sock", "--into", str(tmp_path / "copy"), lane=lane)
            )
            assert await server.wait_end() == 1
            assert server.stderr == ""
        assert listing() == ["source"]


def closing(streams: str, command: Sequence[str]) -> list[str]:
    """``command`` without some of its standard streams."""
    return ["sh", "-c", f'exec "$@" {streams}', "sh", *command]


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize("as_json", [True, False])
async def test_without_standard_streams(
    streams: str, as_json: bool, source: str, tmp_path: Path, lane: str
) -> None:
    uri = f"unix:{tmp_path}/s.sock"
    async with run(
        closing(streams, serve_command(source, "--listen", uri, "--once", as_json=as_json))
    ) as server:
        while not (tmp_path / "s.sock").exists() and not server.has_ended:  # noqa: ASYNC110 - it says nothing
            await trio.sleep(0.01)
        into = ["--into", str(tmp_path / "copy")]
        code, output, errors = await ended(
            closing(streams, pull_command(uri, *into, lane=lane, as_json=as_json))
        )
        assert (code, errors) == (0, [])
        assert bool(output) == (">&-" not in streams.split())
        assert (await server.wait_end(), server.stderr) == (0, "")
    assert (tmp_path / "copy").read_bytes() == Path(source).read_bytes()


async def test_errors_do_not_stray_to_stdout(nowhere: str, tmp_path: Path, lane: str) -> None:
    command = pull_command(nowhere, "--into", str(tmp_path / "copy"), lane=lane, as_json=False)
    assert await ended(closing("2>&-", command)) == (3, [], [])


FAILING_BESIDE_A_SIGNAL = """
import os, signal, sys
from pagenet.cli._command import Report, run_command
from pagenet.errors import SourceLost

async def work():
    os.kill(os.getpid(), signal.SIGTERM)  # caught, but nobody has looked at it yet
    raise SourceLost("the source is gone")

sys.exit(run_command(work, Report("pagenet-pull", False, {})))
"""


def test_error_is_told_although_a_signal_comes() -> None:
    """A signal that comes while a command fails does not end it before it has said why."""
    command = [sys.executable, "-c", FAILING_BESIDE_A_SIGNAL]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stderr == "pagenet-pull: the source is gone\n"


@pytest.mark.parametrize("as_json", [True, False])
def test_a_line_is_one_write(as_json: bool) -> None:
    """A process that is killed between two writes would leave half a line to the next one."""

    class Counting(io.StringIO):
        writes = 0

        def write(self, text: str, /) -> int:
            self.writes += 1
            return super().write(text)

    stream = Counting()
    Report("pagenet-pull", as_json, {"waiting": "waiting"}, to=stream)("waiting")
    assert stream.writes == 1
    assert stream.getvalue().endswith("\n")
