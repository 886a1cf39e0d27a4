"""pagenet/uffd/_owners.py and _target.py: whose memory is filled, how it is handed over, and what
its owner may do."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from pathlib import Path
from typing import Any

import pytest
import trio
from pagenet._pagenet_testing import ffi, lib
from processes import (
    HUGE_PAGE,
    PAGE,
    Process,
    Relay,
    check_verified,
    huge_pages,
    pull,
    run,
    run_relay,
    run_server,
    run_workload,
    stop_process,
    threads_in_faults,
    wait_in_faults,
    write_pattern,
)

from pagenet import (
    Block,
    HandshakeError,
    OwnerGone,
    OwnMemory,
    Region,
    Run,
    SourceLost,
    Transfer,
    UffdSocket,
    Unsupported,
    UsageError,
    _native,
    serve,
)
from pagenet._native import Mapped
from pagenet.residency import State
from pagenet.target import Outcome
from pagenet.uffd import Feature, Mode, UffdTarget, Userfaultfd, probe
from pagenet.uffd._handshake import MAX_HANDSHAKE_BYTES, Note

pytestmark = pytest.mark.usefixtures("uffd_permitted")

SIZE = 64 * PAGE
REGION = Region([Block("ram", SIZE)])


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_pattern(tmp_path / "source", SIZE))


def pattern(first: int, pages: int) -> bytes:
    content = bytearray(pages * PAGE)
    lib.pn_pattern_fill(ffi.from_buffer(content), first, pages, PAGE, 0, 0)
    return bytes(content)


def huge_if(memory: str, count: int = 4) -> Any:
    return huge_pages(count) if memory == "hugetlb" else nullcontext()


# ---- memory of one's own ----


@pytest.mark.parametrize(("options", "placements"), [
    ({}, {"copy"}),
    ({"move": True}, {"move", "copy"}),
    ({"kind": "memfd"}, {"continue", "copy"}),
    ({"kind": "memfd", "allocate": True}, {"continue", "copy"}),
    ({"kind": "hugetlb"}, {"continue", "copy"}),
    ({"kind": "hugetlb", "allocate": True}, {"continue", "copy"}),
])  # fmt: skip
async def test_own_memory(
    options: dict[str, Any], placements: set[str], tmp_path: Path, lane: str
) -> None:
    size = 2 * HUGE_PAGE
    path = write_pattern(tmp_path / "source", size, zero_every=3)
    memory = OwnMemory(**options)
    with huge_if(options.get("kind", "anonymous")):
        async with (
            serve(str(path), listen="tcp://127.0.0.1:0") as server,
            pull(server.uri, memory, lane=lane) as transfer,
        ):
            assert transfer.statistics().placement in placements
            await transfer.wait_complete()
            assert await memory.read(0, size) == path.read_bytes()
            assert await memory.read(PAGE - 1, 2) == path.read_bytes()[PAGE - 1 : PAGE + 1]
        assert await memory.read(0, size) == path.read_bytes()
        memory.close()
        memory.close()


async def test_own_memory_is_attached_once() -> None:
    memory = OwnMemory()
    target = await memory.attach(REGION)
    with pytest.raises(UsageError, match="attached before"):
        await memory.attach(REGION)
    target.close(())
    memory.close()


async def test_own_huge_pages_divide_the_region() -> None:
    with pytest.raises(
        UsageError, match="262144 bytes is not a whole number of 2097152-byte huge pages"
    ):
        await OwnMemory("hugetlb").attach(REGION)
    with huge_pages(4), pytest.raises(HandshakeError, match="does not fit the source's memory"):
        await OwnMemory("hugetlb").attach(Region([Block("a", SIZE), Block("b", HUGE_PAGE - SIZE)]))


async def test_own_huge_pages_that_are_not_there() -> None:
    """An error at once: a page that cannot be had later would be a SIGBUS in the middle of the
    transfer."""
    with pytest.raises(
        Unsupported,
        match=r"^cannot map 1099511627776 bytes of hugetlb memory: .*vm\.nr_hugepages\)$",
    ):
        await OwnMemory("hugetlb").attach(Region([Block("ram", 1 << 40)]))


# Touches own memory while it comes. It is a process of its own, which an error would end.
OWN_MEMORY = """
import hashlib, json, sys
import trio
import pagenet
sys.path.insert(0, sys.argv[4])
from processes import pull
async def read(memory, offset, into):
    into[offset] = await memory.read(offset, 4096)
    print(json.dumps({"event": "read", "offset": offset}), flush=True)
async def main(uri, kind, lane):
    memory, into = pagenet.OwnMemory(kind), {}
    async with pull(uri, memory, lane=lane, background="off") as transfer:
        print(json.dumps({"event": "attached"}), flush=True)
        async with trio.open_nursery() as nursery:
            for offset in range(0, transfer.region.size, 4096):
                nursery.start_soon(read, memory, offset, into)
        await transfer.wait_complete()
    digest = hashlib.sha256(b"".join(into[offset] for offset in sorted(into))).hexdigest()
    faults = transfer.statistics().demand.faults
    print(json.dumps({"event": "done", "digest": digest, "faults": faults}), flush=True)
try:
    trio.run(main, *sys.argv[1:4])
except BaseException as error:
    print(json.dumps({"event": "failed", "error": repr(error)}), flush=True)
