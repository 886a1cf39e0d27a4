"""Owners move over a network of namespaces, while a seeded hand cuts links, drops packets, resets
connections, and stops and kills daemons and guards. Every byte is right in the end, and nobody
types a word.

It takes ``SECONDS``; with ``--soak`` an hour, or PAGENET_CHAOS_SECONDS. PAGENET_CHAOS_SEED repeats
the choices of another run. ``--soak`` also shows how long an owner stalls for each kind of outage.
"""

from __future__ import annotations

import array
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from cable import CUTS, Cable, needs_cable, plugged_cable
from processes import (
    LANES,
    PAGE,
    Process,
    check_verified,
    children_of,
    parent_of,
    pull_command,
    run,
    run_workload,
    serve_command,
    write_pattern,
)

from pagenet.uffd import probe

pytestmark = needs_cable

SECONDS = 30.0
SOAK = float(os.environ.get("PAGENET_CHAOS_SECONDS", "3600"))
SEED = os.environ.get("PAGENET_CHAOS_SEED") or str(time.time_ns())
SIZE = 16 << 20
OWNERS = (
    ("--memory", "anonymous", "--close-uffd"),
    ("--memory", "memfd", "--close-uffd"),
    ("--memory", "anonymous", "--remove-share", "10"),
    ("--memory", "memfd", "--keep-map", "--write-share", "30"),
)


@dataclass
class Site:
    """One transfer, and what the hand can reach of it."""

    cable: Cable
    source: str
    directory: Path
    lane: str
    chance: random.Random
    source_dials: bool
    uri: str = ""
    serving: Process | None = None
    pulling: int = 0  # pid
    restarted: trio.Event = field(default_factory=trio.Event)
    pause: float = 0.0  # seconds until a source that was killed is started again

    @property
    def socket(self) -> Path:
        return self.directory / "owner.sock"

    def pull_command(self) -> list[str]:
        where = self.cable.destination
        address = [f"tcp://{where.address}:0", "--listen", "--plaintext"]
        to = address if self.source_dials else [self.uri]
        options = ["--uffd-socket", str(self.socket), "--max-bandwidth", "4M"]
        return [*where.within, *pull_command(*to, *options, lane=self.lane, guard=True)]

    def serve_command(self) -> list[str]:
        where = self.cable.source
        address = self.uri or f"tcp://{where.address}:0"
        how = ["--connect", address] if self.source_dials else ["--listen", address, "--plaintext"]
        return [*where.within, *serve_command(self.source, *how)]

    async def hear(self, pulling: Process) -> None:
        """Follow the pids of the pagenet-pulls, until the last one is done."""
        self.pulling = pulling.pid
        while (line := await pulling.line()) is not None and '"complete"' not in line:
            if '"restarted"' in line:
                self.pulling = int(json.loads(line)["pid"])
                self.restarted.set()


async def cut(site: Site) -> None:
    how = site.chance.choice(CUTS)
    await site.cable.cut(how)
    await trio.sleep(site.chance.uniform(0.1, 1.5))
    await site.cable.mend(how)


async def reset(site: Site) -> None:
    """All connections of one side, as by a firewall that restarts."""
    host = site.chance.choice([site.cable.source, site.cable.destination])
    await trio.run_process(
        [*host.within, "ss", "-K", "-t", "state", "established"], capture_stdout=True, check=False
    )


async def kill_source(site: Site) -> None:
    assert site.serving is not None
    await site.serving.kill()


async def kill_destination(site: Site) -> None:
    site.restarted = trio.Event()
    with suppress(ProcessLookupError):
        os.kill(site.pulling, signal.SIGKILL)
    with trio.move_on_after(3):  # it may be complete, and have ended just now
        await site.restarted.wait()


async def kill_guard(site: Site) -> None:
    for pid in guards_of(site.pulling):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def stop_destination(site: Site) -> None:
    await stop(site.pulling, site.chance.uniform(0.1, 2.0))


async def stop_source(site: Site) -> None:
    assert site.serving is not None
    await stop(site.serving.pid, site.chance.uniform(0.1, 2.0))


async def stop(pid: int, seconds: float) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        await trio.sleep(seconds)
        os.kill(pid, signal.SIGCONT)


def guards_of(pid: int) -> list[int]:
    """The guard of a process: its child, or its parent if the guard has started it."""
    related = [*children_of(pid), parent_of(pid)]
    return [other for other in related if name_of(other) == "pagenet-guard"]


def name_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


FAULTS: dict[str, Callable[[Site], Awaitable[None]]] = {
    "cut": cut,
    "reset": reset,
    "source killed": kill_source,
    "destination killed": kill_destination,
    "guard killed": kill_guard,
    "source stopped": stop_source,
    "destination stopped": stop_destination,
}


async def keep_serving(site: Site, task_status: trio.TaskStatus[None]) -> None:
    """Start the source again whenever it was killed, as systemd does."""
    started = False
    while True:
        async with run(site.serve_command()) as site.serving:
            if not site.uri:
                site.uri = (await site.serving.event("listening"))["uri"]
            if not started:
                task_status.started()
            started = True
            await site.serving.wait_end()
        await trio.sleep(site.pause)


