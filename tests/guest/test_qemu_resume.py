"""A guest whose pagenet-qemu is lost stands still at the next missing page, until another
pagenet-qemu comes."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from migrations import check_goes_on, migrate_command, resume_command, run_incoming, stand_still
from processes import PAGE, Process, run, serve_command
from vm import Serial, bare_command, check_unbroken, needs_migration, run_vm

pytestmark = needs_migration

#: page by page: what the guest does not touch does not come, so there is always something left
SLOWLY = ("--background", "off", "--prefetch", "0,0")
#: and what the guest has comes after it has left
POSTCOPY = ("--precopy", "off")
MEMORY = 128 << 20


def machine(directory: Path, name: str) -> list[str]:
    """A machine whose guest takes seconds for a sweep through its pages."""
    return bare_command(directory, name, memory=MEMORY, work=96)


def slow_incoming(directory: Path) -> AbstractAsyncContextManager[tuple[Process, Serial, str]]:
    return run_incoming(
        directory, command=machine(directory, "b"), listen=["tcp://127.0.0.1:0", *SLOWLY]
    )


async def check_refused(command: Sequence[str], status: int, says: str) -> None:
    async with run(command) as process:
        assert await process.wait() == status
        assert says in process.stderr
        assert process.stderr.count("\n") == 1


async def test_resume(tmp_path: Path) -> None:
    """The destination's pagenet-qemu is killed, and the guest stands still at the next missing
    page, until another pagenet-qemu takes over, which is killed as well. The source waits for
    them."""
    async with (
        run_vm(machine(tmp_path, "a"), tmp_path, "a") as a,
        slow_incoming(tmp_path) as (incoming, serial, uri),
    ):
        await a.serial.wait_sweeps(1)
        pid = incoming.events[0]["pid"]
        async with run(migrate_command(a.qmp, uri, *POSTCOPY)) as leaving:
            await leaving.event("resumed")
            await incoming.kill()
            assert (await leaving.event("waiting"))["uri"] == uri
            await stand_still(pid)
            async with run(resume_command(uri, "--pid", str(pid), *SLOWLY)) as first:
                resuming = await first.event("resuming")
                assert 0 < resuming["missing"] < resuming["pages"]
                await first.event("owner")
                await check_refused(
                    resume_command(uri, "--pid", str(pid)),
                    2,
                    "another pagenet is at work on the memory of",
                )
                await serial.wait_beats(len(serial.beats) + 1)
                await first.kill()
            await stand_still(pid)
            async with run(resume_command(uri, "--qmp", str(tmp_path / "b.qmp"))) as second:
                assert await second.wait() == 0
                assert second.events[-1]["event"] == "complete"
            assert await leaving.wait() == 0
        await check_goes_on(serial)
        check_unbroken(a.serial, serial)
        async with run(resume_command(uri, "--pid", str(pid))) as in_vain:
            assert await in_vain.wait() == 0
            assert in_vain.events == [{"event": "finished", "pid": pid, "pages": MEMORY // PAGE}]


async def test_both_daemons_are_lost(tmp_path: Path) -> None:
    """The pages are still in the source's QEMU. The command that gave up there has printed how to
    bring them."""
    async with (
        run_vm(machine(tmp_path, "a"), tmp_path, "a") as a,
        slow_incoming(tmp_path) as (incoming, serial, uri),
    ):
        await a.serial.wait_sweeps(1)
        async with run(migrate_command(a.qmp, uri, *POSTCOPY)) as leaving:
            await leaving.event("resumed")
            await incoming.kill()
            await leaving.event("waiting")
            leaving.send_signal(signal.SIGTERM)
            abandoned = await leaving.event("abandoned")
            assert await leaving.wait() == 143
            assert "stopped before the destination has every page" in leaving.stderr
        async with run(resume_command(uri, "--pid", str(incoming.events[0]["pid"]))) as resumed:
            assert (await resumed.event("resuming"))["identity"] == abandoned["identity"]
            await resumed.event("listening")
            command = serve_command(
                abandoned["source"], "--identity", abandoned["identity"], "--connect", uri
            )
            async with run(command) as serving:
                assert await resumed.wait() == 0
                assert await serving.wait() == 0
        await check_goes_on(serial)
        check_unbroken(a.serial, serial)
