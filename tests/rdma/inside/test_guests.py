"""A running guest of QEMU moves over RDMA."""

from __future__ import annotations

from pathlib import Path

import pytest
from migrations import Events, check_goes_on, destination
from processes import can_track
from vm import bare_command, check_unbroken, run_vm

from pagenet.qemu import migrate
from pagenet.source.precopy import Precopy

MIB = 1 << 20


@pytest.mark.timeout(300)  # an emulator in an emulator
async def test_migration(tmp_path: Path) -> None:
    told = Events()

    def machine(name: str) -> list[str]:
        return bare_command(tmp_path, name, memory=32 * MIB, work=4, hot=1)

    # The destination first: a guest that works takes half of the only processor from who starts.
    async with (
        destination(tmp_path, command=machine("b"), listen="rdma://127.0.0.1:0") as b,
        run_vm(machine("a"), tmp_path, "a") as a,
    ):
        await a.serial.wait_sweeps(1)
        precopy = Precopy(1) if can_track() else None
        async with migrate(a.qmp, b.uri, precopy=precopy, on_event=told) as server:
            await server.wait_complete()
        await check_goes_on(b.serial)
        check_unbroken(a.serial, b.serial)
        assert b.arrival is not None
        assert "rdma by rxe0" in b.arrival.transfer.lane
        statistics = b.arrival.transfer.statistics()
    assert ("path", {"path": "rxe0 port 1, gid 1 (10.77.0.1)"}) in told.said
    assert statistics.complete
    assert ("round" in [event for event, _ in told.said]) == can_track()
    assert statistics.placement == "continue"
