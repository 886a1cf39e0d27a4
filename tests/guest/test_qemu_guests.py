"""Kinds of guests that move, and users that move them: with devices that use the guest's memory,
under KVM, by a user without privileges."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from cable import needs_cable, plugged_cable
from devices import BLOCKS, echoing, screen, wait_devices, with_devices
from migrations import (
    attach_command,
    check_goes_on,
    destination,
    incoming_command,
    migrate_command,
    run_incoming,
)
from processes import run
from vm import bare_command, check_unbroken, needs_migration, ram_of, run_vm

from pagenet import PagenetError, Unsupported
from pagenet.bench._kvm import find_kvm_cpu
from pagenet.qemu import Precopy, Qmp, connect_qmp, migrate

pytestmark = needs_migration


# ---- devices ----


async def wait_balloon(qmp: Qmp, mib: int) -> None:
    """Wait until the guest has ``mib`` MiB of memory."""
    with trio.fail_after(60):
        while abs((await qmp.command("query-balloon"))["actual"] - (mib << 20)) > 1 << 20:  # noqa: ASYNC110
            await trio.sleep(0.02)


@needs_cable
@pytest.mark.timeout(300)
async def test_devices(tmp_path: Path) -> None:
    """The guest moves first to a machine with the devices in another order, which QEMU notices only
    at the end: the guest goes on where it is, with its disk. Then it moves to the right machine,
    where the balloon takes memory and gives it back while pages still come.
    """
    (tmp_path / "disk").touch()
    os.truncate(tmp_path / "disk", BLOCKS * 4096)
    async with (
        echoing(tmp_path / "echo"),
        plugged_cable() as cable,
        run_vm(with_devices(tmp_path, "a"), tmp_path, "a") as a,
    ):
        await cable.limit("200mbit")
        await wait_devices(a.serial)
        async with connect_qmp(a.qmp) as qmp:
            await qmp.command("balloon", value=224 << 20)
            await wait_balloon(qmp, 224)
        async with destination(
            tmp_path, "c", command=with_devices(tmp_path, "c", swapped=True)
        ) as wrong:
            with pytest.raises(PagenetError, match="QEMU cannot load the guest's devices"):
                async with migrate(a.qmp, wrong.uri):
                    raise AssertionError("not reached")
            await wrong.ended.wait()
        before = await wait_devices(a.serial, a.serial.beats[-1])

        command, listen = (
            with_devices(tmp_path, "b"),
            [f"tcp://{cable.destination.address}:0", "--plaintext"],
        )
        async with run_incoming(
            tmp_path, command=command, listen=listen, within=cable.destination.within
        ) as (incoming, serial, uri):
            async with run([*cable.source.within, *migrate_command(a.qmp, uri)]) as leaving:
                await leaving.event("resumed")
                async with connect_qmp(tmp_path / "b.qmp") as qmp:
                    await qmp.command("balloon", value=160 << 20)
                    await wait_balloon(qmp, 160)
                    await qmp.command("balloon", value=256 << 20)
                    await wait_balloon(qmp, 256)
                complete = await incoming.event("complete")
                assert await leaving.wait() == 0
            assert complete["removed"] > 0
            shown = await screen(a.qmp, tmp_path)
            assert shown == await screen(tmp_path / "b.qmp", tmp_path)
            assert len(set(shown)) == 256
            await wait_devices(serial, before)
            await check_goes_on(serial)
            check_unbroken(a.serial, serial)


# ---- KVM ----


@pytest.fixture
def kvm() -> None:
    """For tests whose guest needs KVM. It is checked here, because that starts QEMU, and collecting
    tests should start nothing."""
    try:
        find_kvm_cpu()
    except Unsupported as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("rounds", [None, 2])
async def test_kvm(rounds: int | None, tmp_path: Path) -> None:
    precopy = None if rounds is None else Precopy(rounds)

    def command(name: str) -> list[str]:
        # Little work: where KVM has no hardware to rely on, it emulates each instruction.
        return bare_command(tmp_path, name, accel="kvm", work=8, hot=2, beat_ms=100, words=1)

    async with (
        run_vm(command("a"), tmp_path, "a") as a,
        destination(tmp_path, command=command("b")) as b,
    ):
        await a.serial.wait_beats(3)
        async with migrate(a.qmp, b.uri, precopy=precopy) as server:
            await server.wait_complete()
        await check_goes_on(b.serial)
        check_unbroken(a.serial, b.serial)
    assert precopy is None or len(precopy.over) == rounds


# ---- sandbox and user ----

SANDBOX = ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
NOBODY = 65534
# This user may read other users' files: the interpreter and this checkout may lie in a home
# directory.
AS_NOBODY = [
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"),
    *(
        "--inh-caps=-all,+dac_read_search",
        "--ambient-caps=+dac_read_search",
        "--bounding-set=-all,+dac_read_search",
        "--",
    ),
]
needs_users = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv") or not Path("/dev/userfaultfd").exists(),
    reason="needs root, setpriv and /dev/userfaultfd",
)


async def test_sandbox(tmp_path: Path) -> None:
    """With every restriction of QEMU's -sandbox, on both sides."""
    command = bare_command(tmp_path, "b", extra=SANDBOX)
    async with (
        run_vm(bare_command(tmp_path, "a", extra=SANDBOX), tmp_path, "a") as a,
        run_incoming(tmp_path, command=command) as (incoming, serial, uri),
        run(migrate_command(a.qmp, uri)) as leaving,
    ):
        assert await leaving.wait() == 0, leaving.stderr
        await incoming.event("complete")
        await check_goes_on(serial)
        check_unbroken(a.serial, serial)


