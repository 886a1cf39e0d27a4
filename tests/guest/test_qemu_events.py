"""What a wrapper of pagenet.qemu learns of a migration, and the program in docs/qemu.md."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import trio
from migrations import Events, check_goes_on, destination
from processes import run
from vm import Serial, bare_command, check_unbroken, needs_migration, ram_of, run_vm

from pagenet.qemu import migrate

pytestmark = needs_migration

DOCUMENT = Path(__file__).parents[2] / "docs" / "qemu.md"
SOURCE = ["connected", "stopped", "switchover", "resumed", "complete"]
DESTINATION = [
    "qemu",
    "listening",
    "connected",
    "owner",
    "serving",
    "loaded",
    "taken",
    "resumed",
    "complete",
]


def fields_of(events: Events, name: str) -> list[dict[str, Any]]:
    return [fields for event, fields in events.said if event == name]


def others(names: list[str]) -> list[str]:
    """The names without those of events that may come any number of times."""
    return [name for name in names if name not in ("progress", "fault")]


async def test_events_of_both_sides(tmp_path: Path) -> None:
    told = Events()
    async with (
        run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a,
        destination(tmp_path, command=bare_command(tmp_path, "b"), max_bandwidth=256 << 10) as b,
    ):
        await a.serial.wait_sweeps(1)
        async with migrate(a.qmp, b.uri, on_event=told) as server:
            await server.wait_complete()
            served = server.statistics()
        await check_goes_on(b.serial)
        check_unbroken(a.serial, b.serial)
        await b.events.wait("complete")
    assert others(told.names) == SOURCE
    assert others(b.events.names) == DESTINATION
    complete = fields_of(b.events, "complete")[0]
    check_progress(fields_of(told, "progress"))
    check_progress(fields_of(b.events, "progress"))
    assert served.pages == complete["pages"]
    assert served.asked >= complete["pages"]
    assert 0 < served.demanded <= complete["faults"]
    faults = fields_of(b.events, "fault")
    assert 0 < sum(fault["count"] for fault in faults) <= complete["faults"]
    assert all(fault["fault_us"].keys() == {"p50", "p99"} for fault in faults)
    assert fields_of(b.events, "progress")[-1]["faults"] <= complete["faults"]


def check_progress(moments: list[dict[str, Any]]) -> None:
    assert moments
    shares = [moment["share"] for moment in moments]
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1
    assert all(moment["bytes"] >= 0 and moment["bytes_per_s"] >= 0 for moment in moments)
    assert any(moment["seconds_left"] is not None for moment in moments)


async def test_program_in_the_document(tmp_path: Path) -> None:
    marked = r"<!-- tests/guest/test_qemu_events.py runs this -->\n```python\n(.*?)```"
    found = re.search(marked, DOCUMENT.read_text(), re.DOTALL)
    assert found
    program = tmp_path / "program.py"
    program.write_text(found[1])
    command, uri = bare_command(tmp_path, "b"), f"unix:{tmp_path / 'b.sock'}"
    serial, pid = Serial("b"), 0
    try:
        async with (
            run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a,
            run([sys.executable, str(program), "arrive", uri, *command]) as arriving,
            trio.open_nursery() as nursery,
        ):
            qemu = await arriving.line()
            assert qemu is not None, arriving.stderr
            assert qemu.startswith("qemu ")
            pid = int(re.findall(r"'pid': (\d+)", qemu)[0])
            assert (await arriving.line() or "").startswith("listening ")
            nursery.start_soon(serial.read, await trio.open_unix_socket(tmp_path / "b.serial"))
            await a.serial.wait_sweeps(1)
            async with run([sys.executable, str(program), "leave", uri, str(a.qmp)]) as leaving:
                said = [line.split()[0] for line in await leaving.rest()]
                assert await leaving.wait_end() == 0, leaving.stderr
            assert others(said) == SOURCE
            await check_goes_on(serial)
            check_unbroken(a.serial, serial)
            os.kill(pid, signal.SIGKILL)
            assert others([line.split()[0] for line in await arriving.rest()]) == DESTINATION[2:]
            assert await arriving.wait_end() == 0, arriving.stderr
            pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
        ram_of(command).unlink(missing_ok=True)
