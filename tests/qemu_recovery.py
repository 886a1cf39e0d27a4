"""QEMU's own postcopy over an outage, recovered by a script as an operator would write one, beside
pagenet over the same outage."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio
from cable import CUTS, Cable, plugged_cable
from chaos_sites import RATE, Site, cut_for, gaps, machine, moved_guest
from vm import VM, Beat, check_unbroken, run_vm

from pagenet import PagenetError
from pagenet.qemu import connect_qmp

__all__ = ["METHODS", "OUTAGES", "stall_of"]

#: what happens, and for how many seconds
OUTAGES: list[tuple[str, float]] = [
    ("nothing", 0.0),
    *[("swallowed", seconds) for seconds in (1.5, 6.5, 15.0)],
    ("down at the source", 7.0),
    ("reset", 0.0),
]
#: QEMU's, and the capabilities that each needs; pagenet needs none
METHODS: dict[str, tuple[str, ...]] = {
    "pagenet": (),
    "postcopy": ("postcopy-ram",),
    "postcopy-preempt": ("postcopy-ram", "postcopy-preempt"),
}
# Seconds between two looks of the script at query-migrate.
_POLL = 0.5
# Seconds of an answer: a monitor may wait for a page, too.
_ANSWER = 5.0
#: seconds after the outage after which a guest that still stands is given up
GIVE_UP = 90.0
_FIRST_PORT = 7000
# Seconds from the switch to the outage.
_UNDISTURBED = 1.0


async def stall_of(method: str, what: str, seconds: float, directory: Path) -> float | None:
    """The longest time, in seconds, between two heartbeats of a guest that moves by that method
    during that outage, the switch included. None: it never went on."""
    async with plugged_cable() as cable:
        if method == "pagenet":
            return await _pagenet_stall(cable, what, seconds, directory)
        return await _qemu_stall(cable, METHODS[method], what, seconds, directory)


async def _strike(cable: Cable, what: str, seconds: float) -> None:
    await trio.sleep(_UNDISTURBED)
    if what in CUTS:
        await cut_for(cable, CUTS[CUTS.index(what)], seconds)
    elif what == "reset":
        await cable.source.reset()


def _longest(beats: list[Beat]) -> float:
    return max((stall.seconds for stall in gaps(beats)), default=0.0)


async def _pagenet_stall(cable: Cable, what: str, seconds: float, directory: Path) -> float:
    site = Site(cable, directory, "native", random.Random(), source_dials=True)
    async with moved_guest(site) as (incoming, _, beats):
        await _strike(cable, what, seconds)
        await incoming.wait_complete()
    return _longest(beats())


# ---- QEMU's own ----


class _Monitor:
    """A QEMU's monitor, with a connection for each command: one that does not answer may be tried
    again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def ask(self, name: str, /, **arguments: Any) -> Any:
        """:exc:`PagenetError` if the command fails; :exc:`trio.TooSlowError`."""
        with trio.fail_after(_ANSWER):
            async with connect_qmp(self._path) as qmp:
                return await qmp.command(name, **arguments)

    async def enable(self, *capabilities: str) -> None:
        on = [{"capability": name, "state": True} for name in capabilities]
        await self.ask("migrate-set-capabilities", capabilities=on)

    async def status(self) -> str:
        """Of its migration; empty if there is none, or no answer."""
        with suppress(PagenetError, trio.TooSlowError):
            return str((await self.ask("query-migrate")).get("status", ""))
        return ""

    async def wait(self, *wanted: str) -> None:
        while await self.status() not in wanted:  # noqa: ASYNC110 - as a script does
            await trio.sleep(0.05)


def _private(command: list[str]) -> list[str]:
    """The same machine with private RAM, QEMU's default."""
    pattern, plain = r"memory-backend-file,(.*),mem-path=([^,]+),.*", r"memory-backend-ram,\1"
    for word in command:
        if found := re.fullmatch(pattern, word):
            Path(found[2]).unlink()
    return [re.sub(pattern, plain, word) for word in command]


@asynccontextmanager
async def _machines(cable: Cable, directory: Path) -> AsyncIterator[tuple[VM, VM]]:
    here = _private(machine(directory, "a"))
    there = _private(machine(directory, "b", "-incoming", "defer"))
    async with (
        run_vm([*cable.source.within, *here], directory, "a") as a,
        run_vm([*cable.destination.within, *there], directory, "b") as b,
    ):
        yield a, b


async def _qemu_stall(
    cable: Cable, capabilities: tuple[str, ...], what: str, seconds: float, directory: Path
) -> float | None:
    await cable.limit(RATE)
    async with _machines(cable, directory) as (a, b):
        source, destination = _Monitor(a.qmp), _Monitor(b.qmp)
        await a.serial.wait_sweeps(1)
        uris = (f"tcp:{cable.destination.address}:{_FIRST_PORT + n}" for n in itertools.count())
        uri = next(uris)
        for side in (source, destination):
            await side.enable(*capabilities)
        await source.ask("migrate-set-parameters", max_bandwidth=1 << 40)
        await destination.ask("migrate-incoming", uri=uri)
        await source.ask("migrate", uri=uri)
        await source.wait("active")
        await source.ask("migrate-start-postcopy")
        await source.wait("postcopy-active")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_recover, source, destination, lambda: next(uris))
            await _strike(cable, what, seconds)
            with trio.move_on_after(GIVE_UP) as waiting:
                await destination.wait("completed")
            nursery.cancel_scope.cancel()
        if waiting.cancelled_caught:
            return None
        beats = len(b.serial.beats)
        await b.serial.wait_beats(beats + 5)
        check_unbroken(a.serial, b.serial)
        return _longest(a.serial.beats + b.serial.beats)


async def _recover(source: _Monitor, destination: _Monitor, uri: Callable[[], str]) -> None:
    """The operator's script: whenever the source says that its migration is paused, have the
    destination listen anew, and the source go on there."""
    while True:
        await trio.sleep(_POLL)
        if await source.status() != "postcopy-paused":
            continue
        with suppress(PagenetError, trio.TooSlowError):
            await _resume(source, destination, uri())


async def _resume(source: _Monitor, destination: _Monitor, uri: str) -> None:
    if await destination.status() == "postcopy-active":
        await destination.ask("migrate-pause")  # it has not noticed
        await destination.wait("postcopy-paused")
    await destination.ask("migrate-recover", uri=uri)
    await source.ask("migrate", uri=uri, resume=True)
