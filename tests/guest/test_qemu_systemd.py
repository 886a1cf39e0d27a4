"""pagenet-qemu as a service of a real systemd: killed, it goes on with the guest."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from migrations import check_goes_on, migrate_command, run_out
from processes import children_of, run
from services import needs_systemd, run_systemd
from vm import VM, bare_command, check_unbroken, needs_migration, run_vm

pytestmark = [*needs_migration, needs_systemd]

MEMORY = 128 << 20
#: page by page, so that there is always something left
SLOWLY = "--background off --prefetch 0,0"


@asynccontextmanager
async def killed_at_the_end(vm: VM) -> AsyncIterator[None]:
    """For one whose process is a program that has started QEMU elsewhere."""
    try:
        yield
    finally:
        for pid in children_of(vm.pid):
            os.kill(pid, signal.SIGKILL)


async def test_killed_after_the_guest_has_come(tmp_path: Path) -> None:
    here = bare_command(tmp_path, "a", memory=MEMORY, work=96)
    waits = ("-incoming", "defer")
    there = bare_command(tmp_path, "b", memory=MEMORY, work=96, extra=waits)
    settings = {
        "QMP": str(tmp_path / "b.qmp"),
        "LISTEN": "tcp://127.0.0.1:0",
        "OPTIONS": f"--json {SLOWLY}",
    }
    async with (
        run_systemd(tmp_path) as systemd,
        run_vm(here, tmp_path, "a") as a,
        run_vm(systemd.inside(*there), tmp_path, "b") as b,
        killed_at_the_end(b),
        systemd.service("pagenet-qemu-incoming", settings) as incoming,
    ):
        uri = (await incoming.output.event("listening"))["uri"]
        await a.serial.wait_sweeps(1)
        async with run(migrate_command(a.qmp, uri, "--precopy", "off")) as leaving:
            await leaving.event("resumed")
            for _ in range(2):
                os.kill(incoming.main, signal.SIGKILL)
                await incoming.output.event("restarted")
                await incoming.output.event("owner")
            beats = len(b.serial.beats)
            await b.serial.wait_beats(beats + 3)
            await run_out(systemd.path("/run/pagenet/qemu-incoming-test.ctl"))
            await incoming.output.event("complete")
            assert await leaving.wait() == 0, leaving.stderr
        await incoming.wait_state("inactive")
        assert await incoming.show("NRestarts") == "2"
        assert await incoming.show("NFileDescriptorStore") == "0"
        await check_goes_on(b.serial)
        check_unbroken(a.serial, b.serial)
