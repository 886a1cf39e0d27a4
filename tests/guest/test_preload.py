"""native/preload.c in a process that knows nothing of pagenet: what it hands over, what it leaves
alone, how it gives up."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from pagenet._pagenet_testing import ffi, lib
from processes import (
    HUGE_PAGE,
    PAGE,
    Process,
    huge_pages,
    pull,
    run,
    threads_in_faults,
    wait_in_faults,
    write_blocks,
    write_pattern,
)

import pagenet.qemu._preload
from pagenet import Transfer, UffdSocket, Unsupported, serve
from pagenet.qemu._preload import preload_library
from pagenet.uffd import Feature, probe

pytestmark = pytest.mark.usefixtures("uffd_permitted")

SIZE = 64 * PAGE
NOBODY = 65534

# A VMM in a few lines. Its arguments: mmap's flags and protection, how many threads map, the user
# to become (0: none), and the files. Then it runs the commands that come on stdin. It touches
# memory from C.
VMM = """
import ctypes, hashlib, json, mmap, os, sys, threading
def say(event, **more):
    print(json.dumps({"event": event, **more}), flush=True)
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
]
flags, protection, threads = (int(argument) for argument in sys.argv[1:4])
files = [os.open(path, os.O_RDWR) for path in sys.argv[5:]]
if int(sys.argv[4]):
    os.setgroups([]), os.setgid(int(sys.argv[4])), os.setuid(int(sys.argv[4]))
maps = {}
def map_file(fd, offset=0):
    ctypes.set_errno(77)
    address = libc.mmap(None, os.fstat(fd).st_size, protection, flags, fd, offset)
    return address, ctypes.get_errno()
together = threading.Barrier(threads)
def map_every(first, step):
    together.wait()
    for fd in files[first::step]:
        maps[fd] = map_file(fd)
spare = os.memfd_create("spare")
os.ftruncate(spare, 4096)
maps[spare] = map_file(spare)
for fd in files[:1]:
    say("refused", mmap=map_file(fd, 1))
mappers = [threading.Thread(target=map_every, args=(first, threads)) for first in range(threads)]
for mapper in mappers: mapper.start()
for mapper in mappers: mapper.join()
say("mapped", errnos=[maps[fd][1] for fd in [spare, *files]])
for line in sys.stdin:
    command, *numbers = line.split()
    if command == "read":
        file, offset, length = map(int, numbers)
        say("read", bytes=ctypes.string_at(maps[files[file]][0] + offset, length).hex())
    elif command == "digest":
        into = [ctypes.string_at(maps[fd][0], os.fstat(fd).st_size) for fd in files]
        say("digest", sha256=hashlib.sha256(b"".join(into)).hexdigest())
"""

MAP_SHARED, MAP_PRIVATE, MAP_POPULATE = 0x01, 0x02, 0x8000
PROT_READ, PROT_WRITE = 1, 2


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_pattern(tmp_path / "source", SIZE))


def pattern(first: int, pages: int) -> bytes:
    content = bytearray(pages * PAGE)
    lib.pn_pattern_fill(ffi.from_buffer(content), first, pages, PAGE, 0, 0)
    return bytes(content)


# ---- the memory ----


@contextmanager
def shared_files(*sizes: int) -> Iterator[list[Path]]:
    """Files of guest RAM, all holes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="pagenet-test-preload-") as directory:
        paths = [Path(directory, f"ram{index}") for index in range(len(sizes))]
        for path, size in zip(paths, sizes, strict=True):
            path.touch()
            os.truncate(path, size)
        yield paths


@pytest.fixture
def ram() -> Iterator[Path]:
    with shared_files(SIZE) as (path,):
        yield path


# ---- the VMM ----


def identities(files: Sequence[Path]) -> str:
    return ",".join(f"{status.st_dev}:{status.st_ino}" for status in map(os.stat, files))


