"""What chaos strikes: the two sides of one transfer, their network, and the owner in the middle.

Each kind of owner has a function that moves one, while the hand strikes, and returns how long it
stood still. It fails unless every byte was right, and nobody had to type a word.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio
from cable import CUTS, Cable, Cut, plugged_cable
from chaos import Fault, Hand, Stall, read_stalls
from migrations import check_goes_on, migrate_command, run_incoming
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
from vm import Beat, bare_command, check_unbroken, run_vm

__all__ = ["KINDS", "OUTAGES", "Site", "outage_stall", "transfer"]

SIZE = 16 << 20
OWN_MEMORY = Path(__file__).with_name("own_memory.py")
#: handshakes as Firecracker's: what the owner keeps, and what its memory is
WITHOUT_MAP = (
    ("--memory", "anonymous", "--close-uffd"),
    ("--memory", "memfd", "--close-uffd"),
    ("--memory", "anonymous", "--remove-share", "10"),
)
WITH_MAP = (("--memory", "memfd", "--keep-map", "--write-share", "30"),)
#: how fast a guest's pages may come, so that it is struck while it lacks some
RATE = "24mbit"
SLOWLY = ("--max-bandwidth", "2M", "--prefetch", "0,0", "--compress", "none")
_PIDFD_GETFD = 438
# Seconds without a heartbeat, which comes every 20 ms, that are a stall.
_SILENT = 0.1


def name_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def guards_of(pid: int) -> list[int]:
    """The guard of a process: its child, or its parent if the guard has started it."""
    related = [*children_of(pid), parent_of(pid)]
    return [other for other in related if name_of(other) == "pagenet-guard"]


def kill(*pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def stop(pid: int, seconds: float) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        await trio.sleep(seconds)
        os.kill(pid, signal.SIGCONT)


async def child_of(guards: list[int]) -> int:
    """What one of them has started, once it has."""
    while True:
        for guard in guards:
            for child in children_of(guard):
                if name_of(child) != "pagenet-guard":
                    return child
        await trio.sleep(0.005)


class Daemon:
    """One of pagenet's commands, which its guard may have started again. ``pid``: of the one that
    runs now. ``replaced``: once killed, it is replaced by a pagenet-serve, which has that guard
    alone, and says nothing of it."""

    def __init__(self, process: Process, replaced: bool = False) -> None:
        self.process, self.pid = process, process.pid
        self._replaced = replaced
        self._restarted = trio.Event()
        self._complete = trio.Event()

    async def hear(self) -> None:
        """Read its events, to the last."""
        while (line := await self.process.line()) is not None:
            self.process.events.append(said := json.loads(line))
            if said["event"] == "restarted":
                self.pid = int(said["pid"])
                self._restarted.set()
            elif said["event"] == "complete":
                self._complete.set()

    async def wait_complete(self) -> None:
        await self._complete.wait()

    async def kill(self) -> None:
        """Kill it, and wait until its guard has started another."""
        self._restarted = trio.Event()
        guards = guards_of(self.pid)
        kill(self.pid)
        with trio.move_on_after(3):  # it may be complete, and have ended just now
            if self._replaced:
                self.pid = await child_of(guards)
            else:
                await self._restarted.wait()

    @property
    def makes_guards(self) -> bool:
        return not self._replaced or self.pid == self.process.pid

    async def kill_guard(self) -> None:
        """And wait until there is another: a daemon that is killed at the same time as its guard is
        not started again."""
        before = guards_of(self.pid)
        kill(*before)
        with trio.move_on_after(3):  # it may be complete, and need none
            while set(guards_of(self.pid)) <= set(before):  # noqa: ASYNC110
                await trio.sleep(0.005)

    def kill_all(self) -> None:
        """With its guard, so that nothing is started again."""
        kill(*guards_of(self.pid), self.pid)


@dataclass
class Site:
    """One transfer, and what the hand can reach of it. ``cable``: None over unix sockets."""

    cable: Cable | None
    directory: Path
    lane: str
    chance: random.Random
    source_dials: bool
    uri: str = ""
    serving: Process | None = None
    pulling: Daemon | None = None
    pause: float = 0.0  # seconds until a source that was killed is started again
    stalls: list[Stall] = field(default_factory=list)

    # ---- where things run ----

    @property
    def here(self) -> list[str]:
        """The prefix of a command at the destination."""
        return [] if self.cable is None else self.cable.destination.within

    @property
    def there(self) -> list[str]:
        return [] if self.cable is None else self.cable.source.within

    @property
    def listener(self) -> str:
        """Where the side that does not dial listens."""
        if self.cable is None:
            return f"unix:{self.directory}/link"
        host = self.cable.destination if self.source_dials else self.cable.source
        return self.uri or f"tcp://{host.address}:0"

    async def keep_serving(self, source: str, task_status: trio.TaskStatus[None]) -> None:
        """Start the source again whenever it was killed, as systemd does."""
        started = False
        while True:
            where = self.listener
            how = ["--connect", where] if self.source_dials else ["--listen", where, "--plaintext"]
            async with run([*self.there, *serve_command(source, *how)]) as self.serving:
                if not self.uri:
                    self.uri = (await self.serving.event("listening"))["uri"]
                if not started:
                    task_status.started()
                started = True
                await self.serving.wait_end()
            await trio.sleep(self.pause)

    # ---- what can be done to it ----

    async def cut(self) -> None:
        await cut_for(self.cable, self.chance.choice(CUTS), self.chance.uniform(0.1, 1.5))

    async def reset(self) -> None:
        """All connections of one side, as by a firewall that restarts."""
        if self.cable is None:
            assert self.serving is not None
            shut_down(self.serving.pid, f"{self.directory}/link")
            return
        await self.chance.choice([self.cable.source, self.cable.destination]).reset()

    async def kill_source(self) -> None:
        assert self.serving is not None
        await self.serving.kill()

    async def stop_source(self) -> None:
        assert self.serving is not None
        await stop(self.serving.pid, self.chance.uniform(0.1, 2.0))

    async def stop_destination(self) -> None:
        assert self.pulling is not None
        await stop(self.pulling.pid, self.chance.uniform(0.1, 2.0))

    def network_faults(self) -> dict[str, Fault]:
        cutting = {} if self.cable is None else {"cut": self.cut}
        return {**cutting, "reset": self.reset}

    def faults(self) -> dict[str, Fault]:
        """Of a source that is started again, and a destination that has a guard."""
        assert self.pulling is not None
        return {
            **self.network_faults(),
            "source killed": self.kill_source,
            "source stopped": self.stop_source,
            "destination killed": self.pulling.kill,
            "destination stopped": self.stop_destination,
            "guard killed": self.pulling.kill_guard,
        }


def shut_down(pid: int, path: str) -> None:
    """End all connections of a process over the socket file ``path``."""
    libc = ctypes.CDLL(None)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                continue
            with suppress(OSError), socket.socket(fileno=take_fd(libc, pidfd, int(name))) as sock:
                listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if not listens and path in (sock.getsockname(), sock.getpeername()):
                    sock.shutdown(socket.SHUT_RDWR)
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended meanwhile, or has closed one
    finally:
        os.close(pidfd)


def take_fd(libc: ctypes.CDLL, pidfd: int, number: int) -> int:
    """A duplicate of another process's descriptor."""
    if (fd := libc.syscall(_PIDFD_GETFD, pidfd, number, 0)) < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return int(fd)


