"""What the machinery costs by itself, without memory or network behind it: the residency map, the
protocol, the order of the background, and a transfer of no bytes."""

from __future__ import annotations

import mmap
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from .. import _native, transport
from .._native.testing import bench_claims
from ..background.schedule import Hot
from ..destination.pulling import pull
from ..protocol import (
    Channel,
    Class,
    Encoding,
    Hello,
    MessageDecoder,
    OutstandingRequests,
    Reply,
    RequestDecoder,
    Role,
    encode_message,
)
from ..region import Block, Region, Run
from ..residency import Residency, State
from ..source.memory import Source
from ..source.serving import serve
from ..target import Outcome, Target
from ..testing import MemoryTransport
from ..uffd import Event, Fault
from ._figures import median

__all__ = ["NullResult", "measure_null"]

# Runs of one missing page, each between two resident pages.
_RUNS = 1_000_000

_SCHEME = "memory"


@dataclass(frozen=True, slots=True)
class NullResult:
    """``count`` of ``unit`` took ``seconds``, the median of the rounds."""

    name: str
    unit: str
    count: int
    seconds: float

    @property
    def per_second(self) -> int:
        return round(self.count / self.seconds)

    @property
    def nanoseconds(self) -> float:
        return round(self.seconds / self.count * 1e9, 1)


async def measure_null(pages: int = 1 << 15, rounds: int = 3) -> list[NullResult]:
    work: list[tuple[str, str, Callable[[], int]]] = [
        ("residency, from C", "claims", lambda: _claim_in_c(pages)),
        ("residency, from Python", "claims", lambda: _claim_in_python(pages)),
        ("requests, encoded and decoded", "headers", lambda: _requests(pages)),
        ("replies, encoded and checked", "headers", lambda: _replies(pages)),
        ("hellos, encoded and decoded", "messages", lambda: _hellos(pages // 64)),
        ("faults in 4 TiB, ranked by hot", "faults", lambda: _faults(pages, 0)),
        ("the same, and a run named for each", "faults", lambda: _faults(pages, 1)),
    ]
    results = []
    with Residency(2 * _RUNS) as scattered:
        for page in range(0, 2 * _RUNS, 2):
            scattered.set(Run(page, 1), State.RESIDENT)
        work.append(
            (
                "the same, in a million runs",
                "faults",
                lambda: _rank(_region(2 * _RUNS), scattered, pages, 1),
            )
        )
        for name, unit, run in work:
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                count = run()
                seconds.append(time.perf_counter() - start)
                await trio.lowlevel.checkpoint()
            results.append(NullResult(name, unit, count, median(seconds)))
    results.append(await _transfer(pages * 16, rounds))
    return results


def _claim_in_c(pages: int) -> int:
    with Residency(pages) as residency:
        return bench_claims(residency.shared)


def _claim_in_python(pages: int) -> int:
    steps = [
        (State.MISSING, State.REQUESTED),
        (State.REQUESTED, State.PLACING),
        (State.PLACING, State.RESIDENT),
    ]
    with Residency(pages) as residency:
        return sum(residency.claim(Run(page, 1), *step) for page in range(pages) for step in steps)


def _faults(count: int, runs: int) -> int:
    """``count`` faults anywhere in 4 TiB; after each, ``hot`` names ``runs`` runs."""
    region = _region(1 << 30)
    with Residency(region.pages) as residency:
        return _rank(region, residency, count, runs)


def _rank(region: Region, residency: Residency, count: int, runs: int) -> int:
    pick = random.Random(1)
    schedule = Hot(region, residency)
    for number in range(count):
        schedule.note_faults([pick.randrange(region.pages)], number / 1000)
        for _ in range(runs):
            schedule.next_run(4 << 20)
    return count


def _region(pages: int) -> Region:
    return Region([Block("null", pages * mmap.PAGESIZE, mmap.PAGESIZE)])


def _requests(pages: int) -> int:
    region = _region(pages)
    outstanding, decoder = OutstandingRequests(region), RequestDecoder(region)
    count = 0
    for page in range(pages):
        decoder.feed(outstanding.open(Class.DEMAND, Run(page, 1)).encode())
        count += sum(1 for _ in decoder.requests())
    return count


def _replies(pages: int) -> int:
    outstanding = OutstandingRequests(_region(pages))
    for page in range(pages):
        request = outstanding.open(Class.DEMAND, Run(page, 1))
        outstanding.reply(
            Reply(request.request_id, Class.DEMAND, Encoding.ZERO, request.run, 0).encode()
        )
    return pages


def _hellos(count: int) -> int:
    decoder, region = MessageDecoder(), _region(1)
    for _ in range(count):
        decoder.feed(
            encode_message(
                Hello(Role.SOURCE, Channel.CONTROL, bytes(16), identity=bytes(16), region=region)
            )
        )
        assert decoder.next() is not None
    return count


# ---- a transfer of no bytes ----


class _NullPiece:
    """Pages that are zero, which no memory has to be read for."""

    identity = "null"
    owner: tuple[int, int | tuple[int, int]] | None = None
    is_native = False
    is_filled = False
    remote: None = None

    def __init__(self, size: int) -> None:
        self.size = size

    def read_nowait(self, offset: int, into: memoryview) -> bool:
        return True

    def read(self, offset: int, into: memoryview) -> None: ...

    def is_hole(self, offset: int, length: int) -> bool:
        return True

    def zero_map(self, offset: int, pages: int, page_size: int) -> None:
        return None

    def check_unchanged(self) -> None: ...

    def native(self, first: int, page_size: int) -> _native.SourceBlock:
        raise NotImplementedError("lanes in C read memory, and there is none")

    def close(self) -> None: ...


class _NullMemory:
    """An owner and its target, which keep no page that is placed."""

    placement = "null"
    event_fd = None

    region: Region

    async def attach(self, region: Region) -> Target:
        self.region = region
        return self

    def scope(self) -> Sequence[Run]:
        return [Run(0, self.region.pages)]

    def read_events(self) -> list[Event]:
        return []

    def pages_between(self, start: int, end: int) -> Sequence[Run]:
        return []

    def page_of(self, fault: Fault) -> int:
        raise NotImplementedError("no thread touches what is not there")

    def piece_of(self, page: int) -> Run:
        return Run(0, self.region.pages)

    def place(self, run: Run, data: memoryview | None) -> Outcome:
        return Outcome(placed=run.count)

    def settle(self, page: int | None, fault: Fault) -> bool:
        raise NotImplementedError("no thread touches what is not there")

    def wake(self, run: Run) -> None: ...

    def discard(self, run: Run) -> None: ...

    async def wait_gone(self) -> None:
        await trio.sleep_forever()

    def close(self, missing: Sequence[Run]) -> None: ...


async def _transfer(pages: int, rounds: int) -> NullResult:
    """Zero pages through Trio lanes, over connections within this process: sessions, requests,
    replies, residency."""
    transport.register(_SCHEME, MemoryTransport(capacity=1 << 20))
    source = Source([("null", _NullPiece(pages * mmap.PAGESIZE))])
    seconds = []
    async with serve(source, listen=f"{_SCHEME}://bench", lane="trio") as server:
        for _ in range(rounds):
            async with pull(server.uri, _NullMemory(), lane="trio") as transfer:
                await transfer.wait_complete()
            seconds.append(transfer.statistics().seconds)
    return NullResult("transfer in memory, Trio lanes", "pages", pages, median(seconds))