def variables(socket: Path, files: Sequence[Path]) -> dict[str, str]:
    return {"PAGENET_UFFD_SOCKET": str(socket), "PAGENET_UFFD_FILES": identities(files)}


def run_vmm(
    environment: dict[str, str],
    *files: Path,
    flags: int = MAP_SHARED,
    protection: int = PROT_READ | PROT_WRITE,
    threads: int = 1,
    uid: int = 0,
    stdin: int = subprocess.PIPE,
    pass_fds: Sequence[int] = (),
) -> AbstractAsyncContextManager[Process]:
    numbers = [str(number) for number in (flags, protection, threads, uid)]
    return run(
        [sys.executable, "-c", VMM, *numbers, *map(str, files)],
        env=os.environ | {"LD_PRELOAD": str(preload_library())} | environment,
        stdin=stdin,
        pass_fds=pass_fds,
    )


class Vmm:
    """A VMM that takes commands."""

    def __init__(self, process: Process, write_end: int) -> None:
        self.process = process
        self._write_end = write_end

    def order(self, *words: str | int) -> None:
        os.write(self._write_end, " ".join(map(str, words)).encode() + b"\n")

    async def read(self, offset: int, length: int = 16, file: int = 0) -> bytes:
        self.order("read", file, offset, length)
        return bytes.fromhex((await self.process.event("read"))["bytes"])

    async def check_content(self, expected: Sequence[str]) -> None:
        self.order("digest")
        content = b"".join(Path(path).read_bytes() for path in expected)
        assert (await self.process.event("digest"))["sha256"] == hashlib.sha256(content).hexdigest()


@asynccontextmanager
async def vmm(environment: dict[str, str], *files: Path, **options: Any) -> AsyncIterator[Vmm]:
    read_end, write_end = os.pipe()
    try:
        async with run_vmm(environment, *files, stdin=read_end, **options) as process:
            yield Vmm(process, write_end)
    finally:
        os.close(read_end)
        os.close(write_end)


@asynccontextmanager
async def filled(
    source: str | Sequence[str],
    vmm: AbstractAsyncContextManager[Vmm],
    owner: UffdSocket,
    lane: str,
    background: str = "linear",
) -> AsyncIterator[tuple[Vmm, Transfer]]:
    """A VMM, which is started when it can hand over its memory, and the transfer into that
    memory."""
    await owner.listen()
    try:
        async with (
            serve(source, listen="tcp://127.0.0.1:0") as server,
            vmm as started,
            pull(server.uri, owner, lane=lane, background=background) as transfer,
        ):
            yield started, transfer
    finally:
        owner.close()


