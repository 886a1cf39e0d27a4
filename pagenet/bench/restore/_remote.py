"""The rows for which pages come out of a store."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from .._figures import Sample, median
from .._peers import Source
from ._arrival import Host, Touched, Weight, arriving, hosting, pss_of, socket_in
from ._store import Bare, Span, Store, spans_of
from ._what import PAGE, TOUCHED_ONLY, Curve, Figure, RestoreOptions, beside, curve_of, pieces_of

__all__ = ["clones", "recorded", "store"]

#: of what a source asks its store for
CHUNK = 2 << 20
_KEY = "memory"
# Guests of each round of ``store`` that come alone.
_ALONE = 8
# Seconds on the way in each direction, and bytes a second of a connection.
_FAR, _RATE = 0.01, 100_000_000
# What bare obstore asks for at a time.
_LADDER = tuple(64 << 10 << step for step in range(8))


@asynccontextmanager
async def _restoring(directory: Path, store: Store, uri: str, *options: str) -> AsyncIterator[Host]:
    """A daemon that reads the object itself, with an empty cache, in ``directory``, which is
    new."""
    cache = ("--cache", str(directory / "cache"))
    async with hosting(uri, directory, *cache, *options, env=store.environment) as host:
        yield host


@contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pagenet-bench-", dir="/dev/shm") as name:
        yield Path(name)


# ---- a page that is in the store ----


async def store(options: RestoreOptions, at: Store) -> list[Figure]:
    """From connecting to the first touch, of a page whose chunk was never asked for: one guest, and
    many at once that touch the same page. Each beside a GET of that chunk."""
    chunks = options.rounds * (_ALONE + 1) + 1
    alone, bare, together = Sample(), Sample(), Sample()
    with Source(chunks * CHUNK) as source, _directory() as directory:
        uri = await at.put(_KEY, source)
        client = Bare(at.environment)
        async with _restoring(directory, at, uri, *TOUCHED_ONLY) as host:
            guests = _Guests(host, source.size, options.shared)
            free = iter(range(chunks))
            await guests.touch(next(free), 1)  # begins the sessions
            for number in range(options.rounds):
                ours, theirs = list[int](), list[int]()
                for turn in range(_ALONE):
                    chunk = next(free)
                    span = Span(chunk * CHUNK, CHUNK)
                    # by turns the first: the store remembers what it has just read
                    for who in (number + turn, number + turn + 1):
                        if who % 2:
                            ours += await guests.touch(chunk, 1)
                        else:
                            theirs.append(await trio.to_thread.run_sync(client.get, _KEY, span))
                alone.add(ours)
                bare.add(theirs)
                together.add(await guests.touch(next(free), options.guests))
    crowd = f"{options.guests} at once, the same page"
    return [
        beside("store", "first touch, p50", alone, bare, 0.5, 1.2),
        beside("store", "first touch, p99", alone, bare, 0.99, 1.2),
        beside("store", f"{crowd}, p50", together, bare, 0.5, 1.2),
        beside("store", f"{crowd}, p99", together, bare, 0.99, 1.2),
    ]


@dataclass(frozen=True, slots=True)
class _Guests:
    host: Host
    size: int
    shared: bool

    async def touch(self, chunk: int, count: int) -> list[int]:
        """``count`` guests that touch the first page of a chunk: how long each waited, in ns."""
        pages = [[chunk * CHUNK // PAGE]] * count
        async with arriving(self.host.socket, self.size, pages, shared=self.shared) as arrival:
            waited = [guest.first for guest in await arrival.go()]
        await self.host.empty()
        return waited


# ---- clones ----


@dataclass(frozen=True, slots=True)
class _Restored:
    touched: Sequence[Touched]
    curve: Curve
    fetched: int
    #: of daemons and guests, in bytes
    memory: int
    weight: Weight

    @property
    def seconds(self) -> float:
        """Until the last guest had touched all of its pages."""
        return max(guest.last for guest in self.touched) / 1e9


async def clones(options: RestoreOptions, at: Store) -> tuple[list[Figure], list[Curve]]:
    """One guest, and then many, of the same memory, each time with an empty cache."""
    with Source(options.size) as source:
        uri = await at.put(_KEY, source)
    pages = pieces_of(options.size, options.working_set, options.piece)
    found: dict[int, list[_Restored]] = {1: [], options.clones: []}
    for _ in range(options.rounds):
        for count, restored in found.items():
            name = f"{count} clones" if count > 1 else "1 clone"
            restored.append(await _restored(at, uri, options, [pages] * count, name))
    one, many = (_Typical(restored) for restored in found.values())
    most = (options.size + (options.clones * 8 << 20)) / (1 << 20)
    limit = most if options.shared else None
    each = round((many.mib_in_memory - one.mib_in_memory) / max(options.clones - 1, 1), 2)
    figures = [
        Figure("clones", "from the store", many.mib_fetched, "MiB", one.mib_fetched, 1.02),
        Figure("clones", "memory of all", many.mib_in_memory, "MiB", limit=limit),
        Figure("clones", "memory of one more", each, "MiB"),
        Figure("clones", "threads", many.threads, limit=16),
        Figure("clones", "last set there", many.seconds, "s", one.seconds, 1.3),
    ]
    return figures, [one.curve, many.curve]


class _Typical:
    """Medians."""

    def __init__(self, rounds: Sequence[_Restored]) -> None:
        self.mib_fetched = round(median(each.fetched for each in rounds) / (1 << 20), 2)
        self.mib_in_memory = round(median(each.memory for each in rounds) / (1 << 20), 2)
        self.threads = max(each.weight.threads for each in rounds)
        self.seconds = round(median(each.seconds for each in rounds), 3)
        self.curve = min(rounds, key=lambda each: abs(each.seconds - self.seconds)).curve


async def _restored(
    at: Store, uri: str, options: RestoreOptions, pages: Sequence[Sequence[int]], name: str
) -> _Restored:
    with _directory() as directory:
        async with (
            at.farther(0) as (counted, relay),
            _restoring(directory, counted, uri, *TOUCHED_ONLY) as host,
            arriving(host.socket, options.size, pages, shared=options.shared) as arrival,
        ):
            pids = [host.pid, *arrival.pids]
            before = await trio.to_thread.run_sync(pss_of, arrival.pids)
            touched = await arrival.go()
            memory = await trio.to_thread.run_sync(pss_of, pids)
            curve = curve_of("clones", name, arrival, touched, options.size)
            # what a process of the bench has before it is a guest is not a guest's
            weight = host.weight()
            return _Restored(touched, curve, await relay.answered(), memory - before, weight)
    raise AssertionError("cancelled without a reason")


# ---- a recorded set ----


async def recorded(options: RestoreOptions, at: Store) -> tuple[list[Figure], list[Curve]]:
    """A guest that touches what was recorded, from a store that is far away: with the recording,
    without, and by demand alone. Beside them the same bytes by bare obstore."""
    pages = pieces_of(options.memory, options.recorded, options.piece)
    with tempfile.TemporaryDirectory(prefix="pagenet-bench-") as name:
        recording = Path(name) / "recording"
        with Source(options.memory) as source:
            uri = await at.put(_KEY, source)
        await _record(at, uri, options, pages, recording)
        orders = {
            "recorded": ("--background", f"recorded={recording}.1"),
            "demand only": TOUCHED_ONLY,
            "hot": ("--background", "hot"),
        }
        seconds: dict[str, list[float]] = {order: [] for order in orders}
        bare: dict[int, list[float]] = {chunk: [] for chunk in _LADDER}
        curves = list[Curve]()
        async with at.farther(_FAR, _RATE) as (far, _):
            for number in range(options.rounds):
                await _climb(far, pages, options.memory, bare)
                for order, wanted in orders.items():
                    touched, curve = await _cold(far, uri, options, pages, order, wanted)
                    seconds[order].append(touched.last / 1e9)
                    if not number:
                        curves.append(curve)
    ours, demand, hot = (round(median(found), 3) for found in seconds.values())
    best, chunk = min((round(median(found), 3), chunk) for chunk, found in bare.items())
    figures = [
        Figure("recorded", f"set there (bare: {chunk >> 10} KiB)", ours, "s", best, 1.3),
        Figure("recorded", "demand only over it", demand, "s", ours, 20, at_least=True),
        Figure("recorded", "hot over it", hot, "s", ours, 3, at_least=True),
    ]
    return figures, curves


async def _cold(
    at: Store,
    uri: str,
    options: RestoreOptions,
    pages: Sequence[int],
    order: str,
    wanted: Sequence[str],
) -> tuple[Touched, Curve]:
    """A guest that is waiting when its daemon starts: the background is not ahead of it."""
    size = options.memory
    with _directory() as directory:
        socket = socket_in(directory)
        async with (
            arriving(socket, size, [pages], shared=options.shared) as arrival,
            _restoring(directory, at, uri, *wanted),
        ):
            touched = await arrival.go()
        return touched[0], curve_of("recorded", order, arrival, touched, size)


async def _record(
    at: Store, uri: str, options: RestoreOptions, pages: Sequence[int], file: Path
) -> None:
    """``FILE.1``: a recording of a guest that waits for each of ``pages``. Of the object: a
    recording is of blocks of certain names."""
    settings = (*TOUCHED_ONLY, "--prefetch", "0,0", "--record", str(file))
    async with _restoring(file.parent, at, uri, *settings) as host:
        async with arriving(host.socket, options.memory, [pages]) as arrival:
            await arrival.go()
        await host.empty()


async def _climb(at: Store, pages: Sequence[int], size: int, bare: dict[int, list[float]]) -> None:
    """Add the seconds that bare obstore takes for all those pages, in chunks of each size."""
    client = Bare(at.environment)
    for chunk, found in bare.items():
        spans = spans_of(pages, PAGE, chunk, size)
        found.append(await trio.to_thread.run_sync(client.get_all, _KEY, spans) / 1e9)
