"""A region moves over RDMA, from every kind of source into every kind of memory, and every byte is
right."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from forked import Command, Server, forked_workload, run_workload
from processes import huge_pages, write_blocks, write_pattern

from pagenet import (
    IntoFile,
    RdmaTransport,
    Tls,
    TransferStatistics,
    UffdSocket,
    UsageError,
    _native,
    pull,
    serve,
)
from pagenet.certificates import make_certificates
from pagenet.cli.pull import main as pull_main
from pagenet.cli.serve import main as serve_main
from pagenet.rdma._constants import KEYS_IN_ANY_CASE
from pagenet.rdma._keys import NativeMemory
from pagenet.rdma._memory import RegisteredMemory
from pagenet.tcp import TcpTransport
from pagenet.testing import check_transport
from pagenet.transport import LaneKind

MIB = 1 << 20
PAGE = 4096
SIZE = 3 * MIB
LARGE = 9 * MIB
ZERO_EVERY = 7
LISTEN = "rdma://127.0.0.1:0"
LANES: list[LaneKind] = ["native", "trio"]


async def move(
    uri: str,
    path: Path,
    lane: LaneKind,
    *arguments: str | int,
    size: str | int = SIZE,
    **options: Any,
) -> TransferStatistics:
    """Move a region into a workload, which checks every byte after the last page has come."""
    owner = UffdSocket(path)
    await owner.listen()
    try:
        every = ("--wait-complete", "--zero-every", ZERO_EVERY, "--size", size)
        async with forked_workload(path, *every, *arguments) as workload:
            async with pull(uri, owner, lane=lane, **options) as transfer:
                await transfer.wait_complete()
            await workload.verified()
    finally:
        owner.close()
    statistics = transfer.statistics()
    assert statistics.complete
    return statistics


@pytest.fixture
def source(tmp_path: Path) -> Iterator[str]:
    path = Path("/dev/shm/source")
    yield str(write_pattern(path, SIZE, zero_every=ZERO_EVERY))
    path.unlink()


# One run is enough: in all that this checks, a connection of this transport is one of TCP, and the
# guest's time is better spent on pages.
async def test_conformance() -> None:
    await check_transport(RdmaTransport(TcpTransport()), lambda: LISTEN)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("memory", "placement"), [("anonymous", "copy"), ("memfd", "continue")])
async def test_touching_while_it_comes(
    memory: str, placement: str, lane: LaneKind, source: str, tmp_path: Path
) -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    async with serve(
        source, listen=LISTEN, on_event=lambda event, /, **fields: said.append((event, fields))
    ) as server:
        statistics = await move(
            server.uri, tmp_path / "uffd.sock", lane, "--memory", memory, "--threads", 4
        )
    assert statistics.placement == placement
    assert statistics.demand.pages
    assert ("path", {"path": "rxe0 port 1, gid 1 (10.77.0.1)"}) in said


@pytest.mark.parametrize("lane", LANES)
async def test_words_are_encrypted(lane: LaneKind, source: str, tmp_path: Path) -> None:
    make_certificates(tmp_path / "pki", ["127.0.0.1"])
    directory = tmp_path / "pki" / "127.0.0.1"
    with pytest.raises(UsageError, match="--plaintext-pages"):
        async with serve(source, listen=LISTEN, tls=Tls(directory)):
            raise AssertionError("not reached")
    tls = Tls(directory, plaintext_pages=True)
    async with serve(source, listen=LISTEN, tls=tls) as server:
        await move(server.uri, tmp_path / "uffd.sock", lane, tls=tls)


async def test_zero_pages_are_not_read(source: str, tmp_path: Path) -> None:
    async with serve(source, listen=LISTEN) as server:
        statistics = await move(
            server.uri, tmp_path / "uffd.sock", "native", "--order", "none", prefetch=(0, 0)
        )
    content = Path(source).read_bytes()
    zero = sum(not any(content[at : at + PAGE]) for at in range(0, SIZE, PAGE))
    assert zero
    assert statistics.zero_pages == zero
    assert statistics.wire_bytes == SIZE - zero * PAGE


async def test_huge_pages(source: str, tmp_path: Path) -> None:
    with huge_pages(4):
        path = write_pattern(Path("/dev/shm/huge"), 4 * MIB, zero_every=ZERO_EVERY)
        try:
            async with serve(str(path), listen=LISTEN) as server:
                await move(
                    server.uri,
                    tmp_path / "uffd.sock",
                    "native",
                    "--memory",
                    "hugetlb",
                    size=4 * MIB,
                )
        finally:
            path.unlink()


@pytest.mark.parametrize("memory", ["anonymous", "memfd"])
async def test_written_and_given_up_while_it_comes(
    memory: str, source: str, tmp_path: Path
) -> None:
    async with serve(source, listen=LISTEN) as server:
        arguments = ("--memory", memory, "--write-share", 30, "--remove-share", 10, "--threads", 4)
        await move(server.uri, tmp_path / "uffd.sock", "native", *arguments)


@pytest.mark.parametrize("lane", LANES)
async def test_blocks_that_end_within_a_chunk(lane: LaneKind, tmp_path: Path) -> None:
    sizes = [MIB + PAGE, PAGE, 300 << 10]
    # on a disk: registered as a copy, before Linux 6.2
    paths = write_blocks(tmp_path, sizes, zero_every=ZERO_EVERY)
    async with serve(paths, listen=LISTEN) as server:
        await move(server.uri, tmp_path / "uffd.sock", lane, size=",".join(map(str, sizes)))


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Sources in another process: its memfd, and a range of its addresses."""
    script = """if True:
        import ctypes, mmap, os, sys
        with open(sys.argv[1], "rb") as file:
            content = file.read()
        fd = os.memfd_create("source")
        os.write(fd, content)
        memory = mmap.mmap(-1, len(content), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = content
        print(fd, ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
        sys.stdin.read()"""
    pattern = write_pattern(tmp_path / "pattern", MIB + 8 * PAGE, zero_every=ZERO_EVERY)
    command = ["/usr/bin/python3", "-c", script, str(pattern)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        fd, address = map(int, process.stdout.readline().split())
        yield (
            f"/proc/{process.pid}/fd/{fd}",
            f"pid:{process.pid}:{address:#x}+{pattern.stat().st_size:#x}",
        )
        process.communicate()


@pytest.mark.parametrize("kind", [0, 1])
async def test_source_in_another_process(
    kind: int, holder: tuple[str, str], tmp_path: Path
) -> None:
    async with serve(holder[kind], listen=LISTEN) as server:
        await move(server.uri, tmp_path / "uffd.sock", "native", size=MIB + 8 * PAGE)


async def test_into_a_file(source: str, tmp_path: Path) -> None:
    async with (
        serve(source, listen=LISTEN) as server,
        pull(server.uri, IntoFile(tmp_path / "copy")) as transfer,
    ):
        await transfer.wait_complete()
    assert (tmp_path / "copy").read_bytes() == Path(source).read_bytes()


async def test_source_that_dials(source: str, tmp_path: Path) -> None:
    uris: list[str] = []
    listening = trio.Event()

    def on_event(event: str, /, **fields: Any) -> None:
        if event == "listening":
            uris.append(fields["uri"])
            listening.set()

    async def serve_it() -> None:
        await listening.wait()
        async with serve(source, connect=uris[0]) as server:
            await server.wait_complete()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_it)
        await move(LISTEN, tmp_path / "uffd.sock", "native", listen=True, on_event=on_event)


