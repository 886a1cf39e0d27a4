"""A guest whose source is lost for good waits, or its QEMU ends: it never goes on with zeros."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from migrations import (
    attach_command,
    check_goes_on,
    command_of,
    migrate_command,
    resume_command,
    run_incoming,
    stand_still,
)
from processes import Process, run, serve_command
from vm import VM, bare_command, check_unbroken, needs_migration, run_vm

from pagenet.bench._kvm import find_kvm_cpu
from pagenet.errors import Unsupported
from pagenet.uffd import Feature, probe

pytestmark = needs_migration

#: page by page, so that there is always something left
SLOWLY = ("--background", "off", "--prefetch", "0,0", "--reconnect-for", "0")
POSTCOPY = ("--precopy", "off")
WAITS = ("-incoming", "defer")


def machine(directory: Path, name: str, accel: str = "tcg", *extra: str) -> list[str]:
    if accel == "tcg":
        return bare_command(directory, name, memory=128 << 20, work=96, extra=extra)
    # Little work: where KVM has no hardware to rely on, it emulates each instruction.
    return bare_command(
        directory, name, accel=accel, work=8, hot=2, beat_ms=100, words=1, extra=extra
    )


class Arrived(NamedTuple):
    """Two machines, the guest of the first of which runs on the second, and what moves it."""

    a: VM
    b: VM
    incoming: Process
    leaving: Process
    uri: str


@asynccontextmanager
async def arrived(directory: Path, accel: str, on_loss: str) -> AsyncIterator[Arrived]:
    async with (
        run_vm(machine(directory, "a", accel), directory, "a") as a,
        run_vm(machine(directory, "b", accel, *WAITS), directory, "b") as b,
        run(attach_command(b.qmp, *SLOWLY, "--on-loss", on_loss)) as incoming,
    ):
        await a.serial.wait_beats(3)
        uri = (await incoming.event("listening"))["uri"]
        async with run(migrate_command(a.qmp, uri, *POSTCOPY)) as leaving:
            await leaving.event("resumed")
            yield Arrived(a, b, incoming, leaving, uri)


async def end_of(incoming: Process) -> list[str]:
    """What it tells once its source is lost."""
    assert await incoming.wait() == 4, incoming.stderr
    assert incoming.stderr.count("\n") == 1
    names = [event["event"] for event in incoming.events]
    return names[names.index("missing") :]


@pytest.mark.parametrize("accel", ["tcg", "kvm"])
async def test_poison(accel: str, tmp_path: Path) -> None:
    """QEMU gets SIGBUS. That ends it, unless it can tell the guest of a memory error: KVM on a
    kernel with CONFIG_MEMORY_FAILURE. A guest without a kernel does not survive that either."""
    if Feature.POISON not in probe():
        pytest.skip("the kernel has no UFFDIO_POISON")
    if accel == "kvm":
        try:
            find_kvm_cpu()
        except Unsupported as error:
            pytest.skip(str(error))
    async with arrived(tmp_path, accel, "poison") as at:
        await at.leaving.kill()
        assert await end_of(at.incoming) == ["missing", "poisoned", "error"]
        missing, poisoned, _ = at.incoming.events[-3:]
        assert missing["pages"] >= poisoned["pages"] > 0  # QEMU may end before the last one
        with trio.fail_after(60):
            status = await at.b.process.wait()
        if accel == "tcg":
            assert status == -signal.SIGBUS
        assert not any(beat.bad for beat in at.b.serial.beats)


async def test_kill(tmp_path: Path) -> None:
    async with arrived(tmp_path, "tcg", "kill") as at:
        await at.leaving.kill()
        assert await end_of(at.incoming) == ["missing", "killed", "error"]
        assert at.incoming.events[-2]["pid"] == at.b.pid
        with trio.fail_after(60):
            assert await at.b.process.wait() == -signal.SIGKILL


async def test_started_qemu_is_killed(tmp_path: Path) -> None:
    listen = ["tcp://127.0.0.1:0", *SLOWLY, "--on-loss", "kill"]
    async with (
        run_vm(machine(tmp_path, "a"), tmp_path, "a") as a,
        run_incoming(tmp_path, command=machine(tmp_path, "b"), listen=listen) as (incoming, _, uri),
    ):
        await a.serial.wait_beats(3)
        async with run(migrate_command(a.qmp, uri, *POSTCOPY)) as leaving:
            await leaving.event("resumed")
            await leaving.kill()
            assert await end_of(incoming) == ["missing", "killed", "error"]
        pid = incoming.events[0]["pid"]
        with trio.fail_after(60):
            while command_of(pid):  # noqa: ASYNC110
                await trio.sleep(0.01)


async def test_it_waits(tmp_path: Path) -> None:
    """The default."""
    async with arrived(tmp_path, "tcg", "wait") as at:
        at.leaving.send_signal(signal.SIGTERM)
        given = await at.leaving.event("abandoned")
        assert await end_of(at.incoming) == ["missing", "error"]
        await stand_still(at.b.pid)
        async with run(resume_command(at.uri, "--pid", str(at.b.pid))) as resumed:
            where = ["--identity", given["identity"], "--connect", at.uri]
            await resumed.event("listening")
            async with run(serve_command(given["source"], *where)):
                assert await resumed.wait() == 0, resumed.stderr
        await check_goes_on(at.b.serial)
        check_unbroken(at.a.serial, at.b.serial)