@contextmanager
def nobodys_directory() -> Iterator[Path]:
    """A directory of that user, with a userfaultfd node that its group may open."""
    with tempfile.TemporaryDirectory(prefix="pagenet-nobody-") as name:
        directory = Path(name)
        os.chown(directory, NOBODY, NOBODY)
        node = directory / "userfaultfd"
        os.mknod(node, stat.S_IFCHR, Path("/dev/userfaultfd").stat().st_rdev)
        os.chmod(node, 0o660)
        os.chown(node, 0, NOBODY)
        yield directory


def nobodys(command: list[str]) -> list[str]:
    os.chown(ram_of(command), NOBODY, NOBODY)
    return command


@needs_users
async def test_unprivileged_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both QEMUs and both commands run as user nobody, and the source's RAM is read as its own
    user."""
    with nobodys_directory() as directory:
        monkeypatch.setenv("PAGENET_UFFD_DEVICE", str(directory / "userfaultfd"))
        monkeypatch.setenv("TMPDIR", str(directory))
        there = nobodys(bare_command(directory, "b", extra=SANDBOX))
        async with (
            run_vm([*AS_NOBODY, *nobodys(bare_command(directory, "a"))], directory, "a") as a,
            run_incoming(directory, command=there, within=AS_NOBODY) as (incoming, serial, uri),
            run([*AS_NOBODY, *migrate_command(a.qmp, uri)]) as leaving,
        ):
            assert await leaving.wait() == 0, leaving.stderr
            await incoming.event("complete")
            assert (
                f"Uid:\t{NOBODY}\t{NOBODY}"
                in Path(f"/proc/{incoming.events[0]['pid']}/status").read_text()
            )
            await check_goes_on(serial)
            check_unbroken(a.serial, serial)


@needs_users
async def test_attaching_to_an_unprivileged_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """That user's QEMU may open the node that PAGENET_UFFD_DEVICE names, and no other."""
    with nobodys_directory() as directory:
        monkeypatch.setenv("PAGENET_UFFD_DEVICE", str(directory / "userfaultfd"))
        waiting = nobodys(bare_command(directory, "b", extra=["-incoming", "defer"]))
        async with (
            run_vm(bare_command(directory, "a"), directory, "a") as a,
            run_vm([*AS_NOBODY, *waiting], directory, "b") as b,
            run(attach_command(b.qmp)) as incoming,
        ):
            uri = (await incoming.event("listening"))["uri"]
            async with run(migrate_command(a.qmp, uri)) as leaving:
                assert await leaving.wait() == 0, leaving.stderr
            assert await incoming.wait() == 0, incoming.stderr
            await check_goes_on(b.serial)
            check_unbroken(a.serial, b.serial)


@needs_users
async def test_user_without_userfaultfd(monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("every user may use userfaultfd here")
    with nobodys_directory() as directory:
        os.chmod(directory / "userfaultfd", 0o600)
        monkeypatch.setenv("PAGENET_UFFD_DEVICE", str(directory / "userfaultfd"))
        monkeypatch.setenv("TMPDIR", str(directory))
        command = nobodys(bare_command(directory, "b"))
        try:
            async with run(
                [*AS_NOBODY, *incoming_command("tcp://127.0.0.1:0", command=command)]
            ) as incoming:
                assert await incoming.wait() != 0
                assert (
                    "may not use userfaultfd: run as root, give this user access to"
                    in incoming.stderr
                )
        finally:
            ram_of(command).unlink()
