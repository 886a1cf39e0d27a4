"""What is checked before a guest is changed: one line tells what to change, and the guest goes
on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from migrations import check_goes_on, status_of
from processes import plant_pagenet, run
from vm import bare_command, check_unbroken, needs_guest, ram_of, run_vm

from pagenet import UsageError
from pagenet.cli.qemu import main
from pagenet.qemu import Backend, Machine, connect_qmp, migrate, prepare_incoming
from pagenet.qemu._guard import guarding

MACHINE = Machine(
    version=(7, 2, 22),
    kind="pc-i440fx-7.2-machine",
    ram=64 << 20,
    cpus=1,
    arch="x86_64",
    kvm=False,
    status="running",
    backends=(Backend("ram0", "memory-backend-file", 64 << 20, True, 1 << 30),),
)


@pytest.mark.parametrize(("change", "says"), [
    ({"version": [8, 0, 0]},
        "the destination's QEMU is older: 8.0.0 at the source, 7.2.22 at the destination;"
        " it must be the"),
    ({"version": [7, 3, 0]}, "the destination's QEMU is older"),
    ({"version": "new"}, "the source does not say which QEMU it is"),
    ({"version": [7, "x"]}, "the source does not say which QEMU it is"),
    ({"kvm": True}, "the accelerator differs: KVM at the source, TCG at the destination"),
    ({"arch": "aarch64"},
        "the architecture differs: aarch64 at the source, x86_64 at the destination"),
])  # fmt: skip
def test_machines_that_differ(change: dict[str, Any], says: str) -> None:
    assert says in str(MACHINE.difference({**MACHINE.as_message(), **change}))


@pytest.mark.parametrize("version", [(7, 2, 0), (7, 2, 99), (5, 0, 0)])
def test_destination_of_the_same_version_or_newer(version: tuple[int, int, int]) -> None:
    assert MACHINE.difference(replace(MACHINE, version=version).as_message()) is None


async def test_the_guard_is_of_this_pagenet_and_not_of_one_that_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_pagenet(tmp_path)
    monkeypatch.chdir(tmp_path)
    async with guarding(tmp_path / "monitor", os.getpid()):
        pass
    assert not (tmp_path / "imported").exists()


# ---- at the source ----


def shared(command: list[str]) -> list[str]:
    return command


def private(command: list[str]) -> list[str]:
    return [word.replace("share=on", "share=off") for word in command]


def without_backend(command: list[str]) -> list[str]:
    at = command.index("-object")
    # its file must still be removed
    unused = ["-fw_cfg", f"name=opt/unused,string=mem-path={ram_of(command)}"]
    return [
        word.replace(",memory-backend=ram0", "")
        for word in [*command[:at], *command[at + 2 :], *unused]
    ]


def two_backends(command: list[str]) -> list[str]:
    return [*command, "-object", "memory-backend-ram,id=more,size=1M"]


def not_migratable(command: list[str]) -> list[str]:
    return [
        *command,
        "-drive",
        f"file=fat:rw:{ram_of(command).with_suffix('.fat')},format=raw,if=none,id=fat",
    ]


@needs_guest
@pytest.mark.parametrize(("machine", "says"), [
    (private,
        "QEMU would send private RAM itself, which takes as long as a precopy: "
        "start it with share=on for ram0"),
    (without_backend,
        "QEMU would send private RAM itself, .*:"
        " start it with -object memory-backend-file,id=ram0"),
    (two_backends,
        "the machine has 2 memory backends, and not all of them are its RAM or a NUMA node's"),
    (not_migratable,
        "QEMU cannot migrate this guest: The .* format used by node .*; take that out of it"),
])  # fmt: skip
async def test_guest_that_cannot_leave(
    machine: Callable[[list[str]], list[str]], says: str, tmp_path: Path
) -> None:
    command = bare_command(tmp_path, "a")
    directory = ram_of(command).with_suffix(".fat")
    directory.mkdir()
    try:
        async with run_vm(machine(command), tmp_path, "a") as a:
            with pytest.raises(UsageError, match=says):
                async with migrate(a.qmp, "unix:nobody"):
                    raise AssertionError("not reached")
            assert await status_of(a.qmp) == "running"
    finally:
        directory.rmdir()


@needs_guest
async def test_qemu_that_is_set_to_migrate_otherwise(tmp_path: Path) -> None:
    async with run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a:
        await a.serial.wait_sweeps(1)
        async with connect_qmp(a.qmp) as qmp:
            capability = {"capability": "postcopy-ram", "state": True}
            await qmp.command("migrate-set-capabilities", capabilities=[capability])
        with pytest.raises(UsageError, match="switch off QEMU's migration capability postcopy-ram"):
            async with migrate(a.qmp, "unix:nobody"):
                raise AssertionError("not reached")
        async with connect_qmp(a.qmp) as qmp:
            await qmp.command(
                "migrate-set-capabilities", capabilities=[{**capability, "state": False}]
            )
            await qmp.command("migrate-set-parameters", max_bandwidth=1000)
            await qmp.command("migrate", uri="exec:cat >/dev/null")
            await qmp.command("query-migrate")
        with pytest.raises(
            UsageError,
            match=r"QEMU is migrating already \((setup|active)\): wait for it, or say migrate_",
        ):
            async with migrate(a.qmp, "unix:nobody"):
                raise AssertionError("not reached")
        await check_goes_on(a.serial)
        check_unbroken(a.serial)


# ---- at the destination ----


@needs_guest
def test_no_room_for_the_ram(tmp_path: Path) -> None:
    command = bare_command(tmp_path, "b")
    try:
        with pytest.raises(
            UsageError,
            match=r"RAM is 70368744177664 bytes, and /dev/shm has room for \d+: make it larger",
        ):
            prepare_incoming(
                [word.replace("size=67108864", "size=64T") for word in command],
                tmp_path / "a",
                tmp_path / "b",
            )
    finally:
        ram_of(command).unlink()


def plant_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def plant_hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def plant_fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def plant_file(path: Path, victim: Path) -> None:
    path.touch()
    os.chown(path, 65534, -1)


@pytest.mark.parametrize(("plant", "says"), [
    (plant_link,
        "cannot make the destination's RAM {}: it is a symbolic link: name the file itself"),
    (plant_hard_link,
        "{} is another user's file, or has another name too: remove it, or name another one"),
    (plant_fifo, "{} is not a regular file: name another one for the destination's RAM"),
    (plant_file,
        "{} is another user's file, or has another name too: remove it, or name another one"),
])  # fmt: skip
def test_planted_where_ram_is_to_be(
    plant: Callable[[Path, Path], None], says: str, tmp_path: Path
) -> None:
    """A file or link that another user has put there is not followed, extended, waited for, or
    used."""
    if plant is plant_file and os.geteuid():
        pytest.skip("needs root, to give a file to another user")
    ram, victim = tmp_path / "ram", tmp_path / "victim"
    victim.touch()
    plant(ram, victim)
    backend = f"memory-backend-file,id=r,size=8M,mem-path={ram},share=on"
    with pytest.raises(UsageError) as raised:
        prepare_incoming(
            ["qemu", "-object", backend, "-machine", "pc,memory-backend=r"],
            tmp_path / "a",
            tmp_path / "b",
        )
    assert str(raised.value) == says.format(ram)
    assert victim.stat().st_size == 0
    assert ram.is_symlink() or ram.exists()


AS_NOBODY = """
import os, sys
from pagenet.cli.qemu import main
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


