"""native/testing: pattern.c, and workload.c in a process of its own. Most handlers here only
listen."""

from __future__ import annotations

import array
import itertools
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagenet._pagenet_testing import ffi, lib
from processes import workload_command

from pagenet import _native
from pagenet._native.testing import run_workload
from pagenet.testing import workload as installed

pytestmark = pytest.mark.native

PAGE = 4096
SIZES = st.sampled_from([16, 512, 4096, 8192])
NUMBERS = st.integers(0, 2**64 - 1)
PAGES = st.integers(0, 2**52)

# ---- the pattern ----


def fill(
    first: int, pages: int, page_size: int = PAGE, seed: int = 1, zero_every: int = 0
) -> bytearray:
    memory = bytearray(b"\xaa" * pages * page_size)
    lib.pn_pattern_fill(ffi.from_buffer(memory), first, pages, page_size, seed, zero_every)
    return memory


def check(
    memory: bytearray, first: int, page_size: int = PAGE, seed: int = 1, zero_every: int = 0
) -> tuple[int, int | None]:
    """How many pages differ, and the first of them."""
    bad = ffi.new("uint64_t *")
    pages = len(memory) // page_size
    differ = lib.pn_pattern_check(
        ffi.from_buffer(memory), first, pages, page_size, seed, zero_every, bad
    )
    return differ, bad[0] if differ else None


def words(memory: bytearray) -> array.array[int]:
    return array.array("Q", bytes(memory))


@given(
    first=PAGES,
    pages=st.integers(0, 9),
    page_size=SIZES,
    seed=NUMBERS,
    zero_every=st.integers(0, 5),
)
def test_pattern_checks_what_it_filled(
    first: int, pages: int, page_size: int, seed: int, zero_every: int
) -> None:
    memory = fill(first, pages, page_size, seed, zero_every)
    assert check(memory, first, page_size, seed, zero_every) == (0, None)
    alone = [fill(first + page, 1, page_size, seed, zero_every) for page in range(pages)]
    assert memory == b"".join(alone)


