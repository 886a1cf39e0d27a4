"""The source is lost for good: the owner waits, its missing pages are poisoned, or it is killed."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from pagenet._pagenet import lib
from processes import (
    HUGE_PAGE,
    LANES,
    PAGE,
    Event,
    Process,
    Relay,
    check_verified,
    huge_pages,
    pull_command,
    run,
    run_relay,
    run_server,
    run_workload,
    threads_in_faults,
    wait_in_faults,
    write_pattern,
)

import pagenet
from pagenet import IntoFile, OwnMemory, Unsupported, UsageError, _native
from pagenet.cli.pull import main
from pagenet.residency import State
from pagenet.uffd import Feature, check_poison, probe

SIZE = 16 << 20
#: page by page, so that there is always something left
SLOWLY = ("--background", "off", "--reconnect-for", "0")
TOUCHES = ("--order", "random", "--threads", "4", "--touches", str(SIZE // PAGE))


@pytest.fixture(autouse=True)
def uffd_permitted() -> None:
    probe()


@pytest.fixture
def can_poison() -> None:
    if Feature.POISON not in probe():
        pytest.skip("the kernel has no UFFDIO_POISON")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pattern(tmp_path_factory.mktemp("loss") / "source", SIZE, zero_every=4))


def huge_if(memory: str) -> Any:
    return huge_pages(SIZE // HUGE_PAGE) if memory == "hugetlb" else nullcontext()


@asynccontextmanager
async def losing(
    source: str, directory: Path, lane: str, on_loss: str, *owner_options: str
) -> AsyncIterator[tuple[Process, Process, Relay]]:
    """A pagenet-pull, an owner, and what is between the pagenet-pull and its source. It holds back
    what comes after the first pages."""
    socket = directory / "owner.sock"
    hold_after = 5 * HUGE_PAGE // 2 if "hugetlb" in owner_options else SIZE // 8
    async with run_server(source) as (_, uri), run_relay(uri, hold_after) as relay:
        command = pull_command(
            relay.uri, "--uffd-socket", str(socket), *SLOWLY, "--on-loss", on_loss, lane=lane
        )
        async with run(command) as pulling:
            await pulling.event("waiting")
            what = ["--size", str(SIZE), "--zero-every", "4", "--wait-complete", *owner_options]
            async with run_workload(socket, *what) as owner:
                await pulling.event("owner")
                yield pulling, owner, relay


async def stall(owner: Process, relay: Relay) -> None:
    """Return when all threads of the owner wait, after some pages have come."""
    await relay.held.wait()
    await wait_in_faults(owner.pid, 4)


async def lose(pulling: Process, relay: Relay) -> list[Event]:
    """Cut the source off. Returns what is told about it."""
    await relay.cut()
    await pulling.event("missing")
    before = len(pulling.events) - 1
    assert await pulling.wait() == 4
    assert pulling.stderr.count("\n") == 1
    told = pulling.events[before:]
    assert told[-1]["event"] == "error"
    return told[:-1]


# ---- poison ----


@pytest.mark.parametrize(
    ("memory", "keeps", "lane"),
    [
        *(("anonymous", True, lane) for lane in LANES),
        *(("memfd", True, lane) for lane in LANES),
        ("anonymous", False, "native"),
        ("hugetlb", True, "native"),
    ],
)
async def test_poison(
    memory: str, keeps: bool, lane: str, source: str, tmp_path: Path, can_poison: None
) -> None:
    """The threads that wait get SIGBUS. All pages that are in place are right, and all others are
    SIGBUS."""
    options = ["--memory", memory, *TOUCHES, *([] if keeps else ["--close-uffd"])]
    with huge_if(memory):
        async with losing(source, tmp_path, lane, "poison", *options) as (
            pulling,
            owner,
            relay,
        ):
            await stall(owner, relay)
            missing, poisoned = await lose(pulling, relay)
            assert (missing["event"], poisoned["event"]) == ("missing", "poisoned")
            assert poisoned["pages"] == missing["pages"] > 0
            verified = await owner.event("verified")
            size = HUGE_PAGE if memory == "hugetlb" else PAGE
            assert (verified["bad"], verified["pages"]) == (0, SIZE // PAGE)
            assert verified["poisoned"] == missing["pages"] * size // PAGE < SIZE // PAGE
            assert await owner.wait() == 0


@pytest.mark.parametrize(
    ("memory", "lane"),
    [*(("anonymous", lane) for lane in LANES), ("memfd", "native"), ("hugetlb", "native")],
)
async def test_poisoned_pages_are_brought_back(
    memory: str, lane: str, source: str, tmp_path: Path, can_poison: None
) -> None:
    """Twice lost, and then resumed, while the owner stands still. No page is poisoned any more, not
    even one of zeros."""
    options = ["--memory", memory, "--order", "none", "--keep-map"]
    with huge_if(memory):
        async with losing(source, tmp_path, lane, "poison", *options) as (
            pulling,
            owner,
            relay,
        ):
            owner.send_signal(signal.SIGSTOP)
            _, poisoned = await lose(pulling, relay)
            assert poisoned["pages"] == SIZE // (HUGE_PAGE if memory == "hugetlb" else PAGE)
            resume = (relay.uri, "--resume", str(owner.pid))
            again = pull_command(*resume, *SLOWLY, "--on-loss", "poison", lane=lane)
            async with run(again) as pulling:
                await pulling.event("owner")
                _, poisoned = await lose(pulling, relay)
                assert poisoned["pages"] == 0  # they are poisoned already
            relay.release()
            async with run(pull_command(*resume, lane=lane)) as pulling:
                assert await pulling.wait() == 0, pulling.stderr
            owner.send_signal(signal.SIGCONT)
            await check_verified(owner)


@pytest.mark.parametrize(("memory", "lane"), [("anonymous", "native"), ("memfd", "trio")])
async def test_owner_that_gives_memory_up_all_the_time(
    memory: str, lane: str, source: str, tmp_path: Path, can_poison: None
) -> None:
    """Nothing can be poisoned while its events are unread. What it has given up meanwhile is zeros
    after a resumption."""
    options = ["--memory", memory, *TOUCHES, "--keep-map", "--remove-share", "50"]
    async with losing(source, tmp_path, lane, "poison", *options) as (pulling, owner, relay):
        await relay.held.wait()
        missing, poisoned = await lose(pulling, relay)
        assert 0 < poisoned["pages"] <= missing["pages"]
        relay.release()
        resume = (relay.uri, "--resume", str(owner.pid))
        async with run(pull_command(*resume, lane=lane)) as again:
            assert await again.wait() in (0, 5), again.stderr  # 5: it has seen enough, and ended
        verified = await owner.event("verified")
        assert (verified["bad"], verified["first_bad"]) == (0, None)
        assert await owner.wait() == 0


def test_kernel_cannot_poison(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """One line, before anything is dialled."""
    kernel = int(probe() & ~Feature.POISON)
    monkeypatch.setattr(_native, "uffd_api", lambda fd, wanted: kernel)
    words = ["tcp://127.0.0.1:1", "--uffd-socket", "owner.sock", "--no-guard"]
    assert main([*words, "--on-loss", "poison"]) == 7
    said = capsys.readouterr()
    assert said.err == "pagenet-pull: this kernel cannot poison pages: that takes Linux 6.6\n"
    with pytest.raises(Unsupported, match=r"6\.6"):
        check_poison()


async def test_memory_that_cannot_be_poisoned(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So says the kernel where the memory is registered."""
    register = _native.uffd_register

    def without_poison(*args: int) -> int:
        return register(*args) & ~(1 << 8)

    monkeypatch.setattr(_native, "uffd_register", without_poison)
    async with pagenet.serve(source, listen="tcp://127.0.0.1:0") as server:
        memory = OwnMemory()
        with pytest.raises(Unsupported, match=r"6\.6"):
            async with pagenet.pull(server.uri, memory, on_loss="poison"):
                pass
        memory.close()


