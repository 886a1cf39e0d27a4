"""pagenet-qemu reclaim: a guest that was given away, and whose pages have not all gone, comes
back."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cable import Cable, needs_cable, plugged_cable
from devices import BLOCKS, echoing, wait_devices, with_devices
from migrations import (
    check_goes_on,
    destination,
    limited,
    migrate_command,
    pagenet_qemu,
    resume_command,
    run_incoming,
    stand_still,
    status_of,
    until,
)
from processes import Process, run, wait_stopped
from vm import (
    VM,
    Serial,
    bare_command,
    check_unbroken,
    in_memfd,
    needs_migration,
    run_vm,
)

from pagenet.control import connect_control
from pagenet.qemu import connect_qmp, migrate

pytestmark = needs_migration

#: page by page, so that pages are missing for long
SLOWLY = ("--background", "off", "--prefetch", "0,0")
MEMORY = 128 << 20


def guest(directory: Path, name: str) -> list[str]:
    return bare_command(directory, name, memory=MEMORY, work=96)


def reclaim_command(monitor: Path, uri: str, identity: str) -> list[str]:
    return pagenet_qemu("reclaim", "--json", "--qmp", str(monitor), uri, "--identity", identity)


def at_source(cable: Cable | None) -> list[str]:
    return [] if cable is None else cable.source.within


@dataclass
class Moved:
    """A guest that has left ``a``, most of whose pages are there still. ``before``: what it said
    there."""

    a: VM
    before: Serial
    there: Serial
    leaving: Process
    incoming: Process
    uri: str
    identity: str
    control: Path

    @property
    def pid(self) -> int:
        """The QEMU that has the guest."""
        return int(self.incoming.events[0]["pid"])

    async def ask(self) -> None:
        async with connect_control(self.control) as client:
            await client.command("reclaim")

    async def check_is_back(self) -> None:
        """The guest goes on where it came from, with every page right, and nowhere else."""
        assert await status_of(self.a.qmp) == "running"
        await check_goes_on(self.a.serial)
        check_unbroken(self.before, self.there, self.a.serial)

    async def check_goes_on_there(self) -> None:
        beats = len(self.there.beats)
        await self.there.wait_beats(beats + 5)
        check_unbroken(self.before, self.there)
        assert not self.a.serial.lines
        assert await status_of(self.a.qmp) in ("postmigrate", "paused")


@asynccontextmanager
async def moved(
    directory: Path,
    command: Callable[[Path, str], list[str]] = guest,
    cable: Cable | None = None,
    guard: bool = False,
) -> AsyncIterator[Moved]:
    """``cable``: between the two sides. ``guard``: both have one."""
    control = directory / "ctl"
    where = "127.0.0.1" if cable is None else cable.destination.address
    within = [] if cable is None else cable.destination.within
    listen = [f"tcp://{where}:0", "--plaintext", *SLOWLY]
    receive = run_incoming(
        directory, command=command(directory, "b"), listen=listen, within=within, guard=guard
    )
    async with (
        run_vm(command(directory, "a"), directory, "a") as a,
        receive as (incoming, there, uri),
    ):
        await a.serial.wait_sweeps(1)
        options = ["--precopy", "off", "--control", str(control)]
        leave = migrate_command(a.qmp, uri, *options, guard=guard)
        async with run([*at_source(cable), *leave]) as leaving:
            identity = (await leaving.event("switchover"))["identity"]
            await leaving.event("resumed")
            before = a.serial.take()
            await there.wait_beats(3)
            yield Moved(a, before, there, leaving, incoming, uri, identity, control)


def memfd_guest(directory: Path, name: str) -> list[str]:
    return in_memfd(guest(directory, name)) if name == "a" else guest(directory, name)


@pytest.mark.parametrize("command", [guest, memfd_guest])
async def test_told_while_migrate_runs(
    command: Callable[[Path, str], list[str]], tmp_path: Path
) -> None:
    async with moved(tmp_path, command) as move:
        await move.ask()
        came = await move.leaving.event("reclaimed")
        assert 0 < came["bytes"] < MEMORY
        assert (await move.incoming.event("returned"))["bytes"] == came["bytes"]
        assert (await move.leaving.wait(), await move.incoming.wait()) == (9, 9)
        assert "it runs here again" in move.leaving.stderr
        assert "missing" not in {event["event"] for event in move.incoming.events}
        await move.check_is_back()


async def test_after_everything_was_killed(tmp_path: Path) -> None:
    """Both daemons are gone, and the guest stands still. An operator has it come back, and it can
    leave again."""
    async with moved(tmp_path) as move:
        await move.incoming.kill()
        await move.leaving.kill()
        await stand_still(move.pid)
        monitor = str(tmp_path / "b.qmp")
        async with run(resume_command(move.uri, "--qmp", monitor, *SLOWLY)) as resuming:
            await resuming.event("listening")
            async with run(reclaim_command(move.a.qmp, move.uri, move.identity)) as again:
                assert await again.wait() == 0, again.stderr
            assert await resuming.wait() == 9
        await move.check_is_back()
        async with (
            destination(tmp_path, command=guest(tmp_path, "c"), name="c") as c,
            migrate(move.a.qmp, c.uri) as server,
        ):
            await server.wait_complete()
            await check_goes_on(c.serial)
            check_unbroken(move.a.serial, c.serial)


@pytest.mark.parametrize("victim", ["incoming", "migrate", "source QEMU"])
async def test_killed_half_way(victim: str, tmp_path: Path) -> None:
    """Whatever is killed while the guest goes back, it goes on where it was, and can go back
    later."""
    async with moved(tmp_path) as move:
        await move.ask()
        await move.incoming.event("returning")
        victims = {"incoming": move.incoming.pid, "migrate": move.leaving.pid}
        os.kill(victims.get(victim, move.a.pid), signal.SIGKILL)
        if victim == "incoming":
            await move.leaving.event("not_reclaimed")
            monitor = str(tmp_path / "b.qmp")
            async with run(resume_command(move.uri, "--qmp", monitor, *SLOWLY)) as resuming:
                await resuming.event("owner")
                await move.check_goes_on_there()
                await move.ask()
                assert (await move.leaving.wait(), await resuming.wait()) == (9, 9)
            await move.check_is_back()
        elif victim == "migrate":
            async with run(reclaim_command(move.a.qmp, move.uri, move.identity)) as again:
                assert await again.wait() == 0, again.stderr
            assert await move.incoming.wait() == 9
            assert "not_reclaimed" in {event["event"] for event in move.incoming.events}
            await move.check_is_back()
        else:
            await move.leaving.event("not_reclaimed")
            beats = len(move.there.beats)
            await move.there.wait_beats(beats + 5)
            check_unbroken(move.before, move.there)


async def test_destination_qemu_ends(tmp_path: Path) -> None:
    """The guest is lost with it, and both sides say so."""
    async with moved(tmp_path) as move:
        await move.ask()
        await move.incoming.event("returning")
        os.kill(move.pid, signal.SIGKILL)
        assert await move.incoming.wait() == 5, move.incoming.stderr
        await move.leaving.event("not_reclaimed")
        assert await status_of(move.a.qmp) in ("postmigrate", "paused")


def reclaiming(move: Moved, moment: str, cable: Cable | None = None) -> list[str]:
    command = reclaim_command(move.a.qmp, move.uri, move.identity)
    return [*at_source(cable), *until(moment, *command[command.index("reclaim") :])]


@asynccontextmanager
async def taken_until(
    moment: str, by: str, directory: Path, guard: bool = False
) -> AsyncIterator[Moved]:
    """A guest that is taken back ``by`` migrate or reclaim, which is killed at that moment."""
    with limited("migrate", moment):
        async with moved(directory, guard=guard) as move:
            if by == "migrate":
                await move.ask()
                assert await move.leaving.wait() == -signal.SIGKILL
            else:
                await move.leaving.kill()
                async with run(reclaiming(move, moment)) as killed:
                    assert await killed.wait() == -signal.SIGKILL
            yield move


@pytest.mark.parametrize("by", ["reclaim", "migrate"])
async def test_killed_after_it_has_taken_the_guest(by: str, tmp_path: Path) -> None:
    """Its guard process resumes the guest. The guard of ``migrate`` starts nothing that serves its
    pages: that would have the output still."""
    async with taken_until("SIGKILL at taken", by, tmp_path, guard=by == "migrate") as move:
        assert await move.incoming.wait() == 9
        await move.check_is_back()


@pytest.mark.parametrize("by", ["reclaim", "migrate"])
async def test_killed_when_it_says_taking(by: str, tmp_path: Path) -> None:
    """The guest stands still at the source, which has all of it."""
    async with taken_until("SIGKILL after taking", by, tmp_path) as move:
        assert await move.incoming.wait() == 9
        assert await status_of(tmp_path / "b.qmp") == "gone"
        assert await status_of(move.a.qmp) in ("postmigrate", "paused")
        async with connect_qmp(move.a.qmp) as qmp:
            await qmp.command("cont")
        await move.check_is_back()


@pytest.mark.parametrize(
    ("moment", "left"),
    [("SIGKILL after offer", ("postmigrate", "paused")), ("SIGKILL at returned", ("gone",))],
)
async def test_incoming_killed_once_the_guest_is_given_back(
    moment: str, left: tuple[str, ...], tmp_path: Path
) -> None:
    """The guest runs at the source. Once the destination's guards know, one ends QEMU there, and
    the other starts nothing."""
    with limited("incoming", moment):
        async with moved(tmp_path, guard=moment == "SIGKILL at returned") as move:
            await move.ask()
            assert (await move.leaving.wait(), await move.incoming.wait_end()) == (9, -9)
            await move.check_is_back()
            assert await status_of(tmp_path / "b.qmp") in left
            if "gone" not in left:
                os.kill(move.pid, signal.SIGKILL)
            await move.incoming.rest()  # nobody has the output any more


async def test_incoming_told_to_end_half_way(tmp_path: Path) -> None:
    """It has the guest go on there."""
    with limited("migrate", "SIGSTOP before loaded"):
        async with moved(tmp_path) as move:
            await move.ask()
            await wait_stopped(move.leaving)
            move.incoming.send_signal(signal.SIGTERM)
            assert await move.incoming.wait_end() == 128 + signal.SIGTERM
            assert await status_of(tmp_path / "b.qmp") == "running"
            move.leaving.send_signal(signal.SIGCONT)
            await move.leaving.event("not_reclaimed")
            async with run(resume_command(move.uri, "--pid", str(move.pid), *SLOWLY)) as resuming:
                await resuming.event("owner")
                await move.check_goes_on_there()


async def test_incoming_told_to_end_once_the_guest_is_given_back(tmp_path: Path) -> None:
    """It does not have the guest go on there."""
    with limited("incoming", "none"):
        async with moved(tmp_path) as move:
            await move.leaving.kill()
            async with run(reclaiming(move, "SIGSTOP at taken")) as stopped:
                await move.incoming.event("returned")
                move.incoming.send_signal(signal.SIGTERM)
                assert await move.incoming.wait() == 9
                stopped.send_signal(signal.SIGCONT)
                assert await stopped.wait() == 0, stopped.stderr
            await move.check_is_back()


async def test_in_doubt(tmp_path: Path) -> None:
    """The source does not say that it takes the guest: nobody runs it, and the destination says so.
    It is taken back once more."""
    with limited("incoming", "none"):
        async with moved(tmp_path) as move:
            await move.leaving.kill()
            async with run(reclaiming(move, "SIGSTOP before taking")) as stopped:
                await move.incoming.event("return_in_doubt")
                await stopped.kill()
                for monitor in (move.a.qmp, tmp_path / "b.qmp"):
                    assert await status_of(monitor) in ("postmigrate", "paused")
            async with run(reclaim_command(move.a.qmp, move.uri, move.identity)) as again:
                assert await again.wait() == 0, again.stderr
            assert await move.incoming.wait() == 9
            await move.check_is_back()


# ---- the link ----


@needs_cable
@pytest.mark.parametrize("how", ["reset", "swallowed"])
async def test_link_breaks_half_way(how: str, tmp_path: Path) -> None:
    """The guest goes on at the destination. Once the link is back it can go back."""
    async with plugged_cable() as cable, moved(tmp_path, cable=cable) as move:
        await cable.limit("40mbit", cable.destination)
        await move.ask()
        await move.incoming.event("returning")
        await cable.destination.wait_sent(1 << 20)
        if how == "reset":
            await cable.destination.reset()
        else:
            await cable.cut("swallowed")
        await move.incoming.event("not_reclaimed")
        if how == "swallowed":
            await cable.mend("swallowed")
        await cable.unlimit(cable.destination)
        await move.leaving.event("not_reclaimed")
        await move.check_goes_on_there()
        await move.ask()
        assert (await move.leaving.wait(), await move.incoming.wait()) == (9, 9)
        await move.check_is_back()


@needs_cable
async def test_link_breaks_after_taking(tmp_path: Path) -> None:
    """The guest runs at the source, and the destination ends its QEMU."""
    with limited("incoming", "none"):
        async with plugged_cable() as cable, moved(tmp_path, cable=cable) as move:
            await move.leaving.kill()
            async with run(reclaiming(move, "SIGSTOP at taken", cable)) as stopped:
                await stopped.event("taken")
                await cable.source.wait_acknowledged()
                await cable.cut("swallowed")
                stopped.send_signal(signal.SIGCONT)
                assert await stopped.wait() == 0, stopped.stderr
            assert await move.incoming.wait() == 9
            await move.check_is_back()
            assert await status_of(tmp_path / "b.qmp") == "gone"


@needs_cable
async def test_link_breaks_before_taking(tmp_path: Path) -> None:
    """The source runs the guest; the destination cannot know that, and leaves it stopped."""
    with limited("incoming", "none"):
        async with plugged_cable() as cable, moved(tmp_path, cable=cable) as move:
            await move.leaving.kill()
            async with run(reclaiming(move, "SIGSTOP before taking", cable)) as stopped:
                await wait_stopped(stopped)
                await cable.cut("swallowed")
                await move.incoming.event("return_in_doubt")
                stopped.send_signal(signal.SIGCONT)
                assert await stopped.wait() == 0, stopped.stderr
            await move.check_is_back()
            assert await status_of(tmp_path / "b.qmp") in ("postmigrate", "paused")


async def test_devices_that_do_not_fit(tmp_path: Path) -> None:
    """The guest got a device at the destination, which the source's QEMU does not have: the guest
    goes on at the destination. Once it is rid of the device, it can go back."""
    async with moved(tmp_path) as move:
        async with connect_qmp(tmp_path / "b.qmp") as qmp:
            await qmp.command("device_add", driver="virtio-rng-pci", id="more")
        await move.ask()
        reason = (await move.leaving.event("not_reclaimed"))["reason"]
        assert "QEMU cannot load the devices' state" in reason
        assert (await move.incoming.event("not_reclaimed"))["reason"] == reason
        await move.check_goes_on_there()


async def test_refusals(tmp_path: Path) -> None:
    async with run_vm(guest(tmp_path, "a"), tmp_path, "a") as a:
        async with run(reclaim_command(a.qmp, "tcp://127.0.0.1:1", "0" * 32)) as in_vain:
            assert await in_vain.wait() == 2
            assert "this QEMU has given no guest away: it is running" in in_vain.stderr
        async with run(reclaim_command(a.qmp, "tcp://127.0.0.1:1", "x")) as in_vain:
            assert await in_vain.wait() == 2
    async with moved(tmp_path) as move:
        await move.incoming.kill()
        async with run(resume_command(move.uri, "--pid", str(move.pid), *SLOWLY)) as resuming:
            await resuming.event("owner")
            await move.ask()
            reason = (await move.leaving.event("not_reclaimed"))["reason"]
            assert "does not know QEMU's monitor" in reason
            await move.check_goes_on_there()


@needs_cable
@pytest.mark.timeout(300)
async def test_devices(tmp_path: Path) -> None:
    """A guest with two CPUs on Debian's kernel, a disk, a network and a display comes back while
    most of its memory is at the source. Loading the devices writes to no page of its memory."""
    (tmp_path / "disk").touch()
    os.truncate(tmp_path / "disk", BLOCKS * 4096)
    async with (
        echoing(tmp_path / "echo"),
        plugged_cable() as cable,
        run_vm(with_devices(tmp_path, "a"), tmp_path, "a") as a,
    ):
        await cable.limit("200mbit")
        before = await wait_devices(a.serial)
        listen = [f"tcp://{cable.destination.address}:0", "--plaintext"]
        async with run_incoming(
            tmp_path,
            command=with_devices(tmp_path, "b"),
            listen=listen,
            within=cable.destination.within,
        ) as (incoming, serial, uri):
            control = tmp_path / "ctl"
            options = ["--precopy", "off", "--control", str(control)]
            leave = [*cable.source.within, *migrate_command(a.qmp, uri, *options)]
            async with run(leave) as leaving:
                await leaving.event("resumed")
                said = a.serial.take()
                await serial.wait_beats(3)
                async with connect_control(control) as client:
                    await client.command("reclaim")
                await leaving.event("reclaimed")
                assert (await leaving.wait(), await incoming.wait()) == (9, 9)
            await wait_devices(a.serial, before)
            await check_goes_on(a.serial)
            check_unbroken(said, serial, a.serial)
