"""A region moves: real sources, real userfaultfds, real owners that check every byte that they
get."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from pagenet._pagenet import ffi
from processes import (
    HUGE_PAGE,
    PAGE,
    Event,
    Process,
    check_verified,
    huge_pages,
    pull,
    pull_command,
    run,
    run_relay,
    run_server,
    run_workload,
    serve_command,
    stop_process,
    threads_in_faults,
    wait_in_faults,
    write_blocks,
    write_pattern,
)

from pagenet import (
    IntoFile,
    OwnMemory,
    Server,
    TransferStatistics,
    UffdSocket,
    UsageError,
    _native,
    register,
    serve,
)
from pagenet.background.pacing import CHUNK_BYTES
from pagenet.session import receive_exactly
from pagenet.testing import MemoryTransport
from pagenet.transport import Connection
from pagenet.uffd import Mode, Userfaultfd

pytestmark = pytest.mark.usefixtures("uffd_permitted")

KIB, MIB = 1 << 10, 1 << 20
SIZE = 2 * MIB
ZERO_EVERY = 7
TRANSPORTS = ["tcp", "tcp far", "unix", "memory"]
MEMORIES = ["anonymous", "memfd", "tmpfs", "hugetlb"]


@pytest.fixture
def address(tmp_path: Path) -> Callable[[str], str]:
    """Where to listen, by the transport's name."""
    register("memory", MemoryTransport())
    return {
        "tcp": "tcp://127.0.0.1:0",
        # dialled from 127.0.0.1: by its address, another host
        "tcp far": "tcp://127.0.0.2:0",
        "unix": f"unix:{tmp_path}/source.sock",
        "memory": "memory://",
    }.__getitem__


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_pattern(tmp_path / "source", SIZE, zero_every=ZERO_EVERY))


def huge_if(memory: str, count: int) -> Any:
    return huge_pages(count) if memory == "hugetlb" else nullcontext()


async def move(
    uri: str,
    path: Path,
    lane: str,
    *arguments: str | int,
    zero_every: int = ZERO_EVERY,
    allocate: bool = False,
    **options: Any,
) -> tuple[Event, TransferStatistics]:
    """Move a region into a workload, which checks every byte after the last page has come."""
    owner = UffdSocket(path, allocate=allocate)
    await owner.listen()
    try:
        async with run_workload(
            path, "--wait-complete", "--zero-every", zero_every, *arguments
        ) as workload:
            async with pull(uri, owner, lane=lane, **options) as transfer:
                await transfer.wait_complete()
            return await check_verified(workload), transfer.statistics()
    finally:
        owner.close()


def check_complete(statistics: TransferStatistics, pages: int) -> None:
    assert statistics.complete
    assert statistics.pages == pages
    classes = (statistics.demand, statistics.prefetch, statistics.background)
    assert sum(class_.pages for class_ in classes) == pages, (
        "a page was placed twice, or not at all"
    )
    assert statistics.fault_latency.count <= statistics.demand.faults


# ---- orders, threads, transports ----

# Every order with every number of threads; each order, and each number, with each transport at
# least once.
TOUCHING = [
    (order, threads, transport)
    for i, order in enumerate(["random", "sequential", "strided", "zipf"])
    for j, threads in enumerate([1, 2, 8])
    for k, transport in enumerate(TRANSPORTS)
    if transport == "tcp" or (i + j + k) % 3 == 0
]


