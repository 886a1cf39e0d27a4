"""pagenet attaches to a QEMU that waits for a guest, and that was started without the preload
library."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from migrations import attach_command, check_goes_on, migrate_command, stand_still, status_of
from processes import run
from vm import VM, bare_command, check_unbroken, needs_migration, ram_of, run_vm

from pagenet import Block, Region, UsageError
from pagenet.qemu import connect_qmp, describe
from pagenet.qemu.machine import ram_of as find_ram
from pagenet.uffd import AttachedOwner

pytestmark = needs_migration

WAITS = ("-incoming", "defer")
#: runs a command without CAP_SYS_PTRACE
LIMITED = (sys.executable, "-c", """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 19, 0, 0, 0)  # PR_CAPBSET_DROP
os.execv(sys.argv[1], sys.argv[1:])
""")  # fmt: skip
SLOWLY = ("--background", "off", "--prefetch", "0,0")


def machine(directory: Path, name: str, *, incoming: Sequence[str] = ()) -> list[str]:
    return bare_command(directory, name, memory=128 << 20, work=96, extra=incoming)


@asynccontextmanager
async def two_machines(directory: Path) -> AsyncIterator[tuple[VM, VM]]:
    """A machine whose guest works, and one that waits for it."""
    waiting = machine(directory, "b", incoming=WAITS)
    async with (
        run_vm(machine(directory, "a"), directory, "a") as a,
        run_vm(waiting, directory, "b") as b,
    ):
        await a.serial.wait_sweeps(1)
        yield a, b


def put_firmware(ram: Path) -> None:
    """Put firmware into the RAM, as a QEMU does that copies it in before it waits: the guest must
    not find it."""
    with ram.open("r+b") as file:
        for offset in range(0, 128 << 20, 1 << 20):
            file.seek(offset)
            file.write(b"firmware" * 512)


@pytest.mark.parametrize("precopy", ["off", "auto"])
async def test_migration(precopy: str, tmp_path: Path) -> None:
    """No page may come before the RAM is emptied of what QEMU has put there."""
    async with two_machines(tmp_path) as (a, b), run(attach_command(b.qmp)) as incoming:
        put_firmware(b.ram)
        uri = (await incoming.event("listening"))["uri"]
        assert await status_of(b.qmp) == "inmigrate"
        async with run([*migrate_command(a.qmp, uri), "--precopy", precopy]) as leaving:
            assert await leaving.wait() == 0, leaving.stderr
        assert await incoming.wait() == 0, incoming.stderr
        assert incoming.events[0] == {"event": "attached", "pid": b.pid, "ram": str(b.ram)}
        assert await status_of(b.qmp) == "running"
        await check_goes_on(b.serial)
        check_unbroken(a.serial, b.serial)


async def test_resume(tmp_path: Path) -> None:
    async with two_machines(tmp_path) as (a, b), run(attach_command(b.qmp, *SLOWLY)) as incoming:
        uri = (await incoming.event("listening"))["uri"]
        async with run(migrate_command(a.qmp, uri, "--precopy", "off")) as leaving:
            await leaving.event("resumed")
            await incoming.kill()
            await leaving.event("waiting")
            await stand_still(b.pid)
            command = attach_command(b.qmp, "--resume")
            command[command.index("--listen") + 1] = uri
            async with run(command) as resumed:
                assert await resumed.wait() == 0, resumed.stderr
            assert await leaving.wait() == 0, leaving.stderr
        await check_goes_on(b.serial)
        check_unbroken(a.serial, b.serial)


# ---- attachments that are refused: nothing has changed ----


async def check_refused(command: Sequence[str], status: int, says: str) -> None:
    async with run(command) as process:
        assert await process.wait() == status, process.stderr
        assert says in process.stderr
        assert process.stderr.count("\n") == 1


async def test_qemu_that_does_not_wait(tmp_path: Path) -> None:
    async with run_vm(bare_command(tmp_path, "b"), tmp_path, "b") as b:
        await b.serial.wait_beats(1)
        await check_refused(
            attach_command(b.qmp),
            2,
            "does not wait for a guest (running): start it with -incoming defer",
        )
        await check_goes_on(b.serial)
        await check_refused(
            attach_command(b.qmp, "--resume"), 2, "do not come from pagenet: it has no userfaultfd"
        )


async def test_ram_that_is_private(tmp_path: Path) -> None:
    command = [
        word.replace("share=on", "share=off") for word in bare_command(tmp_path, "b", extra=WAITS)
    ]
    async with run_vm(command, tmp_path, "b") as b:
        await check_refused(attach_command(b.qmp), 2, "start it with share=on for ram0")


async def test_no_qemu(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as sock:
                sock.sendall(b"hello\n")
                sock.recv(1)

        answering = threading.Thread(target=answer)
        answering.start()
        await check_refused(attach_command(path), 1, "is no QMP monitor: b'hello'")
        answering.join()


async def test_without_ptrace_permission(tmp_path: Path) -> None:
    """Root without CAP_SYS_PTRACE may not look into a process with more capabilities. Tried on
    either side."""
    async with run_vm(bare_command(tmp_path, "b", extra=WAITS), tmp_path, "b") as b:
        await check_refused(
            [*LIMITED, *attach_command(b.qmp)],
            7,
            f"may not look into QEMU (pid {b.pid}): Permission denied",
        )
        await check_refused(
            [*LIMITED, *attach_command(b.qmp, "--resume")],
            7,
            "may not take over the memory of process",
        )
        assert await status_of(b.qmp) == "inmigrate"
    async with run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a:
        await a.serial.wait_beats(1)
        command = [*LIMITED, *migrate_command(a.qmp, f"unix:{tmp_path / 'nobody'}")]
        await check_refused(
            command, 7, f"may not look into QEMU (pid {a.pid}): Permission denied; run as root"
        )
        await check_goes_on(a.serial)


async def test_stopped_while_nobody_has_come(tmp_path: Path) -> None:
    """The QEMU is released, and waits as before; another try succeeds."""
    async with two_machines(tmp_path) as (a, b):
        async with run(attach_command(b.qmp)) as incoming:
            await incoming.event("listening")
            incoming.send_signal(signal.SIGTERM)
            assert await incoming.wait() == 143
        assert await status_of(b.qmp) == "inmigrate"
        links = [os.readlink(entry) for entry in Path(f"/proc/{b.pid}/fd").iterdir()]
        assert not any("userfaultfd" in link or "residency" in link for link in links)
        async with run(attach_command(b.qmp)) as incoming:
            uri = (await incoming.event("listening"))["uri"]
            async with run(migrate_command(a.qmp, uri)) as leaving:
                assert await leaving.wait() == 0, leaving.stderr
            await check_goes_on(b.serial)
            check_unbroken(a.serial, b.serial)


async def test_both_have_one_file(tmp_path: Path) -> None:
    """That happens easily on one host. The source's guest keeps its memory."""
    async with run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a:
        await a.serial.wait_sweeps(1)
        own = bare_command(tmp_path, "b", extra=WAITS)
        ram_of(own).unlink()
        async with run_vm(
            [word.replace(str(ram_of(own)), str(a.ram)) for word in own], tmp_path, "b"
        ) as b:
            async with run(attach_command(b.qmp)) as incoming:
                uri = (await incoming.event("listening"))["uri"]
                await check_refused(
                    migrate_command(a.qmp, uri), 1, "both QEMUs have the same file for their RAM"
                )
                assert await incoming.wait() == 2
            assert await status_of(b.qmp) == "inmigrate"
            await check_goes_on(a.serial)
            check_unbroken(a.serial)


async def test_attached_twice(tmp_path: Path) -> None:
    """As after a pagenet that was killed before the guest came. QEMU is as before once both have
    released it."""
    async with run_vm(bare_command(tmp_path, "b", extra=WAITS), tmp_path, "b") as b:
        async with connect_qmp(b.qmp) as qmp:
            with find_ram(b.pid, await describe(qmp)) as (found,):
                assert found.file is not None
        region = Region([Block("ram", found.mapping.size)])
        with closing(AttachedOwner(b.pid, [found.mapping])) as first:
            target = await first.attach(region)
            target.close(target.scope())
            with closing(AttachedOwner(b.pid, [found.mapping])) as second:
                with pytest.raises(
                    UsageError, match="another process has begun to; start that process again"
                ):
                    await second.attach(region)
                await second.uproot()
            await first.uproot()
            target = await first.attach(region)
            target.close(target.scope())
            await first.uproot()
        assert await status_of(b.qmp) == "inmigrate"
