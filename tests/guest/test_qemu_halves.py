"""Both halves of a guest's memory, joined without its hosts."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from migrations import (
    check_goes_on,
    migrate_command,
    pagenet_qemu,
    resume_command,
    run_incoming,
    stand_still,
)
from processes import run, serve_command
from vm import bare_command, check_unbroken, needs_migration, ram_of, run_vm

pytestmark = needs_migration

SLOWLY = ("--background", "off", "--prefetch", "0,0")
MEMORY = 128 << 20


def guest(directory: Path, name: str) -> list[str]:
    return bare_command(directory, name, memory=MEMORY, work=96)


async def check_fails(command: Sequence[str], says: str) -> None:
    async with run(command) as process:
        assert await process.wait() == 2
        assert says in process.stderr
        assert process.stderr.count("\n") == 1


async def test_both_halves(tmp_path: Path) -> None:
    """The guest's memory at the destination is stopped and saved, and joined with the source's. The
    guest then goes on with the pages of the joined file: each one that it verifies is right, and is
    the source's or its own."""
    half, whole = tmp_path / "half", tmp_path / "whole"
    listen, command = ["tcp://127.0.0.1:0", *SLOWLY], guest(tmp_path, "b")
    async with (
        run_vm(guest(tmp_path, "a"), tmp_path, "a") as a,
        run_incoming(tmp_path, command=command, listen=listen) as (
            incoming,
            serial,
            uri,
        ),
    ):
        await a.serial.wait_sweeps(1)
        pid = int(incoming.events[0]["pid"])
        async with run(migrate_command(a.qmp, uri, "--precopy", "off")) as leaving:
            gone = await leaving.event("switchover")
            await leaving.event("resumed")
            await serial.wait_beats(3)
            save = pagenet_qemu("save", "--json", "--pid", str(pid), str(half))
            await check_fails(save, "another pagenet is at work on the memory of")
            await incoming.kill()
            await leaving.kill()
        await stand_still(pid)
        async with run(save) as saving:
            assert await saving.wait() == 0, saving.stderr
            (saved,) = saving.events
        assert 0 < saved["pages"] < saved["all"] == MEMORY // 4096
        join = ["join", "--json", str(half), gone["source"], "--output", str(whole)]
        await check_fails(
            pagenet_qemu(*join, "--identity", "0" * 32), "this half belongs to the source"
        )
        assert not whole.exists()
        async with run(pagenet_qemu(*join, "--identity", gone["identity"])) as joining:
            assert await joining.wait() == 0, joining.stderr
            (joined,) = joining.events
        assert joined["half"] == saved["pages"] * 4096
        there, here, both = (path.read_bytes() for path in (ram_of(command), a.ram, whole))
        os.kill(pid, signal.SIGCONT)
        async with run(resume_command(uri, "--pid", str(pid))) as resuming:
            await resuming.event("listening")
            source = serve_command(str(whole), "--identity", gone["identity"], "--connect", uri)
            async with run(source) as serving:
                assert (await resuming.wait(), await serving.wait()) == (0, 0)
        await check_goes_on(serial)
        check_unbroken(a.serial, serial)
    pages = range(0, MEMORY, 4096)
    assert all(
        both[at : at + 4096] in (there[at : at + 4096], here[at : at + 4096]) for at in pages
    )
    assert any(both[at : at + 4096] != here[at : at + 4096] for at in pages)


@pytest.mark.parametrize(
    "content", [b"", b"PGNH", b"PGNH" + b"\xff" * 100, b"\x00" * 4096, b"PGNH\1\0\0\0\1\0\0\0\xc0"]
)
async def test_no_half(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "half").write_bytes(content)
    (tmp_path / "source").write_bytes(bytes(4096))
    words = [str(tmp_path / name) for name in ("half", "source")]
    join = pagenet_qemu("join", *words, "--output", str(tmp_path / "o"), "--identity", "0" * 32)
    await check_fails(join, "is no half of a memory")
    assert not (tmp_path / "o").exists()
