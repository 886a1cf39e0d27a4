"""Guests whose memory is copied while they run, before they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from migrations import Events, check_goes_on, destination, status_of
from vm import bare_command, check_unbroken, needs_migration, qemu_command, run_vm

from pagenet import UsageError
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
    told = Events()
    precopy = Precopy(100)
    async with (
        run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a,
        destination(tmp_path, max_bandwidth=4 << 20) as b,
        trio.open_nursery() as nursery,
    ):
        await a.serial.wait_sweeps(1)

        async def switch() -> None:
            await told.wait("connected")
            await a.serial.wait_beats(len(a.serial.beats) + 5)
            precopy.switch()

        nursery.start_soon(switch)
        async with migrate(a.qmp, b.uri, precopy=precopy, on_event=told) as server:
            await server.wait_complete()
        await check_goes_on(b.serial)
        check_unbroken(a.serial, b.serial)
    assert "round" not in told.names


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
