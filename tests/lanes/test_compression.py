"""Regions that travel compressed, in part, or not at all: every page is right, on lanes of both
kinds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from lanes import PAGE
from processes import huge_pages, pull_command, run, run_server

import pagenet
from pagenet import IntoFile, OwnMemory, TransferStatistics, register, serve
from pagenet.testing import MemoryTransport
from pagenet.transport import LaneKind

pytestmark = pytest.mark.usefixtures("uffd_permitted")

SIZE = 2 << 20
PAGES = SIZE // PAGE
COMPRESS = ["auto", "lz4", "none"]
CONTENTS = [
    *((kind, "lz4") for kind in ("text", "random", "zero")),
    *(("mixed", compress) for compress in COMPRESS),
]


def text(order: random.Random) -> bytes:
    words = b" ".join(
        order.choice([b"page", b"fault", b"lane", b"run", b"%d" % order.randrange(1000)])
        for _ in range(1200)
    )
    return (words * 4)[:PAGE]


@cache
def make_content(kind: str, seed: int = 0) -> bytes:
    order = random.Random(seed)
    kinds: dict[str, Callable[[], bytes]] = {
        "text": lambda: text(order),
        "random": lambda: order.randbytes(PAGE),
        "zero": lambda: bytes(PAGE),
        "half": lambda: order.randbytes(PAGE // 2) + text(order)[: PAGE // 2],
    }
    if kind in kinds:
        return b"".join(kinds[kind]() for _ in range(PAGES))
    pages: list[bytes] = []  # mixed: stretches of each, of all lengths
    while len(pages) < PAGES:
        make = kinds[order.choice(list(kinds))]
        pages += [make() for _ in range(order.choice([1, 1, 2, 5, 17, 64, 100]))]
    return b"".join(pages[:PAGES])


def check_counted(statistics: TransferStatistics, content: bytes, compress: str) -> None:
    zeros = sum(not any(content[at : at + PAGE]) for at in range(0, SIZE, PAGE))
    assert statistics.complete
    assert statistics.zero_pages == zeros
    if compress == "none":
        assert statistics.lz4_bytes == 0
        assert statistics.lz4_ratio is None
        assert statistics.lz4_share == 0
    raw = statistics.size - zeros * PAGE - statistics.lz4_bytes
    packed = sum(
        c.lz4_wire_bytes for c in (statistics.demand, statistics.prefetch, statistics.background)
    )
    headers = statistics.wire_bytes - raw - packed
    assert 0 <= headers < SIZE // 64


@pytest.mark.parametrize(("kind", "compress"), CONTENTS)
@pytest.mark.parametrize("memory", ["anonymous", "memfd", "allocated"])
@pytest.mark.parametrize("lane", ["native", "trio"])
@pytest.mark.parametrize("source_lane", ["native", "trio"])
async def test_every_pairing(
    source_lane: Any, lane: Any, memory: Any, kind: str, compress: Any, tmp_path: Path
) -> None:
    content = make_content(kind)
    (tmp_path / "source").write_bytes(content)
    owner = OwnMemory("memfd", allocate=True) if memory == "allocated" else OwnMemory(memory)
    try:
        async with (
            serve(str(tmp_path / "source"), listen="tcp://127.0.0.1:0", lane=source_lane) as server,
            pagenet.pull(server.uri, owner, lane=lane, compress=compress) as transfer,
        ):
            touched = [
                (page, await owner.read(page * PAGE, PAGE)) for page in (PAGES - 1, 7, PAGES // 2)
            ]
            await transfer.wait_complete()
        assert await owner.read(0, SIZE) == content
    finally:
        owner.close()
    assert all(data == content[page * PAGE : (page + 1) * PAGE] for page, data in touched)
    statistics = transfer.statistics()
    check_counted(statistics, content, compress)
    if compress == "lz4":
        share = {"text": 1.0, "random": 0.0, "zero": 0.0}.get(kind)
        assert share is None or statistics.lz4_share == pytest.approx(share, abs=0.02)
        if kind == "text":
            assert (statistics.lz4_ratio or 0) > 1.5


@pytest.mark.parametrize("transport", ["unix", "memory"])
@pytest.mark.parametrize("compress", COMPRESS)
async def test_transports(compress: Any, transport: str, tmp_path: Path) -> None:
    register("memory", MemoryTransport())
    content = make_content("mixed", seed=1)
    (tmp_path / "source").write_bytes(content)
    uri = "memory://" if transport == "memory" else f"unix:{tmp_path}/socket"
    async with (
        serve(str(tmp_path / "source"), listen=uri) as server,
        pagenet.pull(server.uri, IntoFile(tmp_path / "copy"), compress=compress) as transfer,
    ):
        await transfer.wait_complete()
    assert (tmp_path / "copy").read_bytes() == content
    check_counted(transfer.statistics(), content, compress)


@pytest.mark.parametrize("lane", ["native", "trio"])
async def test_huge_pages_compressed(lane: Any, tmp_path: Path) -> None:
    """A huge page is compressed as one block; a random one is not compressed."""
    huge = 2 << 20
    content = make_content("text") + random.Random(2).randbytes(huge) + bytes(huge)
    (tmp_path / "source").write_bytes(content)
    with huge_pages(3):
        owner = OwnMemory("hugetlb")
        try:
            async with (
                serve(str(tmp_path / "source"), listen="tcp://127.0.0.1:0") as server,
                pagenet.pull(server.uri, owner, lane=lane, compress="lz4") as transfer,
            ):
                await transfer.wait_complete()
            assert await owner.read(0, 3 * huge) == content
        finally:
            owner.close()
    statistics = transfer.statistics()
    assert (statistics.background.lz4_runs, statistics.lz4_bytes) == (1, huge)


@pytest.mark.parametrize("seed", range(6))
async def test_drawn_combinations(seed: int, tmp_path: Path) -> None:
    order = random.Random(seed)
    content = make_content("mixed", seed)
    (tmp_path / "source").write_bytes(content)
    kinds: list[LaneKind] = ["native", "trio"]
    lane, other = (order.choice(kinds) for _ in range(2))
    options: dict[str, Any] = {
        "lane": lane,
        "compress": order.choice(["lz4", "lz4", "auto"]),
        "background_lanes": order.choice([1, 1, 3]),
        "chunk": PAGE * order.choice([1, 3, 64, 512]),
        "prefetch": order.choice([(0, 0), (3, 2), (8, 8), (100, 100)]),
        "background": order.choice(["linear", "linear", "off"]),
    }
    owner = OwnMemory(order.choice(["anonymous", "memfd"]))
    try:
        async with (
            serve(str(tmp_path / "source"), listen="tcp://127.0.0.1:0", lane=other) as server,
            pagenet.pull(server.uri, owner, **options) as transfer,
        ):
            if options["background"] != "off":
                await transfer.wait_complete()
            data = await owner.read(0, SIZE)
            await transfer.wait_complete()
    finally:
        owner.close()
    assert data == content, options
    check_counted(transfer.statistics(), content, "")


async def test_command(tmp_path: Path) -> None:
    content = make_content("text")
    (tmp_path / "source").write_bytes(content)
    async with run_server(str(tmp_path / "source")) as (_, uri):
        for compress in ("lz4", "none"):
            command = pull_command(
                uri, "--into", str(tmp_path / compress), "--compress", compress, lane="native"
            )
            async with run(command) as puller:
                complete = await puller.event("complete")
                assert await puller.wait() == 0
            assert (tmp_path / compress).read_bytes() == content
            compressed = complete["compressed"]
            if compress == "none":
                assert compressed == {"bytes": 0, "share": 0.0, "ratio": None}
                assert complete["bytes_wire"] > SIZE
            else:
                assert compressed["bytes"] == SIZE
                assert compressed["share"] > 0.99
                assert compressed["ratio"] == pytest.approx(SIZE / complete["bytes_wire"], rel=0.02)
        command = pull_command(
            uri, "--into", str(tmp_path / "copy"), "--compress", "lz4", lane="native", as_json=False
        )
        async with run(command) as puller:
            words = "\n".join(await puller.rest())
            assert await puller.wait_end() == 0
        assert "compressed: 100% of what came, to 1/" in words


async def test_command_that_makes_no_sense(tmp_path: Path) -> None:
    command = pull_command(
        "unix:nowhere", "--into", str(tmp_path / "copy"), "--compress", "zstd", lane="native"
    )
    async with run(command) as puller:
        assert await puller.wait() == 2
        assert "--compress: invalid choice: 'zstd'" in puller.stderr
        assert len(puller.stderr.splitlines()) == 1
        assert json.dumps(puller.events) == "[]"