def write_states(pid: int, state: int) -> None:
    """Write it for each page into the map that the owner keeps."""
    found = Path(f"/proc/{pid}/fd").iterdir()
    file = os.open(next(fd for fd in found if _native.MAP_NAME in os.readlink(fd)), os.O_RDWR)
    header, pages = lib.pn_map_bytes(0), SIZE // PAGE
    with mmap.mmap(file, header + pages) as mapped:
        mapped[header:] = bytes([state]) * pages
    os.close(file)


@pytest.mark.parametrize(("memory", "lane"), [("anonymous", "trio"), ("memfd", "native")])
async def test_map_that_calls_all_pages_missing(
    memory: str, lane: str, source: str, tmp_path: Path, can_poison: None
) -> None:
    """Those in place are not poisoned."""
    options = ["--memory", memory, *TOUCHES, "--keep-map"]
    async with losing(source, tmp_path, lane, "poison", *options) as (pulling, owner, relay):
        await stall(owner, relay)
        write_states(owner.pid, State.MISSING)
        missing, poisoned = await lose(pulling, relay)
        assert missing["pages"] == SIZE // PAGE > poisoned["pages"]
        verified = await owner.event("verified")
        assert (verified["bad"], verified["poisoned"]) == (0, poisoned["pages"])


# ---- kill ----


@pytest.mark.parametrize("keeps", [True, False])
async def test_kill(keeps: bool, source: str, tmp_path: Path) -> None:
    options = [*TOUCHES, *([] if keeps else ["--close-uffd"])]
    async with losing(source, tmp_path, "native", "kill", *options) as (pulling, owner, relay):
        await stall(owner, relay)
        missing, killed = await lose(pulling, relay)
        assert missing["pages"] > 0
        assert killed == {"event": "killed", "pid": owner.pid}
        assert await owner.wait() == -signal.SIGKILL
        assert "verified" not in [event["event"] for event in owner.events]


