"""Guests whose memory is copied while they run, before they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from migrations import (
    Events,
    check_goes_on,
    destination,
    migrate_command,
    resume_command,
    run_incoming,
    status_of,
)
from processes import run
from vm import bare_command, check_unbroken, needs_migration, qemu_command, run_vm

from pagenet import RemoteProtocolError, UsageError
from pagenet.control import connect_control
from pagenet.qemu import Precopy, migrate

pytestmark = needs_migration


@pytest.mark.parametrize(("rounds", "lane"), [("auto", "native"), (1, "trio"), (3, "native")])
async def test_precopy(rounds: Any, lane: Any, tmp_path: Path) -> None:
    told = Events()
    precopy = Precopy(rounds)
    command = qemu_command(tmp_path, "b")
    async with (
        run_vm(qemu_command(tmp_path, "a"), tmp_path, "a") as a,
        destination(tmp_path, command=command, lane=lane) as b,
    ):
        await a.serial.wait_sweeps(1)
        async with migrate(a.qmp, b.uri, lane=lane, precopy=precopy, on_event=told) as server:
            await server.wait_complete()
        assert await status_of(a.qmp) == "postmigrate"
        await check_goes_on(b.serial)
        check_unbroken(a.serial, b.serial)
        assert b.arrival is not None
        assert b.arrival.transfer.statistics().complete
    over = [fields for name, fields in told.said if name == "round"]
    assert [fields["round"] for fields in over] == list(range(1, len(over) + 1))
    assert over[0]["pages"] == (256 << 20) // 4096
    assert 0 < over[-1]["left"] < over[0]["pages"] / 2
    assert "no_precopy" not in told.names
    if rounds != "auto":
        assert len(over) == rounds


async def test_switch(tmp_path: Path) -> None:
    """The rounds of a slow link are ended by hand: pages that were not copied come later."""
    path = tmp_path / "ctl"
    async with (
        run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a,
        run_incoming(
            tmp_path, listen=["tcp://127.0.0.1:0", "--max-bandwidth", "1M", "--compress", "none"]
        ) as (incoming, serial, uri),
    ):
        await a.serial.wait_sweeps(1)
        options = ("--precopy", "1", "--control", str(path))
        async with run(migrate_command(a.qmp, uri, *options)) as leaving:
            await leaving.event("connected")
            async with connect_control(path) as control:
                status = await control.command("rounds", count=100)
                assert status["rounds"] == 100
                assert (status["state"], status["round"]) == ("copying", 1)
                with pytest.raises(RemoteProtocolError, match="no proper 'count'"):
                    await control.command("rounds", count=101)
            await check_goes_on(a.serial)  # it runs here still
            async with connect_control(path) as control:
                await control.command("switch")
            assert await leaving.wait() == 0
        assert "round" not in [event["event"] for event in leaving.events]
        await incoming.event("complete")
        await check_goes_on(serial)
        check_unbroken(a.serial, serial)


async def test_killed_in_a_round(tmp_path: Path) -> None:
    """Whichever side is killed: the guest goes on here, is not tracked any more, and can leave
    again."""
    slow = ["tcp://127.0.0.1:0", "--max-bandwidth", "1M", "--compress", "none"]
    async with run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a:
        await a.serial.wait_sweeps(1)
        for number, victim in enumerate(("source", "destination")):
            name = f"b{number}"
            command = bare_command(tmp_path, name)
            async with run_incoming(tmp_path, name, command=command, listen=slow) as (
                incoming,
                _,
                uri,
            ):
                options = ("--precopy", "100")
                async with run(migrate_command(a.qmp, uri, *options)) as leaving:
                    await leaving.event("connected")
                    await a.serial.wait_beats(len(a.serial.beats) + 10)
                    await (leaving if victim == "source" else incoming).kill()
                    if victim == "destination":
                        assert await leaving.wait() == 4
                    else:
                        assert await incoming.wait_end() == 4
            assert await status_of(a.qmp) == "running"
            assert not tracked(a.process.pid)
            await check_goes_on(a.serial)
        async with (
            run_incoming(tmp_path, "c", command=bare_command(tmp_path, "c")) as (_, serial, uri),
            run(migrate_command(a.qmp, uri)) as leaving,
        ):
            assert await leaving.wait() == 0
            await check_goes_on(serial)
            check_unbroken(a.serial, serial)


def tracked(pid: int) -> bool:
    """Whether a mapping of the process is write-protected for a userfaultfd."""
    flags = [
        line.split()
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines()
        if line.startswith("VmFlags:")
    ]
    return any("uw" in line for line in flags)


async def test_resumed_after_precopy(tmp_path: Path) -> None:
    """The destination is killed when it has the guest, and lacks what was stale. The guest writes
    to most of its pages, so that what is stale does not come before the kill."""
    listen = ["tcp://127.0.0.1:0", "--start-background", "after=1000", "--prefetch", "0,0"]
    there = bare_command(tmp_path, "b", work=24, hot=20)
    async with (
        run_vm(bare_command(tmp_path, "a", work=24, hot=20), tmp_path, "a") as a,
        run_incoming(tmp_path, listen=listen, command=there) as (incoming, serial, uri),
    ):
        await a.serial.wait_sweeps(1)
        pid = incoming.events[0]["pid"]
        async with run(migrate_command(a.qmp, uri, "--precopy", "1")) as leaving:
            await leaving.event("resumed")
            await incoming.kill()
            async with run(resume_command(uri, "--pid", str(pid))) as second:
                resuming = await second.event("resuming")
                assert 0 < resuming["missing"] < resuming["pages"]
                assert await second.wait() == 0
            assert await leaving.wait() == 0
        await check_goes_on(serial)
        check_unbroken(a.serial, serial)


@pytest.mark.parametrize("rounds", ["auto", 2])
async def test_writes_that_are_not_seen(rounds: Any, tmp_path: Path) -> None:
    """A disk that is read with O_DIRECT writes to RAM unseen."""
    told = Events()
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    extra = ["-blockdev", f"driver=file,node-name=d,filename={disk},cache.direct=on,locking=off"]
    async with (
        run_vm(bare_command(tmp_path, "a", extra=extra), tmp_path, "a") as a,
        destination(tmp_path, command=bare_command(tmp_path, "b", extra=extra)) as b,
    ):
        await a.serial.wait_sweeps(1)
        if rounds == "auto":
            async with migrate(a.qmp, b.uri, precopy=Precopy(rounds), on_event=told) as server:
                await server.wait_complete()
            assert "O_DIRECT" in dict(told.said)["no_precopy"]["reason"]
            await check_goes_on(b.serial)
        else:
            with pytest.raises(UsageError, match="the disk d is read with O_DIRECT"):
                async with migrate(a.qmp, b.uri, precopy=Precopy(rounds)):
                    raise AssertionError("not reached")
            await check_goes_on(a.serial)
