"""A destination is killed, and another takes over what it has left; a source that has lost its
destination dials it again."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from forked import Command, run_workload
from processes import write_pattern

import pagenet
from pagenet.cli.pull import main as pull
from pagenet.cli.serve import main as serve

MIB = 1 << 20
PAGE = 4096
SIZE = 2 * MIB
ZERO_EVERY = 7
LISTEN = "rdma://127.0.0.1:0"
SLOWLY = ("--max-bandwidth", MIB // 4, "--prefetch", "0,0")
#: The workload writes to its pages, which may not be undone. It gives up none: between reading of
#: such a page and recording it, which takes an emulated processor long, a kill has the page come
#: again (docs/design.md).
WORK = (
    "--touches",
    SIZE // PAGE // 2,
    "--order",
    "random",
    "--write-share",
    30,
    "--think-us",
    2000,
)


#: what is killed is not started again by itself
ALONE = ("--no-guard",)


@pytest.fixture
def source() -> Iterator[Path]:
    path = write_pattern(Path("/dev/shm/source"), SIZE, zero_every=ZERO_EVERY)
    yield path
    path.unlink()


def workload(path: Path, memory: str) -> Command:
    arguments = ("--size", SIZE, "--zero-every", ZERO_EVERY, "--keep-map", "--wait-complete", *WORK)
    return Command(run_workload, "--socket", path, "--memory", memory, *arguments)


def kill_half_way(pulling: Command, begun: float = 0.0) -> float:
    """Kill it when it has brought more than the share ``begun``, and return the share."""
    while (share := pulling.event("progress")["share"]) <= begun:
        pass
    assert share < 1
    pulling.kill()
    return float(share)


@pytest.mark.parametrize(
    ("memory", "lane", "next_lane"),
    [("memfd", "native", "trio"), ("anonymous", "trio", "native"), ("memfd", "native", "native")],
)
def test_killed_and_resumed(
    memory: str, lane: str, next_lane: str, source: Path, tmp_path: Path
) -> None:
    path = tmp_path / "uffd"
    with Command(serve, source, "--listen", LISTEN, "--json") as server:
        uri = server.event("listening")["uri"]
        begin = (uri, "--uffd-socket", path, "--json", "--lane", lane)
        with Command(pull, *begin, *SLOWLY, *ALONE) as first:
            first.event("waiting")
            with workload(path, memory) as owner:
                share = kill_half_way(first)
                resume = (uri, "--resume", owner.pid, "--json", "--lane", next_lane, *ALONE)
                with Command(pull, *resume, *SLOWLY) as second:
                    kill_half_way(second, share)
                with Command(pull, *resume) as third:
                    assert owner.event("verified")["bad"] == 0
                    assert third.wait() == 0
                    assert third.events[-1]["event"] == "complete"
                    assert third.events[-1]["pages"] == SIZE // PAGE


def serve_persistently(arguments: list[str]) -> int:
    """Does the part of ``pagenet-qemu migrate`` that serves pages."""

    async def run() -> None:
        async with pagenet.serve(arguments[0], connect=arguments[1]) as server:
            server.persist()
            await server.wait_complete()

    trio.run(run)
    return 0


def test_dialled_again(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "uffd"
    with socket.create_server(("127.0.0.1", 0)) as free:
        uri = f"rdma://127.0.0.1:{free.getsockname()[1]}"
    listening = (uri, "--listen", "--json", *ALONE)
    with Command(pull, *listening, "--uffd-socket", path, *SLOWLY) as first:
        first.event("listening")
        with Command(serve_persistently, source, uri) as server:
            first.event("waiting")
            with workload(path, "memfd") as owner:
                kill_half_way(first)
                with Command(pull, *listening, "--resume", owner.pid) as second:
                    assert owner.event("verified")["bad"] == 0
                    assert second.wait() == 0
                assert server.wait() == 0


@pytest.mark.parametrize("lane", ["native", "trio"])
def test_source_is_killed_and_started_again(lane: str, source: Path, tmp_path: Path) -> None:
    """The destination goes on by itself, with queue pairs and keys of the next source."""
    path = tmp_path / "uffd"
    with Command(serve, source, "--listen", LISTEN, "--json") as first:
        uri = first.event("listening")["uri"]
        begin = (uri, "--uffd-socket", path, "--json", "--lane", lane)
        with Command(pull, *begin, *SLOWLY, *ALONE) as pulling:
            pulling.event("waiting")
            with workload(path, "memfd") as owner:
                assert pulling.event("progress")["share"] < 1
                first.kill()
                pulling.event("disconnected")
                with Command(serve, source, "--listen", uri, "--json") as second:
                    pulling.event("reconnected")
                    assert owner.event("verified")["bad"] == 0
                    assert pulling.wait() == 0
                    second.event("complete")