"""


def run_own_memory(uri: str, kind: str, lane: str) -> AbstractAsyncContextManager[Process]:
    return run([sys.executable, "-c", OWN_MEMORY, uri, kind, lane, str(Path(__file__).parents[1])])


@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
async def test_own_memory_is_read_while_it_comes(kind: str, source: str, lane: str) -> None:
    async with (
        serve(source, listen="tcp://127.0.0.1:0") as server,
        run_own_memory(server.uri, kind, lane) as process,
    ):
        done = await process.event("done")
        assert done["digest"] == hashlib_of(Path(source).read_bytes())
        # of the pages, those that a thread could touch before they came
        assert done["faults"] >= SIZE // PAGE / 2
        assert await process.wait() == 0


def hashlib_of(content: bytes) -> str:
    return (
        subprocess.run(["sha256sum"], input=content, capture_output=True, check=True)
        .stdout.split()[0]
        .decode()
    )


@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
async def test_own_memory_is_sigbus_when_the_source_is_lost(
    kind: str, source: str, lane: str
) -> None:
    if Feature.POISON not in probe():
        pytest.skip("the kernel has no UFFDIO_POISON")
    async with (
        run_server(source) as (server, uri),
        run_relay(uri, 16 << 10) as relay,
        run_own_memory(relay.uri, kind, lane) as process,
    ):
        await relay.held.wait()
        await server.kill()
        await relay.cut()
        assert await process.wait() == -signal.SIGBUS, (process.events, process.stderr)
        # "failed" if the thread that pulls reports the error before the thread that reads gets its
        # signal
        assert {event["event"] for event in process.events} <= {"attached", "read", "failed"}
        assert len(process.events) < SIZE // PAGE


# ---- the handshake: owners that are accepted ----


class Owner:
    """An owner within this process that hands over memory and never touches it."""

    def __init__(
        self,
        path: Path,
        size: int = SIZE,
        fd: int = -1,
        features: Feature = Feature.EVENT_REMOVE,
        register: bool = True,
        page_size: int = PAGE,
    ) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.memory = Mapped(size, fd, alignment=page_size)
        self.uffd = Userfaultfd.open(features)
        if register:
            self.uffd.register(self.memory.address, size, Mode.MISSING)

    def mapping(self, **changes: int) -> dict[str, int]:
        whole = {
            "base_host_virt_addr": self.memory.address,
            "size": self.memory.size,
            "offset": 0,
            "page_size": PAGE,
        }
        return {**whole, **changes}

    def send(self, message: bytes, *fds: int) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has been refused already
            socket.send_fds(self.socket, [message], list(fds))

    def hand_over(self, *more_fds: int) -> None:
        self.send(json.dumps([self.mapping()]).encode(), self.uffd.fd, *more_fds)

    async def wait_turned_away(self) -> None:
        await trio.lowlevel.wait_readable(self.socket)
        with suppress(ConnectionResetError):  # it was in the middle of its message
            assert self.socket.recv(1) == b""

    def content(self) -> bytes:
        """Its memory's content, once every page is there."""
        return bytes(self.memory.buffer(0, self.memory.size))

    def close(self) -> None:
        self.socket.close()
        self.uffd.close()
        self.memory.close()


