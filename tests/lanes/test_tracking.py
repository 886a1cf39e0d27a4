"""pagenet/uffd/_tracking.py and native/track.c against the kernel: which pages were written, in
this process and in others, which may end, change their memory or attack."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from processes import HUGE_PAGE, PAGE, huge_pages, skip_without_tracking

from pagenet import Block, OwnerGone, PagenetError, Region, Run, Unsupported, UsageError, _native
from pagenet.uffd import Mapping, WriteTracker, probe
from pagenet.uffd import _tracking as tracking

PAGES = 64
IN_MS = 1 / 1000
libc = ctypes.CDLL(None, use_errno=True)

other_processes = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="attaching is for x86-64"
)


@pytest.fixture(autouse=True)
def kernel_can() -> None:
    skip_without_tracking()
    probe()


class Memory:
    """Memory of this process: ``kind`` is anonymous, memfd or hugetlb."""

    def __init__(self, kind: str, pages: int = PAGES) -> None:
        self.page_size = HUGE_PAGE if kind == "hugetlb" else PAGE
        self.size = pages * self.page_size
        flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB if kind == "hugetlb" else 0)
        self.fd = -1 if kind == "anonymous" else os.memfd_create("test", flags)
        if self.fd >= 0:
            os.ftruncate(self.fd, self.size)
        self.mapped = _native.Mapped(self.size, self.fd, alignment=self.page_size)
        self.mapping = Mapping(self.mapped.address, self.size, 0, self.page_size)
        self.region = Region([Block("test", self.size, self.page_size)])

    def write(self, page: int, byte: int = 1, pages: int = 1) -> None:
        into = self.mapped.address + page * self.page_size
        ctypes.memset(into, byte, pages * self.page_size)

    def discard(self, page: int, pages: int) -> None:
        at = self.mapped.address + page * self.page_size
        assert not libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(pages * self.page_size), 4)

    def track(self) -> WriteTracker:
        return WriteTracker(os.getpid(), [self.mapping], self.region)

    def close(self) -> None:
        self.mapped.close()
        if self.fd >= 0:
            os.close(self.fd)


@pytest.fixture
def hugepages() -> Iterator[None]:
    with huge_pages(PAGES):
        yield


@pytest.fixture(params=["anonymous", "memfd", "hugetlb"])
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    if request.param == "hugetlb":
        request.getfixturevalue("hugepages")
    memory = Memory(request.param)
    yield memory
    memory.close()


@pytest.fixture
def small() -> Iterator[Memory]:
    memory = Memory("memfd")
    yield memory
    memory.close()


# ---- memory of this process ----


@pytest.mark.native
def test_what_was_written_is_named_once(memory: Memory) -> None:
    memory.write(3)
    with memory.track() as tracker:
        assert tracker.written() == []
        memory.write(0)
        memory.write(2, pages=3)
        memory.write(PAGES - 1)
        assert tracker.written() == [Run(0, 1), Run(2, 3), Run(PAGES - 1, 1)]
        assert tracker.written() == []
        memory.write(3)
        assert tracker.written() == [Run(3, 1)]


@pytest.mark.native
def test_reading_is_not_writing(memory: Memory) -> None:
    memory.write(1)
    with memory.track() as tracker:
        for page in range(PAGES):
            ctypes.string_at(memory.mapped.address + page * memory.page_size, 8)
        assert tracker.written() == []
        memory.write(0)
        memory.write(1)
        assert tracker.written() == [Run(0, 2)]


@pytest.mark.native
def test_bits_are_those_of_the_runs(memory: Memory) -> None:
    with memory.track() as tracker:
        memory.write(0)
        memory.write(9, pages=2)
        bits = bytearray(PAGES // 8)
        tracker.mark(bits)
        assert int.from_bytes(bits, "little") == 1 | 3 << 9
        memory.write(63)
        tracker.mark(bits)
        assert int.from_bytes(bits, "little") == 1 | 3 << 9 | 1 << 63
        with pytest.raises(ValueError, match="no bits for 64 pages"):
            tracker.mark(bytearray(7))


@pytest.mark.native
def test_written_pages_that_were_discarded_are_named(memory: Memory) -> None:
    """Their entries in the page table are empty: in memory of huge pages only the second pass names
    those."""
    with memory.track() as tracker:
        memory.write(0, pages=PAGES)
        memory.discard(0, PAGES)
        assert tracker.written() == [Run(0, PAGES)]
        assert tracker.written() == []
        memory.write(5)
        assert tracker.written() == [Run(5, 1)]


@pytest.mark.native
def test_this_kernel_names_empty_entries() -> None:
    """If it does not, looks take three times as long."""
    assert tracking._names_empty(PAGE)
    assert not tracking._names_empty(HUGE_PAGE)


@pytest.mark.native
@pytest.mark.parametrize("names_empty", [True, False])
@pytest.mark.parametrize(
    ("first", "count"), [(0, 2048), (512, 512), (3, 1200), (700, 1), (1023, 2)]
)
def test_page_tables_that_were_discarded(
    names_empty: bool, first: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel frees a page table whose last entry is discarded (Linux 6.14)."""
    if not names_empty:
        monkeypatch.setattr(tracking, "_names_empty", lambda _: False)
    memory = Memory("memfd", pages=2048)
    try:
        with memory.track() as tracker:
            memory.write(first, pages=count)
            memory.discard(first, count)
            assert tracker.written() == [Run(first, count)]
            assert tracker.written() == []
            memory.write(0, pages=2048)
            memory.discard(first, count)
            assert tracker.written() == [Run(0, 2048)]
            assert tracker.written() == []
    finally:
        memory.close()


