"""native/crew.c: a few threads that drive the lanes of many transfers, in this process."""

from __future__ import annotations

import threading
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from processes import check_verified, run_server, run_workload, write_pattern

import pagenet
from pagenet import _native

SIZE = 1 << 20

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("uffd_permitted")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pattern(tmp_path_factory.mktemp("crew") / "source", SIZE, zero_every=4))


@pytest.mark.parametrize("threads", [1, 3])
async def test_many_at_once(threads: int, source: str, tmp_path: Path) -> None:
    """All come and go at the same time, and give memory up meanwhile."""
    path, guests = tmp_path / "owners", 12
    touching = ("--size", SIZE, "--zero-every", 4, "--order", "random", "--remove-share", 10)
    async with run_server(source) as (_, uri), pagenet.host(threads=threads) as hosting:
        await hosting.add("it", uri, path)
        await hosting.snapshots["it"].wait_cached()
        before = threading.active_count()
        async with AsyncExitStack() as stack:
            owners = [
                await stack.enter_async_context(run_workload(path, *touching, "--memory", kind))
                for _ in range(guests // 3)
                for kind in ("memfd", "anonymous", "shared")
            ]
            for owner in owners:
                await check_verified(owner)
        with trio.fail_after(30):
            while hosting.guests:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert (hosting.completed + hosting.gone, hosting.failed) == (guests, 0)
        assert threading.active_count() <= before + 1  # no thread of Python drives a lane


async def test_cancelled_in_the_middle(source: str, tmp_path: Path) -> None:
    """Lanes end when the block is left, with owners that wait for pages, and new ones that come."""
    path = tmp_path / "owners"
    options = ("--size", SIZE, "--zero-every", 4, "--think-us", 20000)
    async with run_server(source) as (_, uri), AsyncExitStack() as stack:
        async with pagenet.host(threads=1, background="off", prefetch=(0, 0)) as hosting:
            await hosting.add("it", uri, path)
            for _ in range(4):
                await stack.enter_async_context(run_workload(path, *options))
            with trio.fail_after(30):
                while sum(guest.transfer is not None for guest in hosting.guests.values()) < 4:  # noqa: ASYNC110
                    await trio.sleep(0.01)
        assert not path.exists()


def test_closed_twice() -> None:
    crew = _native.Crew(2)
    crew.close()
    crew.close()
    with pytest.raises(TypeError):
        _ = crew.crew