# ---- owners ----


Owner = Callable[[Site, Hand], Awaitable[list[Stall]]]


async def move_handshake(kinds: tuple[tuple[str, ...], ...], site: Site, hand: Hand) -> list[Stall]:
    """A process that hands over its memory as Firecracker does."""
    kind = site.chance.choice(kinds)
    async with handed_over(site, kind) as owner:
        assert site.pulling is not None
        async with hand.striking(site.faults()):
            await check_verified(owner)
    return read_stalls(site.directory / "stalls")


@asynccontextmanager
async def handed_over(site: Site, kind: tuple[str, ...]) -> AsyncIterator[Process]:
    """The owner of such a transfer, which has begun. The rest of it ends with the block."""
    source = str(write_pattern(site.directory / "source", SIZE))
    handshake = site.directory / "owner.sock"
    options = ["--uffd-socket", str(handshake), "--max-bandwidth", "4M"]
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        if not site.source_dials:
            await nursery.start(site.keep_serving, source)
        to = [site.listener, "--listen", "--plaintext"] if site.source_dials else [site.uri]
        command = pull_command(*to, *options, lane=site.lane, guard=True)
        pulling = await stack.enter_async_context(run([*site.here, *command]))
        site.pulling = Daemon(pulling)
        stack.callback(site.pulling.kill_all)
        if site.source_dials:
            site.uri = (await pulling.event("listening"))["uri"]
            await nursery.start(site.keep_serving, source)
        await pulling.event("waiting")
        touches = ["--touches", str(2 * SIZE // PAGE), "--think-us", "1000", "--threads", "4"]
        stalls = ["--stalls-out", str(site.directory / "stalls"), "--wait-complete"]
        what = ["--size", str(SIZE), "--order", "random"]
        owner = await stack.enter_async_context(
            run_workload(handshake, *kind, *what, *touches, *stalls)
        )
        nursery.start_soon(site.pulling.hear)
        stack.callback(nursery.cancel_scope.cancel)
        yield owner


async def move_own_memory(site: Site, hand: Hand) -> list[Stall]:
    """A program that pulls into memory of its own: if it is killed, so is the memory's owner."""
    source = str(write_pattern(site.directory / "source", SIZE))
    async with trio.open_nursery() as nursery:
        if not site.source_dials:
            await nursery.start(site.keep_serving, source)
        to = [site.listener, source, "listen"] if site.source_dials else [site.uri, source]
        async with run([*site.here, sys.executable, str(OWN_MEMORY), *to]) as owner:
            if site.source_dials:
                site.uri = (await owner.event("listening"))["uri"]
                await nursery.start(site.keep_serving, source)
            await owner.event("owner")
            site.pulling = Daemon(owner)
            mine = ("destination killed", "guard killed")
            faults = {name: fault for name, fault in site.faults().items() if name not in mine}
            async with hand.striking(faults):
                assert (await owner.event("verified"))["bad"] == 0
            assert await owner.wait() == 0, owner.stderr
        nursery.cancel_scope.cancel()
    stalls = [event for event in owner.events if event["event"] == "stall"]
    return [Stall(stall["end"], stall["seconds"]) for stall in stalls]


def machine(directory: Path, name: str, *extra: str) -> list[str]:
    return bare_command(directory, name, memory=48 << 20, work=20, extra=extra)


async def move_guest(site: Site, hand: Hand) -> list[Stall]:
    """A guest of QEMU, struck once it runs at the destination."""
    async with (
        moved_guest(site) as (incoming, leaving, beats),
        hand.striking(guest_faults(site, incoming, leaving)),
    ):
        await incoming.wait_complete()
    return gaps(beats())


@asynccontextmanager
async def moved_guest(site: Site) -> AsyncIterator[tuple[Daemon, Daemon, Callable[[], list[Beat]]]]:
    """A guest that has gone to the destination, without its pages. In the end it is well. The last
    of what is yielded returns its heartbeats so far, on either machine."""
    if site.cable is not None:
        await site.cable.limit(RATE)
    where = [site.listener, *([] if site.cable is None else ["--plaintext"])]
    here, there = machine(site.directory, "a"), machine(site.directory, "b")
    async with (
        run_vm(here, site.directory, "a") as a,
        run_incoming(
            site.directory,
            command=there,
            listen=[*where, *SLOWLY],
            within=site.here,
            guard=True,
        ) as (incoming, serial, uri),
    ):
        await a.serial.wait_sweeps(1)
        command = migrate_command(a.qmp, uri, "--precopy", "off", guard=True)
        async with run([*site.there, *command]) as leaving, trio.open_nursery() as nursery:
            sides = Daemon(incoming), Daemon(leaving, replaced=True)
            try:
                await leaving.event("resumed")
                for side in sides:
                    nursery.start_soon(side.hear)
                yield *sides, lambda: a.serial.beats + serial.beats
                await check_goes_on(serial)
                check_unbroken(a.serial, serial)
            except BaseException:
                for side in sides:
                    told = [said for said in side.process.events if said["event"] != "progress"]
                    print(side.pid, told[-8:], side.process.stderr[-2000:], file=sys.stderr)
                raise
            finally:
                for side in sides:
                    side.kill_all()
            nursery.cancel_scope.cancel()


def guest_faults(site: Site, incoming: Daemon, leaving: Daemon) -> Mapping[str, Fault]:
    async def kill_guard() -> None:
        able = [side for side in (incoming, leaving) if side.makes_guards]
        await site.chance.choice(able).kill_guard()

    async def stop_one(side: Daemon) -> None:
        await stop(side.pid, site.chance.uniform(0.1, 2.0))

    async def reset() -> None:
        if site.cable is None:
            shut_down(leaving.pid, f"{site.directory}/link")
        else:
            await site.reset()

    return {
        **site.network_faults(),
        "reset": reset,
        "source killed": leaving.kill,
        "source stopped": partial(stop_one, leaving),
        "destination killed": incoming.kill,
        "destination stopped": partial(stop_one, incoming),
        "guard killed": kill_guard,
    }


def gaps(beats: list[Beat]) -> list[Stall]:
    return [
        Stall(after.time, after.time - before.time)
        for before, after in itertools.pairwise(beats)
        if after.time - before.time > _SILENT
    ]


#: what is moved, and over what
KINDS: dict[str, tuple[Owner, bool]] = {
    "handshake without map, TCP": (partial(move_handshake, WITHOUT_MAP), True),
    "handshake with map, TCP": (partial(move_handshake, WITH_MAP), True),
    "QEMU guest, TCP": (move_guest, True),
    "QEMU guest, unix": (move_guest, False),
    "own memory, TCP": (move_own_memory, True),
    "handshake without map, unix": (partial(move_handshake, WITHOUT_MAP), False),
    "handshake with map, unix": (partial(move_handshake, WITH_MAP), False),
    "own memory, unix": (move_own_memory, False),
}


async def transfer(kind: str, hand: Hand, directory: Path) -> None:
    """Move one owner of that kind while ``hand`` strikes, and note it."""
    move, has_network = KINDS[kind]
    async with plugged_cable() if has_network else nullcontext() as cable:
        chance = random.Random(hand.chance.random())
        lane = hand.draw("lanes", LANES)
        dials = kind.startswith("QEMU") or hand.draw("who dials", (False, True))
        site = Site(cable, directory, lane, chance, dials)
        try:
            stalls = await move(site, hand)
        except BaseException:
            print(f"{kind}, lanes {lane}, source dials: {dials}; {hand.story()}", file=sys.stderr)
            raise
        hand.note(kind, stalls)


# ---- one outage ----

#: what happens, and for how many seconds
OUTAGES: list[tuple[str, float]] = [
    *[("swallowed", seconds) for seconds in (0.5, 1.5, 3.0, 6.5, 15.0)],
    *[("down at the source", 7.0), ("down at the destination", 7.0)],
    *[("reset", 0.0), ("source killed", 1.0), ("destination killed", 0.0), ("guard killed", 0.0)],
    *[("source stopped", 5.0), ("source stopped", 15.0)],
    *[("destination stopped", 5.0), ("destination stopped", 15.0)],
]


async def outage(site: Site, what: str, seconds: float) -> None:
    assert site.serving is not None
    assert site.pulling is not None
    if what in CUTS:
        await cut_for(site.cable, CUTS[CUTS.index(what)], seconds)
    elif what == "source stopped":
        await stop(site.serving.pid, seconds)
    elif what == "destination stopped":
        await stop(site.pulling.pid, seconds)
    else:
        site.pause = seconds
        await site.faults()[what]()


async def cut_for(cable: Cable | None, how: Cut, seconds: float) -> None:
    assert cable is not None
    await cable.cut(how)
    await trio.sleep(seconds)
    await cable.mend(how)


async def outage_stall(site: Site, what: str, seconds: float) -> float:
    """The longest time that a touch has taken in a transfer with that outage, in seconds."""
    async with handed_over(site, WITHOUT_MAP[0]) as owner, trio.open_nursery() as nursery:

        async def strike() -> None:
            await trio.sleep(0.5)
            await outage(site, what, seconds)

        nursery.start_soon(strike)
        await check_verified(owner)
    return max((stall.seconds for stall in read_stalls(site.directory / "stalls")), default=0.0)
