"""pagenet-pull --many: one process, many guests, few threads. What goes wrong with one guest is
that guest's own."""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from processes import (
    PAGE,
    Process,
    check_verified,
    pull_command,
    run,
    run_server,
    run_workload,
    serve_command,
    write_pattern,
)

from pagenet._native import take_descriptor
from pagenet.background.learned import load_learned
from pagenet.control import connect_control

pytestmark = pytest.mark.usefixtures("uffd_permitted")

SIZE = 4 << 20
PAGES = SIZE // PAGE
KINDS = {
    "anonymous": ("--memory", "anonymous"),
    "memfd": ("--memory", "memfd"),
    "memfd, gives memory up": ("--memory", "memfd", "--remove-share", "20"),
    "anonymous, no uffd": ("--memory", "anonymous", "--close-uffd"),
    "shared": ("--memory", "shared", "--write-share", "30"),
    "shared, gives memory up": ("--memory", "shared", "--remove-share", "20"),
    "shared, no uffd": ("--memory", "shared", "--close-uffd"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pattern(tmp_path_factory.mktemp("many") / "source", SIZE, zero_every=8))


@asynccontextmanager
async def hosting(
    source: str, directory: Path, *options: str, threads: int = 2, guard: bool = False
) -> AsyncIterator[tuple[Process, Path]]:
    """The daemon, and the socket of its owners. Its control socket is ``ctl``."""
    path = directory / "owners"
    more = ["--many", "--control", str(directory / "ctl"), "--threads", str(threads), *options]
    async with run_server(source, "--max-sessions", "200") as (_, uri):
        to = (uri, "--uffd-socket", str(path), *more)
        async with run(pull_command(*to, lane="native", guard=guard)) as daemon:
            await daemon.event("added")
            yield daemon, path


MANY: dict[str, tuple[str | int, ...]] = {
    kind: (*what, "--size", SIZE, "--zero-every", 8, "--order", "random")
    for kind, what in KINDS.items()
    if kind in ("anonymous", "memfd", "shared")
}


def touching(kind: str, *options: str | int) -> Sequence[str | int]:
    """Guests that share pages are never complete."""
    what = ("--size", SIZE, "--zero-every", 8, "--order", "random")
    end = () if kind.startswith("shared") else ("--wait-complete",)
    return (*KINDS[kind], *what, *end, *options)


def threads_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


async def count(daemon: Process, event: str, number: int) -> None:
    for _ in range(number):
        await daemon.event(event)


async def ended(daemon: Process, number: int) -> None:
    """Return when so many guests have ended, well."""
    while sum(found["event"] in ("complete", "gone") for found in daemon.events) < number:
        assert await daemon.next_event() is not None, daemon.events
    assert not [found for found in daemon.events if found["event"] in ("failed", "lost")]


async def told(daemon: Process, event: str, guest: int) -> dict[str, Any]:
    """That event of that guest, whether it has come already or not."""
    at = 0
    while True:
        for found in daemon.events[at:]:
            if (found["event"], found.get("guest")) == (event, guest):
                return found
        at = len(daemon.events)
        await daemon.event(event)


async def test_guests_of_every_kind_at_once(source: str, tmp_path: Path) -> None:
    """All bytes are right, and the number of threads and descriptors is that of before."""
    async with hosting(source, tmp_path) as (daemon, path):
        async with run_workload(path, *touching("memfd")) as first:
            await check_verified(first)
            await daemon.event("complete")
        threads = threads_of(daemon.pid)
        descriptors = len(os.listdir(f"/proc/{daemon.pid}/fd"))
        async with AsyncExitStack() as stack:
            guests = [
                await stack.enter_async_context(
                    run_workload(path, *touching(kind, "--threads", 2, "--seed", 0))
                )
                for kind in KINDS
                for _ in range(4)
            ]
            most = 0
            for guest in guests:
                await check_verified(guest)
                most = max(most, threads_of(daemon.pid))
            await ended(daemon, 1 + len(guests))
        assert most <= threads
        with trio.fail_after(10):
            while len(os.listdir(f"/proc/{daemon.pid}/fd")) > descriptors:  # noqa: ASYNC110
                await trio.sleep(0.01)
        daemon.send_signal(signal.SIGTERM)
        assert await daemon.wait() == 143


async def test_what_is_wrong_with_one_is_its_own(source: str, tmp_path: Path) -> None:
    """One says nothing, one sends garbage, one is killed, one forks: another guest gets all of its
    pages meanwhile, and so does one that comes later."""
    async with hosting(source, tmp_path, "--background", "off") as (daemon, path):
        with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as wrong:
            silent.connect(str(path))
            wrong.connect(str(path))
            wrong.send(b"[{}]")
            assert "has no proper" in (await daemon.event("refused"))["reason"]
            slowly = ("--think-us", 100000)  # it is killed before it is done
            async with run_workload(path, *touching("memfd")) as honest:
                await told(daemon, "owner", 3)
                async with run_workload(path, *touching("anonymous", *slowly)) as killed:
                    await told(daemon, "owner", 4)
                    await killed.kill()
                    assert 0 < (await told(daemon, "gone", 4))["missing"] <= PAGES
                await check_verified(honest)
                await told(daemon, "complete", 3)
            async with run_workload(path, *touching("memfd")) as later:
                await check_verified(later)
                await told(daemon, "complete", 5)


async def test_owner_makes_its_userfaultfd_blocking(source: str, tmp_path: Path) -> None:
    """It has the open file too. Reading it must not wait, and other guests go on."""
    slowly = ("--think-us", 20000, "--threads", 1)
    lazily = ("--fill", "touched", "--prefetch", "0,0")
    async with (
        hosting(source, tmp_path, *lazily, threads=1) as (daemon, path),
        run_workload(path, *touching("anonymous", *slowly)) as hostile,
    ):
        await told(daemon, "owner", 1)
        uffd = take_uffd(hostile.pid)
        os.set_blocking(uffd, True)
        os.close(uffd)
        reason = (await told(daemon, "failed", 1))["reason"]
        assert reason == "the owner has made its userfaultfd blocking"
        words = (*MANY["anonymous"], "--verify", "touched", "--touches", 100)
        async with run_workload(path, *words) as honest:
            await check_verified(honest)
        await hostile.kill()


def take_uffd(pid: int) -> int:
    """A duplicate of the process's userfaultfd."""
    pidfd = os.pidfd_open(pid)
    try:
        [found] = [
            int(entry.name)
            for entry in Path(f"/proc/{pid}/fd").iterdir()
            if "userfaultfd" in entry.readlink().name
        ]
        return take_descriptor(pidfd, found)
    finally:
        os.close(pidfd)


async def test_owners_that_leave_at_once(source: str, tmp_path: Path) -> None:
    """Perhaps before they are attached: they are gone, and nothing of them is kept."""
    async with hosting(source, tmp_path, "--fill", "touched", guard=True) as (daemon, path):
        words = (*MANY["anonymous"], "--verify", "none", "--touches", 1)
        counts = []
        for _ in range(3):
            before = len(daemon.events)
            async with AsyncExitStack() as stack:
                owners = [
                    await stack.enter_async_context(run_workload(path, *words)) for _ in range(10)
                ]
                for owner in owners:
                    assert await owner.wait() == 0
            while sum(event["event"] == "gone" for event in daemon.events[before:]) < 10:
                assert (await daemon.next_event()) is not None
            counts.append(len(os.listdir(f"/proc/{daemon.pid}/fd")))
        assert counts[2] <= counts[0]
        daemon.send_signal(signal.SIGTERM)
        assert await daemon.wait() == 143


async def test_source_goes_away_and_comes_back(source: str, tmp_path: Path) -> None:
    path = tmp_path / "owners"
    async with run_server(source) as (server, uri):
        command = pull_command(
            uri, "--uffd-socket", str(path), "--many", "--max-bandwidth", "1M", lane="native"
        )
        async with run(command) as daemon:
            await daemon.event("added")
            async with (
                run_workload(path, *touching("memfd", "--touches", 16)) as one,
                run_workload(path, *touching("anonymous", "--touches", 16)) as other,
            ):
                await count(daemon, "owner", 2)
                await server.kill()
                await daemon.event("disconnected")
                async with run(serve_command(source, "--listen", uri)):
                    await daemon.event("reconnected")
                    await check_verified(one)
                    await check_verified(other)
                    await count(daemon, "complete", 2)


async def test_control(source: str, tmp_path: Path) -> None:
    """Guests are listed; one is paused, and not the other; another snapshot is added, and
    removed."""
    other = write_pattern(tmp_path / "other", SIZE, seed=1)
    async with (
        hosting(source, tmp_path, "--background", "off") as (daemon, path),
        run_server(str(other)) as (_, uri),
        connect_control(tmp_path / "ctl") as control,
    ):
        async with (
            run_workload(path, *touching("memfd", "--touches", 8)) as one,
            run_workload(path, *touching("memfd", "--touches", 8)) as two,
        ):
            await count(daemon, "owner", 2)
            status = await control.command("status")
            assert status["guests_now"] == 2
            numbers = {guest["pid"]: guest["guest"] for guest in status["guests"]}
            first, second = numbers[one.pid], numbers[two.pid]
            assert (await control.command("pause", guest=first))["paused"]
            assert not (await control.command("status", guest=second))["paused"]
            for bad in ({"guest": 3}, {"guest": 0}, {"guest": "x"}):
                with pytest.raises(Exception, match="guest"):
                    async with connect_control(tmp_path / "ctl") as another:
                        await another.command("status", **bad)
            await control.command("schedule", name="linear")
            await check_verified(two)
            assert (await daemon.event("complete"))["guest"] == second
            await control.command("resume", guest=first)
            await check_verified(one)
            await daemon.event("complete")
        there = tmp_path / "more"
        await control.command("add", name="other", uri=uri, uffd_socket=str(there))
        async with run_workload(there, *touching("memfd", "--seed", 1, "--zero-every", 0)) as three:
            await daemon.event("owner")
            await control.command("schedule", name="linear", guest=3)
            await check_verified(three)
            await daemon.event("complete")
        status = await control.command("remove", name="other")
        assert [each["name"] for each in status["snapshots"]] == ["default"]
        assert not there.exists()
        assert (status["guests_now"], status["guests_completed"]) == (0, 3)
        with pytest.raises(Exception, match="there is no snapshot 'other'"):
            await control.command("remove", name="other")


async def test_each_page_comes_once(source: str, tmp_path: Path) -> None:
    """However many guests want it at the same time, and whatever their memory is."""
    path = tmp_path / "owners"
    async with run_server(source) as (_, uri):
        command = pull_command(
            *(uri, "--uffd-socket", str(path), "--many", "--control", str(tmp_path / "ctl")),
            *("--background", "off", "--prefetch", "0,0", "--fill", "touched"),
            lane="native",
        )
        async with run(command) as daemon, AsyncExitStack() as stack:
            await daemon.event("added")
            guests = [
                await stack.enter_async_context(run_workload(path, *MANY[kind], "--seed", 0))
                for kind in MANY
                for _ in range(3)
            ]
            for guest in guests:
                await check_verified(guest)
            async with connect_control(tmp_path / "ctl") as control:
                [about] = (await control.command("status"))["snapshots"]
            content = Path(source).read_bytes()
            pages = [content[at : at + PAGE] for at in range(0, SIZE, PAGE)]
            taken = sum(page != bytes(PAGE) for page in pages) * PAGE
            assert about["cache"]["share"] == 1
            assert taken <= about["cache"]["bytes_wire"] < taken * 1.02
            assert about["cache"]["bytes_resident"] == taken  # zeros take no memory
            assert [found["event"] for found in daemon.events if found["event"] == "failed"] == []


async def test_cache_of_huge_pages(source: str, tmp_path: Path) -> None:
    """Guests have pages of either size, whatever the cache has."""
    free = re.search(r"HugePages_Free:\s*(\d+)", Path("/proc/meminfo").read_text())
    if free is None or int(free[1]) < 4 * SIZE >> 21:
        pytest.skip("needs free huge pages (sysctl vm.nr_hugepages)")
    words = ("--size", SIZE, "--zero-every", 8, "--order", "random", "--write-share", 30)
    for huge in (True, False):
        kinds = ("anonymous", "memfd", "hugetlb", "shared-hugetlb" if huge else "shared")
        async with (
            hosting(source, tmp_path, *(["--huge-pages"] if huge else [])) as (daemon, path),
            AsyncExitStack() as stack,
        ):
            for kind in kinds:
                guest = run_workload(path, *words, "--memory", kind)
                await check_verified(await stack.enter_async_context(guest))
            await ended(daemon, len(kinds))


async def test_cache_with_less_memory_than_the_snapshot(tmp_path: Path) -> None:
    """Pages leave it, of guests that share them, too, and come again when they are touched. What a
    guest has written stays its own."""
    size, most = 64 << 20, 16 << 20
    large = write_pattern(tmp_path / "large", size)
    options = ("--cache-memory", "16M", "--fill", "touched")
    touching = ("--size", size, "--order", "random", "--touches", 3 * size // PAGE)
    async with hosting(str(large), tmp_path, *options) as (daemon, path):
        async with (
            run_workload(path, *touching, *KINDS["shared"], "--threads", 2) as one,
            run_workload(path, *touching, *KINDS["shared, gives memory up"]) as two,
            run_workload(path, *touching, *KINDS["anonymous"]) as three,
        ):
            for guest in (one, two, three):
                await check_verified(guest)
            async with connect_control(tmp_path / "ctl") as control:
                [about] = (await control.command("status"))["snapshots"]
        assert about["cache"]["bytes_wire"] > size
        assert about["cache"]["bytes_resident"] <= most + (2 << 20)
        await ended(daemon, 3)


async def test_learns_what_guests_wait_for(source: str, tmp_path: Path) -> None:
    """The next guest gets at once what the first has waited for, but for a few pages: that it does
    not want them is learned, too. All of it outlasts the daemon."""
    learned = tmp_path / "default.learned"
    options = ("--learn", str(tmp_path), "--fill", "touched", "--prefetch", "0,0")
    touching = ("--order", "random", "--touches", 200, "--verify", "touched", "--seed", 0)
    first = ("--size", SIZE, "--zero-every", 8, *touching)
    async with hosting(source, tmp_path, *options) as (daemon, path):
        async with run_workload(path, *first, *KINDS["anonymous"]) as guest:
            await check_verified(guest)
        await daemon.event("gone")
        daemon.send_signal(signal.SIGTERM)
        await daemon.wait()
    known = load_learned(learned)
    assert (known.restores, len(known.pages)) == (1, 200)
    start_up = known.order(start_up=True)
    brought = len(set(start_up) - known.probes())
    idle = ("--size", SIZE, "--order", "none", "--wait-complete")
    async with hosting(source, tmp_path, *options) as (daemon, path):
        async with run_workload(path, *idle, *KINDS["shared"]) as guest:
            number = (await daemon.event("owner"))["guest"]
            with trio.fail_after(20):
                async with connect_control(tmp_path / "ctl") as control:
                    status = await control.command("status", guest=number)
                    while status["classes"]["background"]["pages"] < brought:
                        await trio.sleep(0.01)
                        status = await control.command("status", guest=number)
            assert status["pages_resident"] == brought
            await guest.kill()
        await daemon.event("gone")
        daemon.send_signal(signal.SIGTERM)
        await daemon.wait()
    again = load_learned(learned)
    assert again.restores == 2
    assert sum(page.misses for page in again.pages.values()) == 200 - brought


async def test_file_that_guests_share_cannot_be_written_to(source: str, tmp_path: Path) -> None:
    async with hosting(source, tmp_path) as (daemon, path):
        with socket.socket(socket.AF_UNIX) as owner:
            owner.connect(str(path))
            owner.send(b'{"want": "file"}')
            text, [fd], _, _ = await trio.to_thread.run_sync(socket.recv_fds, owner, 256, 1)
            offer = json.loads(text)
            assert offer == {"size": SIZE, "page_size": PAGE}
            assert os.fstat(fd).st_size == SIZE
            assert os.fstat(fd).st_mode & 0o777 == 0o400  # nor opened again, by another user
            for wrong in (
                lambda: os.pwrite(fd, b"x", 0),
                lambda: os.ftruncate(fd, 0),
                lambda: mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_WRITE),
                lambda: os.posix_fallocate(fd, 0, SIZE),
            ):
                with pytest.raises(OSError, match=r"denied|Invalid|Bad file"):
                    wrong()
            os.close(fd)
            owner.send(b"[{}]")
            assert "has no proper" in (await daemon.event("refused"))["reason"]


async def test_example_of_an_owner_that_shares(source: str, tmp_path: Path) -> None:
    program = tmp_path / "owner"
    example = Path(__file__).parents[2] / "examples" / "shared_owner.c"
    await trio.run_process(["cc", "-Wall", "-Wextra", "-Werror", "-o", program, example])
    async with hosting(source, tmp_path) as (daemon, path):
        for _ in range(2):  # the first has not written into what the second gets
            done = await trio.run_process([program, path], capture_stdout=True)
            assert int(done.stdout) == sum(Path(source).read_bytes())
        await ended(daemon, 2)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b'{"want": "money"}', "asks for no file"),
        (b'{"want": "file"}{"want": "file"}', "a second time"),
        (b'{"want": "file"', "within 5 s|no handshake"),
    ],
)
async def test_bad_requests_for_the_file(
    sent: bytes, why: str, source: str, tmp_path: Path
) -> None:
    async with hosting(source, tmp_path) as (daemon, path):
        with socket.socket(socket.AF_UNIX) as owner:
            owner.connect(str(path))
            owner.send(sent)
            assert re.search(why, (await daemon.event("refused"))["reason"])


