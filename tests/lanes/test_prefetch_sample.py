"""Whether prefetched pages are needed: a sample of them is not made visible before it is touched.
The owner must not notice."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from lanes import MADV_REMOVE, libc
from processes import Process, pull_command, run, run_server, threads_in_faults, wait_in_faults

import pagenet
from pagenet import OwnMemory, Transfer, _native
from pagenet.progress import complete_fields
from pagenet.qemu._preload import preload_library
from pagenet.residency import State
from pagenet.transport import LaneKind

pytestmark = pytest.mark.usefixtures("uffd_permitted")

PAGE = 4096
PAGES = 8192
SIZE = PAGES * PAGE
HALF = SIZE // 2
# One fault in each STEP pages brings all of them: eight on either side.
STEP = 17


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "source"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def memory() -> Iterator[OwnMemory]:
    made = OwnMemory("memfd")
    yield made
    made.close()


@asynccontextmanager
async def coming(source: Path, memory: OwnMemory, lane: LaneKind) -> AsyncIterator[Transfer]:
    """A transfer that brings each touched page, and eight pages on either side of it."""
    async with (
        pagenet.serve(str(source), listen="tcp://127.0.0.1:0") as server,
        pagenet.pull(server.uri, memory, lane=lane, background="off", prefetch=(8, 8)) as transfer,
    ):
        yield transfer


async def touch_every_neighbourhood(memory: OwnMemory, transfer: Transfer) -> None:
    """Touch all neighbourhoods but the last ones: complete memory is not watched any more."""
    for page in range(8, PAGES - 100, STEP):
        await memory.read(page * PAGE, 1)
    with trio.fail_after(20):
        while transfer.filling.residency.find(State.REQUESTED, 0) is not None:  # noqa: ASYNC110
            await trio.sleep(0.001)


@pytest.mark.parametrize("lane", ["native", "trio"])
async def test_the_share_that_was_not_touched(
    lane: LaneKind, source: Path, memory: OwnMemory
) -> None:
    async with coming(source, memory, lane) as transfer:
        await touch_every_neighbourhood(memory, transfer)
        before = transfer.statistics()
        assert before.placement == "continue"
        assert before.prefetch.pages / 20 < before.prefetch.sampled < before.prefetch.pages / 13
        assert before.prefetch_unused == 1
        content = source.read_bytes()
        assert await memory.read(0, HALF) == content[:HALF]
        now = transfer.statistics()
        assert now.prefetch_unused == pytest.approx(0.5, abs=0.08)
        # No thread waited for the source, so these faults do not count.
        assert now.demand.faults <= before.demand.faults + 2 * PAGES // STEP // 16
        transfer.set_background("linear")
        await transfer.wait_complete()
        assert transfer.statistics().prefetch_unused == now.prefetch_unused
        assert now.prefetch_unused is not None
        assert complete_fields(transfer.statistics())["prefetch_unused"] == round(
            now.prefetch_unused, 3
        )
        assert await memory.read(HALF, HALF) == content[HALF:]


@pytest.mark.parametrize("lane", ["native", "trio"])
async def test_what_is_given_up_untouched_was_not_used_and_is_zero(
    lane: LaneKind, source: Path, memory: OwnMemory
) -> None:
    async with coming(source, memory, lane) as transfer:
        await touch_every_neighbourhood(memory, transfer)
        advice, place = (MADV_REMOVE, ctypes.c_void_p(memory.address))
        await trio.to_thread.run_sync(libc.madvise, place, ctypes.c_size_t(HALF), advice)
        assert await memory.read(0, HALF) == bytes(HALF)
        assert transfer.statistics().prefetch_unused == 1
        transfer.set_background("linear")
        await transfer.wait_complete()
        assert await memory.read(0, HALF) == bytes(HALF)
        assert await memory.read(HALF, HALF) == source.read_bytes()[HALF:]


async def test_in_private_memory_it_cannot_be_known(source: Path) -> None:
    memory = OwnMemory("anonymous")
    try:
        async with coming(source, memory, "auto") as transfer:
            await memory.read(100 * PAGE, 1)
            transfer.set_background("linear")
            await transfer.wait_complete()
            assert transfer.statistics().prefetch_unused is None
            assert transfer.statistics().prefetch.sampled == 0
    finally:
        memory.close()


@pytest.mark.parametrize("lane", ["native", "trio"])
async def test_when_it_is_given_up_what_came_is_there(
    lane: LaneKind, source: Path, memory: OwnMemory
) -> None:
    async with coming(source, memory, lane) as transfer:
        await touch_every_neighbourhood(memory, transfer)
        assert transfer.statistics().prefetch.sampled > 0
    assert not transfer.statistics().complete
    assert await memory.read(0, 8 * STEP * PAGE) == source.read_bytes()[: 8 * STEP * PAGE]


@pytest.mark.parametrize("stride", [1, 2, 16, 17, 64, 512])
def test_no_stride_misses_the_sample(stride: int) -> None:
    pages = [
        page for page in range(0, 4000 * stride, stride) if _native.before_sampled(page, 1) == 0
    ]
    assert 150 < len(pages) < 350
    assert _native.before_sampled(pages[0] + 1, 10_000) < 200


# ---- killed while a sample is not visible ----

# An owner that keeps its userfaultfd and the map of its pages, by the preload library. It reads the
# pages that it is told to.
OWNER = """
import hashlib, json, mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
    for line in sys.stdin:
        first, count = map(int, line.split())
        digest = hashlib.sha256(data[4096 * first : 4096 * (first + count)]).hexdigest()
        print(json.dumps({"event": "read", "digest": digest}), flush=True)