@pytest.mark.parametrize("lane", LANES)
async def test_no_more_is_pinned_than_allowed(
    lane: LaneKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[int] = []
    take = RegisteredMemory.take

    async def taking(self: RegisteredMemory, *args: Any) -> tuple[bytes, bool]:
        answer = await take(self, *args)
        pinned.append(self.pinned)
        return answer

    monkeypatch.setattr(RegisteredMemory, "take", taking)
    path = write_pattern(tmp_path / "large", LARGE, zero_every=ZERO_EVERY)
    async with serve(str(path), listen=LISTEN, rdma_pin_limit=MIB, lane="trio") as server:
        await move(
            server.uri,
            tmp_path / "uffd.sock",
            lane,
            "--order",
            "random",
            "--threads",
            4,
            size=LARGE,
        )
    connections = 1 if lane == "native" else 2
    assert max(pinned) <= connections * KEYS_IN_ANY_CASE * MIB < LARGE


async def test_no_more_is_pinned_than_allowed_in_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories: list[NativeMemory] = []
    make = NativeMemory.__init__

    def making(self: NativeMemory, *args: Any) -> None:
        make(self, *args)
        memories.append(self)

    monkeypatch.setattr(NativeMemory, "__init__", making)
    path = write_pattern(Path("/dev/shm/large"), LARGE, zero_every=ZERO_EVERY)
    most = 0
    async with (
        serve(str(path), listen=LISTEN, rdma_pin_limit=MIB) as server,
        trio.open_nursery() as nursery,
    ):

        async def look() -> None:
            nonlocal most
            while True:
                most = max(most, *(memory.pinned for memory in memories), 0)
                await trio.sleep(0.002)

        nursery.start_soon(look)
        await move(
            server.uri,
            tmp_path / "uffd.sock",
            "native",
            "--order",
            "random",
            "--threads",
            4,
            size=LARGE,
        )
        nursery.cancel_scope.cancel()
    [memory] = memories
    path.unlink()
    assert 0 < most <= KEYS_IN_ANY_CASE * MIB < LARGE
    assert memory.pinned == 0


# ---- a source that is a process of its own ----


@pytest.fixture
def server(source: str) -> Iterator[Server]:
    server = Server(source)
    yield server
    server.close()


async def test_stopped_source(server: Server, tmp_path: Path) -> None:
    """Its processor takes no part: once the keys are given out, pages come while the source is
    stopped."""
    owner = UffdSocket(tmp_path / "uffd.sock")
    await owner.listen()
    arguments = ("--wait-complete", "--zero-every", ZERO_EVERY, "--size", SIZE, "--order", "none")
    async with forked_workload(tmp_path / "uffd.sock", *arguments) as workload:
        async with pull(server.uri, owner, max_bandwidth=MIB) as transfer:
            while transfer.statistics().done < MIB // 2 // PAGE:  # noqa: ASYNC110 - nothing tells of single pages
                await trio.sleep(0.01)
            server.kill(signal.SIGSTOP)
            assert transfer.statistics().done < SIZE // PAGE
            transfer.set_max_bandwidth(None)
            await transfer.wait_complete()
        await workload.verified()
    owner.close()


def test_commands(source: str, tmp_path: Path) -> None:
    socket = tmp_path / "uffd.sock"
    with Command(
        serve_main, source, "--listen", LISTEN, "--once", "--rdma-pin-limit", "2M", "--json"
    ) as server:
        uri = server.event("listening")["uri"]
        with Command(pull_main, uri, "--uffd-socket", socket, "--json") as puller:
            puller.event("waiting")
            arguments = ("--wait-complete", "--zero-every", ZERO_EVERY, "--size", SIZE)
            with Command(run_workload, "--socket", socket, *arguments) as workload:
                assert puller.event("owner")["lane"] == "rdma by rxe0 port 1, gid 1 (10.77.0.1)"
                assert workload.event("verified")["bad"] == 0
            assert puller.wait() == 0
        assert server.wait() == 0


# ---- a bad network ----


@pytest.fixture
def bad_wire() -> Iterator[None]:
    """Two devices, joined by a wire that delays every packet by 5 ms, and loses one packet in a
    hundred."""
    script = Path(__file__).with_name("wire.sh")
    subprocess.run(["sh", script, "up"], check=True)
    yield
    subprocess.run(["sh", script, "down"], check=True)


@pytest.fixture
def spun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often each loop in C has looked for the end of a READ before it slept."""
    found: list[int] = []
    run = _native.RdmaLoop.run

    def running(self: _native.RdmaLoop, sock: int, tls: _native.Tls | None = None) -> _native.End:
        end = run(self, sock, tls)
        found.append(self.spun)
        return end

    monkeypatch.setattr(_native.RdmaLoop, "run", running)
    return found


async def test_packets_are_late_and_lost(
    bad_wire: None, source: str, tmp_path: Path, spun: list[int]
) -> None:
    """With processors to spare, a loop looks for the end of a READ before it sleeps:
    tests/rdma/test_rdma.py runs this with four too."""
    async with serve(source, listen="rdma://10.88.0.1:0?device=rxea", plaintext=True) as server:
        before = sent_over_wire()
        statistics = await move(
            f"{server.uri}?device=rxeb", tmp_path / "uffd.sock", "native", "--threads", 4
        )
    assert sent_over_wire() - before > statistics.wire_bytes
    assert [bool(times) for times in spun] == [os.sysconf("SC_NPROCESSORS_ONLN") >= 4]


def sent_over_wire() -> int:
    return int(Path("/sys/class/net/va/statistics/tx_bytes").read_text())