class Reception:
    """A socket for owners, and the owners that it has refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refused: list[str] = []
        self.waiting = 0
        self.owners: list[Owner] = []
        self.target: UffdTarget | None = None
        self.attached = trio.Event()
        self.socket = UffdSocket(
            path, on_waiting=self._count, on_refused=lambda error: self.refused.append(str(error))
        )

    def _count(self) -> None:
        self.waiting += 1

    async def run(self, region: Region) -> None:
        self.target = await self.socket.attach(region)
        self.attached.set()

    def connect(self, **options: Any) -> Owner:
        self.owners.append(Owner(self.path, **options))
        return self.owners[-1]

    def close(self) -> None:
        if self.target is not None:
            self.target.close(())
        for owner in self.owners:
            owner.close()
        self.socket.close()


@pytest.fixture
async def reception(tmp_path: Path) -> AsyncIterator[Reception]:
    async with receiving(tmp_path / "uffd.sock") as reception:
        yield reception


@asynccontextmanager
async def receiving(path: Path, region: Region = REGION) -> AsyncIterator[Reception]:
    reception = Reception(path)
    await reception.socket.listen()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reception.run, region)
            yield reception
            nursery.cancel_scope.cancel()
    finally:
        reception.close()


async def check_welcome(reception: Reception) -> None:
    """Check that the next owner is served."""
    reception.connect().hand_over()
    await reception.attached.wait()
    assert reception.target is not None
    assert reception.target.placement == "copy"
    assert reception.waiting == 1


async def check_refused(reception: Reception, owner: Owner, reason: str) -> None:
    await owner.wait_turned_away()
    (line,) = reception.refused
    assert reason in line
    assert "\n" not in line
    assert len(line) < 300
    await check_welcome(reception)


async def test_good_owner(reception: Reception) -> None:
    await check_welcome(reception)
    assert reception.refused == []


async def test_page_size_may_be_called_otherwise(reception: Reception) -> None:
    owner = reception.connect()
    mapping = owner.mapping()
    mapping["page_size_kib"] = mapping.pop("page_size")
    owner.send(json.dumps([mapping]).encode(), owner.uffd.fd)
    await reception.attached.wait()


async def test_message_in_pieces(reception: Reception) -> None:
    owner = reception.connect()
    message = b"\n [" + json.dumps(owner.mapping()).encode() + b" ] \n"
    owner.send(message[:1], owner.uffd.fd)
    for byte in message[1 : message.index(b"]") + 1]:
        await trio.testing.wait_all_tasks_blocked()  # the handler has read what was sent
        owner.send(bytes([byte]))
    await reception.attached.wait()
    assert reception.refused == []


async def test_descriptor_with_a_later_piece(reception: Reception) -> None:
    owner = reception.connect()
    message = json.dumps([owner.mapping()]).encode()
    owner.send(message[:20])
    await trio.testing.wait_all_tasks_blocked()
    owner.send(message[20:], owner.uffd.fd)
    await reception.attached.wait()


async def test_several_mappings(tmp_path: Path) -> None:
    region = Region([Block("rom", 4 * PAGE), Block("ram", 60 * PAGE)])
    async with receiving(tmp_path / "uffd.sock", region) as reception:
        owner = reception.connect()
        address = owner.memory.address
        mappings = [
            owner.mapping(size=10 * PAGE, offset=20 * PAGE),
            # this mapping crosses the end of a block
            owner.mapping(base_host_virt_addr=address + 20 * PAGE, size=10 * PAGE),
        ]
        owner.send(json.dumps(mappings).encode(), owner.uffd.fd)
        await reception.attached.wait()
        assert reception.target is not None
        assert sorted(run.first for run in reception.target.scope()) == [0, 4, 20]
        assert sum(run.count for run in reception.target.scope()) == 20


# ---- the handshake: owners that are refused ----

BAD_MESSAGES: dict[str, tuple[Callable[[Owner], bytes], str]] = {
    "no json": (lambda owner: b"hello", "is not JSON"),
    "no utf-8": (lambda owner: b"[\xff\xfe]", "is not JSON"),
    "half": (lambda owner: json.dumps([owner.mapping()]).encode()[:30] + b"]", "is not JSON"),
    "no array": (lambda owner: json.dumps(owner.mapping()).encode(), "asks for no file"),
    "request for a file": (lambda owner: b'{"want": "file"}', "here is none to share"),
    "empty array": (lambda owner: b"[]", "is not a JSON array of mappings"),
    "array of nothing": (lambda owner: b"[null]",
        "mapping 0 of the owner's handshake is not a JSON object"),
    "no address": (lambda owner: b'[{"size": 4096, "offset": 0}]',
        "has no proper 'base_host_virt_addr'"),
    "text for a number": (
        lambda owner: json.dumps([{**owner.mapping(), "size": "4096"}]).encode(),
        "has no proper 'size'",
    ),
    "odd size": (lambda owner: json.dumps([owner.mapping(size=SIZE - 1)]).encode(),
        "not whole pages"),
    "huge": (lambda owner: json.dumps([owner.mapping(size=1 << 60)]).encode(),
        "is no address range"),
    "larger than the region": (lambda owner: json.dumps([owner.mapping(size=SIZE + PAGE)]).encode(),
        "past the end"),
    "past the end": (lambda owner: json.dumps([owner.mapping(offset=PAGE)]).encode(),
        "past the end of the region"),
    "wrapping": (lambda owner: json.dumps([owner.mapping(offset=2**64 - PAGE)]).encode(),
        "past the end of the region"),
    "twice": (lambda owner: json.dumps([owner.mapping()] * 2).encode(), "mappings overlap"),
    "overlapping": (
        lambda owner: json.dumps([
            owner.mapping(size=3 * PAGE),
            owner.mapping(size=PAGE, offset=8 * PAGE),
        ]).encode(),
        "overlap in the owner's address space",
    ),
    "one page for two": (
        lambda owner: json.dumps([
            owner.mapping(size=PAGE),
            owner.mapping(size=PAGE, base_host_virt_addr=owner.memory.address + PAGE),
        ]).encode(),
        "overlap in the region",
    ),
    "other page size": (lambda owner: json.dumps([owner.mapping(page_size=12288)]).encode(),
        "page size 12288"),
    "endless": (lambda owner: b"[" + b" " * MAX_HANDSHAKE_BYTES,
        f"longer than {MAX_HANDSHAKE_BYTES} bytes"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_MESSAGES)
async def test_message_that_makes_no_sense(what: str, reception: Reception) -> None:
    make, reason = BAD_MESSAGES[what]
    owner = reception.connect()
    owner.send(make(owner), owner.uffd.fd)
    await check_refused(reception, owner, reason)


def pipe(stack: ExitStack) -> int:
    read_end, write_end = os.pipe()
    stack.callback(os.close, read_end)
    stack.callback(os.close, write_end)
    return read_end


def own_socket(stack: ExitStack) -> int:
    return stack.enter_context(socket.socket(socket.AF_UNIX)).fileno()


def memfd_of(stack: ExitStack, size: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    os.ftruncate(fd, size)
    return fd


def device(stack: ExitStack) -> int:
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def directory(stack: ExitStack) -> int:
    fd = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


DESCRIPTORS = [pipe, own_socket, device, directory, lambda stack: memfd_of(stack, SIZE)]


@pytest.mark.parametrize(
    "make", DESCRIPTORS, ids=["pipe", "socket", "device", "directory", "memfd"]
)
async def test_descriptor_that_is_no_userfaultfd(
    make: Callable[[ExitStack], int], reception: Reception
) -> None:
    with ExitStack() as stack:
        owner = reception.connect()
        owner.send(json.dumps([owner.mapping()]).encode(), make(stack))
        await check_refused(reception, owner, "the file descriptor is not a userfaultfd")


@pytest.mark.parametrize(("count", "reason"), [
    (0, "came without a userfaultfd"),
    (3, "more than two descriptors"),
    (4, "more than two descriptors"),
    (100, "more than two descriptors"),
])  # fmt: skip
async def test_number_of_descriptors(count: int, reason: str, reception: Reception) -> None:
    owner = reception.connect()
    owner.send(json.dumps([owner.mapping()]).encode(), *[owner.uffd.fd] * count)
    await check_refused(reception, owner, reason)


async def test_three_descriptors_in_three_pieces(reception: Reception) -> None:
    owner = reception.connect()
    for piece in (b"[", b"{", b'"'):
        owner.send(piece, owner.uffd.fd)
        await trio.testing.wait_all_tasks_blocked()
    await check_refused(reception, owner, "more than two descriptors")


def map_of(stack: ExitStack, flags: int = os.MFD_ALLOW_SEALING) -> int:
    """A memfd, as an owner makes it for the map of its pages."""
    file = os.memfd_create(_native.MAP_NAME, os.MFD_CLOEXEC | flags)
    stack.callback(os.close, file)
    return file


@pytest.mark.parametrize("with_file", [False, True])
async def test_map_of_pages(with_file: bool, reception: Reception) -> None:
    """The map is sent before or after the file behind the memory, or without that file."""
    with ExitStack() as stack:
        memory, file = memfd_of(stack, SIZE), map_of(stack)
        reception.connect(fd=memory).hand_over(file, *([memory] if with_file else []))
        await reception.attached.wait()
        assert reception.target is not None
        assert reception.target.placement == ("continue" if with_file else "copy")
        with reception.target.open_residency(b"source") as residency:
            with pytest.raises(ValueError, match="no map of pages"):
                _native.find_map(file)  # it is not whole yet
            residency.confine(reception.target.scope())
            residency.set(Run(3, 1), State.RESIDENT)
            found = _native.find_map(file)
            assert (found.pages, found.done, found.finished) == (SIZE // PAGE, 1, False)
            assert Note.decode(found.note).source == b"source"
            with pytest.raises(BlockingIOError):
                _native.lock_map(file)
            with pytest.raises(PermissionError):
                os.ftruncate(file, 0)


async def test_map_that_is_not_empty(reception: Reception) -> None:
    with ExitStack() as stack:
        file = map_of(stack)
        os.write(file, b"x")
        owner = reception.connect()
        owner.hand_over(file)
        await check_refused(
            reception, owner, "is not empty: its transfer is to be resumed, not begun"
        )


async def test_map_that_another_process_uses(reception: Reception) -> None:
    with ExitStack() as stack:
        file = map_of(stack)
        stack.callback(os.close, _native.lock_map(file))
        owner = reception.connect()
        owner.hand_over(file)
        await check_refused(
            reception, owner, "the owner's map of pages is in use, or not to be had"
        )


async def test_two_maps(reception: Reception) -> None:
    with ExitStack() as stack:
        owner = reception.connect()
        owner.hand_over(map_of(stack), map_of(stack))
        await check_refused(reception, owner, "carries two maps of its pages")


async def test_map_that_cannot_be_sealed(reception: Reception) -> None:
    """Its owner could shrink it while it is in use."""
    with ExitStack() as stack:
        reception.connect().hand_over(map_of(stack, 0))
        await reception.attached.wait()
        assert reception.target is not None
        with pytest.raises(HandshakeError, match="cannot be used: Operation not permitted"):
            reception.target.open_residency(b"source")


@pytest.mark.parametrize(
    "note",
    [b"", b"[]", b"{", b'{"source": "x"}', b'{"source": "00", "shared": true, "mappings": []}'],
)
def test_note_that_makes_no_sense(note: bytes) -> None:
    with pytest.raises(HandshakeError):
        Note.decode(note)


@pytest.mark.parametrize("features", [Feature.EVENT_FORK, Feature.EVENT_REMAP])
async def test_events_that_pagenet_does_not_follow(features: Feature, reception: Reception) -> None:
    try:
        owner = reception.connect(features=features)
    except Unsupported as error:
        pytest.skip(str(error))
    owner.hand_over()
    await check_refused(reception, owner, "reports forks and remaps")


@pytest.mark.parametrize("sent", [0, 1, 30])
async def test_closes_early(sent: int, reception: Reception) -> None:
    owner = reception.connect()
    if sent:
        owner.send(json.dumps([owner.mapping()]).encode()[:sent], owner.uffd.fd)
    owner.socket.shutdown(socket.SHUT_WR)
    await check_refused(reception, owner, f"closed its socket after {sent} bytes")


@pytest.mark.parametrize("sent", [0, 30])
async def test_says_nothing_more(
    sent: int, reception: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagenet.uffd._owners.HANDSHAKE_TIMEOUT", 0.1)
    owner = reception.connect()
    if sent:
        owner.send(json.dumps([owner.mapping()]).encode()[:sent], owner.uffd.fd)
    await owner.wait_turned_away()
    monkeypatch.undo()
    await check_refused(reception, owner, "sent no handshake for 0.1 s")


async def test_many_bad_ones_in_a_row(reception: Reception) -> None:
    for count in range(1, 20):
        owner = reception.connect()
        owner.send(b"[]", owner.uffd.fd)
        await owner.wait_turned_away()
        assert len(reception.refused) == count
    await check_welcome(reception)


# ---- the file behind shared memory ----


def read_only(stack: ExitStack) -> int:
    fd = os.open(f"/proc/self/fd/{memfd_of(stack, SIZE)}", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


@pytest.mark.parametrize(("make", "reason"), [
    (lambda stack: memfd_of(stack, SIZE - PAGE),
        "memory file is 0x3f000 bytes long, the region 0x40000"),
    (pipe, "memory file is not a memfd"),
    (device, "memory file is not a memfd"),
    (read_only,
        "memory file is not a memfd, or file of tmpfs or hugetlbfs,"
        " that is open to read and to write"),
], ids=["short", "pipe", "device", "read-only"])  # fmt: skip
async def test_file_that_is_of_no_use(
    make: Callable[[ExitStack], int], reason: str, reception: Reception
) -> None:
    with ExitStack() as stack:
        owner = reception.connect(fd=memfd_of(stack, SIZE))
        owner.hand_over(make(stack))
        await check_refused(reception, owner, reason)


async def test_file_is_written_and_mapped(reception: Reception) -> None:
    if Feature.MINOR_SHMEM not in probe():
        pytest.skip("the kernel has no MINOR_SHMEM")
    with ExitStack() as stack:
        fd = memfd_of(stack, SIZE)
        reception.connect(fd=fd).hand_over(fd)
        await reception.attached.wait()
        assert reception.target is not None
        assert reception.target.placement == "continue"


async def test_file_of_private_memory_is_not_used(reception: Reception) -> None:
    with ExitStack() as stack:
        reception.connect().hand_over(memfd_of(stack, SIZE))
        await reception.attached.wait()
        assert reception.target is not None
        assert reception.target.placement == "copy"


async def test_address_where_nothing_is_mapped(reception: Reception) -> None:
    owner = reception.connect()
    owner.send(json.dumps([owner.mapping(base_host_virt_addr=1 << 46)]).encode(), owner.uffd.fd)
    await check_refused(
        reception, owner, "the owner's userfaultfd does not watch its memory at 0x400000000000"
    )


async def test_memory_that_another_userfaultfd_watches(reception: Reception) -> None:
    owner = reception.connect()
    other = Userfaultfd.open()
    try:
        owner.send(json.dumps([owner.mapping()]).encode(), other.fd)
        await check_refused(reception, owner, "does not watch its memory")
    finally:
        other.close()


async def test_memory_that_was_unmapped_since(reception: Reception) -> None:
    """Memory may be unmapped at any time. That is no error: its pages need not be filled."""
    owner = reception.connect()
    owner.hand_over()
    await reception.attached.wait()
    owner.memory.close()
    assert reception.target is not None
    assert reception.target.place(Run(0, 64), memoryview(bytes(SIZE))) == Outcome(
        placed=0, absent=64
    )


@pytest.mark.parametrize("kind", ["memfd", "hugetlb"])
@pytest.mark.parametrize("compress", ["none", "lz4"])
async def test_file_that_becomes_shorter(
    kind: str, compress: str, tmp_path: Path, lane: str
) -> None:
    """Its owner truncates it while pages come. That ends the transfer, and no process gets a
    signal."""
    size = 2 * HUGE_PAGE
    source, path = (
        str(write_pattern(tmp_path / "source", size, zero_every=3)),
        tmp_path / "uffd.sock",
    )
    receiver = UffdSocket(path, allocate=True)
    await receiver.listen()
    page_size = HUGE_PAGE if kind == "hugetlb" else PAGE
    with huge_if(kind), ExitStack() as stack:
        fd = os.memfd_create("test", os.MFD_CLOEXEC | (os.MFD_HUGETLB if kind == "hugetlb" else 0))
        stack.callback(os.close, fd)
        os.ftruncate(fd, size)
        owner = Owner(path, size, fd, page_size=page_size)
        stack.callback(owner.close)
        owner.send(json.dumps([owner.mapping(page_size=page_size)]).encode(), owner.uffd.fd, fd)
        options = {"background": "off", "compress": compress}
        async with serve(source, listen="tcp://127.0.0.1:0") as server:
            with pytest.raises(
                HandshakeError, match=r"^the owner made its memory file shorter, or"
            ):
                await cut_off(pull(server.uri, receiver, lane=lane, **options), fd)
    receiver.close()


async def cut_off(pulling: AbstractAsyncContextManager[Transfer], fd: int) -> None:
    async with pulling as transfer:
        assert transfer.statistics().placement == "continue"
        os.ftruncate(fd, 0)
        transfer.set_background("linear")
        await transfer.wait_complete()


async def test_file_that_can_be_sealed_keeps_its_size(reception: Reception) -> None:
    if Feature.MINOR_SHMEM not in probe():
        pytest.skip("the kernel has no MINOR_SHMEM")
    with ExitStack() as stack:
        fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        stack.callback(os.close, fd)
        os.ftruncate(fd, SIZE)
        reception.connect(fd=fd).hand_over(fd)
        await reception.attached.wait()
        assert reception.target is not None
        assert reception.target.placement == "continue"
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)


# ---- the socket ----


async def test_socket_is_the_users_alone_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "uffd.sock"
    before = os.umask(0)
    try:
        async with receiving(path):
            status = path.lstat()
            assert stat.S_ISSOCK(status.st_mode)
            assert stat.S_IMODE(status.st_mode) == 0o600
    finally:
        os.umask(before)
    assert os.listdir(tmp_path) == []


async def test_socket_of_one_who_died_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "uffd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with receiving(path) as reception:
        await check_welcome(reception)


async def test_socket_of_another_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "uffd.sock"
    async with receiving(path):
        with pytest.raises(UsageError, match="another process listens there already"):
            await UffdSocket(path).attach(REGION)
        path.rename(tmp_path / "moved")
        path.touch()
    assert sorted(os.listdir(tmp_path)) == ["moved", "uffd.sock"]


@pytest.mark.parametrize(
    "what", ["a file", "a directory", "missing/uffd.sock", "x" * 120, "file/uffd.sock"]
)
async def test_path_where_no_socket_can_be(what: str, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "a directory").mkdir()
    with pytest.raises(UsageError) as caught:
        await UffdSocket(tmp_path / what).attach(REGION)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["a directory", "a file", "file"]


async def test_close_is_idempotent_and_may_come_first(tmp_path: Path) -> None:
    owner = UffdSocket(tmp_path / "uffd.sock")
    owner.close()
    await owner.listen()
    await owner.listen()
    owner.close()
    owner.close()
    assert os.listdir(tmp_path) == []


# ---- whole transfers, with owners that are processes ----

MEMORIES = ["anonymous", "memfd", "tmpfs", "hugetlb"]


@asynccontextmanager
async def pulling(
    uri: str,
    owner: UffdSocket,
    lane: str,
    workload: AbstractAsyncContextManager[Process],
    **options: Any,
) -> AsyncIterator[tuple[Process, Any]]:
    """A workload, which is started when it can connect, and the transfer into it."""
    await owner.listen()
    try:
        async with workload as process, pull(uri, owner, lane=lane, **options) as transfer:
            yield process, transfer
    finally:
        owner.close()


@pytest.mark.parametrize("memory", MEMORIES)
async def test_removals(memory: str, tmp_path: Path, lane: str) -> None:
    """Balloons inflate while the background fills and threads touch."""
    size = 32 * HUGE_PAGE if memory == "hugetlb" else 4 << 20
    path = tmp_path / "uffd.sock"
    arguments: list[str | int] = [
        "--size",
        size,
        "--memory",
        memory,
        "--remove-share",
        40,
        "--touches",
        4000,
        "--order",
        "random",
    ]
    with huge_if(memory, 33):
        source = str(write_pattern(tmp_path / "source", size, zero_every=10))
        workload = run_workload(
            path, *arguments, "--zero-every", 10, "--remove-share", 40, "--write-share", 30
        )
        async with (
            serve(source, listen="tcp://127.0.0.1:0") as server,
            pulling(server.uri, UffdSocket(path), lane, workload) as (process, transfer),
        ):
            verified = await process.event("verified")
            assert (verified["bad"], verified["first_bad"], verified["poisoned"]) == (0, None, 0)
            assert verified["removed"] > 0
            await transfer.wait_complete()


@pytest.mark.parametrize("background", ["linear", "off"])
@pytest.mark.parametrize("threads", [0, 4])
async def test_owner_is_killed(background: str, threads: int, tmp_path: Path, lane: str) -> None:
    """While pages are in flight, and threads wait for theirs."""
    size = 8 << 20
    path = tmp_path / "uffd.sock"
    order = ["--order", "random", "--threads", str(threads)] if threads else ["--order", "none"]
    workload = run_workload(path, "--size", size, "--wait-complete", "--verify", "none", *order)
    async with (
        run_server(str(write_pattern(tmp_path / "source", size))) as (_, uri),
        run_relay(uri, 1 << 20 if background == "linear" else 16 << 10) as relay,
    ):
        with pytest.raises(OwnerGone, match="the owner of the memory is gone"):
            await kill_owner(relay, UffdSocket(path), lane, workload, background, threads)


async def kill_owner(
    relay: Relay,
    owner: UffdSocket,
    lane: str,
    workload: AbstractAsyncContextManager[Process],
    background: str,
    threads: int,
) -> None:
    async with pulling(relay.uri, owner, lane, workload, background=background) as (process, _):
        await process.event("touching")
        if background == "linear" or threads:
            await relay.held.wait()
        await wait_in_faults(process.pid, threads)
        await process.kill()
        await trio.sleep_forever()


@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
async def test_owner_that_ends_once_it_has_all(
    kind: Any, source: str, lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may end so soon after its last page that pagenet learns of both at once."""
    transfers: list[Transfer] = []

    async def wait_gone(self: UffdTarget) -> None:
        while not transfers or transfers[0].statistics().done < SIZE // PAGE:
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr(UffdTarget, "wait_gone", wait_gone)
    memory = OwnMemory(kind)
    async with (
        serve(source, listen="tcp://127.0.0.1:0") as server,
        pull(server.uri, memory, lane=lane) as transfer,
    ):
        transfers.append(transfer)
        await transfer.wait_complete()
    memory.close()