async def test_owner_that_shares_something_else(source: str, tmp_path: Path) -> None:
    """It asks for the file, and hands over memory that is not a mapping of it: its own affair."""
    async with (
        hosting(source, tmp_path) as (daemon, path),
        run_workload(path, "--size", SIZE, "--bad-handshake", "unshared") as owner,
    ):
        assert "is not that" in (await daemon.event("refused"))["reason"]
        assert await owner.wait() == 0


async def test_more_than_there_are_places_for_wait(source: str, tmp_path: Path) -> None:
    async with (
        hosting(source, tmp_path, "--max-guests", "2") as (daemon, path),
        AsyncExitStack() as stack,
    ):
        for _ in range(6):
            await stack.enter_async_context(run_workload(path, *touching("memfd")))
        await count(daemon, "complete", 6)


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    from pagenet.cli import pull

    for wrong in (["--into", "x"], ["--uffd-socket", "x", "--listen"], ["--resume", "1"]):
        with pytest.raises(SystemExit) as ended:
            pull.main(["tcp://127.0.0.1:1", "--many", *wrong])
        assert ended.value.code == 2
        assert "--many is for --uffd-socket" in capsys.readouterr().err


async def test_owners_that_wait_for_its_socket(source: str, tmp_path: Path) -> None:
    """The guard may accept an owner before the daemon has asked it for those that it has."""
    path = tmp_path / "owners"
    words = touching("shared", "--touches", 4, "--verify", "touched")
    for _ in range(3):
        async with AsyncExitStack() as stack:
            guests = [await stack.enter_async_context(run_workload(path, *words)) for _ in range(8)]
            async with hosting(source, tmp_path, guard=True) as (daemon, _):
                for guest in guests:
                    await check_verified(guest)
                await ended(daemon, len(guests))
                daemon.send_signal(signal.SIGTERM)
                assert await daemon.wait() == 143