async def test_userfaultfd_is_not_permitted() -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd is set")
    command = [
        sys.executable,
        "-c",
        AS_NOBODY,
        "incoming",
        "--listen",
        "tcp://127.0.0.1:0",
        "--",
        "true",
    ]
    async with run(command) as incoming:
        assert await incoming.wait() == 7
        assert (
            "userfaultfd is not permitted to this user: make /dev/userfaultfd readable and writable"
            in incoming.stderr
        )


@pytest.mark.parametrize(("arguments", "says"), [
    ([], "say which QEMU the guest comes to: its command line after --, or its monitor with --qmp"),
    (["--pid", "1"], "say which QEMU the guest comes to"),
    (["--qmp", "x", "--", "qemu"], "say which QEMU the guest comes to"),
    (["--resume"], "--resume needs the QEMU that has the guest: --pid or --qmp"),
    (["--resume", "--", "qemu"], "--resume needs the QEMU that has the guest"),
    (["--resume", "--qmp", "/nowhere"], "no QMP monitor at /nowhere: No such file or directory"),
    (["--qmp", "/nowhere"], "no QMP monitor at /nowhere: No such file or directory"),
])  # fmt: skip
def test_which_qemu(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main(["incoming", "--listen", "tcp://127.0.0.1:0", *arguments]))
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
