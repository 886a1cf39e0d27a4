"""A pagenet-qemu that is killed is followed by another, which its guard starts: the guest goes on,
and nobody types a word."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from migrations import check_goes_on, migrate_command, run_incoming, run_out
from processes import run
from vm import bare_command, check_unbroken, needs_migration, run_vm

pytestmark = needs_migration

#: page by page, so that there is always something left
SLOWLY = ("--background", "off", "--prefetch", "0,0")
MEMORY = 128 << 20


@pytest.mark.parametrize("victim", ["incoming", "migrate", "both"])
async def test_killed_after_the_guest_has_moved(victim: str, tmp_path: Path) -> None:
    there = bare_command(tmp_path, "b", memory=MEMORY, work=96)
    listen = ["tcp://127.0.0.1:0", *SLOWLY, "--control", str(tmp_path / "ctl")]
    async with (
        run_vm(bare_command(tmp_path, "a", memory=MEMORY, work=96), tmp_path, "a") as a,
        run_incoming(tmp_path, command=there, listen=listen, guard=True) as (incoming, serial, uri),
    ):
        await a.serial.wait_sweeps(1)
        async with run(migrate_command(a.qmp, uri, "--precopy", "off", guard=True)) as leaving:
            await leaving.event("resumed")
            pids = []
            if victim in ("incoming", "both"):
                os.kill(incoming.pid, signal.SIGKILL)
            if victim in ("migrate", "both"):
                os.kill(leaving.pid, signal.SIGKILL)
            if victim in ("incoming", "both"):
                pids.append((await incoming.event("restarted"))["pid"])
                await incoming.event("owner")
            else:
                await incoming.event("reconnected")
            beats = len(serial.beats)
            await serial.wait_beats(beats + 3)
            await run_out(tmp_path / "ctl")
            await (leaving if victim == "incoming" else incoming).event("complete")
            await check_goes_on(serial)
            check_unbroken(a.serial, serial)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