"""


@asynccontextmanager
async def keeping_owner(pulling: Process, socket: Path) -> AsyncIterator[Process]:
    await pulling.event("waiting")
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="pagenet-test-") as file:
        os.truncate(file.fileno(), SIZE)
        status = os.stat(file.fileno())
        variables = {
            "LD_PRELOAD": str(preload_library()),
            "PAGENET_UFFD_SOCKET": str(socket),
            "PAGENET_UFFD_FILES": f"{status.st_dev}:{status.st_ino}",
        }
        async with run(
            [sys.executable, "-c", OWNER, file.name],
            env=os.environ | variables,
            stdin=subprocess.PIPE,
        ) as owner:
            yield owner


async def is_right(owner: Process, content: bytes, first: int, count: int = 1) -> bool:
    with trio.fail_after(20):
        await owner.send(f"{first} {count}\n")
        read = await owner.event("read")
    return bool(
        read["digest"] == hashlib.sha256(content[PAGE * first : PAGE * (first + count)]).hexdigest()
    )


async def wait_done(pulling: Process, pages: int) -> None:
    with trio.fail_after(20):
        while (await pulling.event("progress"))["bytes"] < pages * PAGE:
            pass


@pytest.mark.parametrize("lane", ["native", "trio"])
async def test_killed_while_pages_are_held(lane: str, source: Path, tmp_path: Path) -> None:
    """Only the owner's map shows that these pages have come. While no pagenet runs, a thread that
    touches them waits, and never reads zeros. The next destination makes them visible, whether the
    owner touches them then or is released before.
    """
    content, socket = source.read_bytes(), tmp_path / "owner.sock"
    touched = range(8, 8 + 40 * STEP, STEP)
    around = [page for at in touched for page in range(at - 8, at + 9) if page != at]
    held = [page for page in around if _native.before_sampled(page, 1) == 0]
    assert len(held) > 20
    options = ["--prefetch", "8,8", "--background", "off"]
    async with (
        run_server(str(source)) as (_, uri),
        run([*pull_command(uri, "--uffd-socket", str(socket), lane=lane), *options]) as pulling,
        keeping_owner(pulling, socket) as owner,
    ):
        for page in touched:
            assert await is_right(owner, content, page)
        await wait_done(pulling, 40 * STEP)
        await pulling.kill()
        await owner.send(f"{held[0]} 1\n")
        await wait_in_faults(owner.pid, 1)
        async with run(
            [*pull_command(uri, "--resume", str(owner.pid), lane=lane), *options]
        ) as pulling:
            with trio.fail_after(20):
                read = await owner.event("read")
            assert (
                read["digest"]
                == hashlib.sha256(content[PAGE * held[0] : PAGE * (held[0] + 1)]).hexdigest()
            )
            for page in held[1:10]:
                assert await is_right(owner, content, page)
            await pulling.kill()
        await owner.send(f"{held[10]} 1\n")
        await wait_in_faults(owner.pid, 1)
        async with run(pull_command(uri, "--resume", str(owner.pid), lane=lane)) as pulling:
            with trio.fail_after(20):
                await owner.event("read")
                complete = await pulling.event("complete")
            assert await pulling.wait() == 0
        assert complete["pages"] == PAGES
        assert await is_right(owner, content, 0, PAGES)
        assert threads_in_faults(owner.pid) == 0
