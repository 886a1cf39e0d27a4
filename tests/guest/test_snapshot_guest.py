"""A guest that runs becomes a snapshot, and its writes since then a layer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from migrations import check_goes_on, migrate_command, run_incoming
from processes import run
from vm import bare_command, check_unbroken, needs_migration, ram_of, run_vm

from pagenet.cli._running import open_running
from pagenet.snapshot.memory import SnapshotMemory
from pagenet.snapshot.opened import open_snapshot
from pagenet.snapshot.reading import compare_snapshots, verify_snapshot
from pagenet.snapshot.running import create_running

pytestmark = needs_migration


def memory_of(snapshot: Path) -> bytes:
    memory = SnapshotMemory.open(str(snapshot))
    try:
        data = bytearray(memory.size)
        memory.read(0, memoryview(data))
        return bytes(data)
    finally:
        memory.close()


async def test_layers_of_a_guest_that_runs(tmp_path: Path) -> None:
    """Byte by byte, the RAM of the moment in which the guest stood still."""
    command = bare_command(tmp_path, "a")
    frozen: list[bytes] = []

    class Watched:
        def __init__(self, owner: Any) -> None:
            self.owner = owner

        async def stop(self) -> None:
            await self.owner.stop()
            assert not (await self.owner.qmp.command("query-status"))["running"]

        async def go_on(self) -> None:
            frozen.append(ram_of(command).read_bytes())
            await self.owner.go_on()

    said: list[str] = []

    def note(event: str, /, **fields: object) -> None:
        said.append(event)

    async with run_vm(command, tmp_path, "a") as vm:
        await vm.serial.wait_sweeps(1)
        for name, base in (("first", None), ("second", str(tmp_path / "first"))):
            async with open_running(f"qmp:{vm.qmp}") as (source, owner, tracker):
                created = await create_running(
                    source,
                    Watched(owner),
                    tracker,
                    str(tmp_path / name),
                    base,
                    note,
                )
            await check_goes_on(vm.serial)
        assert created.layers == 2
        assert created.new < created.pages / 2
    assert [memory_of(tmp_path / name) for name in ("first", "second")] == frozen
    assert said.count("resumed") == 2


async def create(*words: str) -> list[str]:
    """Its events."""
    command = [sys.executable, "-m", "pagenet.cli.snapshot", "--json", "create", "--running"]
    async with run([*command, *words]) as process:
        events = [json.loads(line)["event"] for line in await process.rest()]
        assert await process.wait() == 0, process.stderr
        return events


async def test_layer_of_a_guest_that_was_restored(tmp_path: Path) -> None:
    """A guest whose pages pagenet has brought is tracked once all are there."""
    base = str(tmp_path / "first")
    async with run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a:
        await a.serial.wait_sweeps(1)
        assert "resumed" in await create(f"qmp:{a.qmp}", base)
        await check_goes_on(a.serial)
        async with run_incoming(tmp_path) as (incoming, serial, uri):
            async with run(migrate_command(a.qmp, uri)) as leaving:
                assert await leaving.wait() == 0
            await incoming.event("complete")
            events = await create(f"qmp:{tmp_path}/b.qmp", str(tmp_path / "second"), "--base", base)
            assert "resumed" in events
            await check_goes_on(serial)
            check_unbroken(a.serial, serial)
    with open_snapshot(str(tmp_path / "second")) as second:
        assert second.index.layers == 2
        flaws = await verify_snapshot(second)
        assert flaws.broken == 0
        with open_snapshot(base) as first:
            differ = await compare_snapshots(first, second, lambda run: None)
        assert 0 < differ < second.index.pages / 2
