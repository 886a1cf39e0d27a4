"""Everything that can be chosen, drawn together; what can be changed is changed while it runs."""

from __future__ import annotations

import ctypes
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import trio
from commands import tell_at_random
from lanes import MADV_REMOVE, libc

import pagenet
from pagenet import OwnMemory, Transfer, TransferStatistics
from pagenet.background.recording import Recorder, load_recording
from pagenet.control import serve_control
from pagenet.region import Block, Region
from pagenet.transport import LaneKind

PAGE = 4096
PAGES = 1024
SIZE = PAGES * PAGE
MADV_DONTNEED = 4
SEEDS = 20
RECORDED = "recorded=FILE"
CHOICES: dict[str, Sequence[Any]] = {
    "transport": ["tcp", "unix", "memory"],
    "source_lane": ["native", "trio"],
    "lane": ["native", "native", "trio"],
    "dials": ["destination", "source"],
    "memory": ["anonymous", "memfd", "allocated"],
    "content": ["mixed", "random", "text", "zeros"],
    "background": ["hot", "follow", "linear", RECORDED, "off"],
    "background_lanes": [1, 1, 3],
    "chunk": [PAGE, 3 * PAGE, 64 * PAGE, 512 * PAGE],
    "prefetch": [None, (0, 0), (8, 8), (256, 0), (0, 100)],
    "start_background": [None, "after=0.05", "rate=1000000", "rate=1"],
    "max_bandwidth": [None, 1 << 20, 8 << 20],
    "compress": ["auto", "lz4", "none"],
    "record": [False, True],
    "given_up": ["nothing", "early", "late"],
    "commanded": [True, True, False],
}


def drawn(seed: int) -> dict[str, Any]:
    """A value of each choice, all equally likely; the first SEEDS draws have every value."""
    if seed >= SEEDS:
        return {
            name: random.Random(f"{name} {seed}").choice(choices)
            for name, choices in CHOICES.items()
        }
    choice = {}
    for name, choices in CHOICES.items():
        order = [choices[number % len(choices)] for number in range(SEEDS)]
        random.Random(name).shuffle(order)
        choice[name] = order[seed]
    return choice


def make_content(kind: str, draw: random.Random) -> bytes:
    """Stretches of each kind, of all lengths: long ones of zeros are not placed in shared
    memory."""
    words = [b"page", b"fault", b"lane", b"run"]
    text = b" ".join(draw.choice(words) + b"%d" % draw.randrange(1000) for _ in range(20_000))
    make: dict[str, Callable[[], bytes]] = {
        "random": lambda: draw.randbytes(PAGE),
        "text": lambda: text[(at := draw.randrange(len(text) - PAGE)) : at + PAGE],
        "zeros": lambda: bytes(PAGE),
    }
    pages: list[bytes] = []
    while len(pages) < PAGES:
        one = make[draw.choice(sorted(make)) if kind == "mixed" or draw.random() < 0.2 else kind]
        pages += [one() for _ in range(draw.choice([1, 1, 2, 5, 17, 64, 100]))]
    return b"".join(pages[:PAGES])


def write_sparse(path: Path, content: bytes) -> None:
    """Write the file with holes for zeros."""
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), PAGE):
            if any(content[at : at + PAGE]):
                file.seek(at)
                file.write(content[at : at + PAGE])


def make_memory(kind: Literal["anonymous", "memfd", "allocated"]) -> OwnMemory:
    return OwnMemory("memfd", allocate=True) if kind == "allocated" else OwnMemory(kind)


@asynccontextmanager
async def moving(
    choice: dict[str, Any], options: dict[str, Any], memory: OwnMemory, directory: Path
) -> AsyncIterator[Transfer]:
    """A transfer from ``source`` in that directory, whichever side dials."""
    uri = {"unix": f"unix:{directory}/socket", "memory": f"memory://{directory.name}"}
    transport, source = choice["transport"], str(directory / "source")
    listen = uri.get(transport, f"{transport}://127.0.0.1:0")
    lane: LaneKind = choice["source_lane"] if transport != "memory" else "trio"
    if choice["dials"] == "destination":
        async with (
            pagenet.serve(source, listen=listen, lane=lane) as server,
            pagenet.pull(server.uri, memory, **options) as transfer,
        ):
            yield transfer
        return

    async def dial(where: str) -> None:
        async with pagenet.serve(source, connect=where, lane=lane):
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:

        def told(event: str, /, **fields: Any) -> None:
            if event == "listening":
                nursery.start_soon(dial, fields["uri"])

        async with pagenet.pull(listen, memory, listen=True, on_event=told, **options) as transfer:
            yield transfer
        nursery.cancel_scope.cancel()


