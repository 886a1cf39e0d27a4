"""The source goes away in the middle and comes back: no owner loses a page, and nobody types a
word."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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

from pagenet.uffd import probe

SIZE = 32 << 20
#: slow enough that the source never has sent everything before it is killed
SLOWLY = ("--max-bandwidth", "20M")


@pytest.fixture(autouse=True)
def uffd_permitted() -> None:
    probe()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pattern(tmp_path_factory.mktemp("away") / "source", SIZE, zero_every=16))


@asynccontextmanager
async def filling(
    uri: str, directory: Path, lane: str, memory: str, *more: str
) -> AsyncIterator[tuple[Process, Process]]:
    """A pagenet-pull, and an owner without a map, as Firecracker is one."""
    socket = directory / "owner.sock"
    command = pull_command(uri, "--uffd-socket", str(socket), *SLOWLY, *more, lane=lane)
    async with run(command) as pulling:
        await pulling.event("waiting")
        options = ["--memory", memory, "--size", SIZE, "--zero-every", 16, "--threads", 4]
        touches = ["--touches", 2 * SIZE // PAGE, "--order", "random", "--wait-complete"]
        async with run_workload(socket, *options, *touches) as owner:
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
    async with run_server(source) as (first, uri):
        async with filling(uri, tmp_path, lane, memory) as (pulling, owner):
            serving = first
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
            memory = ["--memory", "memfd", "--size", SIZE, "--zero-every", 16]
            touches = ["--touches", 2 * SIZE // PAGE, "--order", "random", "--wait-complete"]
            async with run_workload(socket, *memory, *touches) as owner:
                await pulling.event("owner")
                yield pulling, owner, serving
