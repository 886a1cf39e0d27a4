"""The source goes away in the middle and comes back: no owner loses a page, and nobody types a
word."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

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

from pagenet.control import connect_control
from pagenet.uffd import probe

SIZE = 32 << 20
#: slow enough that the source never has sent everything before it is killed
SLOWLY = ("--max-bandwidth", "20M")
TOUCHES: tuple[str | int, ...] = ("--touches", 2 * SIZE // PAGE, "--wait-complete")
#: four threads touch at most 16 MB in a second
RARELY = ("--touches", SIZE // PAGE // 4, "--think-us", 1000, "--wait-complete")


@pytest.fixture(autouse=True)
def uffd_permitted() -> None:
    probe()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pattern(tmp_path_factory.mktemp("away") / "source", SIZE, zero_every=16))


def run_owner(socket: Path, memory: str, *more: str | int) -> AbstractAsyncContextManager[Process]:
    """An owner that touches its pages in a random order."""
    what = ["--memory", memory, "--size", str(SIZE), "--zero-every", "16", "--order", "random"]
    return run_workload(socket, *what, *more)


@asynccontextmanager
async def filling(
    uri: str,
    directory: Path,
    lane: str,
    memory: str,
    *more: str,
    touches: Sequence[str | int] = TOUCHES,
) -> AsyncIterator[tuple[Process, Process]]:
    """A pagenet-pull, and an owner without a map, as Firecracker is one."""
    socket = directory / "owner.sock"
    command = pull_command(uri, "--uffd-socket", str(socket), *SLOWLY, *more, lane=lane)
    async with run(command) as pulling:
        await pulling.event("waiting")
        async with run_owner(socket, memory, *touches, "--threads", 4) as owner:
            await pulling.event("owner")
            yield pulling, owner


async def completes(pulling: Process, owner: Process) -> None:
    await check_verified(owner)
    await pulling.event("complete")
    assert await pulling.wait() == 0, pulling.stderr


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("memory", ["anonymous", "memfd"])
async def test_source_is_killed_and_started_again(
    memory: str, lane: str, source: str, tmp_path: Path
) -> None:
    async with (
        run_server(source) as (serving, uri),
        filling(uri, tmp_path, lane, memory) as (pulling, owner),
    ):
        for _ in range(3):
            await serving.kill()
            away = await pulling.event("disconnected")
            assert "the source" in away["reason"]
            await wait_in_faults(owner.pid, 4)
            async with run(serve_command(source, "--listen", uri)) as serving:
                assert (await pulling.event("reconnected"))["seconds"] > 0
                await serving.event("connected")
                await trio.sleep(0.05)
        async with run_server(source, listen=uri):
            await completes(pulling, owner)


@pytest.mark.parametrize("lane", LANES)
async def test_source_that_dials(lane: str, source: str, tmp_path: Path) -> None:
    """The destination listens again, and another source process dials it."""
    uri = f"unix:{tmp_path / 'destination.sock'}"
    async with filling_listener(source, uri, tmp_path, lane) as (pulling, owner, serving):
        await serving.kill()
        await pulling.event("disconnected")
        async with run(serve_command(source, "--connect", uri)) as again:
            await pulling.event("reconnected")
            await completes(pulling, owner)
            assert await again.wait() == 0


@asynccontextmanager
async def filling_listener(
    source: str, uri: str, directory: Path, lane: str
) -> AsyncIterator[tuple[Process, Process, Process]]:
    """The two of :func:`filling`, where the source dials, and that source."""
    socket = directory / "owner.sock"
    options = ["--listen", "--uffd-socket", str(socket), *SLOWLY]
    async with run(pull_command(uri, *options, lane=lane)) as pulling:
        await pulling.event("listening")
        async with run(serve_command(source, "--connect", uri)) as serving:
            await pulling.event("waiting")
            async with run_owner(socket, "memfd", *TOUCHES) as owner:
                await pulling.event("owner")
                yield pulling, owner, serving


@pytest.mark.parametrize("lane", LANES)
async def test_connections_are_reset(lane: str, source: str, tmp_path: Path) -> None:
    """As by a firewall that forgets them. Each time at another moment of the transfer."""
    async with (
        run_server(source) as (_, uri),
        run_relay(uri, hold_after=1 << 40) as relay,
        filling(relay.uri, tmp_path, lane, "memfd", touches=RARELY) as (pulling, owner),
    ):
        for _ in range(5):
            await trio.sleep(0.1)
            await relay.cut()
            await pulling.event("disconnected")
            await pulling.event("reconnected")
        await completes(pulling, owner)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("schedule", ["hot", "follow", "linear"])
async def test_untouched_pages_come_too(
    schedule: str, lane: str, source: str, tmp_path: Path
) -> None:
    """No thread touches them: the background asks again for what it had asked for, and goes on."""
    more = ("--background", schedule)
    untouched = ("--order", "none", "--wait-complete")
    async with (
        run_server(source) as (_, uri),
        run_relay(uri, hold_after=1 << 40) as relay,
        filling(relay.uri, tmp_path, lane, "memfd", *more, touches=untouched) as (pulling, owner),
    ):
        for _ in range(3):
            await trio.sleep(0.1)
            await relay.cut()
            await pulling.event("disconnected")
            await pulling.event("reconnected")
        await completes(pulling, owner)


async def test_another_source_is_no_source(source: str, tmp_path: Path) -> None:
    """It listens where the lost one did, and has other pages. The right one is waited for."""
    other = str(write_pattern(tmp_path / "other", SIZE))
    control = tmp_path / "ctl"
    async with (
        run_server(source) as (serving, uri),
        filling(uri, tmp_path, "native", "memfd", "--control", str(control)) as (pulling, owner),
        connect_control(control) as client,
    ):
        assert (await client.command("status"))["disconnected"] is None
        await serving.kill()
        await pulling.event("disconnected")
        async with run_server(other, listen=uri) as (wrong, _):
            left = await wrong.event("lost")
            assert "another source answers" in left["reason"]
            status = await client.command("status")
            assert status["state"] == "disconnected"
            assert "another source answers" in status["disconnected"]["reason"]
            assert status["disconnected"]["seconds"] > 0
        async with run_server(source, listen=uri):
            await pulling.event("reconnected")
            assert (await client.command("status"))["reconnected"] == 1
            await completes(pulling, owner)


async def test_given_up(source: str, tmp_path: Path) -> None:
    """It ends, and tells exactly which pages are missing."""
    control, missing = tmp_path / "ctl", tmp_path / "missing"
    options = ("--control", str(control), "--missing", str(missing))
    async with (
        run_server(source) as (serving, uri),
        filling(uri, tmp_path, "native", "memfd", *options) as (pulling, _),
        connect_control(control) as client,
    ):
        await serving.kill()
        await pulling.event("disconnected")
        resident = (await client.command("status"))["pages_resident"]
        await client.command("give-up")
        told = await pulling.event("missing")
        assert await pulling.wait() == 4
        assert "told to give up" in pulling.stderr
        assert pulling.stderr.count("\n") == 1
    assert told["pages"] == SIZE // PAGE - resident
    written = json.loads(missing.read_text())
    assert written == {"blocks": [["source", SIZE, PAGE]], "missing": told["runs"]}
    assert sum(count for _, _, count in told["runs"]) == told["pages"]
    assert all(name == "source" and first >= 0 for name, first, _ in told["runs"])


@pytest.mark.parametrize(("seconds", "says"), [("0", "the source"), ("0.7", "within 0.7 s")])
async def test_limit(seconds: str, says: str, source: str, tmp_path: Path) -> None:
    async with (
        run_server(source) as (serving, uri),
        filling(uri, tmp_path, "native", "memfd", "--reconnect-for", seconds) as (pulling, _),
    ):
        await serving.kill()
        assert await pulling.wait() == 4
        assert says in pulling.stderr
        assert pulling.stderr.count("\n") == 1


async def test_owner_that_ends_while_the_source_is_away(source: str, tmp_path: Path) -> None:
    async with (
        run_server(source) as (serving, uri),
        filling(uri, tmp_path, "native", "memfd") as (pulling, owner),
    ):
        await serving.kill()
        await pulling.event("disconnected")
        await owner.kill()
        assert await pulling.wait() == 5
        assert "the owner of the memory is gone" in pulling.stderr


@pytest.mark.parametrize("lane", LANES)
async def test_owner_gives_memory_up_while_the_source_is_away(
    lane: str, source: str, tmp_path: Path
) -> None:
    """It does not wait for the source, and what it gave up reads as zeros."""
    socket = tmp_path / "owner.sock"
    async with run_server(source) as (serving, uri):
        command = pull_command(uri, "--uffd-socket", str(socket), "--background", "off", lane=lane)
        async with run(command) as pulling:
            await pulling.event("waiting")
            removes: list[str | int] = ["--touches", SIZE // PAGE, "--remove-share", 30]
            async with run_owner(socket, "memfd", "--keep-map", *removes) as owner:
                await pulling.event("owner")
                for _ in range(3):
                    await trio.sleep(0.1)
                    await serving.kill()
                    await pulling.event("disconnected")
                    await trio.sleep(0.1)
                    async with run(serve_command(source, "--listen", uri)) as serving:
                        await pulling.event("reconnected")
                async with run_server(source, listen=uri):
                    await check_verified(owner)


async def test_a_stopped_source_is_followed_by_nobody(source: str, tmp_path: Path) -> None:
    """Its kernel answers a dial, and it does not: it is waited for until it goes on."""
    async with (
        run_server(source) as (serving, uri),
        filling(uri, tmp_path, "native", "memfd") as (pulling, owner),
    ):
        serving.send_signal(signal.SIGSTOP)
        away = await pulling.event("disconnected")
        assert "has sent nothing for 10 s" in away["reason"]
        serving.send_signal(signal.SIGCONT)
        await pulling.event("reconnected")
        await completes(pulling, owner)