async def test_killed_again_and_again(source: str, tmp_path: Path) -> None:
    """The guard starts the daemon again, which goes on with every guest, of a snapshot that was
    added later too. No page of an owner without a userfaultfd of its own reads as zeros, and an
    owner that comes meanwhile waits."""
    there = tmp_path / "more"
    async with hosting(source, tmp_path, "--max-bandwidth", "1M", guard=True) as (daemon, path):
        async with connect_control(tmp_path / "ctl") as control:
            [first] = (await control.command("status"))["snapshots"]
            await control.command("add", name="o.ther", uri=first["uri"], uffd_socket=str(there))
        async with AsyncExitStack() as stack:
            guests = []
            slowly = ("--think-us", 1000, "--threads", 2)
            for kind in KINDS:
                for where in (path, there):
                    owner = run_workload(where, *touching(kind, *slowly))
                    guests.append(await stack.enter_async_context(owner))
            pid = daemon.pid
            for _ in range(3):
                await daemon.event("owner")
                os.kill(pid, signal.SIGKILL)
                pid = (await daemon.event("restarted"))["pid"]
            await count(daemon, "added", 2)
            owner = run_workload(there, *touching("anonymous, no uffd"))
            guests.append(await stack.enter_async_context(owner))
            for guest in guests:
                await check_verified(guest)
        async with connect_control(tmp_path / "ctl") as control:
            status = await control.command("status")
            assert {each["name"] for each in status["snapshots"]} == {"default", "o.ther"}
            await control.command("stop")
        await daemon.rest()  # of the last daemon: its output ends with it
