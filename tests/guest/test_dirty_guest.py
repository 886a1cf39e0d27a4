"""pagenet-dirty on a guest of QEMU, beside what the guest and QEMU itself report."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from migrations import check_goes_on
from processes import Process, run
from vm import VM, bare_command, check_unbroken, in_memfd, needs_migration, run_vm

from pagenet import Unsupported
from pagenet.bench._kvm import find_kvm_cpu
from pagenet.qemu import connect_qmp

pytestmark = needs_migration

MEMORY, HOT = 64 << 20, 6 << 20


@asynccontextmanager
async def watched(vm: VM, *options: str) -> AsyncIterator[Process]:
    command = [sys.executable, "-m", "pagenet.cli.dirty", "--qmp", str(vm.qmp), "--json", *options]
    async with run(command) as dirty:
        yield dirty


@pytest.mark.parametrize("kind", ["file", "memfd"])
async def test_what_a_guest_writes(tmp_path: Path, kind: str) -> None:
    """It writes to 6 MiB all the time, and sweeps through the rest reading. QEMU's estimate is
    there too, and the guest goes on unharmed."""
    command = bare_command(tmp_path, "a", memory=MEMORY, work=24, hot=HOT >> 20)
    async with run_vm(command if kind == "file" else in_memfd(command), tmp_path, "a") as vm:
        await vm.serial.wait_sweeps(1)
        async with watched(vm, "--compare") as dirty:
            assert (await dirty.event("qemu"))["bytes_per_s"] >= 0
            while not (await dirty.event("second"))["working_set"]["1"]:
                pass
            dirty.send_signal(signal.SIGINT)
            assert await dirty.wait() == 130, dirty.stderr
        assert dirty.events[0] == {
            "event": "watching",
            "pid": vm.pid,
            "bytes": MEMORY,
            "blocks": 1,
        }
        seconds = [event for event in dirty.events if event["event"] == "second"]
        # a page or so beside: the stack, the ring of the serial port
        assert max(second["working_set"]["1"] for second in seconds) <= HOT + (1 << 20)
        assert dirty.events[-1]["qemu_bytes_per_s"] is not None
        await check_goes_on(vm.serial)
        check_unbroken(vm.serial)


async def test_guest_under_kvm(tmp_path: Path) -> None:
    try:
        find_kvm_cpu()
    except Unsupported as error:
        pytest.skip(str(error))
    # where KVM has to emulate the guest an instruction at a time, a sweep takes long
    command = bare_command(
        tmp_path, "a", memory=MEMORY, work=24, hot=HOT >> 20, words=1, accel="kvm"
    )
    async with run_vm(command, tmp_path, "a") as vm:
        await vm.serial.wait_sweeps(1)
        async with watched(vm) as dirty:
            while not (size := (await dirty.event("second"))["working_set"]["1"]):
                pass
        assert size <= HOT + (1 << 20)
        check_unbroken(vm.serial)


async def test_killed_while_a_guest_is_watched(tmp_path: Path) -> None:
    command = bare_command(tmp_path, "a", memory=MEMORY, work=24, hot=HOT >> 20)
    async with run_vm(command, tmp_path, "a") as vm:
        await vm.serial.wait_sweeps(1)
        for _ in range(3):
            async with watched(vm) as dirty:
                await dirty.event("watching")
                await dirty.kill()
        await check_goes_on(vm.serial)
        check_unbroken(vm.serial)
        async with connect_qmp(vm.qmp) as qmp:
            assert (await qmp.command("query-status"))["status"] == "running"


async def test_qemu_that_ends(tmp_path: Path) -> None:
    command = bare_command(tmp_path, "a", memory=MEMORY, work=24, hot=HOT >> 20)
    async with run_vm(command, tmp_path, "a") as vm, watched(vm) as dirty:
        await dirty.event("second")
        async with connect_qmp(vm.qmp) as qmp:
            await qmp.command("quit")
        # 2 if it is slow to end after it has unmapped its guest's memory
        assert await dirty.wait() in (2, 5)
        assert dirty.stderr.count("\n") == 1
