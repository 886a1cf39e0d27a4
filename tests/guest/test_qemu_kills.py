"""Whichever process is killed, at any time: the guest runs at the source, or at the destination, or
it stands still and that is reported. It never runs on both sides, and never with wrong memory.

The long run is `pytest --soak tests/guest/test_qemu_kills.py`; PAGENET_KILL_SEED repeats the
moments of another run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from cable import CUTS, Cable, Cut, needs_cable, plugged_cable
from migrations import (
    check_goes_on,
    command_of,
    limited,
    migrate_command,
    run_incoming,
    status_of,
)
from processes import Process, children_of, run, wait_stopped
from vm import VM, Serial, bare_command, check_unbroken, needs_migration, run_vm

pytestmark = needs_migration

QEMUS = ("source QEMU", "destination QEMU")
VICTIMS = ("migrate", "incoming", *QEMUS, "guard of migrate", "guard of incoming")
#: the events of the source's command in a migration, in this order; the first is that it was
#: started
STEPS = ("started", "connected", "stopped", "switchover", "resumed")

SEED = os.environ.get("PAGENET_KILL_SEED") or str(time.time_ns())
SOAK = 120

# Seconds: twice what the slowest case takes. The end of a connection is noticed after 10 s, and the
# guard of a dead process tries for 10 s.
PATIENCE = 45.0


@dataclass
class Move:
    """A migration that has begun."""

    a: VM
    serial: Serial
    b: Path
    leaving: Process
    incoming: Process

    def pid(self, victim: str) -> int:
        if victim == "destination QEMU":
            return int(self.incoming.events[0]["pid"])
        if victim == "source QEMU":
            return self.a.pid
        process = self.leaving if victim.endswith("migrate") else self.incoming
        return guard_of(process.pid) if victim.startswith("guard") else process.pid

    def kill(self, victim: str) -> None:
        os.kill(self.pid(victim), signal.SIGKILL)

    async def step(self, name: str) -> None:
        if name != "started":
            await until(
                lambda: (
                    self.leaving.has_ended
                    or any(event["event"] == name for event in self.leaving.events)
                )
            )

    @property
    def is_over(self) -> bool:
        """No process has anything left to do: those that are not dead have reported their end."""
        said = {event["event"] for event in self.incoming.events}
        waits = any(event["event"] in ("waiting", "in_doubt") for event in self.leaving.events)
        nothing_to_do = "complete" in said or "connected" not in said or self.source_is_away
        return (self.leaving.has_ended or waits) and (self.incoming.has_ended or nothing_to_do)

    @property
    def source_is_away(self) -> bool:
        """Whether the destination has the guest, and waits for its source."""
        news = ("disconnected", "reconnected")
        said = [event["event"] for event in self.incoming.events if event["event"] in news]
        return said[-1:] == ["disconnected"]

    @property
    def complaints(self) -> str:
        """The errors that the two commands have reported, to people or to programs."""
        warnings = [
            event
            for event in self.leaving.events + self.incoming.events
            if event["event"] in ("waiting", "in_doubt", "unconfirmed", "abandoned", "disconnected")
        ]
        return "".join(map(str, warnings)) + self.leaving.stderr + self.incoming.stderr


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110
        await trio.sleep(0.001)


def guard_of(pid: int) -> int:
    """The pid of the guard of the process ``pid``."""
    guards = [child for child in children_of(pid) if b"pagenet.qemu._guard" in command_of(child)]
    if not guards:
        raise ProcessLookupError
    return guards[0]


async def listen(process: Process) -> None:
    while (line := await process.line()) is not None:
        process.events.append(json.loads(line))


@asynccontextmanager
async def moving(directory: Path, cable: Cable | None = None) -> AsyncIterator[Move]:
    """A guest whose migration has begun, over ``cable`` if there is one."""
    address, options, here, there = "127.0.0.1", [], [], []
    if cable:
        address, options = cable.destination.address, ["--plaintext"]
        here, there = cable.source.within, cable.destination.within
    listen_options = [f"tcp://{address}:0", *options]
    async with (
        run_vm(bare_command(directory, "a"), directory, "a") as a,
        run_incoming(directory, listen=listen_options, within=there) as (incoming, serial, uri),
    ):
        await a.serial.wait_sweeps(1)
        async with (
            run([*here, *migrate_command(a.qmp, uri)]) as leaving,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(listen, leaving)
            nursery.start_soon(listen, incoming)
            yield Move(a, serial, directory / "b.qmp", leaving, incoming)
            nursery.cancel_scope.cancel()


async def settled(move: Move) -> tuple[str, str]:
    """The states of the two machines, once all is over and they do not change any more. Both must
    never run, not for a moment."""
    seen: list[tuple[str, str]] = []
    with trio.move_on_after(PATIENCE):
        while len(seen) < 4 or len(set(seen[-4:])) > 1:
            seen.append((await status_of(move.a.qmp), await status_of(move.b)))
            assert seen[-1] != ("running", "running"), move.complaints
            if not move.is_over:
                seen.clear()
            await trio.sleep(0.1)
        return seen[-1]
    raise AssertionError(
        f"nothing came of it: {seen[-3:]}, {move.leaving.events}, {move.incoming.events};"
        f" {move.complaints}"
    )


async def outcome(move: Move, victim: str) -> str:
    """Checks that the outcome is one that may be, and names it."""
    here, there = await settled(move)
    if there == "inmigrate" and not move.incoming.has_ended:
        there = "gone"  # no guest came, and it waits for the next
    assert not any(beat.bad for beat in move.a.serial.beats + move.serial.beats)
    if here == "running":
        # There is a moment between the two steps of taking the guest: if the command is killed
        # then, no process ends its QEMU.
        assert there == "gone" or (victim == "incoming" and there != "silent"), (
            f"the destination's QEMU is left: {there}"
        )
        await check_goes_on(move.a.serial)
        check_unbroken(move.a.serial)
        return (
            "runs at the source"
            if there == "gone"
            else "runs at the source, and a QEMU that stands still is left"
        )
    if there in ("running", "silent"):
        return await outcome_there(move)
    if victim == "incoming" and there == "paused":
        # It had reported that it takes the guest, and not yet told its guard to run the guest.
        said = [event["event"] for event in move.leaving.events]
        heard = [event["event"] for event in move.incoming.events]
        # It may have every page, and then the source waits for nothing.
        assert "unconfirmed" in move.complaints, (
            f"it stands still, and nobody says so: {here}, {said}, {heard}; {move.complaints}"
        )
        return "stands still at the destination, which has it; said so"
    assert there == "gone", f"the destination's QEMU is left: {there}"
    if victim in QEMUS:
        assert here == ("gone" if victim == "source QEMU" else "postmigrate")
        return "lost with its QEMU"
    assert "in_doubt" in move.complaints, f"the guest was lost: {here}, {there}; {move.complaints}"
    return "in doubt, stopped, said so"


async def outcome_there(move: Move) -> str:
    if any(event["event"] == "complete" for event in move.incoming.events):
        await check_goes_on(move.serial)
        check_unbroken(move.a.serial, move.serial)
        return "runs at the destination"
    assert move.complaints, "it stands still, and nobody says so"
    if move.serial.beats:
        check_unbroken(move.a.serial, move.serial)
    return "waits for pages at the destination, said so"


async def strike(move: Move, victim: str, cable: Cable | None, cut: Cut) -> None:
    if cable:
        await cable.cut(cut)
    elif not (victim.startswith("guard") and move.is_over):
        move.kill(victim)


async def kill_once(
    directory: Path, victim: str, step: str, delay: float, cut: Cut = CUTS[0]
) -> str:
    async with AsyncExitStack() as stack:
        cable = await stack.enter_async_context(plugged_cable()) if victim == "link" else None
        move = await stack.enter_async_context(moving(directory, cable))
        await move.step(step)
        await trio.sleep(delay)
        # If the process has ended, or does not exist yet, the migration is one like any other.
        with suppress(ProcessLookupError, FileNotFoundError):
            await strike(move, victim, cable, cut)
        return await outcome(move, victim)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("step", ["connected", "stopped", "switchover"])
async def test_killed(victim: str, step: str, tmp_path: Path) -> None:
    await kill_once(tmp_path, victim, step, 0.0)


async def test_destination_stops(tmp_path: Path) -> None:
    """The kernel keeps its connections open, and nothing comes over them: the guest does not wait
    for ever."""
    async with moving(tmp_path) as move:
        await move.step("connected")
        os.kill(move.incoming.pid, signal.SIGSTOP)
        await until(lambda: move.leaving.has_ended)
        os.kill(move.incoming.pid, signal.SIGKILL)
        assert await outcome(move, "incoming") == "runs at the source"
        # If it was stopped later than was meant, the devices' state has yet to be loaded, which may
        # take longer.
        assert " for 10 s\n" in move.leaving.stderr or " for 30 s\n" in move.leaving.stderr


async def test_told_to_end_while_the_guest_stands_still(tmp_path: Path) -> None:
    """It goes on at the source."""
    with limited("incoming", "SIGSTOP before serving"):
        async with moving(tmp_path) as move:
            await wait_stopped(move.incoming)
            move.leaving.send_signal(signal.SIGTERM)
            assert await move.leaving.wait_end() == 128 + signal.SIGTERM
            move.incoming.send_signal(signal.SIGCONT)
            assert await settled(move) == ("running", "gone")
            await check_goes_on(move.a.serial)
            check_unbroken(move.a.serial)


@needs_cable
async def test_link_cut(tmp_path: Path) -> None:
    """In each of the ways that a link breaks, before the guest is given away and after. All cases
    run at once, since they mostly wait."""
    found: dict[tuple[str, str], str] = {}

    async def cut(how: Cut, step: str) -> None:
        directory = tmp_path / f"{step}-{CUTS.index(how)}"
        directory.mkdir()
        found[how, step] = await kill_once(directory, "link", step, 0.0, how)

    async with trio.open_nursery() as nursery:
        for how in CUTS:
            nursery.start_soon(cut, how, "connected")
            nursery.start_soon(cut, how, "switchover")
    assert {found[how, "connected"] for how in CUTS} <= {
        "runs at the source",
        "in doubt, stopped, said so",
    }
    assert {found[how, "switchover"] for how in CUTS} <= {
        "runs at the destination", "waits for pages at the destination, said so",
    }  # fmt: skip


@pytest.mark.soak
@needs_cable
@pytest.mark.parametrize("number", range(SOAK))
async def test_killed_at_random(
    number: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(f"{SEED}/{number}")
    victim = (*VICTIMS, "link")[number % 7]
    step, delay, cut = chance.choice(STEPS), chance.uniform(0, 0.06), chance.choice(CUTS)
    print(f"PAGENET_KILL_SEED={SEED}: {victim} ({cut}), {delay * 1000:.1f} ms after {step}")
    record_property("outcome", f"{victim}: {await kill_once(tmp_path, victim, step, delay, cut)}")