@pytest.mark.native
def test_more_runs_than_a_call_returns() -> None:
    pages = 3 * 8192
    memory = Memory("memfd", pages)
    try:
        with memory.track() as tracker:
            for page in range(0, pages, 2):
                memory.write(page)
            assert tracker.written() == [Run(page, 1) for page in range(0, pages, 2)]
            for page in range(1, pages, 2):
                memory.write(page)
            bits = bytearray(pages // 8)
            tracker.mark(bits)
            assert bits == b"\xaa" * (pages // 8)
    finally:
        memory.close()


@pytest.mark.native
def test_blocks_and_mappings(small: Memory) -> None:
    """Two mappings in another order than their offsets, three blocks: runs end where blocks do."""
    half = small.size // 2
    region = Region([Block("a", half), Block("b", 8 * PAGE), Block("c", half - 8 * PAGE)])
    mappings = [
        Mapping(small.mapped.address, half, half, PAGE),
        Mapping(small.mapped.address + half, half, 0, PAGE),
    ]
    with WriteTracker(os.getpid(), mappings, region) as tracker:
        small.write(0, pages=PAGES)
        assert tracker.written() == [Run(0, 32), Run(32, 8), Run(40, 24)]
        small.write(31, pages=2)
        assert tracker.written() == [Run(0, 1), Run(63, 1)]


@pytest.mark.native
def test_writes_by_the_kernel_are_seen(small: Memory) -> None:
    """A read() that stores into a protected page."""
    with small.track() as tracker, open("/dev/zero", "rb", buffering=0) as zeros:
        zeros.readinto(small.mapped.buffer(7 * PAGE, 100))
        assert tracker.written() == [Run(7, 1)]


def test_nothing_is_left_behind(small: Memory) -> None:
    flags = [line for line in smaps_flags(os.getpid(), small.mapped.address) if line == "uw"]
    with small.track():
        assert "uw" in smaps_flags(os.getpid(), small.mapped.address)
    assert [x for x in smaps_flags(os.getpid(), small.mapped.address) if x == "uw"] == flags == []
    with small.track() as again:
        small.write(1)
        assert again.written() == [Run(1, 1)]
        again.close()
        again.close()


def smaps_flags(pid: int, address: int) -> list[str]:
    """VmFlags of the mapping that begins at ``address``; "uw": write protected by a userfaultfd."""
    lines = iter(Path(f"/proc/{pid}/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-"):
            return next(line for line in lines if line.startswith("VmFlags:")).split()[1:]
    raise AssertionError("nothing begins there")


# ---- refused ----


def test_memory_that_is_tracked_already(small: Memory) -> None:
    with small.track(), pytest.raises(UsageError, match="another userfaultfd watches it already"):
        small.track()


def test_memory_that_is_not_there(small: Memory) -> None:
    wrong = [
        Mapping(small.mapped.address + small.size - PAGE, 1 << 40, 0, PAGE),
        Mapping(PAGE << 4, small.size, 0, PAGE),
    ]
    for mapping in wrong:
        region = Region([Block("test", mapping.size)])
        with pytest.raises(UsageError, match=r"has no memory of 0x\w+ bytes, all of one kind, at"):
            WriteTracker(os.getpid(), [mapping], region)


def test_mappings_that_do_not_fit_the_region(small: Memory) -> None:
    with pytest.raises(UsageError, match="cannot track the memory of process"):
        WriteTracker(os.getpid(), [small.mapping], Region([Block("test", PAGE)]))


OLD_KERNEL = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
# ioctl number PAGEMAP_SCAN (16, seccomp_data.args[1] is at 24) is unknown: ENOTTY
scan = 3 << 30 | 96 << 16 | ord("f") << 8 | 16
code = [(0x20, 0, 0, 24), (0x15, 0, 1, scan), (0x06, 0, 0, 0x50000 | 25), (0x06, 0, 0, 0x7FFF0000)]
program = b"".join(struct.pack("HBBI", *step) for step in code)
room = ctypes.create_string_buffer(program)
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(room)))
assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, filter, 0, 0), ctypes.get_errno()
from pagenet import Block, Region, Unsupported
from pagenet.uffd import Mapping, WriteTracker
try:
    WriteTracker(os.getpid(), [Mapping(1 << 20, 4096, 0, 4096)], Region([Block("x", 4096)]))
