"""Guests whose RAM is several memory backends, one for each NUMA node."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from migrations import attach_command, check_goes_on, destination, migrate_command
from processes import run
from vm import bare_command, check_unbroken, make_ram, needs_migration, ram_of, rams_of, run_vm

from pagenet import UsageError
from pagenet.qemu import migrate, prepare_incoming

pytestmark = needs_migration

HALF = 32 << 20


def numa_command(
    directory: Path,
    name: str,
    *,
    as_json: bool = False,
    ids: Sequence[str] = ("ram1", "ram0"),
    extra: Sequence[str] = (),
) -> list[str]:
    """A machine with two nodes of the same size; the first node's backend has the name that sorts
    second."""
    command = [
        word.replace(",memory-backend=ram0", "")
        for word in bare_command(directory, name, smp=2, work=40)
    ]
    at = command.index("-object")
    ram_of(command).unlink()
    nodes = []
    for backend in ids:
        path = make_ram(name, HALF, None)
        words = f"memory-backend-file,id={backend},size={HALF},mem-path={path},share=on"
        options = {
            "qom-type": "memory-backend-file",
            "id": backend,
            "size": HALF,
            "mem-path": str(path),
            "share": True,
        }
        nodes += ["-object", json.dumps(options, separators=(",", ":")) if as_json else words]
        nodes += ["-numa", f"node,memdev={backend}"]
    return [*command[:at], *nodes, *command[at + 2 :], *extra]


async def test_migration(tmp_path: Path) -> None:
    """The guest moves once with preloading, and once more with attaching."""
    waiting = numa_command(tmp_path, "c", extra=["-incoming", "defer"])
    async with (
        run_vm(numa_command(tmp_path, "a"), tmp_path, "a") as a,
        destination(tmp_path, command=numa_command(tmp_path, "b")) as b,
        run_vm(waiting, tmp_path, "c") as c,
    ):
        await a.serial.wait_sweeps(1)
        async with migrate(a.qmp, b.uri) as server:
            await server.wait_complete()
        await b.ended.wait()
        await check_goes_on(b.serial)
        async with run(attach_command(c.qmp)) as incoming:
            uri = (await incoming.event("listening"))["uri"]
            async with run(migrate_command(b.qmp, uri)) as leaving:
                assert await leaving.wait() == 0, leaving.stderr
            assert await incoming.wait() == 0, incoming.stderr
        await check_goes_on(c.serial)
        check_unbroken(a.serial, b.serial, c.serial)


async def test_json(tmp_path: Path) -> None:
    async with (
        run_vm(numa_command(tmp_path, "a", as_json=True), tmp_path, "a") as a,
        destination(tmp_path, command=numa_command(tmp_path, "b", as_json=True)) as b,
    ):
        await a.serial.wait_sweeps(1)
        async with migrate(a.qmp, b.uri) as server:
            await server.wait_complete()
        await check_goes_on(b.serial)
        check_unbroken(a.serial, b.serial)


async def test_nodes_that_differ(tmp_path: Path) -> None:
    """Blocks are told apart by the names of their backends alone."""
    async with (
        run_vm(numa_command(tmp_path, "a"), tmp_path, "a") as a,
        destination(tmp_path, command=numa_command(tmp_path, "b", ids=("one", "two"))) as b,
    ):
        await a.serial.wait_sweeps(1)
        with pytest.raises(
            Exception,
            match="the memory backends differ: one of 33554432 bytes, two of 33554432 bytes",
        ):
            async with migrate(a.qmp, b.uri):
                raise AssertionError("not reached")
        await check_goes_on(a.serial)
        check_unbroken(a.serial)


def test_files_in_the_order_of_the_ids(tmp_path: Path) -> None:
    command = numa_command(tmp_path, "b", as_json=True)
    rams = [Path(str(json.loads(word)["mem-path"])) for word in command if word.startswith("{")]
    try:
        prepared = prepare_incoming(command, tmp_path / "monitor", tmp_path / "uffd")
        assert prepared.rams == rams[::-1]
        numbers = [f"{ram.stat().st_dev}:{ram.stat().st_ino}" for ram in rams[::-1]]
        assert prepared.environment["PAGENET_UFFD_FILES"] == ",".join(numbers)
    finally:
        for ram in rams:
            ram.unlink()


@pytest.mark.parametrize(("change", "says"), [
    ((r"backend-file,id=ram0", "backend-memfd,id=ram0"),
        "ram0 must be a file, not memory-backend-memfd: .*attach: pagenet"),
    ((r"memdev=ram0", "memdev=ram2"), "must be a file"),
    ((r"(id=ram0.*)share=on", r"\1share=off"), "must be shared: add share=on"),
])  # fmt: skip
def test_command_lines_that_cannot_receive(
    change: tuple[str, str], says: str, tmp_path: Path
) -> None:
    command = numa_command(tmp_path, "b")
    try:
        with pytest.raises(UsageError, match=says):
            prepare_incoming(
                [re.sub(*change, word) for word in command], tmp_path / "monitor", tmp_path / "uffd"
            )
    finally:
        for ram in rams_of(command):
            ram.unlink()
