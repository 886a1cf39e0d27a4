"""An owner that writes to the map of its pages while it is being filled: that costs its own
transfer, and nothing else."""

from __future__ import annotations

import mmap
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import msgpack
import pytest
import trio
from pagenet._pagenet import ffi, lib
from processes import (
    LANES,
    PAGE,
    Process,
    pull_command,
    run,
    run_server,
    run_workload,
    write_pattern,
)

from pagenet import Block, HandshakeError, Region, Run, _native
from pagenet.destination.filling import Filling
from pagenet.progress import complete_fields
from pagenet.residency import State

Write = Callable[[mmap.mmap, random.Random], None]

SIZE = 16 << 20
PAGES = SIZE // PAGE
WROTE = "the owner has written to the map of its pages"
WRITES = 4000  # each write has a few bytes, or a stretch of states

pytestmark = pytest.mark.usefixtures("uffd_permitted")


# ---- a whole transfer ----


def path_of_map(pid: int) -> str | None:
    """Of the map of pages that the process keeps; None if it keeps none."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with suppress(FileNotFoundError):  # closed meanwhile
            if _native.MAP_NAME in os.readlink(path):
                return path
    return None


@contextmanager
def map_of(pid: int) -> Iterator[mmap.mmap]:
    """The map of pages that the process keeps, mapped as its own threads have it."""
    path = path_of_map(pid)
    assert path is not None, "it keeps no map of its pages"
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    with mmap.mmap(file, lib.pn_map_bytes(PAGES)) as mapped:
        os.close(file)
        yield mapped


HEADER = ffi.sizeof("struct pn_map")
DONE = ffi.offsetof("struct pn_map", "done")
CLASSES = ffi.offsetof("struct pn_map", "classes")


def write_header(mapped: mmap.mmap, rng: random.Random) -> None:
    """Write to any part of the header but the count of pages in place, which would complete the
    transfer."""
    at = DONE
    while at == DONE:
        at = (
            rng.randrange(0, CLASSES, 8)
            if rng.random() < 0.3
            else rng.randrange(CLASSES, HEADER, 8)
        )
    value = rng.choice([0, 1, PAGES, PAGES - 1, 2**63, 2**64 - 1, rng.getrandbits(64)])
    mapped[at : at + 8] = value.to_bytes(8, "little")


def write_states(mapped: mmap.mmap, rng: random.Random) -> None:
    """Write states that a page can have, so that lanes continue with them."""
    first, count = rng.randrange(PAGES), rng.choice([1, 1, 1, 8, 64, 1000])
    count = min(count, PAGES - first)
    states = (
        bytes([rng.randrange(10)] * count)
        if rng.random() < 0.5
        else bytes(rng.randrange(10) for _ in range(count))
    )
    mapped[HEADER + first : HEADER + first + count] = states


def write_garbage(mapped: mmap.mmap, rng: random.Random) -> None:
    first, count = rng.randrange(len(mapped)), rng.randrange(1, 64)
    count = min(count, len(mapped) - first)
    mapped[first : first + count] = rng.randbytes(count)


def write_anything(mapped: mmap.mmap, rng: random.Random) -> None:
    rng.choice([write_header, write_states, write_garbage])(mapped, rng)


SCRIBBLERS = [write_header, write_states, write_anything]


async def scribble(pulling: Process, mapped: mmap.mmap, write: Write, seed: int) -> None:
    """Write until the transfer has ended, or WRITES times."""
    rng = random.Random(seed)
    for number in range(WRITES):
        write(mapped, rng)
        if number % 20 == 0:
            await trio.lowlevel.checkpoint()
            if pulling.has_ended:
                return


@asynccontextmanager
async def transfer(
    directory: Path, lane: str, memory: str
) -> AsyncIterator[tuple[Process, Process]]:
    """A transfer that is slow enough to write to the map meanwhile. The owner touches pages, and
    gives some of them up."""
    source = str(write_pattern(directory / "source", SIZE, zero_every=8))
    socket = directory / "owner.sock"
    limited = ["--max-bandwidth", "40M", "--background-lanes", "2"]
    async with run_server(source) as (_, uri):
        command = pull_command(uri, "--uffd-socket", str(socket), *limited, lane=lane)
        async with run([*command, "--prefetch", "auto"]) as pulling:
            await pulling.event("waiting")
            options: list[str | int] = [
                "--memory",
                memory,
                "--size",
                SIZE,
                "--zero-every",
                8,
                "--keep-map",
                "--wait-complete",
            ]
            touches: list[str | int] = [
                "--touches",
                4 * PAGES,
                "--order",
                "random",
                "--write-share",
                20,
                "--remove-share",
                10,
            ]
            async with run_workload(socket, *options, *touches) as owner:
                await pulling.event("owner")
                with trio.fail_after(30):
                    while path_of_map(owner.pid) is None:  # noqa: ASYNC110 - it does not tell
                        await trio.sleep(0.01)
                yield pulling, owner


async def check_end(pulling: Process, seed: int) -> int:
    """Check that it ends, at SIGTERM at the latest, without a crash, and with one line if anything
    was wrong."""
    if not pulling.has_ended:
        pulling.send_signal(signal.SIGTERM)
    code = await pulling.wait()
    said = pulling.stderr.strip().splitlines()
    # the test's own SIGTERM, which came when the transfer was over and signals were not handled any
    # more
    if code == -signal.SIGTERM:
        assert said or pulling.events[-1]["event"] == "complete", (seed, code)
        return 6 if said else 0
    assert code in (0, 5, 6, 143), (seed, code, said)
    assert len(said) <= 1, (seed, code, said)
    assert "Traceback" not in pulling.stderr
    return code


@pytest.mark.native
@pytest.mark.skipif(
    "TSAN_OPTIONS" in os.environ,
    reason="ThreadSanitizer: two lanes that get the same page do race for it",
)
@pytest.mark.parametrize(
    ("lane", "memory"), [("trio", "memfd"), ("native", "memfd"), ("native", "anonymous")]
)
@pytest.mark.parametrize("write", SCRIBBLERS, ids=lambda write: write.__name__)
async def test_owner_scribbles_while_pages_come(
    lane: str, memory: str, write: Write, tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    seed = random.randrange(1 << 32)
    print("seed", seed)
    async with transfer(tmp_path, lane, memory) as (pulling, owner):
        with map_of(owner.pid) as mapped:
            await scribble(pulling, mapped, write, seed)
            code = await check_end(pulling, seed)
            record_property("outcome", f"map: {write.__name__}, exit code {code}")


@pytest.mark.native
@pytest.mark.parametrize("lane", LANES)
async def test_complete_by_its_owners_word_alone(lane: str, tmp_path: Path) -> None:
    """The counter shows that all pages are in place, and they are not: exit code 6, and one
    line."""
    async with transfer(tmp_path, lane, "memfd") as (pulling, owner):
        with map_of(owner.pid) as mapped:
            mapped[DONE : DONE + 8] = PAGES.to_bytes(8, "little")
            assert await pulling.wait() == 6
        assert f"{WROTE}: it counts all of them as in place, and page " in pulling.stderr
        assert len(pulling.stderr.splitlines()) == 1


# ---- one thing at a time ----


class Memory:
    """Two mappings with a gap between them. A :class:`~pagenet.target.Target` to which no page
    comes."""

    placement = "fake"
    event_fd = None
    region = Region([Block("ram", 24 * PAGE)])

    def __init__(self) -> None:
        self.missing: list[Run] = []

    def scope(self) -> list[Run]:
        return [Run(0, 8), Run(16, 8)]

    def close(self, missing: list[Run]) -> None:
        self.missing = missing


@pytest.fixture
def filling() -> Iterator[Filling]:
    made = Filling(Memory())  # type: ignore[arg-type]
    yield made
    made.close()


def owner_writes(filling: Filling, offset: int, data: bytes) -> None:
    """Write to the map as the owner does, through a mapping of its own."""
    assert os.pwrite(filling.residency.shared.fd, data, offset) == len(data)


@pytest.mark.parametrize("state", [State.MISSING, State.COMING, State.OUTSIDE, 255])
def test_completion_is_not_taken_from_the_counter(state: int, filling: Filling) -> None:
    for part in filling.target.scope():
        filling.residency.set(part, State.RESIDENT)
    owner_writes(filling, HEADER + 17, bytes([state]))
    with pytest.raises(
        HandshakeError, match=f"{WROTE}: it counts all of them as in place, and page 17 is not"
    ):
        filling.check_complete()
    assert not filling.completed.is_set()
    assert filling.residency.missing() == [Run(17, 1)]


@pytest.mark.parametrize("value", [0, 3, 2**64 - 1])
def test_scope_is_not_read_from_the_map(value: int, filling: Filling) -> None:
    for name in ("pages", "scope"):
        owner_writes(filling, ffi.offsetof("struct pn_map", name), value.to_bytes(8, "little"))
    assert (filling.statistics().pages, filling.statistics().done) == (16, 0)
    filling.check_complete()
    assert not filling.completed.is_set()
    for part in filling.target.scope():
        filling.residency.set(part, State.REMOVED)
    filling.check_complete()
    assert filling.completed.is_set()


def test_pages_that_are_not_mapped_are_never_missing(filling: Filling) -> None:
    """Poisoning the missing pages would stop at such a page, and leave the rest."""
    owner_writes(filling, HEADER, bytes(24))
    assert filling.residency.missing() == [Run(0, 8), Run(16, 8)]


def test_counters_can_be_said(filling: Filling) -> None:
    """Counters fit into JSON and msgpack, whose numbers end at 64 bits, although three classes are
    summed up."""
    owner_writes(filling, CLASSES, b"\xff" * (HEADER - CLASSES))
    now = filling.statistics()
    assert now.wire_bytes < 2**63
    assert msgpack.packb(complete_fields(now))
    assert now.fault_latency.microseconds(0.99) is not None