async def test_resumed_owner_is_killed(source: str, tmp_path: Path) -> None:
    options = ["--order", "none", "--keep-map"]
    async with losing(source, tmp_path, "native", "wait", *options) as (pulling, owner, relay):
        assert [event["event"] for event in await lose(pulling, relay)] == ["missing"]
        words = (relay.uri, "--resume", str(owner.pid), *SLOWLY, "--on-loss", "kill")
        async with run(pull_command(*words, lane="native")) as again:
            await again.event("owner")
            _, killed = await lose(again, relay)
            assert killed == {"event": "killed", "pid": owner.pid}
        assert await owner.wait() == -signal.SIGKILL


# The process that connects has inherited the userfaultfd of its parent, whose memory it is.
BY_PROXY = """
import json, os, socket, sys
from pagenet import _native
from pagenet.uffd import Mode, Userfaultfd
size = int(sys.argv[2])
memory, uffd = _native.Mapped(size), Userfaultfd.open()
uffd.register(memory.address, size, Mode.MISSING)
if not os.fork():
    to = socket.socket(socket.AF_UNIX)
    to.connect(sys.argv[1])
    mapping = {"base_host_virt_addr": memory.address, "size": size, "offset": 0, "page_size": 4096}
    socket.send_fds(to, [json.dumps([mapping]).encode()], [uffd.fd])
    to.recv(1)
    os._exit(0)
sys.stdin.read()
"""


async def test_nobody_else_is_killed(source: str, tmp_path: Path) -> None:
    socket = tmp_path / "owner.sock"
    async with run_server(source) as (_, uri):
        words = (uri, "--uffd-socket", str(socket), "--on-loss", "kill")
        async with run(pull_command(*words, lane="native")) as pulling:
            await pulling.event("waiting")
            command = [sys.executable, "-c", BY_PROXY, str(socket), str(SIZE)]
            async with run(command, stdin=subprocess.PIPE) as owner:
                assert await pulling.wait() == 7
                assert "cannot kill this owner: the memory is not that of" in pulling.stderr
                assert pulling.stderr.count("\n") == 1
                await owner.close_stdin()
                assert await owner.wait() == 0


async def test_own_memory_is_not_killed(source: str) -> None:
    memory = OwnMemory()
    async with pagenet.serve(source, listen="tcp://127.0.0.1:0") as server:
        with pytest.raises(Unsupported, match="does not kill itself"):
            async with pagenet.pull(server.uri, memory, on_loss="kill"):
                pass
    memory.close()


# ---- what is no loss ----


async def test_stopped_by_a_signal(source: str, tmp_path: Path) -> None:
    """The source is there: the next pagenet-pull can go on."""
    options = [*TOUCHES, "--keep-map"]
    async with losing(source, tmp_path, "native", "kill", *options) as (pulling, owner, relay):
        await stall(owner, relay)
        pulling.send_signal(signal.SIGTERM)
        assert await pulling.wait() == 143
        assert pulling.events[-1]["event"] == "missing"
        assert threads_in_faults(owner.pid) == 4
        relay.release()
        words = (relay.uri, "--resume", str(owner.pid))
        async with run(pull_command(*words, lane="native")) as again:
            assert await again.wait() == 0
        await check_verified(owner)


async def test_damaged_map(source: str, tmp_path: Path) -> None:
    """What it says is missing may be in place."""
    options = [*TOUCHES, "--keep-map"]
    async with losing(source, tmp_path, "trio", "kill", *options) as (pulling, owner, relay):
        await stall(owner, relay)
        write_states(owner.pid, 0xFF)
        relay.release()
        assert await pulling.wait() == 6
        assert not {"poisoned", "killed"} & {event["event"] for event in pulling.events}
        assert not owner.has_ended


async def test_source_file_is_written_to(source: str, tmp_path: Path, can_poison: None) -> None:
    """Its pages as they were are lost for good."""
    copy, socket = tmp_path / "copy", tmp_path / "owner.sock"
    copy.write_bytes(Path(source).read_bytes())
    async with run_server(str(copy)) as (_, uri):
        words = (uri, "--uffd-socket", str(socket), "--background", "off", "--on-loss", "poison")
        async with run(pull_command(*words, lane="native")) as pulling:
            await pulling.event("waiting")
            options = ["--size", str(SIZE), "--order", "none", "--wait-complete"]
            async with run_workload(socket, *options, "--verify", "none") as owner:
                await pulling.event("owner")
                with copy.open("r+b") as file:
                    file.write(b"x")
                assert await pulling.wait() == 4
                names = [event["event"] for event in pulling.events if event["event"] != "progress"]
                assert names[-3:] == ["missing", "poisoned", "error"]
                assert (await owner.event("verified"))["pages"] == 0


@pytest.mark.parametrize("on_loss", ["poison", "kill"])
async def test_file_has_no_owner(
    on_loss: Any, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "copy"
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["tcp://127.0.0.1:1", "--into", str(path), "--on-loss", on_loss])
    assert "--on-loss is about an owner, and with --into there is none" in capsys.readouterr().err
    async with pagenet.serve(source, listen="tcp://127.0.0.1:0") as server:
        with pytest.raises(UsageError, match="nobody touches a file"):
            async with pagenet.pull(server.uri, IntoFile(path), on_loss=on_loss):
                pass
    assert not path.exists()