async def test_owner_that_ends_by_itself(source: str, tmp_path: Path, lane: str) -> None:
    """An owner that ends before its handshake was read is refused: then the next owner stays for
    longer."""
    async with serve(source, listen="tcp://127.0.0.1:0") as server:
        for milliseconds in (1, 100, 10_000):
            if await ends_after(milliseconds, server.uri, tmp_path / "uffd.sock", lane):
                return
    pytest.fail("every owner was refused")


async def ends_after(milliseconds: int, uri: str, path: Path, lane: str) -> bool:
    """Whether it was accepted before it ended."""
    workload = run_workload(
        path, "--size", SIZE, "--order", "none", "--wait-complete", "--gone-after", milliseconds
    )
    with trio.CancelScope() as unless_refused:
        owner = UffdSocket(path, on_refused=lambda error: unless_refused.cancel())
        with pytest.raises(OwnerGone):
            await wait_gone(uri, owner, lane, workload)
    return not unless_refused.cancelled_caught


async def wait_gone(
    uri: str, owner: UffdSocket, lane: str, workload: AbstractAsyncContextManager[Process]
) -> None:
    async with pulling(uri, owner, lane, workload, background="off"):
        await trio.sleep_forever()


BAD_HANDSHAKES = {
    "json": "sent no handshake for",  # half of it, and no more
    "nofd": "came without a userfaultfd",
    "overlap": "overlap",
    "past-end": "past the end",
    "empty": "is not a JSON array",
    "huge": "is no address range",
    "long": "longer than",
}


