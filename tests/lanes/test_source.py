"""pagenet/source/memory.py: every kind of source, sources that are refused, and what may happen to
a source while it is served."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from processes import HUGE_PAGE, LANES, PAGE, huge_pages, pull

from pagenet import (
    Block,
    IntoFile,
    OwnMemory,
    Region,
    Run,
    Source,
    SourceLost,
    UsageError,
    open_source,
    serve,
)
from pagenet.source.memory import named_identity

PAGES = 5


def page_of(byte: int) -> bytes:
    return bytes([byte]) * PAGE


CONTENT = b"".join(page_of(byte) for byte in range(1, PAGES + 1))

# Has the bytes in a memfd and, with an unmapped page behind them, in private memory. It stays until
# stdin ends.
HOLDER = """
import ctypes, json, mmap, os, sys
content = b"".join(bytes([byte]) * 4096 for byte in range(1, 6))
fd = os.memfd_create("held")
os.write(fd, content)
memory = mmap.mmap(-1, len(content) + 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.write(content)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ctypes.CDLL(None).munmap(ctypes.c_void_p(address + len(content)), ctypes.c_size_t(4096))
print(json.dumps({"fd": fd, "address": address}), flush=True)
sys.stdin.read()
os._exit(0)  # Python would unmap what is unmapped
"""


@dataclass
class Holder:
    """Another process, and the pages in it."""

    process: subprocess.Popen[bytes]
    fd: int
    address: int

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def shared_holder() -> Iterator[Holder]:
    with ExitStack() as stack:
        yield start_holder(stack)


@pytest.fixture
def holder() -> Iterator[Holder]:
    """A :class:`Holder` for tests that end it."""
    with ExitStack() as stack:
        yield start_holder(stack)


def start_holder(stack: ExitStack) -> Holder:
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    )
    stack.callback(process.kill)
    assert process.stdout is not None
    return Holder(process, **json.loads(process.stdout.readline()))


def in_a_file(holder: Holder, stack: ExitStack, directory: Path) -> str:
    path = directory / "a file"
    path.write_bytes(CONTENT)
    return str(path)


def in_tmpfs(holder: Holder, stack: ExitStack, directory: Path) -> str:
    fd, name = tempfile.mkstemp(dir="/dev/shm")
    stack.callback(os.unlink, name)
    with open(fd, "wb") as file:
        file.write(CONTENT)
    return name


def in_own_memfd(holder: Holder, stack: ExitStack, directory: Path) -> str:
    fd = os.memfd_create("own", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    os.write(fd, CONTENT)
    return f"/proc/self/fd/{fd}"


def in_hugetlb_memfd(holder: Holder, stack: ExitStack, directory: Path) -> str:
    stack.enter_context(huge_pages(2))
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    stack.callback(os.close, fd)
    os.ftruncate(fd, 2 * HUGE_PAGE)  # the second page stays a hole
    with mmap.mmap(fd, HUGE_PAGE) as memory:
        memory[: len(CONTENT)] = CONTENT
    return f"/proc/self/fd/{fd}"


KINDS: dict[str, Callable[[Holder, ExitStack, Path], str]] = {
    "file": in_a_file,
    "tmpfs": in_tmpfs,
    "own memfd": in_own_memfd,
    "memfd of another process": lambda holder, *_: f"/proc/{holder.pid}/fd/{holder.fd}",
    "from-to, decimal": lambda holder, *_: (
        f"pid:{holder.pid}:{holder.address}-{holder.address + len(CONTENT)}"
    ),
    "from-to, hexadecimal": lambda holder, *_: (
        f"pid:{holder.pid}:{holder.address:#x}-{holder.address + len(CONTENT):#X}"
    ),
    "from+size, mixed": lambda holder, *_: f"pid:{holder.pid}:{holder.address:#x}+{len(CONTENT)}",
    "hugetlb memfd": in_hugetlb_memfd,
}


async def read(source: Source, first: int, count: int) -> bytes | None:
    """The bytes of a run; None if they are known to be zero, and nothing was read."""
    into = bytearray(b"\xee" * count * PAGE)
    return bytes(into) if await source.read_into(Run(first, count), memoryview(into)) else None


# ---- every kind ----


@pytest.mark.parametrize("kind", KINDS)
async def test_reads_any_run(kind: str, shared_holder: Holder, tmp_path: Path) -> None:
    with ExitStack() as stack:
        source = stack.enter_context(open_source(KINDS[kind](shared_holder, stack, tmp_path)))
        (block,) = source.region.blocks
        assert block.page_size == PAGE
        assert block.size == (2 * HUGE_PAGE if kind == "hugetlb memfd" else len(CONTENT))
        for first in range(PAGES):
            for count in range(1, PAGES - first + 1):
                assert (
                    await read(source, first, count)
                    == CONTENT[first * PAGE : (first + count) * PAGE]
                )
        if kind == "hugetlb memfd":
            assert await read(source, PAGES, 512) in (None, bytes(HUGE_PAGE))
            assert await read(source, 510, 4) in (None, bytes(4 * PAGE))


@pytest.mark.parametrize("kind", KINDS)
def test_identity_is_the_memorys(kind: str, shared_holder: Holder, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(CONTENT)
    with ExitStack() as stack:
        spec = KINDS[kind](shared_holder, stack, tmp_path)
        identities = []
        for specs in (
            [spec],
            [f"NAME={spec}"],
            [tmp_path / "other"],
            [spec, tmp_path / "other"],
            [tmp_path / "other", spec],
        ):
            with open_source(*specs) as source:
                assert len(source.identity) == 16
                identities.append(source.identity)
    assert identities[0] == identities[1]
    assert len(set(identities)) == 4


def test_identity_does_not_go_by_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    (tmp_path / "link").hardlink_to(tmp_path / "file")
    (tmp_path / "symlink").symlink_to("file")
    with open_source(tmp_path / "file") as file, open_source(tmp_path / "link") as link:
        with open_source(tmp_path / "symlink") as symlink:
            assert file.identity == link.identity == symlink.identity
        (tmp_path / "file").unlink()
        (tmp_path / "file").write_bytes(CONTENT)
        with open_source(tmp_path / "file") as new:
            assert new.identity != file.identity


def test_identity_of_a_range_is_its_start(shared_holder: Holder) -> None:
    def identity(start: int, size: int) -> bytes:
        with open_source(f"pid:{shared_holder.pid}:{start}+{size}") as source:
            return source.identity

    address = shared_holder.address
    assert identity(address, PAGE) == identity(address, PAGE)
    assert identity(address, PAGE) != identity(address + PAGE, PAGE)


def put_out_of_memory(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def test_file_that_is_on_disk_alone(tmp_path: Path) -> None:
    """What is not in memory is read in a thread."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    put_out_of_memory(path)
    with open_source(path) as source:
        assert await read(source, 0, PAGES) == CONTENT


# ---- holes ----


def write_sparse(path: Path, size: int, pages: dict[int, bytes]) -> None:
    with open(path, "wb") as file:
        file.truncate(size)
        for page, content in pages.items():
            os.pwrite(file.fileno(), content, page * PAGE)


async def test_holes_are_known_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    write_sparse(path, 1 << 40, {4: page_of(4), 5: page_of(5), 1000: page_of(6)})
    with open_source(path) as source:
        assert await read(source, 0, 4) is None
        assert await read(source, 4, 2) == page_of(4) + page_of(5)
        assert await read(source, 0, 8) == bytes(4 * PAGE) + page_of(4) + page_of(5) + bytes(
            2 * PAGE
        )
        assert await read(source, 6, 994) is None
        assert await read(source, 6, 995) == bytes(994 * PAGE) + page_of(6)
        assert await read(source, (1 << 28) - 64, 64) is None


async def test_hole_that_is_filled_later(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    write_sparse(path, 2 * PAGE, {})
    with open_source(path) as source:
        assert await read(source, 0, 2) is None
        write_sparse(path, 2 * PAGE, {1: page_of(9)})
        assert await read(source, 0, 2) == bytes(PAGE) + page_of(9)


# ---- several blocks, and their names ----


async def test_blocks_one_after_the_other(tmp_path: Path, shared_holder: Holder) -> None:
    (tmp_path / "ram").write_bytes(page_of(7) * 3)
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "ram").write_bytes(page_of(8))
    memory = f"pid:{shared_holder.pid}:{shared_holder.address}+{2 * PAGE}"
    with open_source(tmp_path / "ram", f"vga.vram={memory}", tmp_path / "dir" / "ram") as source:
        assert source.region == Region(
            [Block("ram", 3 * PAGE), Block("vga.vram", 2 * PAGE), Block("ram#2", PAGE)]
        )
        assert await read(source, 0, 3) == page_of(7) * 3
        assert await read(source, 3, 2) == CONTENT[: 2 * PAGE]
        assert await read(source, 5, 1) == page_of(8)


@pytest.mark.parametrize(
    ("file", "spec", "name"),
    [
        ("ram", "ram", "ram"),
        ("ram", "pc.ram=ram", "pc.ram"),
        ("pc.ram=ram", "pc.ram=ram", "pc.ram=ram"),  # a file of exactly that name takes precedence
        ("a=b=c", "x=a=b=c", "x"),
        ("p" * 250, "p" * 250, "p" * 200),
        ("\udcff", "\udcff", "\ufffd"),
    ],
)
def test_names(
    file: str, spec: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(file).write_bytes(CONTENT)
    with open_source(spec) as source:
        assert source.region.blocks[0].name == name


def test_address_range_is_named_after_itself(shared_holder: Holder) -> None:
    spec = f"pid:{shared_holder.pid}:{shared_holder.address:#x}+4096"
    with open_source(spec) as source:
        assert source.region.blocks[0].name == spec


def test_close_is_idempotent(tmp_path: Path, shared_holder: Holder) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    source = open_source(tmp_path / "file", f"pid:{shared_holder.pid}:{shared_holder.address}+4096")
    source.close()
    source.close()


# ---- what is no source ----


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


NO_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "cannot open source .*: No such file or directory"),
    "directory": (lambda path: path.mkdir(), "is not a regular file"),
    "empty": (
        lambda path: path.touch(),
        "is 0 bytes long: not a whole number of 4096-byte pages, or none",
    ),
    "one byte": (lambda path: path.write_bytes(b"x"), "is 1 bytes long: not a whole number"),
    "a page and a byte": (lambda path: path.write_bytes(page_of(1) + b"x"), "is 4097 bytes long"),
    "fifo": (make_fifo, "is not a regular file"),
    "socket": (make_socket, "cannot open source"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "loop": (lambda path: path.symlink_to(path), "cannot open source .*: Too many levels"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "cannot open source .*: No such file"),
}


@pytest.mark.parametrize("what", NO_FILES)
def test_no_file_for_a_source(what: str, tmp_path: Path) -> None:
    make, reason = NO_FILES[what]
    make(tmp_path / what)
    check_refused(reason, str(tmp_path / what))


def check_refused(reason: str, *specs: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        open_source(*specs)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "spec",
    [
        "pid:",
        "pid:1",
        "pid:1:",
        "pid:self:0x1000-0x2000",
        "pid:-1:0x1000-0x2000",
        "pid:1:0x1000",
        "pid:1:0x1000-",
        "pid:1:1000h-2000h",
        "pid:1:0x1000..0x2000",
        "pid:1:0x1000-0x2000-0x3000",
        "pid:1: 0x1000-0x2000",
        "pid:1:-0x1000+0x2000",
        "pid:1:007+0x2000",
    ],
)
def test_no_syntax(spec: str) -> None:
    check_refused(r"is not pid:PID:START-END or pid:PID:START\+SIZE", spec)
    check_refused(r"is not pid:PID:START-END or pid:PID:START\+SIZE", f"ram={spec}")


@pytest.mark.parametrize(
    "range_",
    ["0x1000-0x1000", "0x2000-0x1000", "0x1000+0", "0x1001+0x1000", "0x1000+0x1001", "1-2"],
)
def test_no_whole_pages(range_: str) -> None:
    check_refused("is not a range of whole 4096-byte pages", f"pid:{os.getpid()}:{range_}")


@pytest.mark.parametrize(
    "range_",
    [f"{1 << 60}+4096", f"{1 << 64}+4096", f"4096+{1 << 64}", f"4096+{1 << 63}", f"4096-{1 << 70}"],
)
def test_range_that_no_process_has(range_: str) -> None:
    check_refused("no process has 0x[0-9a-f]+ bytes at 0x", f"pid:{os.getpid()}:{range_}")


def test_range_that_is_not_mapped() -> None:
    check_refused("Bad address", f"pid:{os.getpid()}:0x1000+0x1000")


def test_range_that_ends_in_the_void(shared_holder: Holder) -> None:
    check_refused(
        "Bad address", f"pid:{shared_holder.pid}:{shared_holder.address}+{len(CONTENT) + PAGE}"
    )
    check_refused(
        "Bad address", f"pid:{shared_holder.pid}:{shared_holder.address + len(CONTENT)}+4096"
    )


def test_process_that_does_not_exist(holder: Holder) -> None:
    holder.end()
    check_refused("No such process", f"pid:{holder.pid}:{holder.address}+4096")
    check_refused("No such file", f"/proc/{holder.pid}/fd/{holder.fd}")


@pytest.mark.parametrize(
    ("pid", "reason"),
    [
        ("0", "Invalid argument"),
        (str(1 << 30), "No such process"),
        (str(1 << 40), ""),
        ("9" * 30, ""),
    ],
)
def test_number_that_no_process_has(pid: str, reason: str) -> None:
    check_refused(f"source pid:{pid}: .*{reason}", f"pid:{pid}:0x1000+0x1000")


def test_no_source_at_all() -> None:
    check_refused("no source given")


def test_one_bad_block_closes_the_good_ones(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    check_refused("No such file", str(tmp_path / "file"), str(tmp_path / "missing"))


def test_block_is_not_given_a_name_that_another_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a#2"):
        Path(name).write_bytes(CONTENT)
    check_refused("two blocks of a region have the same name", "a#2", "a", "./a")


UNPRIVILEGED = """
import os, sys
from pagenet import UsageError, open_source
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
for spec in sys.argv[1:]:
    try:
        open_source(spec)
    except UsageError as error:
        print(error)
"""


def test_without_permission(shared_holder: Holder) -> None:
    if os.getuid():
        pytest.skip("needs root, to become somebody who may not")
    with tempfile.NamedTemporaryFile() as file:
        file.write(CONTENT)
        file.flush()
        memory = f"pid:{shared_holder.pid}:{shared_holder.address}+4096"
        descriptor = f"/proc/{shared_holder.pid}/fd/{shared_holder.fd}"
        command = [sys.executable, "-c", UNPRIVILEGED, file.name, memory, descriptor]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.stderr == ""
        assert result.stdout.splitlines() == [
            f"cannot open source {file.name}: Permission denied",
            (
                f"cannot read process {shared_holder.pid} at {shared_holder.address:#x}: Operation"
                " not permitted (it takes the same user and ptrace access, or CAP_SYS_PTRACE)"
            ),
            (
                f"cannot open source {descriptor}: Operation not permitted; run as root, or as its"
                " user with ptrace access (kernel.yama.ptrace_scope=0)"
            ),
        ]


# Opens a file in that way only, and then becomes an ordinary user.
HANDLE_HOLDER = """
import os, sys
fd = os.open(sys.argv[1], getattr(os, sys.argv[2]))
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
print(fd, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("access", ["O_PATH", "O_WRONLY"])
def test_descriptor_that_its_process_may_not_read(access: str, tmp_path: Path) -> None:
    """Then the process that serves it may not either, even as root: a handle of a file is no
    permission."""
    path = tmp_path / "secret"
    path.write_bytes(CONTENT)
    with subprocess.Popen(
        [sys.executable, "-c", HANDLE_HOLDER, str(path), access],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        descriptor = f"/proc/{process.pid}/fd/{int(process.stdout.readline())}"
        with pytest.raises(
            UsageError,
            match=f"^cannot open source {descriptor}: that process may not read it either$",
        ):
            open_source(descriptor)
        process.kill()


# Prints its position in the file, whenever it is asked.
POSITION_HOLDER = """
import os, sys
fd = os.memfd_create("held")
os.write(fd, bytes(20480))
os.lseek(fd, 7, os.SEEK_SET)
print(fd, flush=True)
sys.stdin.readline()
print(os.lseek(fd, 0, os.SEEK_CUR), flush=True)
"""


def test_place_of_the_process_in_its_file_stays() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", POSITION_HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        with open_source(f"/proc/{process.pid}/fd/{int(process.stdout.readline())}") as source:
            assert source.zero_map(Run(0, PAGES)) is not None  # looks for holes
        told, _ = process.communicate(b"\n")
        assert told == b"7\n"


# ---- what happens to a source while it is served ----


@pytest.mark.parametrize("to", [0, PAGE, 2 * PAGE + 1])
async def test_truncated_file(to: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with open_source(path) as source:
        os.truncate(path, to)
        for first, count in [(to // PAGE, 1), (0, PAGES), (PAGES - 1, 1)]:
            with pytest.raises(
                SourceLost, match=r"file cannot be read any more: it ends at byte \d+ of 20480$"
            ):
                await read(source, first, count)
        if to >= PAGE:
            assert await read(source, 0, 1) == page_of(1)


async def test_truncated_sparse_file_is_no_hole(tmp_path: Path) -> None:
    """The kernel's answer is the same, but zeros would be wrong."""
    path = tmp_path / "sparse"
    write_sparse(path, 4 * PAGE, {})
    with open_source(path) as source:
        assert await read(source, 2, 2) is None
        os.truncate(path, 2 * PAGE)
        assert await read(source, 0, 2) is None
        with pytest.raises(SourceLost):
            await read(source, 2, 2)
        with pytest.raises(SourceLost):
            await read(source, 1, 2)


async def test_unlinked_file_is_served_on(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with open_source(path) as source:
        path.unlink()
        assert await read(source, 0, PAGES) == CONTENT


async def test_memfd_outlives_its_process(holder: Holder) -> None:
    with open_source(f"/proc/{holder.pid}/fd/{holder.fd}") as source:
        holder.end()
        assert await read(source, 0, PAGES) == CONTENT


async def test_process_that_has_ended(holder: Holder) -> None:
    with open_source(f"pid:{holder.pid}:{holder.address}+{len(CONTENT)}") as source:
        holder.end()
        with pytest.raises(SourceLost, match=f"process {holder.pid} "):
            await read(source, 0, 1)


async def test_process_that_is_a_zombie(holder: Holder) -> None:
    """Its pid is still its own, but its memory is gone."""
    with open_source(f"pid:{holder.pid}:{holder.address}+{len(CONTENT)}") as source:
        holder.process.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
        with pytest.raises(SourceLost):
            await read(source, 0, 1)


async def test_process_that_stands_still_is_read(holder: Holder) -> None:
    holder.process.send_signal(signal.SIGSTOP)
    with open_source(f"pid:{holder.pid}:{holder.address}+{len(CONTENT)}") as source:
        assert await read(source, 0, PAGES) == CONTENT


async def test_range_with_a_gap(shared_holder: Holder) -> None:
    """Only its ends are checked when it is opened."""
    maps = Path(f"/proc/{shared_holder.pid}/maps").read_text().splitlines()
    starts = [int(line.split("-")[0], 16) for line in maps if " r" in line]
    last = max(start for start in starts if start < 1 << 47)
    gap = shared_holder.address + len(CONTENT)
    assert last > gap
    with open_source(f"pid:{shared_holder.pid}:{shared_holder.address}-{last + PAGE}") as source:
        assert await read(source, 0, PAGES) == CONTENT
        with pytest.raises(SourceLost, match="Bad address"):
            await read(source, PAGES, 1)
        with pytest.raises(SourceLost, match="Bad address"):
            await read(source, PAGES - 1, 2)


@pytest.fixture
def lane() -> str:
    return LANES[0]  # the destination's lane; here it fills a file


async def check_lost_while_served(
    spec: str, lose: Callable[[], None], reason: str, target: Path, lane: str
) -> None:
    """Check that both sides are told, and that no partial file is left."""
    with pytest.raises(SourceLost, match=reason):
        await lose_while_pulling(spec, lose, f"the source cannot go on: .*{reason}", target, lane)
    assert os.listdir(target.parent) == []


async def lose_while_pulling(
    spec: str, lose: Callable[[], None], reason: str, target: Path, lane: str
) -> None:
    async with serve(spec, listen=f"unix:{target.with_name('socket')}") as server:
        lose()
        with pytest.raises(SourceLost, match=reason):
            await pull_whole(server.uri, target, lane)
        await trio.sleep_forever()


async def pull_whole(uri: str, target: Path, lane: str) -> None:
    async with pull(uri, IntoFile(target), lane=lane) as transfer:
        await transfer.wait_complete()


async def test_file_truncated_while_served(tmp_path: Path, lane: str) -> None:
    with tempfile.NamedTemporaryFile() as file:
        os.truncate(file.name, 1 << 20)
        await check_lost_while_served(
            file.name,
            lambda: os.truncate(file.name, 512 << 10),
            "cannot be read any more",
            tmp_path / "into",
            lane,
        )


async def test_process_ended_while_served(tmp_path: Path, holder: Holder, lane: str) -> None:
    spec = f"pid:{holder.pid}:{holder.address}+{len(CONTENT)}"
    await check_lost_while_served(
        spec, holder.end, f"process {holder.pid}", tmp_path / "into", lane
    )


# ---- a file that is written to is another source ----


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(page_of(9))


def overwrite_mapped(path: Path) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[:PAGE] = page_of(9)


CHANGES: dict[str, Callable[[Path], object]] = {
    "written": overwrite,
    "written through a mapping": overwrite_mapped,
    "truncated and written again": lambda path: path.write_bytes(CONTENT),
    "longer": lambda path: os.truncate(path, len(CONTENT) + PAGE),
    "other time": lambda path: os.utime(path, (1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_identity_is_another_after_a_write(change: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with open_source(path) as before:
        CHANGES[change](path)
        with open_source(path) as after:
            assert before.identity != after.identity


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("lanes", ["native", "trio"])
async def test_file_changed_while_served(change: str, lanes: Any, tmp_path: Path) -> None:
    """Both sides are told, though the destination asks for nothing."""
    path, memory = tmp_path / "file", OwnMemory("memfd")
    path.write_bytes(CONTENT)

    async def change_while_pulling(uri: str) -> None:
        async with pull(uri, memory, lane=lanes, background="off") as transfer:
            CHANGES[change](path)
            await transfer.wait_complete()

    async def change_while_serving() -> None:
        async with serve(str(path), listen=f"unix:{tmp_path}/socket", lane=lanes) as server:
            with pytest.raises(
                SourceLost,
                match=r"the source cannot go on: source .* was changed while it was served",
            ):
                await change_while_pulling(server.uri)
            await trio.sleep_forever()

    with pytest.raises(SourceLost, match="file was changed while it was served"):
        await change_while_serving()
    memory.close()


def test_nothing_but_names_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with open_source(path) as source:
        path.chmod(0o600)
        (tmp_path / "link").hardlink_to(path)
        path.rename(tmp_path / "moved")
        source.check_unchanged()
        (tmp_path / "moved").unlink()
        (tmp_path / "link").unlink()
        source.check_unchanged()


def test_memory_of_a_process_is_not_watched() -> None:
    """Faults change its modification time."""
    with ExitStack() as stack:
        spec = in_own_memfd(None, stack, Path())  # type: ignore[arg-type]
        with open_source(spec) as source:
            os.pwrite(int(Path(spec).name), page_of(9), 0)
            source.check_unchanged()
            with open_source(spec) as again:
                assert again.identity == source.identity


def test_identity_by_name() -> None:
    assert named_identity("00ff" * 8) == bytes.fromhex("00ff" * 8)
    names = ["a", "b", "00ff" * 7, "sha256:" + "00" * 32]
    assert len({named_identity(name) for name in names}) == 4
    assert all(
        len(named_identity(name)) == 16 and named_identity(name) == named_identity(name)
        for name in names
    )