@pytest.mark.parametrize(("order", "threads", "transport"), TOUCHING)
async def test_touching_while_it_comes(
    order: str,
    threads: int,
    transport: str,
    source: str,
    address: Callable[[str], str],
    tmp_path: Path,
    lane: str,
) -> None:
    async with serve(source, listen=address(transport)) as server:
        _, statistics = await move(
            server.uri,
            tmp_path / "uffd.sock",
            lane,
            "--size",
            SIZE,
            "--order",
            order,
            "--threads",
            threads,
        )
    check_complete(statistics, SIZE // PAGE)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_touched_pages_alone(
    transport: str, source: str, address: Callable[[str], str], tmp_path: Path, lane: str
) -> None:
    async with serve(source, listen=address(transport)) as server:
        arguments = ("--size", SIZE, "--order", "random", "--threads", 8)
        verified, statistics = await move(
            server.uri, tmp_path / "uffd.sock", lane, *arguments, background="off"
        )
    check_complete(statistics, SIZE // PAGE)
    assert (
        statistics.demand.pages == statistics.demand.requests == verified["touches"] == SIZE // PAGE
    )
    assert statistics.background.requests == 0
    assert statistics.fault_latency.count == SIZE // PAGE


async def test_sixty_four_faults_outstanding(source: str, tmp_path: Path, lane: str) -> None:
    path = tmp_path / "uffd.sock"
    owner = UffdSocket(path)
    await owner.listen()
    arguments = (
        "--size",
        SIZE,
        "--order",
        "random",
        "--threads",
        64,
        "--zero-every",
        ZERO_EVERY,
        "--wait-complete",
    )
    async with (
        run_server(source) as (_, uri),
        run_relay(uri, 2048) as relay,  # hellos get through, and no page
        run_workload(path, *arguments) as workload,
        pull(relay.uri, owner, lane=lane, background="off") as transfer,
    ):
        await wait_in_faults(workload.pid, 64)
        while transfer.statistics().demand.faults < 64:  # noqa: ASYNC110
            await trio.sleep(0.01)
        assert transfer.statistics().demand.requests == 64
        assert transfer.statistics().done == 0
        relay.release()
        await transfer.wait_complete()
        await check_verified(workload)
    owner.close()


# ---- sizes ----

SIZES = {
    "one page": [PAGE],
    "two pages": [2 * PAGE],
    "a background chunk and a page": [CHUNK_BYTES + PAGE],
    "one page and one block": [PAGE, MIB],
    "three odd blocks": [12 * KIB, MIB + 20 * KIB, 4 * KIB],
    "many blocks": [PAGE * pages for pages in range(1, 20)],
}


@pytest.mark.parametrize("background", ["linear", "off"])
@pytest.mark.parametrize("memory", ["anonymous", "memfd"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
async def test_sizes(
    sizes: list[int], memory: str, background: str, tmp_path: Path, lane: str
) -> None:
    """Each block has its own mapping, at addresses that are not in the blocks' order."""
    sources = write_blocks(tmp_path, sizes, zero_every=ZERO_EVERY)
    arguments = (
        "--size",
        ",".join(map(str, sizes)),
        "--memory",
        memory,
        "--order",
        "random",
        "--threads",
        3,
    )
    async with serve(sources, listen=f"unix:{tmp_path}/source.sock") as server:
        _, statistics = await move(
            server.uri, tmp_path / "uffd.sock", lane, *arguments, background=background
        )
    check_complete(statistics, sum(sizes) // PAGE)


@pytest.mark.parametrize(("blocks", "mappings"), [
    ([20 * KIB], [12 * KIB, 8 * KIB]),  # a block in two mappings
    ([12 * KIB, 8 * KIB], [20 * KIB]),  # a mapping of two blocks
    ([12 * KIB, 8 * KIB, 4 * KIB], [4 * KIB, 12 * KIB, 8 * KIB]),
    ([400 * KIB, 400 * KIB], [200 * KIB, 400 * KIB, 200 * KIB]),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("memory", ["anonymous", "memfd"])
async def test_mappings_that_are_not_blocks(
    blocks: list[int], mappings: list[int], memory: str, tmp_path: Path, lane: str
) -> None:
    sources = write_blocks(tmp_path, blocks, zero_every=ZERO_EVERY)
    arguments = ("--size", ",".join(map(str, mappings)), "--memory", memory, "--order", "random")
    async with serve(sources, listen=f"unix:{tmp_path}/source.sock") as server:
        _, statistics = await move(server.uri, tmp_path / "uffd.sock", lane, *arguments)
    check_complete(statistics, sum(blocks) // PAGE)


async def test_owner_that_maps_a_part(source: str, tmp_path: Path, lane: str) -> None:
    async with serve(source, listen=f"unix:{tmp_path}/source.sock") as server:
        _, statistics = await move(server.uri, tmp_path / "uffd.sock", lane, "--size", SIZE // 2)
    check_complete(statistics, SIZE // 2 // PAGE)


async def test_four_gib_of_zeros_but_for_some_pages(tmp_path: Path, lane: str) -> None:
    """Zeros take no memory on either side. Pages on both sides of 2 and 4 GiB show a number that
    was truncated."""
    pages = (4 << 30) // PAGE + 3
    written = [
        0,
        1,
        1000,
        (2 << 30) // PAGE - 1,
        (2 << 30) // PAGE,
        (4 << 30) // PAGE - 1,
        (4 << 30) // PAGE,
        pages - 1,
    ]
    path = tmp_path / "source"
    path.touch()
    os.truncate(path, pages * PAGE)
    write_pages(path, written)
    memory = OwnMemory()
    async with serve(str(path), listen=f"unix:{tmp_path}/source.sock") as server:
        async with pull(server.uri, memory, lane=lane) as transfer:
            await transfer.wait_complete()
        statistics = transfer.statistics()
        check_complete(statistics, pages)
        assert statistics.zero_pages >= pages - len(written) * CHUNK_BYTES // PAGE
        assert statistics.wire_bytes < 16 * MIB
        assert await trio.to_thread.run_sync(nonzero_pages, memory.address, pages) == written
        for page in written:
            assert await memory.read(page * PAGE, PAGE) == content_of(page)
    memory.close()


def content_of(page: int) -> bytes:
    return (page + 1).to_bytes(8, "little") * (PAGE // 8)


def write_pages(path: Path, pages: list[int]) -> None:
    with open(path, "r+b") as file:
        for page in pages:
            file.seek(page * PAGE)
            file.write(content_of(page))


def nonzero_pages(address: int, pages: int) -> list[int]:
    """The pages that are not zero, in memory that is all resident."""
    memory = memoryview(ffi.buffer(ffi.cast("char *", address), pages * PAGE))
    found: list[int] = []
    first = 0
    while first < pages:
        count, zero = _native.leading_alike(memory[first * PAGE :], pages - first, PAGE)
        found += [] if zero else range(first, first + count)
        first += count
    return found


async def test_zeros_travel_as_a_flag(tmp_path: Path, lane: str) -> None:
    source = str(write_pattern(tmp_path / "source", SIZE, zero_every=1))  # written: no holes
    async with serve(source, listen=f"unix:{tmp_path}/source.sock") as server:
        arguments = ("--size", SIZE, "--memory", "memfd")
        _, statistics = await move(
            server.uri, tmp_path / "uffd.sock", lane, *arguments, zero_every=1
        )
    check_complete(statistics, SIZE // PAGE)
    assert statistics.zero_pages == SIZE // PAGE
    assert statistics.wire_bytes < SIZE // 64


# ---- owners ----

PLACEMENTS = {"anonymous": "copy", "memfd": "continue", "tmpfs": "continue", "hugetlb": "continue"}


@pytest.mark.parametrize("background", ["linear", "off"])
@pytest.mark.parametrize("memory", MEMORIES)
async def test_owners(memory: str, background: str, tmp_path: Path, lane: str) -> None:
    size = 8 * HUGE_PAGE if memory == "hugetlb" else SIZE
    source = str(write_pattern(tmp_path / "source", size, zero_every=ZERO_EVERY))
    arguments = ("--size", size, "--memory", memory, "--order", "random", "--threads", 4)
    with huge_if(memory, 9):
        async with serve(source, listen="tcp://127.0.0.1:0") as server:
            _, statistics = await move(
                server.uri, tmp_path / "uffd.sock", lane, *arguments, background=background
            )
    check_complete(statistics, size // (HUGE_PAGE if memory == "hugetlb" else PAGE))
    assert statistics.placement == PLACEMENTS[memory]


@pytest.mark.parametrize("memory", ["memfd", "hugetlb"])
async def test_shared_memory_that_is_registered_for_missing_alone(
    memory: str, tmp_path: Path, lane: str
) -> None:
    """Firecracker registers it so; pagenet registers it again."""
    size = 8 * HUGE_PAGE if memory == "hugetlb" else SIZE
    source = str(write_pattern(tmp_path / "source", size, zero_every=ZERO_EVERY))
    with huge_if(memory, 9):
        async with serve(source, listen="tcp://127.0.0.1:0") as server:
            arguments = (
                "--size",
                size,
                "--memory",
                memory,
                "--register",
                "missing",
                "--order",
                "random",
            )
            await move(server.uri, tmp_path / "uffd.sock", lane, *arguments)


@pytest.mark.parametrize("background", ["linear", "off"])
@pytest.mark.parametrize("memory", MEMORIES)
async def test_owner_that_writes(memory: str, background: str, tmp_path: Path, lane: str) -> None:
    """A page that is placed late, or twice, would undo a write."""
    size = 8 * HUGE_PAGE if memory == "hugetlb" else SIZE
    source = str(write_pattern(tmp_path / "source", size, zero_every=ZERO_EVERY))
    arguments = (
        "--size",
        size,
        "--memory",
        memory,
        "--order",
        "random",
        "--threads",
        8,
        "--touches",
        20_000,
    )
    with huge_if(memory, 9):
        async with serve(source, listen="tcp://127.0.0.1:0") as server:
            verified, _ = await move(
                server.uri,
                tmp_path / "uffd.sock",
                lane,
                *arguments,
                "--write-share",
                60,
                background=background,
            )
    assert verified["touches"] == 20_000


@pytest.mark.parametrize("memory", MEMORIES)
async def test_owner_that_writes_and_removes(memory: str, tmp_path: Path, lane: str) -> None:
    size = 16 * HUGE_PAGE if memory == "hugetlb" else SIZE
    source = str(write_pattern(tmp_path / "source", size, zero_every=ZERO_EVERY))
    arguments = (
        "--size",
        size,
        "--memory",
        memory,
        "--order",
        "zipf",
        "--threads",
        8,
        "--touches",
        10_000,
    )
    with huge_if(memory, 17):
        async with serve(source, listen="tcp://127.0.0.1:0") as server:
            verified, statistics = await move(
                server.uri,
                tmp_path / "uffd.sock",
                lane,
                *arguments,
                "--write-share",
                40,
                "--remove-share",
                30,
            )
    assert verified["removed"] > 0
    assert statistics.complete


@pytest.mark.parametrize("memory", MEMORIES)
async def test_owner_whose_memory_is_allocated_first(
    memory: str, tmp_path: Path, lane: str
) -> None:
    size = 8 * HUGE_PAGE if memory == "hugetlb" else SIZE
    source = str(write_pattern(tmp_path / "source", size, zero_every=ZERO_EVERY))
    arguments = (
        "--size",
        size,
        "--memory",
        memory,
        "--order",
        "random",
        "--threads",
        8,
        "--touches",
        20_000,
    )
    with huge_if(memory, 9):
        async with serve(source, listen="tcp://127.0.0.1:0") as server:
            await move(
                server.uri,
                tmp_path / "uffd.sock",
                lane,
                *arguments,
                "--write-share",
                60,
                allocate=True,
            )


async def test_allocated_before_the_first_page(source: str, tmp_path: Path, lane: str) -> None:
    path = tmp_path / "uffd.sock"
    owner = UffdSocket(path, allocate=True)
    await owner.listen()
    async with (
        serve(source, listen="tcp://127.0.0.1:0") as server,
        run_workload(
            path, "--size", SIZE, "--memory", "memfd", "--zero-every", ZERO_EVERY, "--wait-complete"
        ) as workload,
        pull(server.uri, owner, lane=lane, held=True) as transfer,
    ):
        (memory,) = (
            entry
            for entry in Path(f"/proc/{workload.pid}/fd").iterdir()
            if "pagenet-workload" in os.readlink(entry)
        )
        assert memory.stat().st_blocks * 512 == SIZE
        assert transfer.statistics().done == 0
        transfer.release()
        await transfer.wait_complete()
        await check_verified(workload)
    owner.close()


# ---- more than one background lane ----


@pytest.mark.parametrize("listens", ["source", "destination"])
@pytest.mark.parametrize("memory", ["anonymous", "memfd"])
async def test_background_lanes(
    memory: str, listens: str, source: str, tmp_path: Path, lane: str
) -> None:
    owner = UffdSocket(tmp_path / "uffd.sock")
    await owner.listen()
    arguments = (
        "--wait-complete",
        "--zero-every",
        ZERO_EVERY,
        "--size",
        SIZE,
        "--memory",
        memory,
        "--order",
        "random",
    )
    uri = f"unix:{tmp_path / 'source.sock'}"
    options: dict[str, Any] = {
        "background_lanes": 5,
        "chunk": 64 << 10,
        "lane": lane,
        "listen": listens == "destination",
    }
    try:
        async with run_workload(tmp_path / "uffd.sock", *arguments) as workload:
            if listens == "source":
                async with (
                    serve(source, listen=uri) as server,
                    pull(server.uri, owner, **options) as transfer,
                ):
                    await transfer.wait_complete()
            else:
                async with trio.open_nursery() as nursery:

                    async def push() -> None:
                        async with serve(source, connect=uri) as server:
                            await server.wait_complete()

                    nursery.start_soon(push)
                    async with pull(uri, owner, **options) as transfer:
                        await transfer.wait_complete()
            await check_verified(workload)
    finally:
        owner.close()
    check_complete(transfer.statistics(), SIZE // PAGE)


@pytest.mark.parametrize(("options", "message"), [
    ({"background_lanes": 0}, "0 background lanes: there may be 1 to 63"),
    ({"background_lanes": 64}, "64 background lanes: there may be 1 to 63"),
    ({"chunk": 0}, "chunks of 0 bytes: they are whole pages, of 4 MiB at most"),
    ({"chunk": 4097}, "chunks of 4097 bytes: they are whole pages"),
    ({"chunk": 8 << 20}, "chunks of 8388608 bytes: they are whole pages, of 4 MiB at most"),
])  # fmt: skip
async def test_background_that_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        async with pull("tcp://127.0.0.1:1", OwnMemory(), lane="trio", **options):
            raise AssertionError("not reached")


# ---- several at once ----


async def test_several_destinations_of_one_source(source: str, tmp_path: Path, lane: str) -> None:
    events: list[str] = []
    memory = OwnMemory()

    def note(event: str, /, **_: object) -> None:
        events.append(event)

    async def move_to(index: int, kind: str) -> None:
        arguments = ("--size", SIZE, "--memory", kind, "--order", "random")
        _, statistics = await move(server.uri, tmp_path / f"uffd-{index}.sock", lane, *arguments)
        check_complete(statistics, SIZE // PAGE)

    async def fill(owner: IntoFile | OwnMemory) -> None:
        async with pull(server.uri, owner, lane=lane) as transfer:
            await transfer.wait_complete()

    async with serve(source, listen="tcp://127.0.0.1:0", on_event=note) as server:
        async with trio.open_nursery() as nursery:
            for index, kind in enumerate(["anonymous", "memfd", "anonymous"]):
                nursery.start_soon(move_to, index, kind)
            nursery.start_soon(fill, IntoFile(tmp_path / "copy"))
            nursery.start_soon(fill, memory)
        assert (
            (tmp_path / "copy").read_bytes()
            == Path(source).read_bytes()
            == await memory.read(0, SIZE)
        )
        await server.wait_complete()
        while server.sessions:  # noqa: ASYNC110
            await trio.sleep(0.01)
    memory.close()
    assert sorted(events) == ["complete"] * 5 + ["connected"] * 5 + ["listening"]


async def test_one_after_the_other(source: str, tmp_path: Path, lane: str) -> None:
    async with serve(source, listen="tcp://127.0.0.1:0") as server:
        for _ in range(3):
            async with pull(server.uri, IntoFile(tmp_path / "copy"), lane=lane) as transfer:
                await transfer.wait_complete()
            assert (tmp_path / "copy").read_bytes() == Path(source).read_bytes()
            (tmp_path / "copy").unlink()


# ---- which side dials ----


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_source_that_dials(
    transport: str, source: str, address: Callable[[str], str], tmp_path: Path, lane: str
) -> None:
    where: dict[str, str] = {}
    listening = trio.Event()

    def on_event(event: str, /, **fields: Any) -> None:
        if event == "listening":
            where.update(fields)
            listening.set()

    async def dial() -> None:
        await listening.wait()
        async with serve(source, connect=where["uri"]) as server:
            await server.wait_complete()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial)
        arguments = ("--size", SIZE, "--order", "random")
        _, statistics = await move(
            address(transport),
            tmp_path / "uffd.sock",
            lane,
            *arguments,
            listen=True,
            on_event=on_event,
        )
    check_complete(statistics, SIZE // PAGE)


# ---- the daemons ----


async def test_daemons(source: str, tmp_path: Path, lane: str) -> None:
    path = tmp_path / "uffd.sock"
    async with (
        run_server(source, "--once") as (server, uri),
        run(pull_command(uri, "--uffd-socket", str(path), lane=lane)) as puller,
        run_workload(
            path, "--size", SIZE, "--zero-every", ZERO_EVERY, "--wait-complete"
        ) as workload,
    ):
        await check_verified(workload)
        assert (await puller.wait(), puller.stderr) == (0, "")
        assert (await server.wait(), server.stderr) == (0, "")
        assert [event["event"] for event in puller.events if event["event"] != "progress"] == [
            "connected", "waiting", "owner", "complete",
        ]  # fmt: skip
        assert [event["event"] for event in server.events] == ["listening", "connected", "complete"]
    assert sorted(os.listdir(tmp_path)) == ["source"]


async def test_daemons_when_the_source_dials(source: str, tmp_path: Path, lane: str) -> None:
    path = tmp_path / "uffd.sock"
    async with run(
        pull_command("tcp://127.0.0.1:0", "--listen", "--uffd-socket", str(path), lane=lane)
    ) as puller:
        uri = (await puller.event("listening"))["uri"]
        async with (
            run(serve_command(source, "--connect", uri)) as server,
            run_workload(
                path, "--size", SIZE, "--zero-every", ZERO_EVERY, "--wait-complete"
            ) as workload,
        ):
            await check_verified(workload)
            assert (await puller.wait(), puller.stderr) == (0, "")
            assert (await server.wait(), server.stderr) == (0, "")


async def test_memory_of_a_process_to_another(tmp_path: Path, lane: str) -> None:
    """From an owner that has all of it and stands still to the next owner, and on from there."""
    first = str(write_pattern(tmp_path / "source", SIZE, zero_every=ZERO_EVERY))
    async with (
        serve(first, listen="tcp://127.0.0.1:0") as server,
        owning(server, tmp_path / "first.sock", "memfd", lane) as owner,
    ):
        fd = next(
            int(entry.name)
            for entry in Path(f"/proc/{owner.pid}/fd").iterdir()
            if "pagenet-workload" in os.readlink(entry)
        )
        async with serve(f"/proc/{owner.pid}/fd/{fd}", listen="tcp://127.0.0.1:0") as second:
            await move(
                second.uri, tmp_path / "second.sock", lane, "--size", SIZE, "--order", "random"
            )


@asynccontextmanager
async def owning(server: Server, path: Path, memory: str, lane: str) -> AsyncIterator[Process]:
    """A workload that has all its pages and has not yet ended."""
    owner = UffdSocket(path)
    await owner.listen()
    async with (
        run_workload(
            path, "--size", SIZE, "--memory", memory, "--zero-every", ZERO_EVERY, "--wait-complete"
        ) as workload,
        pull(server.uri, owner, lane=lane) as transfer,
    ):
        await workload.event("touching")
        await stop_process(workload)
        await transfer.wait_complete()
        yield workload
    owner.close()


# ---- the source is lost ----


async def check_owner_waits(workload: Process, threads: int) -> None:
    """Nothing was placed: every thread still waits for the same page."""
    assert not workload.has_ended
    assert threads_in_faults(workload.pid) == threads
    await workload.kill()
    assert "verified" not in "".join(await workload.rest())


@pytest.mark.parametrize("memory", ["anonymous", "memfd"])
async def test_source_killed_half_way(memory: str, tmp_path: Path, lane: str) -> None:
    """While the background runs and threads wait for pages."""
    size = 16 * MIB
    path = tmp_path / "uffd.sock"
    async with (
        run_server(str(write_pattern(tmp_path / "source", size))) as (server, uri),
        run_relay(uri, 4 * MIB) as relay,
        run(pull_command(relay.uri, "--uffd-socket", str(path), *GIVE_UP, lane=lane)) as puller,
    ):
        await puller.event("waiting")
        async with run_workload(
            path, "--size", size, "--memory", memory, "--order", "random", "--threads", 4
        ) as workload:
            await workload.event("touching")
            await relay.held.wait()
            await wait_in_faults(workload.pid, 4)
            server.send_signal(signal.SIGKILL)
            assert await server.wait_end() == -signal.SIGKILL
            await relay.cut()
            await check_puller_lost_its_source(puller)
            await check_owner_waits(workload, 4)
    assert sorted(os.listdir(tmp_path)) == ["source"]


@pytest.fixture
def large_source(tmp_path: Path) -> str:
    """A source so large that it is never all touched; it takes no memory."""
    path = tmp_path / "source"
    path.touch()
    os.truncate(path, LARGE)
    return str(path)


LARGE = 1 << 30
TOUCHED = ("--background", "off")
GIVE_UP = ("--reconnect-for", "0")
TOUCH_LARGE = ("--size", LARGE, "--zero-every", 1, "--order", "random", "--think-us", 1000)


async def test_source_killed_while_a_fault_waits(
    large_source: str, tmp_path: Path, lane: str
) -> None:
    """Without a relay in between."""
    path = tmp_path / "uffd.sock"
    async with (
        run_server(large_source) as (server, uri),
        run(pull_command(uri, "--uffd-socket", str(path), *TOUCHED, *GIVE_UP, lane=lane)) as puller,
    ):
        await puller.event("waiting")
        async with run_workload(path, *TOUCH_LARGE) as workload:
            await workload.event("touching")
            await stop_process(server)
            await wait_in_faults(workload.pid, 2)
            await server.kill()
            await check_puller_lost_its_source(puller)
            await check_owner_waits(workload, 2)


async def check_puller_lost_its_source(puller: Process) -> None:
    assert await puller.wait() == 4
    (line,) = puller.stderr.splitlines()
    assert line.startswith("pagenet-pull: the source ")
    assert puller.events[-1] == {
        "event": "error",
        "error": "SourceDisconnected",
        "message": line.removeprefix("pagenet-pull: "),
        "exit_code": 4,
    }


async def test_source_killed_before_the_owner_comes(source: str, tmp_path: Path, lane: str) -> None:
    async with (
        run_server(source) as (server, uri),
        run(pull_command(uri, "--uffd-socket", str(tmp_path / "uffd.sock"), lane=lane)) as puller,
    ):
        await puller.event("waiting")
        await server.kill()
        await check_puller_lost_its_source(puller)
    assert os.listdir(tmp_path) == ["source"]


async def test_source_that_dialled_is_killed(large_source: str, tmp_path: Path, lane: str) -> None:
    path = tmp_path / "uffd.sock"
    command = pull_command(
        "tcp://127.0.0.1:0",
        "--listen",
        "--uffd-socket",
        str(path),
        *TOUCHED,
        *GIVE_UP,
        lane=lane,
    )
    async with run(command) as puller:
        uri = (await puller.event("listening"))["uri"]
        async with run(serve_command(large_source, "--connect", uri)) as server:
            await puller.event("waiting")
            async with run_workload(path, *TOUCH_LARGE) as workload:
                await workload.event("touching")
                await stop_process(server)
                await wait_in_faults(workload.pid, 2)
                await server.kill()
                await check_puller_lost_its_source(puller)
                await check_owner_waits(workload, 2)


async def test_file_in_the_making_goes_with_its_source(tmp_path: Path, lane: str) -> None:
    source = str(write_pattern(tmp_path / "source", 8 * MIB))
    async with (
        run_server(source) as (server, uri),
        run_relay(uri, 2 * MIB) as relay,
        run(pull_command(relay.uri, "--into", str(tmp_path / "copy"), lane=lane)) as puller,
    ):
        await relay.held.wait()
        assert sorted(os.listdir(tmp_path)) == ["source"]
        await server.kill()
        await relay.cut()
        await check_puller_lost_its_source(puller)
    assert os.listdir(tmp_path) == ["source"]


# ---- cancelled anywhere ----


class CancelAfter(trio.abc.Instrument):
    """Cancels its scope after ``steps`` steps of all tasks together."""

    def __init__(self, steps: int) -> None:
        self.scope = trio.CancelScope()
        self.steps = 0
        self._cancel_at = steps

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.steps == self._cancel_at:
            self.scope.cancel()


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_native.Mapped]]:
    """Every mapping that was made. All of them must be gone at the end."""
    made: list[_native.Mapped] = []
    original = _native.Mapped.__init__

    def init(self: _native.Mapped, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(_native.Mapped, "__init__", init)
    yield made
    assert [mapping.size for mapping in made if mapping.address] == [], "mappings were left behind"


async def steps_until_cancelled(work: Callable[[], Any], steps: int) -> int:
    """How many steps ``work`` took, if it ended before it was cancelled."""
    cancel = CancelAfter(steps)
    trio.lowlevel.add_instrument(cancel)
    try:
        with cancel.scope:
            await work()
    finally:
        trio.lowlevel.remove_instrument(cancel)
    return cancel.steps


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


class Dealer:
    """An owner within this process, which hands over memory that it never touches."""

    def __init__(self, path: Path) -> None:
        self.owner = UffdSocket(path, on_waiting=self._deal)
        self._memory = _native.Mapped(CANCELLED_SIZE)
        self._uffd = Userfaultfd.open()
        self._uffd.register(self._memory.address, CANCELLED_SIZE, Mode.MISSING)
        self._socket = socket.socket(socket.AF_UNIX)

    def _deal(self) -> None:
        self._socket.connect(str(self.owner.path))
        mapping = {
            "base_host_virt_addr": self._memory.address,
            "size": CANCELLED_SIZE,
            "offset": 0,
            "page_size": PAGE,
        }
        socket.send_fds(self._socket, [json.dumps([mapping]).encode()], [self._uffd.fd])

    def close(self) -> None:
        self.owner.close()
        self._socket.close()
        self._uffd.close()
        self._memory.close()


CANCELLED_SIZE = 3 * CHUNK_BYTES + PAGE


@contextmanager
def owner_of(kind: str, directory: Path) -> Iterator[UffdSocket | OwnMemory | IntoFile]:
    if kind == "file":
        yield IntoFile(directory / "copy")
        return
    made = (
        Dealer(directory / "uffd.sock")
        if kind == "socket"
        else OwnMemory("memfd" if kind == "memfd" else "anonymous")
    )
    try:
        yield made.owner if isinstance(made, Dealer) else made
    finally:
        made.close()


def check_nothing_left(directory: Path) -> None:
    left = set(os.listdir(directory)) - {"source", "source.sock"}
    assert left <= {"copy"}
    if left:  # it was complete before the cancellation came
        assert (directory / "copy").read_bytes() == (directory / "source").read_bytes()
        (directory / "copy").unlink()


@pytest.fixture
def cancelled_source(tmp_path: Path) -> str:
    return str(write_pattern(tmp_path / "source", CANCELLED_SIZE, zero_every=ZERO_EVERY))


OWNERS = ["file", "anonymous", "memfd", "socket"]
# How many moments of a whole transfer are tried, evenly spread over its steps.
MOMENTS = 50


async def cancel_everywhere(
    work: Callable[[], Awaitable[None]], check: Callable[[], Awaitable[None]]
) -> None:
    total = await steps_until_cancelled(work, 1 << 60)
    await check()
    for step in sorted({1 + index * total // MOMENTS for index in range(MOMENTS)}):
        await steps_until_cancelled(work, step)
        await check()


@pytest.mark.parametrize("kind", OWNERS)
async def test_pull_cancelled_anywhere(
    kind: str, cancelled_source: str, tmp_path: Path, lane: str, mapped: list[_native.Mapped]
) -> None:
    async with serve(cancelled_source, listen=f"unix:{tmp_path}/source.sock") as server:
        before = open_files()

        async def work() -> None:
            with owner_of(kind, tmp_path) as owner:
                async with pull(server.uri, owner, lane=lane) as transfer:
                    await transfer.wait_complete()

        async def check() -> None:
            check_nothing_left(tmp_path)
            while server.sessions or open_files() != before:  # noqa: ASYNC110 - the server's side of it
                await trio.sleep(0.001)

        await cancel_everywhere(work, check)


@pytest.mark.parametrize("dials", ["source", "destination"])
@pytest.mark.parametrize("kind", OWNERS)
async def test_both_sides_cancelled_anywhere(
    kind: str,
    dials: str,
    cancelled_source: str,
    address: Callable[[str], str],
    tmp_path: Path,
    lane: str,
    mapped: list[_native.Mapped],
) -> None:
    async def move_to(uri: str, **options: Any) -> None:
        with owner_of(kind, tmp_path) as owner:
            async with pull(uri, owner, lane=lane, **options) as transfer:
                await transfer.wait_complete()

    async def work() -> None:
        if dials == "destination":
            async with serve(cancelled_source, listen=address("memory")) as server:
                await move_to(server.uri)
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(move_to, "memory://destination", listen=True))
                await trio.testing.wait_all_tasks_blocked()
                async with serve(cancelled_source, connect="memory://destination") as server:
                    await server.wait_complete()

    async def check() -> None:
        check_nothing_left(tmp_path)
        with trio.move_on_after(60):
            while open_files() != before:  # noqa: ASYNC110 - a thread that was abandoned has the file until it is synced
                await trio.sleep(0.001)
        assert open_files() == before

    before = open_files()
    await cancel_everywhere(work, check)


# ---- what an application adds to a session ----


@pytest.mark.parametrize("dials", ["source", "destination"])
async def test_streams(dials: str, source: str, tmp_path: Path, lane: str) -> None:
    uri = f"unix:{tmp_path / 'source.sock'}"

    async def echo(connection: Connection) -> None:
        buffer = memoryview(bytearray(100))
        while count := await connection.receive_into(buffer):
            await connection.send(b"<", buffer[:count], b">")

    async def talk(where: str, listen: bool) -> None:
        async with pull(where, OwnMemory(), lane=lane, listen=listen, streams=2) as transfer:
            for number, connection in enumerate(transfer.streams):
                await connection.send(f"{number}".encode())
                answer = bytearray(3)
                await receive_exactly(connection, memoryview(answer))
                assert answer == f"<{number}>".encode()
            await transfer.wait_complete()

    if dials == "destination":
        async with serve(source, listen=uri, on_stream=echo):
            await talk(uri, listen=False)
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk, uri, True)
        while not (tmp_path / "source.sock").exists():  # noqa: ASYNC110
            await trio.sleep(0.001)
        async with serve(source, connect=uri, on_stream=echo) as server:
            await server.wait_complete()


async def test_stream_that_nobody_talks_on(source: str, lane: str) -> None:
    refused: list[str] = []

    def note(event: str, /, **fields: Any) -> None:
        if event == "refused":
            refused.append(fields["reason"])

    async with (
        serve(source, listen="tcp://127.0.0.1:0", on_event=note) as server,
        pull(server.uri, OwnMemory(), lane=lane, streams=1) as transfer,
    ):
        assert await transfer.streams[0].receive_into(memoryview(bytearray(1))) == 0
        await transfer.wait_complete()
    assert refused == ["the destination opens a stream, and this source has no use for one"]


async def test_held_until_released(source: str, tmp_path: Path, lane: str) -> None:
    """Nothing is asked for before the release: until then the source's memory does not have its
    final content."""
    owner = UffdSocket(tmp_path / "uffd.sock")
    await owner.listen()
    arguments = ("--wait-complete", "--zero-every", ZERO_EVERY, "--size", SIZE, "--threads", 2)
    try:
        async with (
            serve(source, listen="tcp://127.0.0.1:0") as server,
            run_workload(tmp_path / "uffd.sock", *arguments) as workload,
            pull(server.uri, owner, lane=lane, held=True) as transfer,
        ):
            await wait_in_faults(workload.pid, 2)
            with closing(OwnMemory()) as other:  # meanwhile, moved from its first page to its last
                async with pull(server.uri, other, lane=lane) as moving:
                    await moving.wait_complete()
            assert (
                transfer.statistics().demand.requests
                == transfer.statistics().background.requests
                == 0
            )
            transfer.release()
            await transfer.wait_complete()
            await check_verified(workload)
    finally:
        owner.close()