except Unsupported as error:
    print(error)
"""


def test_kernel_that_is_too_old() -> None:
    """One that refuses PAGEMAP_SCAN as kernels before 6.7 do: the process is not even looked at."""
    said = subprocess.run(
        [sys.executable, "-c", OLD_KERNEL], capture_output=True, text=True, timeout=60
    )
    assert (said.stdout, said.stderr) == (
        "this kernel cannot say which pages were written: Linux 6.7 or newer can\n",
        "",
    )


# ---- other processes ----

# Maps a memfd that it inherits, and does what it is told, one line each.
OWNER = """
import ctypes, json, mmap, os, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
fd, size, page_size = map(int, sys.argv[1:4])
libc.mmap.restype = ctypes.c_void_p
def map_at(address, flags):
    return libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(size), 3, 1 | flags, fd, 0)
address = map_at(0, 0)
running, counts = threading.Event(), []
def say(**words):
    try:
        fds = len(os.listdir("/proc/self/fd"))
    except OSError:  # while fight() goes on
        fds = None
    print(json.dumps({**words, "fds": fds}), flush=True)
def write_forever(number):
    import random
    draw, pages = random.Random(number), size // page_size
    while running.is_set():
        page = draw.randrange(pages)
        at = address + page * page_size + 8 * draw.randrange(page_size // 8)
        libc.memset(ctypes.c_void_p(at), draw.randrange(256), 8)
        counts[number] += 1
def start(threads):
    running.set()
    counts[:] = [0] * threads
    started[:] = [threading.Thread(target=write_forever, args=(n,)) for n in range(threads)]
    for thread in started:
        thread.start()
def stop():
    running.clear()
    for thread in started:
        thread.join()
    return sum(counts)
started = []
def write(page, byte):
    libc.memset(ctypes.c_void_p(address + page * page_size), byte, page_size)
def fork():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
def unmap(page):
    libc.munmap(ctypes.c_void_p(address + page * page_size), ctypes.c_size_t(page_size))
def remap():
    map_at(address, 0x10)
def move():
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap(ctypes.c_void_p(address), *(ctypes.c_size_t(n) for n in (size, size)), 3,
                ctypes.c_void_p(libc.mmap(None, ctypes.c_size_t(size), 0, 0x22, -1, 0)))
def replace():
    os.execv(sys.executable, [sys.executable, "-c", "input()"])
def fight():
    # other files under the numbers that new descriptors get
    def swap():
        while True:
            for number in range(3, 16):
                if number != fd:
                    try:
                        os.dup2(0, number)
                        os.close(number)
                    except OSError:
                        pass
    threading.Thread(target=swap, daemon=True).start()
def thrash():
    def change():
        while True:
            unmap(0)
            remap()
    threading.Thread(target=change, daemon=True).start()
def drop():
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
def sum_up():
    return sum(sum(range(1000)) for _ in range(200))
say(address=address)
for line in sys.stdin:
    name, *arguments = json.loads(line)
    say(answer=globals()[name](*arguments))
"""


class Owner:
    """A process that has mapped ``memory``."""

    def __init__(self, memory: Memory) -> None:
        command = [sys.executable, "-c", OWNER, str(memory.fd)]
        self.memory = memory
        self.process = subprocess.Popen(
            [*command, str(memory.size), str(memory.page_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[memory.fd],
        )
        ready = self._heard()
        self.mapping = Mapping(ready["address"], memory.size, 0, memory.page_size)
        self.fds = ready["fds"]

    @property
    def pid(self) -> int:
        return self.process.pid

    def _heard(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        words: dict[str, Any] = json.loads(self.process.stdout.readline())
        return words

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def do(self, *words: object) -> Any:
        self.tell(*words)
        said = self._heard()
        self.fds = said["fds"]
        return said["answer"]

    def track(self) -> WriteTracker:
        return WriteTracker(self.pid, [self.mapping], self.memory.region)


@contextmanager
def owner_of(memory: Memory) -> Iterator[Owner]:
    owner = Owner(memory)
    with owner.process:
        try:
            yield owner
        finally:
            owner.process.kill()


@pytest.fixture(params=["memfd", "hugetlb"])
def shared(request: pytest.FixtureRequest) -> Iterator[Memory]:
    if request.param == "hugetlb":
        request.getfixturevalue("hugepages")
    memory = Memory(request.param)
    yield memory
    memory.close()


@other_processes
def test_writes_of_another_process(shared: Memory) -> None:
    with owner_of(shared) as owner:
        before = owner.fds
        with owner.track() as tracker:
            assert tracker.written() == []
            owner.do("write", 5, 1)
            assert tracker.written() == [Run(5, 1)]
            owner.do("fork")
            owner.do("write", 6, 1)
            assert tracker.written() == [Run(6, 1)]
            shared.write(9)
            assert tracker.written() == [], "another process's writes are not seen"
        owner.do("write", 7, 1)
        assert owner.fds == before
        assert "uw" not in smaps_flags(owner.pid, owner.mapping.address)


def copy(memory: Memory, into: memoryview, runs: Sequence[Run]) -> None:
    """What a source does: read the pages that were named."""
    for run in runs:
        start, length = run.first * memory.page_size, run.count * memory.page_size
        into[start : start + length] = memory.mapped.buffer(start, length)


@other_processes
@pytest.mark.parametrize("trial", range(4))
def test_no_write_is_missed(shared: Memory, trial: int) -> None:
    """Several threads write anywhere, while the pages that are named are copied, round after round.
    After the last round, with the writers at rest, the copy is the memory."""
    draw = random.Random(trial)
    with owner_of(shared) as owner, owner.track() as tracker:
        copied = memoryview(bytearray(shared.size))
        owner.do("start", 4)
        rounds = named = 0
        stop = threading.Event()
        timer = threading.Timer(0.5 + draw.random(), stop.set)
        timer.start()
        while not stop.wait(draw.choice([0, 0, 0.001, 0.02])):
            runs = tracker.written()
            copy(shared, copied, runs)
            rounds, named = rounds + 1, named + sum(run.count for run in runs)
        timer.join()
        writes = owner.do("stop")
        copy(shared, copied, tracker.written())
        assert copied == shared.mapped.buffer(0, shared.size)
        assert tracker.written() == []
        assert writes > 0
        assert rounds > 1
        assert named > 0


@other_processes
@pytest.mark.parametrize("change", [("unmap", 0), ("unmap", 9), ("remap",), ("move",)])
def test_memory_that_changes(small: Memory, change: tuple[object, ...]) -> None:
    """Writes before that may be lost: no page is named as if nothing had happened."""
    with owner_of(small) as owner, owner.track() as tracker:
        owner.do("write", 9, 1)
        owner.do(*change)
        for _ in range(2):
            with pytest.raises(UsageError, match="has changed what it maps"):
                tracker.written()


def ask_forever(tracker: WriteTracker) -> None:
    while True:
        tracker.written()


@other_processes
def test_memory_that_changes_all_the_time(small: Memory) -> None:
    with owner_of(small) as owner, owner.track() as tracker:
        owner.do("thrash")
        with pytest.raises(UsageError):
            ask_forever(tracker)
        for _ in range(50):
            try:
                owner.track().close()
            except UsageError:
                continue


@other_processes
def test_process_that_ends(small: Memory) -> None:
    with owner_of(small) as owner, owner.track() as tracker:
        owner.do("write", 9, 1)
        owner.process.kill()
        owner.process.wait()
        with pytest.raises(OwnerGone, match="has ended"):
            tracker.written()
        with pytest.raises(OwnerGone, match="has ended"):
            owner.track()


@other_processes
def test_process_that_has_ended_and_is_not_waited_for(small: Memory) -> None:
    with owner_of(small) as owner:
        owner.process.kill()
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(OwnerGone, match="has ended"):
            owner.track()


@other_processes
def test_process_that_becomes_another_program(small: Memory) -> None:
    with owner_of(small) as owner, owner.track() as tracker:
        owner.tell("replace")
        with pytest.raises((OwnerGone, UsageError)):
            ask_forever(tracker)


@other_processes
def test_owner_without_privileges(small: Memory) -> None:
    """It may have no userfaultfd for faults inside the kernel, and needs none."""
    if os.getuid():
        pytest.skip("changing to another user takes root")
    with owner_of(small) as owner:
        owner.do("drop")
        with owner.track() as tracker:
            owner.do("write", 5, 1)
            assert tracker.written() == [Run(5, 1)]


@other_processes
def test_user_who_may_not(small: Memory) -> None:
    if os.getuid():
        pytest.skip("changing to another user takes root")
    code = (
        "import os, sys\n"
        "from pagenet import Block, Region, Unsupported\n"
        "from pagenet.uffd import Mapping, WriteTracker\n"
        "pid, address, size = map(int, sys.argv[1:])\n"
        "os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
        "try:\n"
        "    WriteTracker(pid, [Mapping(address, size, 0, 4096)], Region([Block('x', size)]))\n"
        "except Unsupported as error:\n"
        "    print(error)\n"
    )
    with owner_of(small) as owner:
        mapping = owner.mapping
        words = map(str, (owner.pid, mapping.address, mapping.size))
        said = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60
        )
        assert said.stdout.startswith(f"may not attach to process {owner.pid}: "), said
        assert said.stdout.count("\n") == 1
        assert owner.do("sum_up") == 200 * 499500


@other_processes
def test_owner_that_fights_for_the_descriptor(small: Memory) -> None:
    """A thread of it puts other files under the numbers of new descriptors, and closes them. Either
    the tracker works, or one line says why not; nothing is left open."""
    with owner_of(small) as owner:
        owner.do("fight")
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            with suppress(PagenetError), owner.track() as tracker:
                tracker.written()
        assert len(os.listdir("/proc/self/fd")) == before


# ---- a tracker that is killed ----

TRACKER = """
import sys
from pagenet import Block, Region
from pagenet.uffd import Mapping, WriteTracker
pid, address, size, page_size = map(int, sys.argv[1:])
mapping, region = Mapping(address, size, 0, page_size), Region([Block("x", size, page_size)])
print(flush=True)
while True:
    with WriteTracker(pid, [mapping], region) as tracker:
        tracker.written()
"""


def kill_tracker(owner: Owner, after: float) -> None:
    mapping = owner.mapping
    words = map(str, (owner.pid, mapping.address, mapping.size, mapping.page_size))
    command = [sys.executable, "-c", TRACKER, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as tracker:
        assert tracker.stdout is not None
        tracker.stdout.readline()
        threading.Event().wait(after)
        os.killpg(tracker.pid, signal.SIGKILL)


@other_processes
@pytest.mark.parametrize("trial", range(2))
def test_killed_tracker_leaves_the_process_as_it_was(shared: Memory, trial: int) -> None:
    """At any moment, also while the userfaultfd is made there: the process goes on, its writes
    included, and can be tracked again."""
    draw = random.Random(trial)
    with owner_of(shared) as owner:
        before = owner.fds
        owner.do("start", 2)
        for _ in range(5):
            kill_tracker(owner, draw.random() * 20 * IN_MS)
            assert owner.do("sum_up") == 200 * 499500
        assert owner.do("stop") > 0
        with owner.track() as tracker:
            owner.do("write", 3, 7)
            assert tracker.written() == [Run(3, 1)]
        assert shared.mapped.buffer(3 * shared.page_size, 8) == b"\x07" * 8
        owner.do("sum_up")
        assert owner.fds == before
        status = Path(f"/proc/{owner.pid}/status").read_text()
        assert "TracerPid:\t0\n" in status
        assert "SigBlk:\t0000000000000000\n" in status


@other_processes
def test_stopped_process_is_refused(small: Memory) -> None:
    with owner_of(small) as owner:
        owner.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, owner.pid, os.WSTOPPED | os.WNOWAIT)
        with pytest.raises(Unsupported, match="it is stopped"):
            owner.track()
        owner.process.send_signal(signal.SIGCONT)
        assert owner.do("sum_up") == 200 * 499500
