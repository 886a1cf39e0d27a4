"""Guests whose RAM is a memfd, which QEMU since 8.1 does not leave out of its own stream."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from migrations import check_goes_on, migrate_command, status_of
from processes import run
from vm import bare_command, check_unbroken, in_memfd, needs_migration, qemu_version, run_vm

pytestmark = [
    *needs_migration,
    pytest.mark.skipif(qemu_version() < (8, 1), reason="QEMU before 8.1 leaves out every shared RAM"),
]


def machine(directory: Path, name: str, *extra: str) -> list[str]:
    return in_memfd(bare_command(directory, name, extra=["-device", "VGA", *extra]))


def attach_command(monitor: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "pagenet.cli.qemu", "incoming", "--json", "--qmp", str(monitor)]
    return [*command, "--listen", "tcp://127.0.0.1:0", *options]


async def test_twice(tmp_path: Path) -> None:
    waits = ("-incoming", "defer")
    async with (
        run_vm(machine(tmp_path, "a"), tmp_path, "a") as a,
        run_vm(machine(tmp_path, "b", *waits), tmp_path, "b") as b,
        run_vm(machine(tmp_path, "c", *waits), tmp_path, "c") as c,
    ):
        await a.serial.wait_sweeps(1)
        for here, there in ((a, b), (b, c)):
            async with run(attach_command(there.qmp)) as incoming:
                uri = (await incoming.event("listening"))["uri"]
                async with run(migrate_command(here.qmp, uri)) as leaving:
                    assert await leaving.wait() == 0, leaving.stderr
                    print(leaving.events)
                assert await incoming.wait() == 0, incoming.stderr
            assert await status_of(here.qmp) == "paused"
            await check_goes_on(there.serial)
        check_unbroken(a.serial, b.serial, c.serial)
