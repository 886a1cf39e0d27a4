"""Whether prefetched pages are needed: a sample of them is not made visible before it is touched. Nobody may notice."""

from __future__ import annotations

import ctypes
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from lanes import MADV_REMOVE, libc

import pagenet
from pagenet import OwnMemory, Transfer, _native
from pagenet.lane import LaneKind
from pagenet.progress import complete_fields
from pagenet.residency import State

pytestmark = pytest.mark.usefixtures("uffd_permitted")

PAGE = 4096
PAGES = 8192
SIZE = PAGES * PAGE
HALF = SIZE // 2
# One fault in so many pages brings all of them: eight on either side.
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
    """What is touched, and eight pages on either side of it."""
    async with (
        pagenet.serve(str(source), listen="tcp://127.0.0.1:0") as server,
        pagenet.pull(server.uri, memory, lane=lane, background="off", prefetch=(8, 8)) as transfer,
    ):
        yield transfer


async def touch_every_neighbourhood(memory: OwnMemory, transfer: Transfer) -> None:
    """But for the last ones: what is complete is not watched any more."""
    for page in range(8, PAGES - 100, STEP):
        await memory.read(page * PAGE, 1)
    with trio.fail_after(20):
        while transfer.filling.residency.find(State.REQUESTED, 0) is not None:  # noqa: ASYNC110
            await trio.sleep(0.001)


@pytest.mark.parametrize("lane", ["native", "trio"])
async def test_the_share_that_was_not_touched(lane: LaneKind, source: Path, memory: OwnMemory) -> None:
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
        # Nobody waited for the source: these are no faults that anything is concluded from.
        assert now.demand.faults <= before.demand.faults + 2 * PAGES // STEP // 16
        transfer.set_background("linear")
        await transfer.wait_complete()
        assert transfer.statistics().prefetch_unused == now.prefetch_unused
        assert complete_fields(transfer.statistics())["prefetch_unused"] == round(now.prefetch_unused, 3)
        assert await memory.read(HALF, HALF) == content[HALF:]


@pytest.mark.parametrize("lane", ["native", "trio"])
async def test_what_is_given_up_untouched_was_not_used_and_is_zero(lane: LaneKind, source: Path, memory: OwnMemory) -> None:
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
async def test_when_it_is_given_up_what_came_is_there(lane: LaneKind, source: Path, memory: OwnMemory) -> None:
    async with coming(source, memory, lane) as transfer:
        await touch_every_neighbourhood(memory, transfer)
        assert transfer.statistics().prefetch.sampled > 0
    assert not transfer.statistics().complete
    assert await memory.read(0, 8 * STEP * PAGE) == source.read_bytes()[: 8 * STEP * PAGE]


@pytest.mark.parametrize("stride", [1, 2, 16, 17, 64, 512])
def test_no_stride_misses_the_sample(stride: int) -> None:
    pages = [page for page in range(0, 4000 * stride, stride) if _native.before_sampled(page, 1) == 0]
    assert 150 < len(pages) < 350
    assert _native.before_sampled(pages[0] + 1, 10_000) < 200
