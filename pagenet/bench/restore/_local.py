"""The rows for which pages come out of memory, or of files of this host."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ...children import module_command
from ...snapshot.creating import create_snapshot
from ...source.memory import open_source
from .._figures import Sample, median
from .._peers import MemoryFile, Source, running, served_at
from ._arrival import Host, Touched, Weight, arriving, bare_handler, hosting, socket_in
from ._what import PAGE, TOUCHED_ONLY, Figure, RestoreOptions, beside

__all__ = ["chain", "many", "start", "warm"]

# Bytes of the memory that is restored.
_SIZE = 64 << 20
# Of that of the chain, and pages that are written in each layer.
_CHAIN_SIZE, _WRITTEN = 16 << 20, 4


@asynccontextmanager
async def _hosted(spec: str, *options: str) -> AsyncIterator[tuple[Host, Path]]:
    """A daemon that restores guests from ``spec``, and the directory of its sockets."""
    with tempfile.TemporaryDirectory(prefix="pagenet-bench-") as name:
        directory = Path(name)
        listen = (f"unix:{directory}/source", spec, "--max-sessions", "2000")
        async with (
            served_at(*listen) as server,
            hosting(server.uri, directory, *options) as host,
        ):
            yield host, directory


async def _touch(socket: Path, page: int, count: int, shared: bool = False) -> list[int]:
    """``count`` guests at once: how long each waited for ``page``, in ns."""
    async with arriving(socket, _SIZE, [[page]] * count, shared=shared) as arrival:
        return [guest.first for guest in await arrival.go()]


# ---- a page that is at hand ----


async def warm(options: RestoreOptions) -> list[Figure]:
    """Many guests at once, which touch a page that others have touched before."""
    ours, floor = Sample(), Sample()
    page = _SIZE // PAGE // 2
    with Source(_SIZE) as source:
        async with (
            _hosted(source.spec, *TOUCHED_ONLY) as (host, directory),
            bare_handler(source, directory) as bare,
        ):
            for socket in (host.socket, bare):
                await _touch(socket, page, 1)
            for _ in range(options.rounds):
                floor.add(await _touch(bare, page, options.guests))
                ours.add(await _touch(host.socket, page, options.guests, options.shared))
                await host.empty()
    crowd = f"{options.guests} at once, first touch"
    return [
        beside("warm", f"{crowd}, p50", ours, floor, 0.5, 3.0),
        beside("warm", f"{crowd}, p99", ours, floor, 0.99, 10.0),
    ]


# ---- a chain of layers ----


async def chain(options: RestoreOptions) -> list[Figure]:
    """A guest that touches every page of the last of many layers, beside one of a snapshot that has
    the same bytes in one layer."""
    first: dict[str, list[int]] = {"one": [], "chain": []}
    last: dict[str, list[int]] = {"one": [], "chain": []}
    with tempfile.TemporaryDirectory(prefix="pagenet-bench-", dir="/dev/shm") as name:
        await _make_chain(Path(name), options.layers)
        for _ in range(options.rounds):
            for which in first:
                guest = await _cold(f"snapshot:{name}/{which}", options)
                first[which].append(guest.first)
                last[which].append(guest.last)
    return [
        _layers_beside(f"{options.layers} layers, {what}", found)
        for what, found in (("first touch", first), ("all pages", last))
    ]


async def _cold(spec: str, options: RestoreOptions) -> Touched:
    """A guest that is waiting when its daemon starts: the background is not ahead of it."""
    pages = range(_CHAIN_SIZE // PAGE)
    with tempfile.TemporaryDirectory(prefix="pagenet-bench-") as name:
        directory = Path(name)
        socket = socket_in(directory)
        async with (
            served_at(f"unix:{directory}/source", spec) as server,
            arriving(socket, _CHAIN_SIZE, [pages], shared=options.shared) as arrival,
            hosting(server.uri, directory),
        ):
            [touched] = await arrival.go()
        return touched


def _layers_beside(name: str, found: dict[str, list[int]]) -> Figure:
    value, floor = (round(median(found[which]) / 1e6, 3) for which in ("chain", "one"))
    return Figure("chain", name, value, "ms", floor, 1.1)


async def _make_chain(directory: Path, layers: int) -> None:
    """``one`` has the pattern in one layer. ``chain`` has it in so many: in the first, many pages
    are wrong, and each of the others sets a few of them right."""
    pages = random.Random(0).sample(range(_CHAIN_SIZE // PAGE), _CHAIN_SIZE // PAGE)
    each = max(1, min(_WRITTEN, len(pages) // layers))
    chain = str(directory / "chain")
    with Source(_CHAIN_SIZE) as right, _Layer(_CHAIN_SIZE) as first:
        first.write(os.pread(right.fd, _CHAIN_SIZE, 0), 0)
        for page in pages[: each * (layers - 1)]:
            first.write(os.urandom(PAGE), page)
        await _create(right.spec, str(directory / "one"))
        await _create(first.spec, chain)
        for number in range(layers - 1):
            with _Layer(_CHAIN_SIZE) as layer:
                for page in pages[number * each : (number + 1) * each]:
                    layer.write(os.pread(right.fd, PAGE, page * PAGE), page)
                await _create(layer.spec, chain, base=chain)


class _Layer(MemoryFile):
    """Memory of which only what is written is there."""

    def _fill(self) -> None:
        os.ftruncate(self.fd, self.size)

    def write(self, content: bytes, page: int) -> None:
        os.pwrite(self.fd, content, page * PAGE)


async def _create(spec: str, target: str, base: str | None = None) -> None:
    with open_source(spec) as source:
        await create_snapshot(source, target, base, sparse=base is not None)


# ---- many guests ----


async def many(options: RestoreOptions) -> list[Figure]:
    """Guests one after the other, and then many at once: what the daemon has afterwards, beside
    what it had before. With ``hostile``, how long they wait beside a hostile guest."""
    with Source(_SIZE) as source:
        async with _hosted(source.spec, *TOUCHED_ONLY, "--max-guests", "2000") as (host, _):
            crowd = _Crowd(host, options)
            for _ in range(2):  # what it keeps for later it has from then on
                await crowd.at_once()
            before, figures = host.weight(), list[Figure]()
            await crowd.in_turn(options.in_turn)
            figures += _growth(f"{options.in_turn} in turn", host.weight(), before)
            await crowd.at_once()
            figures += _growth(f"{options.at_once} at once", host.weight(), before)
            if options.hostile:
                figures += await _beside_a_hostile_one(crowd)
    return figures


@dataclass(frozen=True, slots=True)
class _Crowd:
    """Guests of one daemon. Both methods return how long each waited, in ns; unless ``beside`` is
    set, once the daemon has noticed that all have left."""

    host: Host
    options: RestoreOptions
    beside: bool = False

    async def at_once(self) -> list[int]:
        waited = await _touch(self.host.socket, 0, self.options.at_once, self.options.shared)
        await self.settle()
        return waited

    async def in_turn(self, count: int) -> list[int]:
        async with arriving(
            self.host.socket, _SIZE, [[0]] * count, in_turn=True, shared=self.options.shared
        ) as arrival:
            waited = [guest.first for guest in await arrival.go()]
        await self.settle()
        return waited

    async def settle(self) -> None:
        if not self.beside:
            await self.host.empty()


def _growth(name: str, after: Weight, before: Weight) -> list[Figure]:
    mib = [round(weight.bytes / (1 << 20), 2) for weight in (after, before)]
    return [
        Figure("many", f"{name}: memory", mib[0], "MiB", mib[1], 1.02),
        Figure("many", f"{name}: descriptors", after.descriptors, "", before.descriptors, 1.0),
        Figure("many", f"{name}: threads", after.threads, "", before.threads, 1.0),
    ]


async def _beside_a_hostile_one(crowd: _Crowd) -> list[Figure]:
    """Round by round, without and with."""
    alone, attacked = (Sample(), Sample()), (Sample(), Sample())
    hostile = module_command("pagenet.bench.restore.hostile", str(crowd.host.socket))
    for _ in range(crowd.options.rounds):
        await _add_to(alone, crowd)
        async with running(hostile) as child:
            await child.first_line()
            await _add_to(attacked, replace(crowd, beside=True))
        await crowd.settle()
    return [
        beside("many", f"{name} beside a hostile one, {quantile}", ours, floor, share, 1.1)
        for name, ours, floor in zip(("in turn", "at once"), attacked, alone, strict=True)
        for quantile, share in (("p50", 0.5), ("p99", 0.99))
    ]


async def _add_to(samples: tuple[Sample, Sample], crowd: _Crowd) -> None:
    turns, crowds = samples
    turns.add(await crowd.in_turn(max(1, crowd.options.in_turn // crowd.options.rounds)))
    crowds.add(await crowd.at_once())


# ---- starting ----


async def start(options: RestoreOptions) -> list[Figure]:
    """From exec to ready, beside a Python that imports Trio."""
    ours, floor = list[float](), list[float]()
    with Source(PAGE) as source, tempfile.TemporaryDirectory(prefix="pagenet-bench-") as name:
        async with served_at(f"unix:{name}/source", source.spec) as server:
            words = (server.uri, "--uffd-socket", f"{name}/owners", "--many", "--json")
            command = module_command("pagenet.cli.pull", *words)
            for _ in range(options.rounds):
                floor.append(await _first_line([sys.executable, "-P", "-c", _IMPORT]))
                ours.append(await _first_line(command))
    value, least = (round(median(found) * 1e3, 1) for found in (ours, floor))
    return [Figure("start", "exec to ready", value, "ms", least, 2.0)]


_IMPORT = "import trio; print(flush=True)"


async def _first_line(command: Sequence[str]) -> float:
    """Seconds until a process has said something."""
    began = time.monotonic()
    async with running(command) as child:
        await child.first_line()
        return time.monotonic() - began
    raise AssertionError("cancelled without a reason")