async def read_at_random(
    memory: OwnMemory, content: bytes, pages: Sequence[int], draw: random.Random
) -> None:
    """Read pages in a line, in steps, and anywhere."""
    for _ in range(12):
        first, step = draw.choice(pages), draw.choice([1, -1, 3, 17])
        for page in range(first, first + 12 * step, step):
            if page in pages:
                assert (
                    await memory.read(page * PAGE, PAGE) == content[page * PAGE : (page + 1) * PAGE]
                ), page


async def give_up(memory: OwnMemory, kind: str, first: int, count: int) -> None:
    advice = MADV_DONTNEED if kind == "anonymous" else MADV_REMOVE
    where, length = ctypes.c_void_p(memory.address + first * PAGE), ctypes.c_size_t(count * PAGE)
    assert await trio.to_thread.run_sync(libc.madvise, where, length, advice) == 0


def finish(transfer: Transfer) -> None:
    transfer.set_max_bandwidth(None)
    transfer.set_background("hot")
    transfer.begin_background()
    transfer.resume_background()


def check_counted(statistics: TransferStatistics, given_up: bool, shared: bool) -> None:
    assert statistics.complete
    came = statistics.demand.pages + statistics.prefetch.pages + statistics.background.pages
    assert came == PAGES if not given_up else came <= PAGES
    assert (statistics.prefetch_unused is None) == (not statistics.prefetch.sampled)
    assert shared or not statistics.prefetch.sampled
    assert statistics.prefetch_unused is None or 0 <= statistics.prefetch_unused <= 1


def check_recorded(path: Path, statistics: TransferStatistics) -> None:
    recording = load_recording(path)
    assert (recording.runs, recording.blocks) == (2, (("source", SIZE),))
    assert statistics.demand.faults == 0 or recording.order


async def check_moves(choice: dict[str, Any], seed: int, tmp_path: Path) -> None:
    """Also used by tests/rdma/inside."""
    draw = random.Random(seed)
    content = make_content(choice["content"], draw)
    write_sparse(tmp_path / "source", content)
    earlier = Recorder(Region([Block("source", SIZE)]))
    earlier.note(draw.sample(range(PAGES), 300))
    earlier.recording().save(tmp_path / "recording")
    names = (
        "background",
        "background_lanes",
        "chunk",
        "prefetch",
        "start_background",
        "max_bandwidth",
        "compress",
    )
    options = {name: choice[name] for name in names}
    options["lane"] = choice["lane"] if choice["transport"] != "memory" else "trio"
    options["background"] = options["background"].replace("FILE", str(tmp_path / "recording"))
    options["record"] = tmp_path / "recording" if choice["record"] else None
    first, count = (512, 256) if choice["given_up"] != "nothing" else (0, 0)
    kept = [page for page in range(PAGES) if not first <= page < first + count]
    memory = make_memory(choice["memory"])
    try:
        with trio.fail_after(60):
            async with moving(choice, options, memory, tmp_path) as transfer:
                if choice["given_up"] == "early":
                    await give_up(memory, choice["memory"], first, count)
                async with (
                    serve_control(transfer, tmp_path / "ctl"),
                    trio.open_nursery() as nursery,
                ):
                    if choice["commanded"]:
                        recording, moment = tmp_path / "recording", draw.uniform(0, 0.3)
                        nursery.start_soon(
                            tell_at_random, tmp_path / "ctl", random.Random(seed), recording, moment
                        )
                    for reader in range(3):
                        nursery.start_soon(
                            read_at_random, memory, content, kept, random.Random(f"{seed} {reader}")
                        )
                if choice["given_up"] == "late":
                    await give_up(memory, choice["memory"], first, count)
                if not transfer.is_over:
                    finish(transfer)
                await transfer.wait_complete()
            arrived = bytearray(await memory.read(0, SIZE))
    finally:
        memory.close()
    assert arrived[first * PAGE : (first + count) * PAGE] == bytes(count * PAGE), choice
    assert all(
        arrived[page * PAGE : (page + 1) * PAGE] == content[page * PAGE : (page + 1) * PAGE]
        for page in kept
    ), choice
    check_counted(transfer.statistics(), count > 0, choice["memory"] != "anonymous")
    if choice["record"]:
        check_recorded(tmp_path / "recording", transfer.statistics())