async def test_bad_owners_before_a_good_one(
    source: str, tmp_path: Path, lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # half a message, and then nothing
    monkeypatch.setattr("pagenet.uffd._owners.HANDSHAKE_TIMEOUT", 0.3)
    path = tmp_path / "uffd.sock"
    refused: list[str] = []
    owner = UffdSocket(path, on_refused=lambda error: refused.append(str(error)))
    await owner.listen()

    async def send_bad_one(how: str) -> None:
        async with run_workload(
            path, "--size", f"{SIZE // 2},{SIZE // 2}", "--bad-handshake", how
        ) as bad:
            assert await bad.wait() == 0, bad.stderr

    async def send_all() -> None:
        async with trio.open_nursery() as nursery:
            for how in BAD_HANDSHAKES:
                nursery.start_soon(send_bad_one, how)
        async with run_workload(path, "--size", SIZE, "--wait-complete") as good:
            await check_verified(good, pages=64)

    async with serve(source, listen="tcp://127.0.0.1:0") as server, trio.open_nursery() as nursery:
        nursery.start_soon(send_all)
        async with pull(server.uri, owner, lane=lane) as transfer:
            await transfer.wait_complete()
    owner.close()
    assert len(refused) == len(BAD_HANDSHAKES)
    for reason in BAD_HANDSHAKES.values():
        assert any(reason in line for line in refused), (reason, refused)


# Hands over its memory, and then reads the pages whose numbers come on stdin. Its arguments: the
# socket, the kind of memory, whether to keep a userfaultfd of its own.
READER = """
import json, os, resource, socket, sys
from pagenet import _native
from pagenet.uffd import Mode, Userfaultfd
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
path, kind, keep = sys.argv[1:]
page_size = 2 << 20 if kind == "hugetlb" else 4096
size = 2 * page_size if kind == "hugetlb" else 64 * page_size
fds = []
if kind != "anonymous":
    fds = [os.memfd_create("reader", os.MFD_HUGETLB if kind == "hugetlb" else 0)]
    os.ftruncate(fds[0], size)
memory = _native.Mapped(size, *fds, alignment=page_size)
uffd = Userfaultfd.open()
uffd.register(memory.address, size, Mode.MISSING)
to = socket.socket(socket.AF_UNIX)
to.connect(path)
mapping = {"base_host_virt_addr": memory.address, "size": size, "offset": 0, "page_size": page_size}
socket.send_fds(to, [json.dumps([mapping]).encode()], [uffd.fd, *fds])
if keep == "lets go":
    uffd.close()
print(json.dumps({"event": "ready"}), flush=True)
for line in sys.stdin:
    into = bytearray(16)
    _native.copy_out(memory.address + int(line) * page_size, memoryview(into))
    print(json.dumps({"event": "read", "bytes": into.hex()}), flush=True)
"""


@asynccontextmanager
async def run_reader(
    path: Path, memory: str, keep: str
) -> AsyncIterator[tuple[Process, Callable[[int], None]]]:
    """The process, and how to have it read a page."""
    read_end, write_end = os.pipe()
    try:
        async with run(
            [sys.executable, "-c", READER, str(path), memory, keep], stdin=read_end
        ) as process:
            yield process, lambda page: (os.write(write_end, b"%d\n" % page), None)[1]
    finally:
        os.close(read_end)
        os.close(write_end)


@asynccontextmanager
async def reading(
    uri: str, path: Path, memory: str, keep: str, lane: str
) -> AsyncIterator[tuple[Process, Callable[[int], None], trio.Event]]:
    """A reader, a task that pulls into it, and when that task has lost the source."""
    owner = UffdSocket(path)
    await owner.listen()
    lost = trio.Event()

    async def pull_until_lost() -> None:
        with suppress(SourceLost):
            async with pull(uri, owner, lane=lane, background="off"):
                await trio.sleep_forever()
        owner.close()
        lost.set()

    async with run_reader(path, memory, keep) as (process, read), trio.open_nursery() as nursery:
        nursery.start_soon(pull_until_lost)
        await process.event("ready")
        yield process, read, lost
        nursery.cancel_scope.cancel()


@pytest.fixture
def size_of_source(tmp_path: Path) -> Callable[[str], str]:
    def write(memory: str) -> str:
        return str(
            write_pattern(tmp_path / "source", 2 * HUGE_PAGE if memory == "hugetlb" else SIZE)
        )

    return write


@pytest.mark.parametrize("memory", ["anonymous", "memfd", "hugetlb"])
async def test_owner_that_let_go_is_told_by_sigbus(
    memory: str, size_of_source: Callable[[str], str], tmp_path: Path, lane: str
) -> None:
    """Zeros would be silent corruption, and only pagenet could still answer its faults."""
    if Feature.POISON not in probe():
        pytest.skip("the kernel has no UFFDIO_POISON")
    with huge_if(memory):
        async with (
            run_server(size_of_source(memory)) as (server, uri),
            reading(uri, tmp_path / "uffd.sock", memory, "lets go", lane) as (process, read, _),
        ):
            await read_one_and_lose_the_source(server, process, read)
            assert await process.wait() == -signal.SIGBUS
            assert [event["event"] for event in process.events] == ["ready", "read"]


@pytest.mark.parametrize("memory", ["anonymous", "memfd", "hugetlb"])
async def test_owner_that_keeps_its_own_waits(
    memory: str, size_of_source: Callable[[str], str], tmp_path: Path, lane: str
) -> None:
    with huge_if(memory):
        async with (
            run_server(size_of_source(memory)) as (server, uri),
            reading(uri, tmp_path / "uffd.sock", memory, "keeps", lane) as (process, read, lost),
        ):
            await read_one_and_lose_the_source(server, process, read)
            await lost.wait()
            assert not process.has_ended
            assert threads_in_faults(process.pid) == 1
            await process.kill()
            assert await process.rest() == []


async def read_one_and_lose_the_source(
    server: Process, process: Process, read: Callable[[int], None]
) -> None:
    """Have it read one page, and wait for another one while the source is lost."""
    read(0)
    assert (await process.event("read"))["bytes"] == pattern(0, 1)[:16].hex()
    await stop_process(server)
    read(1)
    await wait_in_faults(process.pid, 1)
    await server.kill()


async def test_leaving_early_is_no_different(source: str, tmp_path: Path, lane: str) -> None:
    """The block is left before the transfer is complete: no thread reads zeros."""
    if Feature.POISON not in probe():
        pytest.skip("the kernel has no UFFDIO_POISON")
    path = tmp_path / "uffd.sock"
    owner = UffdSocket(path)
    await owner.listen()
    async with (
        serve(source, listen="tcp://127.0.0.1:0") as server,
        run_reader(path, "anonymous", "lets go") as (process, read),
    ):
        async with pull(server.uri, owner, lane=lane, background="off"):
            read(0)
            await process.event("read")
        owner.close()
        read(1)
        assert await process.wait() == -signal.SIGBUS


# The process that connects ends at once. The memory is its parent's, which prints the content when
# stdin ends.
BY_PROXY = """
import hashlib, json, os, socket, sys
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
    to.recv(1) if sys.argv[3] == "stays" else None
    os._exit(0)
if sys.argv[3] == "ends":
    os.wait()
print(json.dumps({"event": "ready"}), flush=True)
sys.stdin.read()
into = bytearray(size)
_native.copy_out(memory.address, memoryview(into))
print(json.dumps({"event": "digest", "sha256": hashlib.sha256(into).hexdigest()}), flush=True)
"""


async def test_owner_by_proxy(source: str, tmp_path: Path, lane: str) -> None:
    """What counts is the memory, not the process that handed it over."""
    path = tmp_path / "uffd.sock"
    owner = UffdSocket(path)
    await owner.listen()
    command = [sys.executable, "-c", BY_PROXY, str(path), str(SIZE), "stays"]
    async with (
        serve(source, listen="tcp://127.0.0.1:0") as server,
        run(command, stdin=subprocess.PIPE) as process,
    ):
        async with pull(server.uri, owner, lane=lane) as transfer:
            await transfer.wait_complete()
        owner.close()
        await process.event("ready")
        await process.close_stdin()
        assert (await process.event("digest"))["sha256"] == hashlib_of(Path(source).read_bytes())


async def test_proxy_that_ends_before_it_is_met_is_refused(source: str, tmp_path: Path) -> None:
    path = tmp_path / "uffd.sock"
    refused: list[str] = []
    owner = UffdSocket(path, on_refused=lambda error: refused.append(str(error)))
    await owner.listen()
    command = [sys.executable, "-c", BY_PROXY, str(path), str(SIZE), "ends"]
    async with run(command, stdin=subprocess.PIPE) as process, trio.open_nursery() as nursery:
        await process.event("ready")  # the process that connected has ended, and was waited for
        nursery.start_soon(owner.attach, REGION)
        while not refused:  # noqa: ASYNC110
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    owner.close()
    assert "ended right after it had connected" in refused[0]


async def test_another_file_than_the_one_that_is_mapped(reception: Reception) -> None:
    if Feature.MINOR_SHMEM not in probe():
        pytest.skip("the kernel has no MINOR_SHMEM")
    with ExitStack() as stack:
        reception.connect(fd=memfd_of(stack, SIZE)).hand_over(memfd_of(stack, SIZE))
        await reception.attached.wait()
        assert reception.target is not None
        run_of_pages = reception.target.scope()[0]
        with pytest.raises(HandshakeError, match="or it is not the one that it has mapped"):
            reception.target.place(run_of_pages, memoryview(bytes(SIZE)))