@given(at=st.integers(0, 8 * PAGE - 1), bit=st.integers(0, 7), zero_every=st.integers(0, 2))
def test_any_flipped_bit_is_found(at: int, bit: int, zero_every: int) -> None:
    memory = fill(70, 8, zero_every=zero_every)
    memory[at] ^= 1 << bit
    assert check(memory, 70, zero_every=zero_every) == (1, 70 + at // PAGE)


def test_check_counts_pages_and_names_the_first() -> None:
    memory = fill(10, 6)
    for page in (2, 5):
        memory[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    assert check(memory, 10) == (2, 12)


def test_page_in_another_place_is_found() -> None:
    memory = fill(0, 4)
    memory[PAGE : 2 * PAGE] = memory[2 * PAGE : 3 * PAGE]
    assert check(memory, 0) == (1, 1)
    assert check(fill(1, 4), 0) == (4, 0)


def test_pattern_depends_on_the_seed() -> None:
    assert check(fill(0, 4, seed=1), 0, seed=2) == (4, 0)


def test_no_two_words_agree() -> None:
    """So only pages that are meant to be zero are."""
    assert len(set(words(fill(0, 64)))) == 64 * PAGE // 8


@given(page=PAGES, page_size=SIZES, seed=NUMBERS, zero_every=st.integers(0, 3))
def test_word_functions_agree_with_the_page(
    page: int, page_size: int, seed: int, zero_every: int
) -> None:
    expected = words(fill(page, 1, page_size, seed, zero_every))
    assert lib.pn_pattern_word(page, page_size, seed, zero_every) == expected[0]
    assert [
        lib.pn_pattern_word_at(page, i, seed, zero_every) for i in range(len(expected))
    ] == list(expected)


@pytest.mark.parametrize("zero_every", [2, 8, 50])
def test_share_of_zero_pages(zero_every: int) -> None:
    pages = 20_000
    memory = fill(0, pages, 16, zero_every=zero_every)
    zero = [page for page in range(pages) if not any(memory[16 * page : 16 * page + 16])]
    assert len(zero) == pytest.approx(pages / zero_every, rel=0.2)
    distances = {after - before for before, after in itertools.pairwise(zero)}
    assert len(distances) > zero_every / 2, "zero pages in even strides"


def test_all_pages_zero_and_none() -> None:
    assert not any(fill(0, 100, 512, zero_every=1))
    assert check(bytearray(100 * 512), 0, 512, zero_every=0) == (100, 0)


# ---- the workload ----


@dataclass
class Owner:
    """A workload that has sent its handshake, seen from the handler's end."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    handshake: bytes
    fds: list[int]

    @property
    def regions(self) -> list[dict[str, int]]:
        return list(json.loads(self.handshake))

    def event(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def wait_fault(self) -> None:
        select.select([self.fds[0]], [], [])

    def leave(self) -> None:
        """What an owner sees of a handler's death: its socket and its descriptors are closed."""
        self.connection.close()
        while self.fds:
            os.close(self.fds.pop())


def check_found(found: dict[str, Any], **expected: Any) -> None:
    assert {name: found[name] for name in expected} == expected


def popen(*args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(workload_command(*args), stdout=subprocess.PIPE)


Start = Callable[..., Owner]


@pytest.fixture
def start(tmp_path: Path, uffd_permitted: None) -> Iterator[Start]:
    """Starts a workload with those options and takes its handshake."""
    path = str(tmp_path / "socket")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen()

        def start(*args: str, launch: Callable[..., subprocess.Popen[bytes]] = popen) -> Owner:
            process = stack.enter_context(launch("--socket", path, *args))
            stack.callback(process.kill)
            connection = stack.enter_context(listener.accept()[0])
            handshake, fds, _, _ = socket.recv_fds(connection, 1 << 16, 8)
            owner = Owner(process, connection, handshake, fds)
            stack.callback(owner.leave)
            return owner

        yield start


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """As a user does. The others leave out the rest of pagenet, which takes half a second of
    CPU to import under a sanitizer."""
    return subprocess.run(installed.workload_command(*args), capture_output=True, text=True)


def test_command_runs_on_this_python() -> None:
    assert installed.workload_command("--help") == [
        sys.executable,
        "-P",
        "-m",
        "pagenet.testing.workload",
        "--help",
    ]


def test_help() -> None:
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(
        "usage: python -m pagenet.testing.workload --socket PATH --size BYTES [options]\n"
    )
    handshakes = "no|json|nofd|overlap|past-end|empty|huge|long|unshared"
    assert f"--bad-handshake {handshakes}\n" in result.stdout


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ("", "--socket and --size"),
        ("--socket s", "--socket and --size"),
        ("--size 4K", "--socket and --size"),
        ("--socket s --size 4K --colour red", "--colour"),
        ("--socket s --size", "--size"),
        ("--socket s --size 4K surplus", "surplus"),
        ("--socket s --size 4X", "--size"),
        ("--socket s --size 4K,", "--size"),
        ("--socket s --size 0", "--size"),
        ("--socket s --size -4096", "--size"),
        ("--socket s --size 4097", "--size"),
        ("--socket s --size 17179869184G", "--size"),
        ("--socket s --size 64T", "--size"),
        ("--socket s --size 4K --memory hugetlb", "--size"),
        ("--socket s --size 4K --memory floppy", "--memory"),
        ("--socket s --size 4K --memory mem", "--memory"),
        ("--socket s --size 4K --register minor", "--register"),
        ("--socket s --size 4K --threads 0", "--threads"),
        ("--socket s --size 4K --threads two", "--threads"),
        ("--socket s --size 4K --write-share 101", "--write-share"),
        ("--socket s --size 4K --stride 0", "--stride"),
        ("--socket s --size 8K --pattern-page-size 24", "--pattern-page-size"),
        ("--socket s --size 4K --pattern-page-size 8K", "--size"),
    ],
)
def test_usage_errors(args: str, complaint: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_workload(["workload", *args.split()]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert complaint in captured.err


def test_usage_error_is_the_exit_status() -> None:
    assert run("--colour", "red").returncode == 2


def test_socket_path_that_no_socket_can_have(uffd_permitted: None) -> None:
    result = run("--socket", "s" * 200, "--size", "4K")
    assert (result.returncode, result.stdout) == (4, "")


KIND = {"anonymous": "missing", "memfd": "both", "tmpfs": "both"}


@pytest.mark.parametrize("memory", KIND)
def test_handshake(start: Start, memory: str) -> None:
    owner = start("--size", "64K,4K,1M", "--memory", memory, "--order", "none", "--verify", "none")
    sizes = [64 << 10, 4 << 10, 1 << 20]
    assert [region.pop("base_host_virt_addr") % PAGE for region in owner.regions] == [0, 0, 0]
    for region, size, offset in zip(owner.regions, sizes, [0, 64 << 10, 68 << 10], strict=True):
        base = region.pop("base_host_virt_addr")
        assert base > 0
        assert region == {"size": size, "offset": offset, "page_size": PAGE, "page_size_kib": PAGE}
    assert os.readlink(f"/proc/self/fd/{owner.fds[0]}") == "anon_inode:[userfaultfd]"
    check_memory_fds(owner.fds[1:], memory, sum(sizes))
    assert owner.event()["event"] == "connected"
    assert [owner.event()["event"] for _ in range(2)] == ["touching", "verifying"]
    check_found(owner.event(), event="verified", pages=0, bad=0, first_bad=None, touches=0)
    assert owner.process.wait() == 0


def check_memory_fds(fds: list[int], memory: str, size: int) -> None:
    assert len(fds) == (memory != "anonymous")
    for fd in fds:
        status = os.fstat(fd)
        assert stat.S_ISREG(status.st_mode)
        assert (status.st_size, status.st_nlink) == (size, 0)


def test_mappings_lie_apart(start: Start) -> None:
    owner = start("--size", "64K,4K,1M", "--order", "none", "--verify", "none")
    ranges = sorted((region["base_host_virt_addr"], region["size"]) for region in owner.regions)
    for (base, size), (following, _) in itertools.pairwise(ranges):
        assert base + size < following


@pytest.mark.parametrize(
    ("memory", "asked"), [("anonymous", "missing"), ("memfd", "missing"), ("memfd", "minor")]
)
def test_registers_as_asked(start: Start, memory: str, asked: str) -> None:
    owner = start(
        "--size",
        "4K",
        "--memory",
        memory,
        "--register",
        asked,
        "--order",
        "none",
        "--verify",
        "none",
    )
    assert owner.event() == {"event": "connected", "registered": asked}


BASE, SIZE, OFFSET = "base_host_virt_addr", "size", "offset"


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


BROKEN: dict[str, Callable[[Owner], bool]] = {
    "json": lambda owner: not is_json(owner.handshake),
    "nofd": lambda owner: len(owner.regions) == 2 and not owner.fds,
    "overlap": lambda owner: owner.regions[2] == owner.regions[0],
    "past-end": lambda owner: owner.regions[1][OFFSET] + owner.regions[1][SIZE] >= 2**64,
    "empty": lambda owner: owner.regions == [],
    "huge": lambda owner: owner.regions[0][SIZE] == 2**60,
    "long": lambda owner: len(owner.handshake) > 16384 and not is_json(owner.handshake),
}


@pytest.mark.parametrize("how", BROKEN)
def test_bad_handshake_that_is_refused(start: Start, how: str) -> None:
    owner = start("--size", "64K,8K", "--bad-handshake", how)
    assert BROKEN[how](owner)
    assert len(owner.fds) == (how != "nofd")
    owner.leave()
    assert owner.process.wait() == 0
    assert owner.process.stdout is not None
    assert owner.process.stdout.read() == b""


def test_bad_handshake_that_is_not_refused(start: Start) -> None:
    owner = start("--size", "64K", "--bad-handshake", "empty")
    assert owner.process.wait() == 3


def test_owner_keeps_its_uffd_and_stalls(start: Start) -> None:
    """If the handler's copy were the last, its death would turn missing pages into zeros."""
    owner = start("--size", "64K", "--order", "sequential")
    assert [owner.event()["event"] for _ in range(2)] == ["connected", "touching"]
    owner.wait_fault()
    owner.leave()
    while (event := owner.event())["event"] == "progress":
        if event["touched"] == 0:
            break
    assert event["event"] == "progress"


def test_sigterm_ends_it_while_threads_wait_for_pages(start: Start) -> None:
    owner = start("--size", "64K", "--threads", "4")
    owner.wait_fault()
    owner.process.terminate()
    assert owner.process.wait() == -signal.SIGTERM


def test_gone_after(start: Start) -> None:
    owner = start("--size", "64K", "--gone-after", "1")
    assert owner.process.wait() == 9


@contextmanager
def popen_in_a_process(*args: str) -> Iterator[subprocess.Popen[bytes]]:
    launcher = "import subprocess, sys; subprocess.call(sys.argv[1:])"
    command = [sys.executable, "-c", launcher, *workload_command(*args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        yield process


def test_dies_with_its_parent(start: Start) -> None:
    owner = start("--size", "64K", launch=popen_in_a_process)
    assert [owner.event()["event"] for _ in range(2)] == ["connected", "touching"]
    owner.process.kill()
    assert owner.connection.recv(1) == b""


def test_outlives_the_thread_that_started_it(start: Start) -> None:
    """Trio starts processes from worker threads, which end when they have been idle for a while."""
    owners: list[Owner] = []

    def launch() -> None:
        owners.append(
            start("--size", "64K", "--order", "none", "--verify", "none", "--wait-complete")
        )
        assert [owners[0].event()["event"] for _ in range(2)] == ["connected", "touching"]

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    owners[0].leave()
    assert owners[0].process.wait() == 0


# ---- what it finds: against the smallest handler there is ----


class Handler:
    """Answers faults of one region, one at a time, with the pattern of seed 0. spoil() may change
    each page before it is placed."""

    def __init__(
        self, owner: Owner, spoil: Callable[[int, bytearray], int] = lambda page, data: _native.COPY
    ) -> None:
        (self.region,), self.owner, self.spoil = owner.regions, owner, spoil

    def serve(self) -> dict[str, Any]:
        """Answer faults until the workload's last event. Returns that event."""
        assert self.owner.process.stdout is not None
        uffd, stdout = self.owner.fds[0], self.owner.process.stdout.fileno()
        output = b""
        while True:
            ready, _, _ = select.select([uffd, stdout], [], [])
            if uffd in ready:
                self.answer(uffd)
            if stdout in ready:
                chunk = os.read(stdout, 65536)
                output += chunk
                if not chunk:
                    return dict(json.loads(output.splitlines()[-1]))

    def answer(self, uffd: int) -> None:
        with suppress(BlockingIOError):
            for event in _native.uffd_read(uffd):
                self.place(uffd, event)

    def place(self, uffd: int, event: _native.NativeEvent) -> None:
        page = (event.start - self.region[BASE]) // PAGE
        data = fill(page, 1, seed=0)
        how = self.spoil(page, data)
        _native.place(uffd, how, self.region[BASE] + page * PAGE, data, PAGE, PAGE)


@pytest.mark.parametrize("order", ["zipf", "random", "sequential", "strided", "none"])
def test_right_bytes_are_found_right(start: Start, order: str) -> None:
    owner = start(
        "--size",
        "1M",
        "--order",
        order,
        "--threads",
        "4",
        "--touches",
        "2000",
        "--write-share",
        "50",
    )
    found = Handler(owner).serve()
    touches = 0 if order == "none" else 2000
    check_found(found, pages=256, bad=0, first_bad=None, touches=touches, poisoned=0)
    assert owner.process.wait() == 0


@pytest.mark.parametrize("order", ["random", "sequential", "strided"])
def test_touches_every_page_once(start: Start, order: str) -> None:
    owner = start("--size", "308K", "--order", order, "--threads", "3", "--verify", "touched")
    check_found(Handler(owner).serve(), pages=77, bad=0, touches=77)


def zeros(page: int, data: bytearray) -> int:
    if page in (7, 200):
        data[:] = bytes(PAGE)
    return _native.COPY


def last_bit(page: int, data: bytearray) -> int:
    if page in (7, 200):
        data[-1] ^= 0x80
    return _native.COPY


@pytest.mark.parametrize(
    ("spoil", "verify"),
    [(zeros, "none"), (zeros, "all"), (last_bit, "all")],
    ids=["touch", "verification", "one bit"],
)
def test_wrong_bytes_are_found(
    start: Start, spoil: Callable[[int, bytearray], int], verify: str
) -> None:
    owner = start("--size", "1M", "--order", "random", "--verify", verify)
    check_found(Handler(owner, spoil).serve(), bad=2, first_bad=7)
    assert owner.process.wait() == 1


def test_lost_write_is_found(start: Start) -> None:
    """Late placement: a page's old content comes once more, and overwrites what the owner has
    written since."""
    owner = start(
        "--size",
        "4K",
        "--memory",
        "memfd",
        "--touches",
        "100",
        "--write-share",
        "100",
        "--wait-complete",
    )
    handler, old = Handler(owner), bytes(fill(0, 1, seed=0))
    owner.wait_fault()
    handler.answer(owner.fds[0])
    while os.pread(owner.fds[1], PAGE, 0) == old:
        pass
    os.pwrite(owner.fds[1], old, 0)
    owner.connection.close()
    check_found(handler.serve(), bad=1, first_bad=0)
    assert owner.process.wait() == 1


def test_poisoned_pages_are_counted(start: Start) -> None:
    owner = start("--size", "1M", "--threads", "4", "--order", "random", "--write-share", "50")
    found = Handler(
        owner, lambda page, data: _native.POISON if page % 8 == 0 else _native.COPY
    ).serve()
    if not found["poisoned"]:
        pytest.skip("the kernel has no UFFDIO_POISON")
    check_found(found, pages=256, bad=0, poisoned=32)
    assert owner.process.wait() == 0
