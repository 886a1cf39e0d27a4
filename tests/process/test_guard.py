"""A pagenet-pull that is killed is started again by its guard, and goes on: whatever the moment,
whatever the owner keeps, no page reads as zeros, and nobody types a word."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from processes import (
    PAGE,
    Process,
    check_verified,
    parent_of,
    pull_command,
    run,
    run_server,
    run_workload,
    serve_command,
    write_pattern,
)

from pagenet.guard import guarding
from pagenet.uffd import probe

SIZE = 16 << 20
SLOWLY = ("--max-bandwidth", "20M")
#: owners: what they keep, and what their memory is
OWNERS = {
    "anonymous, no uffd": ("--memory", "anonymous", "--close-uffd"),
    "memfd, no uffd": ("--memory", "memfd", "--close-uffd"),
    "anonymous": ("--memory", "anonymous"),
    "memfd, its own map": ("--memory", "memfd", "--keep-map"),
}


@pytest.fixture(autouse=True)
def uffd_permitted() -> None:
    probe()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pattern(tmp_path_factory.mktemp("guard") / "source", SIZE, zero_every=16))


#: a variable in the environment of the daemons of this module, and so of their guards: others run
#: on this machine, too
OURS = f"PAGENET_TEST_GUARD={os.getpid()}"


def guards() -> list[int]:
    """The guards of this module's daemons, and of this process, but for those whose end nobody has
    waited for."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if (
                entry.name.isdecimal()
                and (entry / "exe").readlink().name == "pagenet-guard"
                and OURS.encode() in (entry / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, value = OURS.partition("=")
    monkeypatch.setenv(name, value)


class Guarded:
    """A pagenet-pull, the ones that come after it, and their output."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.pid = process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    async def kill_and_wait(self) -> None:
        """Kill it, and return when another one has taken its place."""
        self.kill()
        self.pid = (await self.process.event("restarted"))["pid"]


@asynccontextmanager
async def guarded(
    *args: str, lane: str, env: Mapping[str, str] | None = None
) -> AsyncIterator[Guarded]:
    before = set(guards())
    async with run(pull_command(*args, lane=lane, guard=True), env=env) as process:
        pulling = Guarded(process)
        try:
            yield pulling
        except BaseException:
            for pid in {*guards()} - before:
                os.kill(pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                pulling.kill()
            raise
    with trio.fail_after(10):
        while set(guards()) - before:  # noqa: ASYNC110
            await trio.sleep(0.01)


def run_owner(socket: Path, kind: str, *more: str | int) -> AbstractAsyncContextManager[Process]:
    what = ["--size", str(SIZE), "--zero-every", "16", "--order", "random", "--wait-complete"]
    return run_workload(socket, *OWNERS[kind], *what, "--touches", SIZE // PAGE, *more)


@pytest.mark.parametrize(
    ("kind", "lane"), [*((kind, "native") for kind in OWNERS), ("anonymous, no uffd", "trio")]
)
async def test_killed_again_and_again(kind: str, lane: str, source: str, tmp_path: Path) -> None:
    socket = tmp_path / "owner.sock"
    async with (
        run_server(source) as (_, uri),
        guarded(uri, "--uffd-socket", str(socket), *SLOWLY, lane=lane) as pulling,
    ):
        await pulling.process.event("waiting")
        async with run_owner(socket, kind, "--threads", 4, "--think-us", 2000) as owner:
            for _ in range(3):
                await pulling.process.event("owner")
                await trio.sleep(random.uniform(0, 0.1))
                await pulling.kill_and_wait()
            await check_verified(owner)
        await pulling.process.event("complete")
    assert not socket.exists()


async def test_guard_is_killed_while_the_source_is_away(source: str, tmp_path: Path) -> None:
    """A pagenet-pull that was started again has not got to its owner yet, and the guard was the
    last that held it."""
    socket, uri = tmp_path / "owner.sock", f"unix:{tmp_path / 'link'}"
    listen = (uri, "--listen", "--uffd-socket", str(socket), *SLOWLY)
    async with guarded(*listen, lane="native") as pulling:
        await pulling.process.event("listening")
        async with run(serve_command(source, "--connect", uri)) as serving:
            await pulling.process.event("waiting")
            touches = ("--threads", 4, "--think-us", 2000)
            async with run_owner(socket, "anonymous, no uffd", *touches) as owner:
                await pulling.process.event("owner")
                await serving.kill()
                await pulling.kill_and_wait()
                await pulling.process.event("listening")
                os.kill(parent_of(pulling.pid), signal.SIGKILL)
                await pulling.process.event("guarded")
                await pulling.kill_and_wait()
                await pulling.process.event("listening")
                async with run(serve_command(source, "--connect", uri)):
                    await check_verified(owner)
                    await pulling.process.event("complete")


#: Kills the process that has just read a removal from a userfaultfd, once for each file
#: $KILL_AT.0, .1, ... that is there.
KILLING_READ = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_time(void) {
    static int seen;
    const char *prefix = getenv("KILL_AT");
    for (int i = 0; prefix && i < 16; i++) {
        char name[4096];
        snprintf(name, sizeof name, "%s.%d", prefix, i);
        if (access(name, F_OK) == 0)
            return ++seen > i && unlink(name) == 0;
    }
    return 0;
}

static ssize_t look(int fd, const struct iovec *parts, ssize_t got) {
    char link[64], name[64] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (got <= 0 || readlink(link, name, sizeof name - 1) < 0 ||
        strcmp(name, "anon_inode:[userfaultfd]"))
        return got;
    const struct uffd_msg *events = parts->iov_base;
    for (size_t i = 0; i < (size_t)got / sizeof *events; i++)
        if (events[i].event == UFFD_EVENT_REMOVE && is_time())
            kill(getpid(), SIGKILL);
    return got;
}

ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    ssize_t (*next)(int, const struct iovec *, int, off_t, int) = dlsym(RTLD_NEXT, "preadv2");
    return look(fd, parts, next(fd, parts, count, offset, flags));
}

ssize_t readv(int fd, const struct iovec *parts, int count) {
    ssize_t (*next)(int, const struct iovec *, int) = dlsym(RTLD_NEXT, "readv");
    return look(fd, parts, next(fd, parts, count));
}
"""


@pytest.fixture(scope="module")
def killing_read(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("killing")
    (directory / "killing.c").write_text(KILLING_READ)
    cc = ("cc", "-shared", "-fPIC", "-o", "killing.so", "killing.c", "-ldl")
    subprocess.run(cc, check=True, cwd=directory)
    return directory / "killing.so"


@pytest.mark.parametrize(
    ("kind", "lane"), [*((kind, "native") for kind in OWNERS), ("anonymous, no uffd", "trio")]
)
async def test_killed_when_it_has_read_a_removal(
    kind: str, lane: str, source: str, killing_read: Path, tmp_path: Path
) -> None:
    """The owner goes on as soon as its removal was read, and nothing tells it again: the page must
    not get the source's bytes from the next pagenet-pull."""
    socket = tmp_path / "owner.sock"
    moments = [tmp_path / f"at.{number}" for number in range(2)]
    for moment in moments:
        moment.touch()
    env = {**os.environ, "LD_PRELOAD": str(killing_read), "KILL_AT": str(tmp_path / "at")}
    async with (
        run_server(source) as (_, uri),
        guarded(uri, "--uffd-socket", str(socket), *SLOWLY, lane=lane, env=env) as pulling,
    ):
        await pulling.process.event("waiting")
        touches = ("--threads", 4, "--think-us", 1000, "--remove-share", 30)
        async with run_owner(socket, kind, *touches) as owner:
            for _ in moments:
                pulling.pid = (await pulling.process.event("restarted"))["pid"]
            await check_verified(owner)
        await pulling.process.event("complete")
    assert not any(moment.exists() for moment in moments)


@pytest.mark.parametrize("number", range(6))
async def test_killed_around_the_handshake(number: int, source: str, tmp_path: Path) -> None:
    """From the moment on when the owner has sent it."""
    socket = tmp_path / "owner.sock"
    async with (
        run_server(source) as (_, uri),
        guarded(uri, "--uffd-socket", str(socket), lane="native") as pulling,
    ):
        await pulling.process.event("waiting")
        async with run_owner(socket, "anonymous, no uffd") as owner:
            await owner.event("connected")
            await trio.sleep(number * 0.001)
            with suppress(ProcessLookupError):
                pulling.kill()
            await check_verified(owner)
        await pulling.process.event("complete")


async def test_killed_before_an_owner_comes(source: str, tmp_path: Path) -> None:
    """The socket stays the same, and the owner finds it."""
    socket = tmp_path / "owner.sock"
    async with (
        run_server(source) as (_, uri),
        guarded(uri, "--uffd-socket", str(socket), lane="native") as pulling,
    ):
        await pulling.process.event("waiting")
        inode = socket.stat().st_ino
        await pulling.kill_and_wait()
        await pulling.process.event("waiting")
        assert socket.stat().st_ino == inode
        async with run_owner(socket, "anonymous") as owner:
            await check_verified(owner)
        await pulling.process.event("complete")


async def test_source_is_away_too(source: str, tmp_path: Path) -> None:
    """The next one waits for the source as the killed one would have."""
    socket = tmp_path / "owner.sock"
    async with (
        run_server(source) as (serving, uri),
        guarded(uri, "--uffd-socket", str(socket), *SLOWLY, lane="native") as pulling,
    ):
        await pulling.process.event("waiting")
        async with run_owner(socket, "anonymous, no uffd") as owner:
            await pulling.process.event("owner")
            await serving.kill()
            await pulling.kill_and_wait()
            await pulling.process.event("disconnected")
            async with run_server(source, listen=uri):
                await check_verified(owner)
                await pulling.process.event("complete")


async def test_guard_is_killed(source: str, tmp_path: Path) -> None:
    """The daemon makes another, which knows all that the first one knew."""
    socket, before = tmp_path / "owner.sock", set(guards())
    slowly = ("--max-bandwidth", "5M")
    async with (
        run_server(source) as (_, uri),
        guarded(uri, "--uffd-socket", str(socket), *slowly, lane="native") as pulling,
    ):
        await pulling.process.event("waiting")
        async with run_owner(socket, "anonymous, no uffd", "--touches", 64) as owner:
            await pulling.process.event("owner")
            [first] = set(guards()) - before
            os.kill(first, signal.SIGKILL)
            with trio.fail_after(10):
                while not set(guards()) - before - {first}:  # noqa: ASYNC110
                    await trio.sleep(0.001)
            for _ in range(2):  # the second is later than the new guard, which then knows all
                await pulling.process.event("progress")
            await pulling.kill_and_wait()
            await check_verified(owner)
        await pulling.process.event("complete")


async def test_guard_is_stopped(source: str, tmp_path: Path) -> None:
    """One that does not answer is replaced, and starts nothing when it goes on."""
    socket = tmp_path / "owner.sock"
    before = set(guards())
    async with (
        run_server(source) as (_, uri),
        guarded(uri, "--uffd-socket", str(socket), lane="native") as pulling,
    ):
        await pulling.process.event("waiting")
        async with run_owner(socket, "anonymous, no uffd", "--touches", 64) as owner:
            await pulling.process.event("owner")
            [first] = set(guards()) - before
            os.kill(first, signal.SIGSTOP)
            await check_verified(owner)
        await pulling.process.event("complete")
        with suppress(ProcessLookupError):
            os.kill(first, signal.SIGCONT)
        assert await pulling.process.wait() == 0
    assert "restarted" not in {event["event"] for event in pulling.process.events}


async def test_destination_that_listens(source: str, tmp_path: Path) -> None:
    """On a port that the first one has chosen: the source finds the next one there."""
    socket = tmp_path / "owner.sock"
    options = ["tcp://127.0.0.1:0", "--listen", "--uffd-socket", str(socket), *SLOWLY]
    async with guarded(*options, lane="native") as pulling:
        uri = (await pulling.process.event("listening"))["uri"]
        async with run(serve_command(source, "--connect", uri)) as serving:
            await pulling.process.event("waiting")
            async with run_owner(socket, "anonymous, no uffd") as owner:
                await pulling.process.event("owner")
                await pulling.kill_and_wait()
                await check_verified(owner)
            await pulling.process.event("complete")
            assert await serving.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_stopped_by_a_signal(number: int, source: str, tmp_path: Path) -> None:
    """That is no death: nothing is started again, and no guard is left."""
    socket = tmp_path / "owner.sock"
    async with (
        run_server(source) as (_, uri),
        guarded(uri, "--uffd-socket", str(socket), lane="native") as pulling,
    ):
        await pulling.process.event("waiting")
        pulling.kill(number)
        assert await pulling.process.wait() == 128 + number


# ---- the guard itself ----


async def test_what_it_holds() -> None:
    read, write = os.pipe()
    async with guarding() as guard:
        assert guard.get("pipe") == []
        guard.hold("pipe", read, write)
        os.close(read)
        held = guard.get("pipe")
        os.write(write, b"x")
        os.close(write)
        assert os.read(held[0], 1) == b"x"
        for fd in held:
            os.close(fd)
        guard.forget("pipe")
        assert guard.get("pipe") == []


async def test_its_memory() -> None:
    """A few hundred KB: it holds descriptors, and does nothing else."""
    async with guarding():
        [pid] = [pid for pid in guards() if parent_of(pid) == os.getpid()]
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        [rss] = [line for line in rollup.splitlines() if line.startswith("Rss:")]
        assert int(rss.split()[1]) < 1024