async def strike(site: Site, struck: Counter[str]) -> None:
    """One fault after the other."""
    while True:
        await trio.sleep(site.chance.uniform(0.1, 0.8))
        name = site.chance.choice(list(FAULTS))
        struck[name] += 1
        await FAULTS[name](site)


async def move(
    site: Site,
    struck: Counter[str],
    hand: Callable[[Site, Counter[str]], Awaitable[None]],
    kind: tuple[str, ...],
) -> float:
    """One transfer, while ``hand`` does what it likes. Returns the longest time that a touch has
    taken, in seconds."""
    latencies = site.directory / "latencies"
    async with trio.open_nursery() as nursery:
        if not site.source_dials:
            await nursery.start(keep_serving, site)
        async with run(site.pull_command()) as pulling:
            if site.source_dials:
                site.uri = (await pulling.event("listening"))["uri"]
                await nursery.start(keep_serving, site)
            await pulling.event("waiting")
            what = ["--size", str(SIZE), "--order", "random", "--threads", "4"]
            touches: list[str | int] = [
                "--touches",
                2 * SIZE // PAGE,
                "--think-us",
                1000,
                "--wait-complete",
            ]
            kept = ["--latency-out", str(latencies)]
            async with run_workload(site.socket, *kind, *what, *touches, *kept) as owner:
                nursery.start_soon(site.hear, pulling)
                try:
                    async with trio.open_nursery() as striking:
                        striking.start_soon(hand, site, struck)
                        await check_verified(owner)
                        striking.cancel_scope.cancel()
                except BaseException:
                    for pid in (*guards_of(site.pulling), site.pulling):
                        os.kill(pid, signal.SIGKILL)
                    raise
            nursery.cancel_scope.cancel()
    found = array.array("Q")
    found.frombytes(latencies.read_bytes())
    return max(found, default=0) / 1e9


@pytest.mark.parametrize(
    "seconds",
    [SECONDS, pytest.param(SOAK, marks=[pytest.mark.soak, pytest.mark.timeout(SOAK + 400)])],
)
async def test_chaos(
    seconds: float, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    probe()
    print(f"PAGENET_CHAOS_SEED={SEED}")
    source = str(write_pattern(tmp_path / "source", SIZE))
    chance, struck, transfers, longest = random.Random(SEED), Counter[str](), 0, 0.0
    end = trio.current_time() + seconds
    while trio.current_time() < end:
        directory = tmp_path / str(transfers)
        directory.mkdir()
        lane, dials = chance.choice(LANES), chance.random() < 0.5
        async with plugged_cable() as cable:
            site = Site(cable, source, directory, lane, random.Random(chance.random()), dials)
            stall = await move(site, struck, strike, chance.choice(OWNERS))
            longest = max(longest, stall)
        transfers += 1
    told = ", ".join(f"{name} {count}" for name, count in sorted(struck.items()))
    print(f"{transfers} transfers, {struck.total()} faults ({told}); longest stall {longest:.1f} s")
    record_property("outcome", f"{transfers} transfers, {struck.total()} faults")


# ---- how long an owner stalls ----

Outage = tuple[str, float]
#: what happens, and for how many seconds
OUTAGES: list[Outage] = [
    *[("swallowed", seconds) for seconds in (0.5, 1.5, 3.0, 6.5, 15.0)],
    *[("down at the source", 7.0), ("down at the destination", 7.0)],
    *[("reset", 0.0), ("source killed", 1.0), ("destination killed", 0.0), ("guard killed", 0.0)],
    *[("source stopped", 5.0), ("source stopped", 15.0)],
    *[("destination stopped", 5.0), ("destination stopped", 15.0)],
]


async def outage(site: Site, what: str, seconds: float) -> None:
    if what in CUTS:
        how = CUTS[CUTS.index(what)]
        await site.cable.cut(how)
        await trio.sleep(seconds)
        await site.cable.mend(how)
    elif what == "source stopped":
        assert site.serving is not None
        await stop(site.serving.pid, seconds)
    elif what == "destination stopped":
        await stop(site.pulling, seconds)
    elif what == "source killed":
        site.pause = seconds
        await kill_source(site)
    else:
        await FAULTS[what](site)


@pytest.mark.soak
@pytest.mark.timeout(120)
@pytest.mark.parametrize("source_dials", [False, True], ids=["destination dials", "source dials"])
@pytest.mark.parametrize(("what", "seconds"), OUTAGES)
async def test_outages(
    what: str,
    seconds: float,
    source_dials: bool,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Prints the longest time that a touch has taken, beside that of the outage."""
    probe()
    source = str(write_pattern(tmp_path / "source", SIZE))
    async with plugged_cable() as cable:
        site = Site(cable, source, tmp_path, "native", random.Random(), source_dials)

        async def hand(site: Site, struck: Counter[str]) -> None:
            await trio.sleep(0.5)
            await outage(site, what, seconds)
            await trio.sleep_forever()

        stall = await move(site, Counter(), hand, OWNERS[0])
    who = "source" if source_dials else "destination"
    print(f"{what}, {seconds:g} s; the {who} dials: longest stall {stall:.2f} s")
    record_property("outcome", f"{what}, {seconds:g} s: stall {stall:.2f} s")
