"""A destination is killed in the middle, and another takes over: at any moment, again and again,
and every byte is right."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from pagenet._pagenet import lib
from processes import (
    LANES,
    PAGE,
    Process,
    check_verified,
    pull_command,
    run,
    run_server,
    run_workload,
    write_pattern,
)
from written import Noted

import pagenet
from pagenet import (
    AbandonedOwner,
    Block,
    HandshakeError,
    OwnerGone,
    Region,
    Run,
    UsageError,
    _native,
    open_source,
)
from pagenet.destination.filling import Filling
from pagenet.protocol import Class, Message
from pagenet.residency import Residency, State
from pagenet.source.rounds import Rounds
from pagenet.uffd import Feature, Mode, UffdTarget, Userfaultfd, probe
from pagenet.uffd._handshake import Mapping, Note

SIZE = 64 << 20
PAGES = SIZE // PAGE

AS_NOBODY = """
import os, sys
from pagenet.cli.pull import main
os.setgroups([]), os.setgid(65534), os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def uffd_permitted() -> None:
    probe()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pattern(tmp_path_factory.mktemp("recovery") / "source", SIZE, zero_every=16))


def resume_command(uri: str, pid: int, lane: str, *more: str) -> list[str]:
    return pull_command(uri, "--resume", str(pid), *more, lane=lane)


@asynccontextmanager
async def begun(
    uri: str,
    directory: Path,
    memory: str,
    lane: str,
    *more: str | int,
    background: str = "linear",
    prefetch: Sequence[str] = (),
) -> AsyncIterator[tuple[Process, Process]]:
    """A pagenet-pull, and an owner that works on the memory which it fills."""
    socket = directory / "owner.sock"
    command = pull_command(uri, "--uffd-socket", str(socket), "--background", background, lane=lane)
    async with run([*command, *prefetch]) as pulling:
        await pulling.event("waiting")
        options = ["--memory", memory, "--size", SIZE, "--zero-every", 16, "--keep-map", *more]
        async with run_workload(socket, *options) as owner:
            await pulling.event("owner")
            yield pulling, owner


async def is_killed(pulling: Process, after: float) -> bool:
    """Kill it after ``after`` s, unless it has every page before. Returns whether it was killed."""
    with trio.move_on_after(after):
        while not pulling.has_ended and (line := await pulling.line()) is not None:
            if '"complete"' in line:
                assert await pulling.wait() == 0
                return False
    assert not pulling.has_ended, pulling.stderr
    await pulling.kill()
    return True


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    ("memory", "window"), [("anonymous", "0,0"), ("memfd", "0,0"), ("memfd", "8,8")]
)
@pytest.mark.parametrize(
    "kills", [4, pytest.param(40, marks=[pytest.mark.soak, pytest.mark.timeout(300)])]
)
async def test_killed_again_and_again(
    kills: int, memory: str, window: str, lane: str, source: str, tmp_path: Path
) -> None:
    """The owner writes to its pages, and gives some of them up, all the time. Neither is undone,
    and nothing is missed. In shared memory, a sample of the prefetched pages is not visible yet at
    that moment."""
    longest, prefetch = 0.5 / kills, ("--prefetch", window)
    async with run_server(source) as (_, uri):
        more: list[str | int] = ["--touches", 8 * PAGES, "--order", "random", "--wait-complete"]
        more += ["--write-share", 50, "--remove-share", 20]
        async with begun(uri, tmp_path, memory, lane, *more, prefetch=prefetch) as (pulling, owner):
            going_on = await is_killed(pulling, random.uniform(0.0, longest))
            while going_on:
                kills -= 1
                async with run([*resume_command(uri, owner.pid, lane), *prefetch]) as pulling:
                    if not await begins(pulling):
                        break
                    going_on = await is_killed(
                        pulling, random.uniform(0.0, longest) if kills > 0 else 60
                    )
            await check_verified(owner)


async def begins(pulling: Process) -> bool:
    """Whether it begins. It does not if the previous one was killed just after it had brought the
    last page."""
    while (line := await pulling.line()) is not None and '"owner"' not in line:
        if '"finished"' in line or "ended" in line or "no userfaultfd" in line:
            return False
    assert line is not None, pulling.stderr
    return True


# ---- what is left in the map ----


