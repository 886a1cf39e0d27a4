"""The daemons as services of a real systemd: killed, they are started again with the descriptors
that systemd has kept, and go on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from processes import Process, check_verified, run, run_server, workload_command
from processes import write_pattern as write
from services import ROOT, Service, Systemd, needs_systemd, run_systemd

from pagenet.children import module_command
from pagenet.uffd import probe

pytestmark = needs_systemd

SIZE = 8 << 20
SOCKET = "/run/pagenet/test.sock"
#: until hurry(): few pages come that nobody waits for
SLOWLY = "--max-bandwidth 100k --prefetch 0,0"
NO_UFFD = ("--memory", "anonymous", "--close-uffd")
OWNERS = {
    "anonymous, no uffd": NO_UFFD,
    "memfd, its own map": ("--memory", "memfd", "--keep-map"),
}


@pytest.fixture(autouse=True)
def uffd_permitted() -> None:
    probe()


@pytest.fixture
async def systemd(tmp_path: Path) -> AsyncIterator[Systemd]:
    async with run_systemd(tmp_path) as systemd:
        yield systemd


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("systemd") / "source", SIZE, zero_every=16))


@asynccontextmanager
async def pulling_from(
    source: str, systemd: Systemd, options: str = "", more: str = ""
) -> AsyncIterator[Service]:
    settings = {"OPTIONS": f"--json {options}"}
    async with (
        run_server(source) as (_, uri),
        systemd.service("pagenet-pull", {"SOURCE": uri, **settings}, more) as service,
    ):
        yield service


def run_owner(systemd: Systemd, *words: str | int) -> AbstractAsyncContextManager[Process]:
    what = ("--size", SIZE, "--zero-every", 16, "--order", "random", "--wait-complete")
    command = ("--socket", SOCKET, *what, "--touches", 64, *words)
    return run(systemd.inside(*workload_command(*map(str, command))))


async def hurry(systemd: Systemd) -> None:
    """Bring the rest at once."""
    with trio.fail_after(30):
        while await control(systemd, "bandwidth", "none"):  # noqa: ASYNC110
            await trio.sleep(0.05)


async def control(systemd: Systemd, *words: str) -> int:
    """The exit code of pagenet-ctl."""
    command = module_command("pagenet.cli.ctl", "/run/pagenet/test.ctl", *words)
    done = await trio.run_process(
        systemd.inside(*command), check=False, capture_stdout=True, capture_stderr=True
    )
    return done.returncode


async def kill_and_wait(service: Service, number: int = signal.SIGKILL) -> None:
    """Kill the daemon, and return when another one has taken its place."""
    os.kill(service.main, number)
    await service.output.event("restarted")


async def check_over(service: Service, result: str = "success") -> None:
    """Nothing is started again, runs, or is kept."""
    await service.wait_state("inactive" if result == "success" else "failed")
    assert await service.show("Result") == result
    assert await service.show("NFileDescriptorStore") == "0"
    assert service.processes == []


@pytest.mark.parametrize("kind", OWNERS)
async def test_killed_again_and_again(kind: str, source: str, systemd: Systemd) -> None:
    async with pulling_from(source, systemd, SLOWLY) as service:
        await service.output.event("waiting")
        async with run_owner(systemd, *OWNERS[kind], "--threads", 4) as owner:
            for _ in range(2):
                await service.output.event("owner")
                await trio.sleep(random.uniform(0, 0.1))
                await kill_and_wait(service)
            await hurry(systemd)
            await check_verified(owner)
        await service.output.event("complete")
        await check_over(service)
        assert await service.show("NRestarts") == "2"
        assert await service.show("StatusText") == "complete: every page is in place"


async def test_killed_around_the_handshake(source: str, systemd: Systemd) -> None:
    """From the moment on when the owner has sent it."""
    for number in range(4):
        async with pulling_from(source, systemd) as service:
            await service.output.event("waiting")
            daemon = service.main
            async with run_owner(systemd, *NO_UFFD) as owner:
                await owner.event("connected")
                await trio.sleep(number * 0.001)
                with suppress(ProcessLookupError):
                    os.kill(daemon, signal.SIGKILL)
                await check_verified(owner)
            await service.output.event("complete")
            await check_over(service)


async def test_killed_before_it_hears_of_the_owner(source: str, systemd: Systemd) -> None:
    """Both the daemon, which is stopped, and the guard, which has accepted the owner for it: the
    connection is in the store before the daemon could learn of it."""
    async with pulling_from(source, systemd) as service:
        await service.output.event("waiting")
        assert await control(systemd, "status") == 0  # it has asked the guard to accept
        found = service.processes
        os.kill(service.main, signal.SIGSTOP)
        kept = int(await service.show("NFileDescriptorStore"))
        async with run_owner(systemd, *NO_UFFD) as owner:
            with trio.fail_after(30):
                while await service.show("NFileDescriptorStore") != str(kept + 1):  # noqa: ASYNC110
                    await trio.sleep(0.01)
            for pid in found:
                with suppress(ProcessLookupError):  # a guard ends when its daemon is dead
                    os.kill(pid, signal.SIGKILL)
            await check_verified(owner)
        await service.output.event("complete")
        assert await service.show("NRestarts") == "1"
        await check_over(service)


async def test_killed_before_an_owner_comes(source: str, systemd: Systemd) -> None:
    """The socket stays, even if systemd itself is started again, and owners that come meanwhile
    wait in it."""
    async with pulling_from(source, systemd) as service:
        await service.output.event("waiting")
        await systemd.systemctl("daemon-reexec")
        os.kill(service.main, signal.SIGKILL)
        async with run_owner(systemd, *NO_UFFD) as owner:
            await service.output.event("restarted")
            await check_verified(owner)
        await service.output.event("complete")
        await check_over(service)


async def test_guard_is_killed(source: str, systemd: Systemd) -> None:
    async with pulling_from(source, systemd, SLOWLY) as service:
        await service.output.event("waiting")
        first = service.guard
        os.kill(first, signal.SIGKILL)
        with trio.fail_after(10):
            while service.guard in (0, first):  # noqa: ASYNC110
                await trio.sleep(0.001)
        async with run_owner(systemd, *NO_UFFD) as owner:
            await service.output.event("owner")
            await kill_and_wait(service)
            await hurry(systemd)
            await check_verified(owner)
        await service.output.event("complete")
        await check_over(service)


async def test_destination_that_listens(source: str, systemd: Systemd) -> None:
    """On a port that the first one has chosen: the next one is told of it by what is kept."""
    settings = {"SOURCE": "tcp://127.0.0.1:0", "OPTIONS": f"--json --listen {SLOWLY}"}
    async with systemd.service("pagenet-pull", settings) as service:
        uri = (await service.output.event("listening"))["uri"]
        await kill_and_wait(service)
        assert (await service.output.event("listening"))["uri"] == uri
        async with systemd.service(
            "pagenet-serve", {"SOURCE": source, "OPTIONS": "--json", "WHERE": f"--connect={uri}"}
        ) as serving:
            await service.output.event("waiting")
            async with run_owner(systemd, *NO_UFFD) as owner:
                await service.output.event("owner")
                os.kill(serving.main, signal.SIGKILL)
                await kill_and_wait(service)
                await hurry(systemd)
                await check_verified(owner)
            await service.output.event("complete")
            await check_over(service)
            await check_over(serving)


async def test_stopped(source: str, systemd: Systemd) -> None:
    """By systemctl, in the middle: that is no death."""
    async with pulling_from(source, systemd, SLOWLY) as service:
        await service.output.event("waiting")
        async with run_owner(systemd, *NO_UFFD):
            await service.output.event("owner")
            await systemd.systemctl("stop", service.name)
            await check_over(service)
            assert await service.show("NRestarts") == "0"


async def test_source_is_unreachable(systemd: Systemd) -> None:
    """An exit code is an end: systemd shows it, and what was said."""
    settings = {"SOURCE": "tcp://127.0.0.1:1", "OPTIONS": "--json"}
    async with systemd.service("pagenet-pull", settings) as service:
        await check_over(service, "exit-code")
        assert await service.show("ExecMainStatus") == "3"
        assert "127.0.0.1:1" in await service.show("StatusText")


async def test_when_it_is_ready(source: str, systemd: Systemd) -> None:
    """Not before owners may connect."""
    async with pulling_from(source, systemd, SLOWLY) as service:
        await service.wait_state("active")
        await trio.run_process(systemd.inside("test", "-S", SOCKET))
        assert SOCKET in await service.show("StatusText")
        async with run_owner(systemd):
            with trio.fail_after(30):
                while "resident" not in await service.show("StatusText"):  # noqa: ASYNC110
                    await trio.sleep(0.05)


@pytest.mark.parametrize("missing", ["FileDescriptorStoreMax=0", "NotifyAccess=main"])
async def test_no_store(missing: str, source: str, systemd: Systemd) -> None:
    """Where what the guard sends is not kept, it is not relied on."""
    async with pulling_from(source, systemd, "", missing) as service:
        await service.output.event("waiting")
        assert await service.show("NFileDescriptorStore") == "0"
        async with run_owner(systemd, *NO_UFFD) as owner:
            await check_verified(owner)
        await service.output.event("complete")
        await check_over(service)


@pytest.mark.parametrize("unit", sorted(path.name for path in (ROOT / "systemd").iterdir()))
def test_systemd_finds_no_fault(unit: str, tmp_path: Path) -> None:
    commands = tmp_path / "units"
    commands.mkdir()
    text = (ROOT / "systemd" / unit).read_text().replace("ExecStart=pagenet-", "ExecStart=true ")
    (commands / unit.replace("@", "@test")).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(commands / unit.replace("@", "@test"))],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