def userfaultfds(pid: int) -> int:
    links = [entry.readlink() for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return sum("userfaultfd" in link.name for link in links)


# ---- what is handed over ----


async def test_file_comes_along(source: str, ram: Path, tmp_path: Path, lane: str) -> None:
    owner = UffdSocket(tmp_path / "uffd.sock")
    async with filled(source, vmm(variables(owner.path, [ram]), ram), owner, lane) as (
        machine,
        transfer,
    ):
        refused = await machine.process.event("refused")
        mapped = await machine.process.event("mapped")
        assert refused["mmap"] == [2**64 - 1, 22]  # EINVAL: as without the library
        assert mapped["errnos"] == [77, 77]
        if Feature.MINOR_SHMEM in probe():
            assert transfer.statistics().placement == "continue"
        await machine.check_content([source])
        await transfer.wait_complete()
    assert ram.read_bytes() == Path(source).read_bytes()


async def test_two_files_are_one_region(tmp_path: Path, lane: str) -> None:
    sizes = [24 * PAGE, 40 * PAGE]
    blocks = write_blocks(tmp_path, sizes)
    owner = UffdSocket(tmp_path / "uffd.sock")
    with shared_files(*sizes) as files:
        # It maps the files in another order than that of the region.
        machine = vmm(variables(owner.path, files), *reversed(files))
        async with filled(blocks, machine, owner, lane) as (started, transfer):
            assert transfer.statistics().placement == "copy"
            await started.check_content(list(reversed(blocks)))
            await transfer.wait_complete()
        assert [file.read_bytes() for file in files] == [
            Path(block).read_bytes() for block in blocks
        ]


async def test_threads_map_at_once(tmp_path: Path, lane: str) -> None:
    sizes = [4 * PAGE] * 16
    blocks = write_blocks(tmp_path, sizes)
    owner = UffdSocket(tmp_path / "uffd.sock")
    with shared_files(*sizes) as files:
        async with filled(
            blocks, vmm(variables(owner.path, files), *files, threads=16), owner, lane
        ) as (machine, transfer):
            await machine.check_content(blocks)
            assert machine.process.events[1] == {"event": "mapped", "errnos": [77] * 17}
            await transfer.wait_complete()


async def test_huge_pages(tmp_path: Path, lane: str) -> None:
    source = str(write_pattern(tmp_path / "source", 2 * HUGE_PAGE))
    owner = UffdSocket(tmp_path / "uffd.sock")
    with huge_pages(4), ExitStack() as stack:
        fd = os.memfd_create("pagenet-test", os.MFD_CLOEXEC | os.MFD_HUGETLB)
        stack.callback(os.close, fd)
        os.ftruncate(fd, 2 * HUGE_PAGE)
        file = Path(f"/proc/self/fd/{fd}")
        machine = vmm(variables(owner.path, [file]), file, pass_fds=[fd])
        async with filled(source, machine, owner, lane) as (started, transfer):
            assert transfer.region.blocks[0].page_size == HUGE_PAGE
            await started.check_content([source])
            await transfer.wait_complete()


async def test_nothing_is_there_before_it_is_watched(
    source: str, ram: Path, tmp_path: Path, lane: str
) -> None:
    """MAP_POPULATE would fill the file with zeros, which then pass for pages that have come."""
    owner = UffdSocket(tmp_path / "uffd.sock")
    machine = vmm(variables(owner.path, [ram]), ram, flags=MAP_SHARED | MAP_POPULATE)
    async with filled(source, machine, owner, lane, background="off") as (started, _):
        await started.process.event("mapped")
        assert ram.stat().st_blocks == 0
        assert await started.read(5 * PAGE) == pattern(5, 1)[:16]


async def test_vmm_waits_when_pagenet_is_lost(
    source: str, ram: Path, tmp_path: Path, lane: str
) -> None:
    """The VMM keeps a userfaultfd of its own. Without it, it would read zeros from here on, or get
    SIGBUS."""
    owner = UffdSocket(tmp_path / "uffd.sock")
    await owner.listen()
    async with (
        serve(source, listen="tcp://127.0.0.1:0") as server,
        vmm(variables(owner.path, [ram]), ram) as machine,
    ):
        async with pull(server.uri, owner, lane=lane, background="off"):
            assert await machine.read(3 * PAGE) == pattern(3, 1)[:16]
            assert userfaultfds(machine.process.pid) == 1
        owner.close()
        assert userfaultfds(machine.process.pid) == 1
        assert await machine.read(3 * PAGE) == pattern(3, 1)[:16]
        machine.order("read", 0, 4 * PAGE, 16)
        await wait_in_faults(machine.process.pid, 1)  # for a page that no process can answer
        assert threads_in_faults(machine.process.pid) == 1
        await machine.process.kill()
        assert await machine.process.rest() == []


# Its standard files are closed when it maps memory. The first free number then goes to mmap's own
# duplicate.
WITHOUT_STDIO = """
import mmap, os, signal, sys
ram = os.open(sys.argv[1], os.O_RDWR)
os.close(0), os.close(2)
memory = mmap.mmap(ram, 0)
print('{"event": "mapped"}', flush=True)
signal.pause()
"""


async def test_stdio_may_be_replaced_later(
    source: str, ram: Path, tmp_path: Path, lane: str
) -> None:
    """QEMU does so with -daemonize, and would close a descriptor that the library keeps for
    good."""
    owner = UffdSocket(tmp_path / "uffd.sock")
    environment = os.environ | {"LD_PRELOAD": str(preload_library())} | variables(owner.path, [ram])
    await owner.listen()
    async with (
        serve(source, listen="tcp://127.0.0.1:0") as server,
        run([sys.executable, "-c", WITHOUT_STDIO, str(ram)], env=environment) as process,
    ):
        async with pull(server.uri, owner, lane=lane):
            await process.event("mapped")
            assert userfaultfds(process.pid) == 1
            assert not Path(f"/proc/{process.pid}/fd/2").exists()
        owner.close()


# ---- what is left alone ----


@contextmanager
def other_file() -> Iterator[Path]:
    with shared_files(SIZE) as (path,):
        path.write_bytes(b"x" * SIZE)
        yield path


async def check_left_alone(environment: dict[str, str], *files: Path, **options: int) -> None:
    async with vmm(environment, *files, **options) as machine:
        assert (await machine.process.event("mapped"))["errnos"] == [77] * (1 + len(files))
        assert await machine.read(PAGE) == files[0].read_bytes()[:16]
        assert userfaultfds(machine.process.pid) == 0


async def test_nothing_happens_without_the_variables(ram: Path, tmp_path: Path) -> None:
    await check_left_alone({}, ram)
    await check_left_alone({"PAGENET_UFFD_FILES": identities([ram])}, ram)
    await check_left_alone({"PAGENET_UFFD_SOCKET": str(tmp_path / "nobody.sock")}, ram)


@pytest.mark.parametrize("options", [
    {"flags": MAP_PRIVATE},
    {"protection": PROT_READ},
], ids=["private", "read-only"])  # fmt: skip
async def test_other_mappings_of_the_file(
    options: dict[str, int], ram: Path, tmp_path: Path
) -> None:
    """No pagenet listens, so the VMM would end if it tried to hand them over."""
    await check_left_alone(variables(tmp_path / "nobody.sock", [ram]), ram, **options)


async def test_other_files(ram: Path, tmp_path: Path) -> None:
    with other_file() as other:
        await check_left_alone(variables(tmp_path / "nobody.sock", [ram]), other)


async def test_mappings_after_the_handoff(
    source: str, ram: Path, tmp_path: Path, lane: str
) -> None:
    owner = UffdSocket(tmp_path / "uffd.sock")
    with other_file() as other:
        machine = vmm(variables(owner.path, [ram]), ram, other, ram)
        async with filled(source, machine, owner, lane) as (started, transfer):
            assert await started.read(PAGE, file=1) == b"x" * 16
            await transfer.wait_complete()
            assert await started.read(PAGE, file=2) == pattern(1, 1)[:16]
            assert userfaultfds(started.process.pid) == 1


# ---- how it gives up ----


async def check_gives_up(
    reason: str, environment: dict[str, str], *files: Path, uid: int = 0
) -> None:
    async with run_vmm(environment, *files, uid=uid) as process:
        with trio.fail_after(10):
            assert await process.wait() == 7
        (line,) = process.stderr.splitlines()
        assert line.startswith("pagenet: ")
        assert reason in line
        assert "mapped" not in {event["event"] for event in process.events}


async def test_nobody_listens(ram: Path, tmp_path: Path) -> None:
    path = tmp_path / "nobody.sock"
    reason = f"cannot reach pagenet on {path}: No such file or directory: start pagenet first"
    await check_gives_up(reason, variables(path, [ram]), ram)


async def test_path_is_too_long(ram: Path) -> None:
    await check_gives_up(
        "longer than the kernel's 107 bytes", variables(Path("/" + "x" * 107), [ram]), ram
    )


@pytest.mark.parametrize(
    "files",
    ["", "1", "1:", ":1", "1:2,", ",1:2", "1:2:3", "a:b", "-1:2", " 1:2", "1:2,1:2", "1:2 "],
)
async def test_list_that_makes_no_sense(files: str, ram: Path, tmp_path: Path) -> None:
    environment = {
        "PAGENET_UFFD_SOCKET": str(tmp_path / "nobody.sock"),
        "PAGENET_UFFD_FILES": files,
    }
    await check_gives_up(
        f"PAGENET_UFFD_FILES is '{files}', not up to 64 different files", environment, ram
    )


async def test_file_is_too_short(ram: Path, tmp_path: Path) -> None:
    os.truncate(ram, SIZE - 1)
    await check_gives_up(
        "guest RAM ends past the end of its file", variables(tmp_path / "nobody.sock", [ram]), ram
    )


async def test_file_on_a_disk(tmp_path: Path) -> None:
    disk = write_pattern(tmp_path / "disk", SIZE)
    if (
        await trio.run_process(["stat", "-fc%T", str(disk)], capture_stdout=True)
    ).stdout == b"tmpfs\n":
        pytest.skip(f"{tmp_path} is on tmpfs")
    await check_gives_up(
        "put it on tmpfs (/dev/shm) or hugetlbfs", variables(tmp_path / "nobody.sock", [disk]), disk
    )


def needs_to_become_nobody() -> None:
    if os.getuid():
        pytest.skip("only root can become a user who may not use userfaultfd")
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n":
        pytest.skip("vm.unprivileged_userfaultfd lets every user in")


async def test_user_without_access(ram: Path, tmp_path: Path) -> None:
    needs_to_become_nobody()
    if os.stat("/dev/userfaultfd").st_mode & stat.S_IRWXO:
        pytest.skip("/dev/userfaultfd lets every user in")
    reason = (
        "may not use userfaultfd: run as root, give this user access to /dev/userfaultfd (setfacl"
        f" -m u:{NOBODY}:rw"
    )
    reason += " /dev/userfaultfd, of Debian's package acl)"
    await check_gives_up(reason, variables(tmp_path / "nobody.sock", [ram]), ram, uid=NOBODY)


async def test_user_with_a_device_node_of_his_own(source: str, lane: str) -> None:
    needs_to_become_nobody()
    with (
        tempfile.TemporaryDirectory(prefix="pagenet-test-") as directory,
        shared_files(SIZE) as (ram,),
    ):
        os.chmod(directory, 0o755)
        node = Path(directory, "userfaultfd")
        try:
            os.mknod(node, stat.S_IFCHR, os.stat("/dev/userfaultfd").st_rdev)
            os.chmod(node, 0o666)
            os.close(os.open(node, os.O_RDWR))
        except OSError as error:
            pytest.skip(f"there can be no device node in {directory}: {error.strerror}")
        owner = UffdSocket(Path(directory, "uffd.sock"))
        await owner.listen()
        os.chmod(owner.path, 0o666)
        environment = variables(owner.path, [ram]) | {"PAGENET_UFFD_DEVICE": str(node)}
        async with filled(source, vmm(environment, ram, uid=NOBODY), owner, lane) as (
            machine,
            transfer,
        ):
            await machine.check_content([source])
            await transfer.wait_complete()


# ---- where the library is ----


def test_library_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preload_library().is_file()
    monkeypatch.setattr(pagenet.qemu._preload, "__file__", str(tmp_path / "_preload.py"))
    with pytest.raises(
        Unsupported, match=r"^/.*/pagenet\.preload\.so is missing: install pagenet again"
    ):
        preload_library()


def test_library_whose_path_the_loader_would_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "a b"
    directory.mkdir()
    (directory / "pagenet.preload.so").touch()
    monkeypatch.setattr(pagenet.qemu._preload, "__file__", str(directory / "_preload.py"))
    with pytest.raises(Unsupported, match="no space, colon or dollar"):
        preload_library()