class Left:
    """Memory of this process whose destinations come and go, as an owner has it: all that it keeps
    is a userfaultfd, a memfd of its pages, and one of their map."""

    def __init__(self, pages: int) -> None:
        self.region = Region([Block("ram", pages * PAGE)])
        self.uffd = Userfaultfd.open(Feature.EVENT_REMOVE & probe())
        self.memory = os.memfd_create("memory", os.MFD_CLOEXEC)
        os.ftruncate(self.memory, pages * PAGE)
        self.map = os.memfd_create(_native.MAP_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.mapped = _native.Mapped(pages * PAGE, self.memory)
        self.uffd.register(self.mapped.address, pages * PAGE, Mode.MISSING | Mode.MINOR)

    def fill(self, source: bytes = b"source") -> Filling:
        """The filling with which another destination begins."""
        map_fd = _native.lock_map(self.map)
        target = UffdTarget(
            Userfaultfd.received(os.dup(self.uffd.fd)),
            [Mapping(self.mapped.address, self.region.size, 0, PAGE)],
            self.region,
            shared_fd=os.dup(self.memory),
            map_fd=map_fd,
            recover=(
                Note.decode(_native.find_map(self.map).note) if os.fstat(self.map).st_size else None
            ),
            keeps_uffd=lambda: True,
            wait_gone=trio.sleep_forever,
        )
        try:
            return Filling(target, source)
        except BaseException:
            target.close(target.scope())
            raise

    def read(self, page: int) -> bytes:
        """The bytes of a resident page."""
        into = bytearray(PAGE)
        _native.copy_out(self.mapped.address + page * PAGE, memoryview(into))
        return bytes(into)

    def close(self) -> None:
        self.mapped.close()
        self.uffd.close()
        os.close(self.memory)
        os.close(self.map)


@pytest.fixture
def left() -> Iterator[Left]:
    made = Left(16)
    yield made
    made.close()


NEW, OLD = b"n" * PAGE, b"o" * PAGE


def test_what_every_state_becomes(left: Left) -> None:
    dead = left.fill()
    # no page that is mapped is OUTSIDE
    states = [state for state in State if state is not State.OUTSIDE]
    for state in states:
        dead.residency.set(Run(state, 1), state)
    os.pwrite(left.memory, NEW, State.READY * PAGE)
    os.pwrite(left.memory, NEW, State.REMOVING * PAGE)
    dead.close()
    alive = left.fill()
    became = {state: alive.residency.state(state) for state in states}
    assert became == {
        State.MISSING: State.MISSING,
        State.COMING: State.MISSING,
        State.REQUESTED: State.MISSING,
        State.PLACING: State.MISSING,
        State.COPIED: State.MISSING,
        State.READY: State.RESIDENT,
        State.RESIDENT: State.RESIDENT,
        State.REMOVING: State.REMOVED,
        State.REMOVED: State.REMOVED,
        State.POISONED: State.POISONED,
    }
    assert (alive.residency.scope, alive.residency.done) == (16, 5)
    assert left.read(State.READY) == NEW
    assert os.pread(left.memory, PAGE, State.REMOVING * PAGE) == bytes(PAGE)
    alive.close()


def test_what_the_owner_has_written_stays(left: Left) -> None:
    """The page was visible already when its destination died."""
    dead = left.fill()
    dead.arrived(Class.BACKGROUND, Run(3, 1), memoryview(NEW), 0)  # not asked for: dropped
    dead.residency.set(Run(3, 1), State.REQUESTED)
    dead.arrived(Class.BACKGROUND, Run(3, 1), memoryview(NEW), 0)
    os.pwrite(left.memory, OLD, 3 * PAGE)
    dead.residency.set(Run(3, 1), State.READY)
    dead.close()
    alive = left.fill()
    alive.residency.set(Run(4, 1), State.REQUESTED)
    alive.arrived(Class.BACKGROUND, Run(3, 2), memoryview(NEW * 2), 0)
    assert (left.read(3), left.read(4)) == (OLD, NEW)
    alive.close()


def test_a_page_that_was_given_up_since(left: Left) -> None:
    """The dead destination has read the event, which does not come again. The page is not there,
    and does not come back."""
    dead = left.fill()
    dead.residency.set(Run(3, 1), State.READY)
    dead.close()
    alive = left.fill()
    assert alive.residency.state(3) is State.RESIDENT
    assert os.pread(left.memory, PAGE, 3 * PAGE) == bytes(PAGE)
    alive.close()


def test_half_a_page_is_not_seen(left: Left) -> None:
    dead = left.fill()
    dead.residency.set(Run(3, 1), State.PLACING)
    os.pwrite(left.memory, NEW[:100], 3 * PAGE)
    dead.close()
    alive = left.fill()
    alive.residency.set(Run(3, 1), State.REQUESTED)
    alive.arrived(Class.DEMAND, Run(3, 1), None, 0)
    assert left.read(3) == bytes(PAGE)
    alive.close()


def test_another_source(left: Left) -> None:
    left.fill().close()
    with pytest.raises(
        UsageError, match="not the one whose pages were coming, but another machine's"
    ):
        left.fill(b"another")
    left.fill().close()


def test_two_at_once(left: Left) -> None:
    filling = left.fill()
    with pytest.raises(BlockingIOError):
        left.fill()
    filling.close()
    left.fill().close()


def test_owner_that_ends_meanwhile(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = left.fill()
    dead.residency.set(Run(3, 1), State.READY)
    dead.close()

    def gone(*_: object, **__: object) -> None:
        raise OwnerGone("the owner of the memory is gone")

    monkeypatch.setattr(UffdTarget, "publish", gone)
    with pytest.raises(OwnerGone):
        left.fill()
    monkeypatch.undo()
    left.fill().close()


def test_map_of_another_size(left: Left) -> None:
    with Residency(
        8,
        file=_native.lock_map(left.map),
        note=Note(b"source", True, (Mapping(0, PAGE, 0, PAGE),)).encode(),
    ):
        pass
    with pytest.raises(HandshakeError, match="cannot be used: Invalid argument"):
        left.fill()


@pytest.mark.parametrize(
    ("state", "says"),
    [(255, "cannot be used: Invalid argument"), (State.OUTSIDE, "not that of its")],
)
def test_map_that_its_owner_has_written_to(state: int, says: str, left: Left) -> None:
    left.fill().close()
    os.pwrite(left.map, bytes([state]), lib.pn_map_bytes(3))
    with pytest.raises(HandshakeError, match=says):
        left.fill()


@pytest.mark.parametrize(
    "garbage", [b"", b"x", b"pagenet4" + b"\xff" * 5000, b"pagenet4" + b"\xff" * 50000]
)
def test_garbage_where_a_map_should_be(garbage: bytes) -> None:
    file = os.memfd_create("map", os.MFD_CLOEXEC)
    try:
        os.write(file, garbage)
        with pytest.raises(ValueError, match="no map of pages"):
            _native.find_map(file)
    finally:
        os.close(file)


def test_state_that_no_page_can_have(left: Left) -> None:
    """Its owner has the map open, too, and writes to it while pages come."""
    filling = left.fill()
    os.pwrite(left.map, b"\xff", lib.pn_map_bytes(3))
    with pytest.raises(
        HandshakeError, match="the owner has written to the map of its pages: page 3"
    ):
        filling.residency.state(3)
    # no thread may read zeros there
    assert sum(run.count for run in filling.residency.missing()) == 16
    os.pwrite(left.map, b"\0", lib.pn_map_bytes(3))
    filling.close()


def test_map_that_cannot_be_sealed() -> None:
    """Its owner could shrink it while it is in use."""
    file = os.memfd_create("map", os.MFD_CLOEXEC)
    with pytest.raises(PermissionError):
        Residency(8, file=file)


# ---- owners that are not to be taken over ----


@pytest.mark.parametrize(("pid", "says"), [
    (lambda: os.getpid(), "do not come from pagenet: it has no userfaultfd"),
    (lambda: 2**22 + 1, "there is no process 4194305"),
    (lambda: 2**40, "there is no process 1099511627776"),
])  # fmt: skip
def test_no_owner(pid: Callable[[], int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        AbandonedOwner(pid())


async def test_owner_without_a_map(source: str, tmp_path: Path) -> None:
    socket = tmp_path / "owner.sock"
    async with (
        run_server(source) as (_, uri),
        run(pull_command(uri, "--uffd-socket", str(socket), lane="native")) as pulling,
    ):
        await pulling.event("waiting")
        async with run_workload(socket, "--size", SIZE) as owner:
            await pulling.event("owner")
            with pytest.raises(UsageError, match="it keeps no map of them"):
                AbandonedOwner(owner.pid)


async def test_another_process_is_at_work(source: str, tmp_path: Path) -> None:
    async with run_server(source) as (_, uri):  # noqa: SIM117
        async with begun(uri, tmp_path, "memfd", "native", "--order", "none", background="off") as (
            _,
            owner,
        ):
            with pytest.raises(
                UsageError, match=f"another pagenet is at work on the memory of process {owner.pid}"
            ):
                AbandonedOwner(owner.pid)


async def test_of_another_user(source: str, tmp_path: Path) -> None:
    async with run_server(source) as (_, uri):  # noqa: SIM117
        async with begun(uri, tmp_path, "memfd", "native", "--order", "none", background="off") as (
            pulling,
            owner,
        ):
            await pulling.kill()
            command = [
                sys.executable,
                "-c",
                AS_NOBODY,
                *resume_command(uri, owner.pid, "native")[3:],
            ]
            async with run(command) as resumed:
                assert await resumed.wait() == 7
                assert (
                    f"may not take over the memory of process {owner.pid}: Permission denied"
                    in resumed.stderr
                )


# ---- owners that lie ----


# An unprivileged process that claims to have been filled before: it has a map of pages and the note
# beside it, a userfaultfd, and a file of root's that it may read. Its arguments: the file, the
# source's identity, and what it has mapped.
FORGER = """
import ctypes, json, mmap, os, sys
from pagenet import _native
from pagenet.uffd import Mode, Userfaultfd
from pagenet.uffd._handshake import Mapping, Note
path, identity, how = sys.argv[1:]
os.setgroups([]), os.setgid(65534), os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1)  # as if it had not been root: its user may look into it
size = os.stat(path).st_size
file = os.open(path, os.O_RDONLY)
uffd = Userfaultfd(_native.uffd_open("/dev/userfaultfd", True), 0)
_native.uffd_api(uffd.fd, 0)
fd = -1 if how == "nothing" else file
flags = mmap.MAP_SHARED if how == "shared" else mmap.MAP_PRIVATE
access = mmap.PROT_READ if how == "shared" else mmap.PROT_READ | mmap.PROT_WRITE
memory = mmap.mmap(fd, size, flags=flags | (mmap.MAP_ANONYMOUS if fd < 0 else 0), prot=access)
if fd >= 0:
    lines = [line for line in open("/proc/self/maps") if path in line]
    address = int(lines[0].split("-")[0], 16)
else:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
if how != "shared":
    uffd.register(address, size, Mode.MISSING)
note = Note(bytes.fromhex(identity), True, (Mapping(address, size, 0, 4096),)).encode()
file_of_map = os.memfd_create(_native.MAP_NAME, os.MFD_ALLOW_SEALING)
kept = _native.SharedMap(size // 4096, note, os.dup(file_of_map))
print(json.dumps({"event": "ready"}), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def file_of_roots() -> Iterator[Path]:
    """A file of root's, which other users may read, and not write."""
    path = Path(f"/dev/shm/pagenet-roots-{os.getpid()}")
    path.write_bytes(b"roots" * (PAGE // 5 * 16) + bytes(16 * PAGE - PAGE // 5 * 16 * 5))
    path.chmod(0o644)
    yield path
    path.unlink()


@pytest.mark.skipif(os.getuid() != 0, reason="this is about what root may do, and others may not")
@pytest.mark.parametrize("how", ["privately", "shared", "nothing"])
@pytest.mark.parametrize("lane", LANES)
async def test_root_is_not_lent_out(
    how: str, lane: str, file_of_roots: Path, tmp_path: Path
) -> None:
    """Root's file is open in a process that may read it. pagenet does not open it anew, with root's
    permission to write."""
    before = file_of_roots.read_bytes()
    chosen = str(write_pattern(tmp_path / "chosen", len(before)))
    with open_source(chosen) as source:
        identity = source.identity.hex()
    command = [sys.executable, "-c", FORGER, str(file_of_roots), identity, how]
    async with run_server(chosen) as (_, uri), run(command, stdin=subprocess.PIPE) as forger:
        await forger.event("ready")
        async with run(resume_command(uri, forger.pid, lane)) as resumed:
            assert await resumed.wait() == 2, resumed.stderr
            assert (
                f"the memory of process {forger.pid} is not what its map of pages says"
                in resumed.stderr
            )
            assert resumed.stderr.count("\n") == 1
    assert file_of_roots.read_bytes() == before


async def resumed_from(
    server_arguments: Sequence[str], owner: Process, lane: str
) -> tuple[int, str]:
    """How a destination that takes over from there ends, and what it prints."""
    async with (
        run_server(*server_arguments) as (_, uri),
        run(resume_command(uri, owner.pid, lane)) as pulling,
    ):
        return await pulling.wait(), pulling.stderr


@pytest.mark.parametrize("lane", LANES)
async def test_a_file_that_was_written_to_is_another_source(lane: str, tmp_path: Path) -> None:
    """Refused in one line, which names the identity under which the same bytes would be taken."""
    source = write_pattern(tmp_path / "source", SIZE, zero_every=16)
    touches: list[str | int] = ["--touches", PAGES, "--order", "random", "--wait-complete"]
    async with (
        run_server(str(source)) as (_, uri),
        begun(uri, tmp_path, "memfd", lane, *touches) as (pulling, owner),
    ):
        await pulling.kill()
        body = source.read_bytes()
        source.write_bytes(body)
        code, complaint = await resumed_from([str(source)], owner, lane)
        assert (code, complaint.count("\n")) == (2, 1), complaint
        assert "was changed since" in complaint
        identity = complaint.split("--identity ")[1].split()[0]
        assert (await resumed_from([str(source), "--identity", identity], owner, lane))[0] == 0
        await check_verified(owner)


@pytest.mark.parametrize("lane", LANES)
async def test_a_copy_of_the_same_name_is_the_same_source(lane: str, tmp_path: Path) -> None:
    one = write_pattern(tmp_path / "one", SIZE, zero_every=16)
    other = write_pattern(tmp_path / "other", SIZE, zero_every=16)
    touches: list[str | int] = ["--touches", PAGES, "--order", "random", "--wait-complete"]
    async with (
        run_server(str(one), "--identity", "build 42") as (_, uri),
        begun(uri, tmp_path, "memfd", lane, *touches) as (pulling, owner),
    ):
        await pulling.kill()
        assert (await resumed_from([str(other), "--identity", "build 43"], owner, lane))[0] == 2
        assert (await resumed_from([str(other), "--identity", "build 42"], owner, lane))[0] == 0
        await check_verified(owner)


STALE = [*range(100, 150), *range(PAGES - 50, PAGES)]


@contextmanager
def source_memory(source: str) -> Iterator[tuple[str, mmap.mmap]]:
    """What names it, and memory that has what ``source`` has, but for the pages in ``STALE``."""
    fd = os.memfd_create("source", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    with mmap.mmap(fd, SIZE) as memory:
        memory[:] = Path(source).read_bytes()
        for page in STALE:
            memory[page * PAGE : (page + 1) * PAGE] = b"\xee" * PAGE
        try:
            yield f"/proc/{os.getpid()}/fd/{fd}", memory
        finally:
            os.close(fd)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("delay", [0.0, 0.001, 0.01])
async def test_killed_while_stale_pages_are_dropped(
    delay: float, lane: Any, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part of the last message has come, and the rest never does."""
    monkeypatch.setattr("pagenet.source.rounds._SPAN_BYTES", 64)
    written, last = set[int](), Path(source).read_bytes()
    tracker = Noted(Region([Block("ram", SIZE)]), written)
    more: list[str | int] = ["--touches", 4 * PAGES, "--order", "random", "--wait-complete"]
    with source_memory(source) as (spec, memory):
        serving = pagenet.serve(spec, listen="tcp://127.0.0.1:0", lane=lane, tracked=tracker)
        async with (
            serving as server,
            begun(server.uri, tmp_path, "memfd", lane, *more) as (pulling, owner),
            trio.open_nursery() as nursery,
        ):
            rounds = await server.wait_rounds()
            assert rounds is not None
            await rounds.wait_over()
            await rounds.pause()
            for page in STALE:
                memory[page * PAGE : (page + 1) * PAGE] = last[page * PAGE : (page + 1) * PAGE]
            written.update(STALE)
            sent = send_once(rounds, monkeypatch)
            nursery.start_soon(rounds.freeze)
            await sent.wait()
            await trio.sleep(delay)
            await pulling.kill()
            async with run(resume_command(server.uri, owner.pid, lane)) as second:
                assert await second.wait() == 0, second.stderr
            await check_verified(owner)
            nursery.cancel_scope.cancel()


def send_once(rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Have one more message sent, and none after it. Returns the event of that."""
    send, sent = rounds._send, trio.Event()

    async def send_first(message: Message) -> None:
        if sent.is_set():
            await trio.sleep_forever()
        await send(message)
        sent.set()

    monkeypatch.setattr(rounds, "_send", send_first)
    return sent
