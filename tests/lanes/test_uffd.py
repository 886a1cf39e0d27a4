"""pagenet/uffd/_userfaultfd.py and native/place.c against the kernel: memory of this process,
touched from C threads."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import HUGE_PAGE, PAGE, huge_pages

from pagenet import Unsupported, _native
from pagenet._native import CONTINUE, COPY, MOVE, POISON, ZERO, Mapped, Placed
from pagenet.uffd import (
    Event,
    Fault,
    Feature,
    Forked,
    Mode,
    Remapped,
    Removed,
    Unmapped,
    Userfaultfd,
    probe,
)

pytestmark = pytest.mark.native

# Seconds that a thread that should resume has before the test fails. Only failures take that long.
PATIENCE = 20.0
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
KEEP_SIZE, PUNCH_HOLE = 1, 2  # of fallocate()
NO_FEATURES = Feature(0)

# drops the GIL while it is in a call, which Python's own mmap does not
libc = ctypes.CDLL(None, use_errno=True)
libc.mremap.restype = ctypes.c_void_p
Address = ctypes.c_void_p
Size = ctypes.c_size_t
Offset = ctypes.c_long


class Call:
    """A thread that makes one call into C, which may wait for a page or for the reader of an
    event."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.result: Any = None
        self._thread = threading.Thread(target=self._run, args=(call, *args))
        self._thread.start()

    def _run(self, call: Callable[..., Any], *args: Any) -> None:
        self.result = call(*args)

    @property
    def is_waiting(self) -> bool:
        return self._thread.is_alive()

    @property
    def thread_id(self) -> int | None:
        return self._thread.native_id

    def join(self) -> Any:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the call has not come back"
        return self.result


class Watched:
    """Memory under a userfaultfd."""

    def __init__(self, pages: int, features: Feature, mode: Mode, fd: int, page_size: int) -> None:
        self.page_size = page_size
        self.memory = Mapped(pages * page_size, fd, alignment=page_size)
        self.uffd = Userfaultfd.open(features)
        self.uffd.register(self.memory.address, self.memory.size, mode)
        self._calls: list[Call] = []

    def at(self, page: int) -> int:
        return self.memory.address + page * self.page_size

    def call(self, function: Callable[..., Any], *args: Any) -> Call:
        call = Call(function, *args)
        self._calls.append(call)
        return call

    def touch(self, page: int, length: int | None = None) -> Call:
        """Reads a page; its bytes are the result."""
        return self.call(copied_out, self.at(page), length or self.page_size)

    def write(self, page: int, text: bytes) -> Call:
        source = bytes(text)  # alive for as long as the thread
        into = self.memory.buffer(page * self.page_size, len(text))
        return self.call(_native.copy_out, address_of(source), into)

    def read_page(self, page: int) -> bytes:
        return bytes(self.touch(page).join())

    def wait_events(self) -> list[Event]:
        assert select.select([self.uffd.fd], [], [], PATIENCE)[0], "no event"
        return self.uffd.read()

    def wait_fault(self) -> Fault:
        (event,) = self.wait_events()
        assert isinstance(event, Fault)
        return event

    def place(self, how: int, page: int, data: bytes | memoryview | None, pages: int = 1) -> Placed:
        return self.uffd.place(how, self.at(page), data, pages * self.page_size, self.page_size)

    def close(self) -> None:
        self.uffd.close()  # threads that still wait are released
        for call in self._calls:
            call.join()
        self.memory.close()


def copied_out(address: int, length: int) -> bytes:
    into = bytearray(length)
    _native.copy_out(address, memoryview(into))
    return bytes(into)


def address_of(data: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(data), Address).value or 0


def page_of(byte: int, page_size: int = PAGE) -> bytes:
    return bytes([byte]) * page_size


def placed(
    pages: int, existed: int = 0, absent: int = 0, error: int = 0, page_size: int = PAGE
) -> Placed:
    return Placed(pages * page_size, existed * page_size, absent * page_size, error)


Watch = Callable[..., Watched]


@pytest.fixture(scope="module")
def kernel() -> Feature:
    try:
        return probe()
    except Unsupported as error:
        pytest.skip(str(error))


@pytest.fixture
def watch(kernel: Feature) -> Iterator[Watch]:
    """Makes watched memory; skips where the kernel lacks a feature."""
    made: list[Watched] = []

    def watch(
        pages: int = 4,
        features: Feature = NO_FEATURES,
        mode: Mode = Mode.MISSING,
        fd: int = -1,
        page_size: int = PAGE,
    ) -> Watched:
        if features & ~kernel:
            pytest.skip(f"the kernel has no {(features & ~kernel).name}")
        made.append(Watched(pages, features, mode, fd, page_size))
        return made[-1]

    yield watch
    for watched in made:
        watched.close()


@pytest.fixture
def memfd() -> Iterator[int]:
    """Four pages, all of them holes."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * PAGE)
    yield fd
    os.close(fd)


# ---- opening ----


def test_probe_finds_what_every_kernel_has(kernel: Feature) -> None:
    assert Feature.EVENT_REMOVE | Feature.MISSING_SHMEM | Feature.MISSING_HUGETLBFS in kernel


def test_open_switches_on_what_is_wanted(kernel: Feature) -> None:
    for wanted in (NO_FEATURES, Feature.EVENT_REMOVE, Feature.EVENT_REMOVE | Feature.THREAD_ID):
        uffd = Userfaultfd.open(wanted)
        assert uffd.features == wanted
        uffd.close()
        uffd.close()


def test_it_neither_blocks_nor_is_inherited(kernel: Feature) -> None:
    uffd = Userfaultfd.open()
    assert (os.get_blocking(uffd.fd), os.get_inheritable(uffd.fd)) == (False, False)
    assert uffd.read() == []
    uffd.close()


def test_feature_that_no_kernel_has(kernel: Feature) -> None:
    with pytest.raises(Unsupported, match=r"^userfaultfd: Invalid argument$"):
        Userfaultfd.open(Feature(1 << 62))


def test_missing_feature_is_named(kernel: Feature, monkeypatch: pytest.MonkeyPatch) -> None:
    def api_of_an_older_kernel(fd: int, wanted: int) -> int:
        if wanted & Feature.MOVE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return int(kernel & ~(Feature.MOVE | Feature.POISON))

    monkeypatch.setattr(_native, "uffd_api", api_of_an_older_kernel)
    with pytest.raises(Unsupported, match=r"^this kernel's userfaultfd lacks MOVE$"):
        Userfaultfd.open(Feature.MOVE | Feature.EVENT_REMOVE)


UNPRIVILEGED = """
import os, sys
from pagenet import Unsupported
from pagenet.uffd import Userfaultfd
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
Userfaultfd.open(user_mode_only=True).close()  # which every user may have
try:
    Userfaultfd.open()
except Unsupported as error:
    sys.exit(str(error))
"""


def test_user_without_access_is_told_what_to_change() -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() != "0\n":
        pytest.skip("vm.unprivileged_userfaultfd lets every user in")
    if os.getuid() and os.access("/dev/userfaultfd", os.W_OK):
        pytest.skip("this user may use /dev/userfaultfd, and cannot become one who may not")
    result = subprocess.run([sys.executable, "-c", UNPRIVILEGED], capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "userfaultfd is not permitted to this user: make /dev/userfaultfd readable and writable"
        " for it"
    )
    assert "setfacl -m u:" in line
    assert "of Debian's package acl" in line
    assert "vm.unprivileged_userfaultfd=1" in line
    assert "CAP_SYS_PTRACE" in line


def test_received_takes_it_over(kernel: Feature) -> None:
    opened = Userfaultfd.open(Feature.EVENT_REMOVE | Feature.THREAD_ID)
    os.set_blocking(opened.fd, True)
    received = Userfaultfd.received(os.dup(opened.fd))
    assert received.features == opened.features
    assert not os.get_blocking(received.fd)
    received.close()
    opened.close()


def test_received_refuses_what_is_none() -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(ValueError, match="not a userfaultfd"):
        Userfaultfd.received(read_end)
    os.close(read_end)  # still open
    os.close(write_end)


# ---- events ----


def test_read_fault(watch: Watch) -> None:
    watched = watch()
    touch = watched.touch(2)
    assert watched.wait_fault() == Fault(watched.at(2), write=False, minor=False, thread=0)
    assert touch.is_waiting
    assert watched.place(COPY, 2, page_of(7)) == placed(1)
    assert touch.join() == page_of(7)
    assert watched.uffd.read() == []


def test_write_fault(watch: Watch) -> None:
    watched = watch()
    write = watched.write(1, b"text")
    assert watched.wait_fault() == Fault(watched.at(1), write=True, minor=False, thread=0)
    watched.place(COPY, 1, page_of(7))
    write.join()
    assert watched.read_page(1) == b"text" + page_of(7)[4:]


def test_fault_names_its_thread(watch: Watch) -> None:
    watched = watch(features=Feature.THREAD_ID)
    touches = [watched.touch(page) for page in range(3)]
    events: list[Event] = []
    while len(events) < 3:
        events += watched.wait_events()
    assert {event.address: event.thread for event in events if isinstance(event, Fault)} == {
        watched.at(page): touch.thread_id for page, touch in enumerate(touches)
    }
    watched.place(ZERO, 0, bytes(PAGE), 3)


def test_exact_address(watch: Watch) -> None:
    watched = watch(features=Feature.EXACT_ADDRESS)
    watched.call(copied_out, watched.at(1) + 100, 1)
    assert watched.wait_fault().address == watched.at(1) + 100
    watched.place(ZERO, 1, bytes(PAGE))


def test_sixty_four_faults_and_more_come_in_batches(watch: Watch) -> None:
    watched = watch(100)
    for page in range(100):
        watched.touch(page, 1)
    addresses: set[int] = set()
    while len(addresses) < 100:
        addresses |= {event.address for event in watched.wait_events() if isinstance(event, Fault)}
    assert addresses == {watched.at(page) for page in range(100)}
    watched.place(ZERO, 0, bytes(PAGE), 100)


def test_remove(watch: Watch) -> None:
    watched = watch(features=Feature.EVENT_REMOVE)
    watched.place(COPY, 0, page_of(7) * 4, 4)
    advice = watched.call(libc.madvise, Address(watched.at(1)), Size(2 * PAGE), mmap.MADV_DONTNEED)
    assert watched.wait_events() == [Removed(watched.at(1), watched.at(3))]
    assert advice.join() == 0
    assert watched.read_page(0) == watched.read_page(3) == page_of(7)
    touch = watched.touch(1)
    assert watched.wait_fault().address == watched.at(1)
    watched.place(ZERO, 1, bytes(PAGE))
    assert touch.join() == bytes(PAGE)


def test_unmap(watch: Watch) -> None:
    watched = watch(features=Feature.EVENT_UNMAP)
    unmap = watched.call(libc.munmap, Address(watched.at(2)), Size(2 * PAGE))
    assert watched.wait_events() == [Unmapped(watched.at(2), watched.at(4))]
    assert unmap.join() == 0
    watched.memory.size = 2 * PAGE  # the rest may be other memory by now


def test_remap(watch: Watch) -> None:
    watched = watch(features=Feature.EVENT_REMAP)
    room = Mapped(2 * PAGE)
    size, how = Size(2 * PAGE), MREMAP_MAYMOVE | MREMAP_FIXED
    remap = watched.call(
        libc.mremap, Address(watched.at(2)), size, size, how, Address(room.address)
    )
    assert watched.wait_events() == [Remapped(watched.at(2), room.address, 2 * PAGE)]
    assert remap.join() == room.address
    watched.memory.size = 2 * PAGE
    room.close()


# The parent of the forking process reads the event: a thread of its own would need a lock that the
# forking thread has meanwhile.
FORKING = """
import os, socket, sys
from pagenet import Unsupported, _native
from pagenet.uffd import Feature, Mode, Userfaultfd
try:
    uffd = Userfaultfd.open(Feature.EVENT_FORK)
except Unsupported as error:
    sys.exit(str(error))
memory = _native.Mapped(4096)
uffd.register(memory.address, memory.size, Mode.MISSING)
with socket.socket(fileno=int(sys.argv[1])) as to:
    socket.send_fds(to, [b"uffd"], [uffd.fd])
pid = os.fork()
if not pid:
    os._exit(0)
os.waitpid(pid, 0)
"""


@contextmanager
def run_with_socket(script: str) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """A Python process, and the other end of the socket whose descriptor is its first argument."""
    ours, theirs = socket.socketpair()
    with ours:
        command = [sys.executable, "-c", script, str(theirs.fileno())]
        with theirs:
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True
            )
        with process:
            yield process, ours
            ours.close()


def test_fork(kernel: Feature) -> None:
    with run_with_socket(FORKING) as (forking, connection):
        _, fds, _, _ = socket.recv_fds(connection, 100, 1)
        if not fds:
            pytest.skip(f"this user may not ask for fork events: {forking.communicate()[1]}")
        uffd = Userfaultfd.received(fds[0])
        assert uffd.features == Feature.EVENT_FORK
        assert select.select([uffd.fd], [], [], PATIENCE)[0]
        (event,) = uffd.read()
        assert isinstance(event, Forked)
        assert os.readlink(f"/proc/self/fd/{event.uffd}") == "anon_inode:[userfaultfd]"
        assert forking.wait() == 0
        os.close(event.uffd)
        uffd.close()


def test_unknown_event(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    event = _native.NativeEvent(kind=0x17, start=0, end=0, length=0, flags=0, thread=0, fd=-1)
    monkeypatch.setattr(_native, "uffd_read", lambda *_: [event])
    with pytest.raises(Unsupported, match="event 0x17 is unknown"):
        watch().uffd.read()


# ---- placing ----


def test_copy_many_pages_at_once(watch: Watch) -> None:
    watched = watch(8)
    data = b"".join(page_of(byte) for byte in range(1, 8))
    assert watched.place(COPY, 1, data, 7) == placed(7)
    assert b"".join(watched.read_page(page) for page in range(1, 8)) == data


def test_zero(watch: Watch) -> None:
    watched = watch()
    touch = watched.touch(3)
    watched.wait_fault()
    assert watched.place(ZERO, 0, bytes(PAGE), 4) == placed(4)
    assert touch.join() == bytes(PAGE)


def test_continue_maps_what_was_written_elsewhere(watch: Watch, memfd: int) -> None:
    watched = watch(features=Feature.MINOR_SHMEM, mode=Mode.MISSING | Mode.MINOR, fd=memfd)
    first = watched.touch(1)
    assert watched.wait_fault() == Fault(watched.at(1), write=False, minor=False, thread=0)
    os.pwrite(memfd, page_of(7) * 2, PAGE)
    second = watched.touch(2)
    assert watched.wait_fault() == Fault(watched.at(2), write=False, minor=True, thread=0)
    assert watched.place(CONTINUE, 1, None, 2) == placed(2)
    assert first.join() == second.join() == page_of(7)


def test_continue_without_a_page_in_the_file_is_no_page(watch: Watch, memfd: int) -> None:
    watched = watch(features=Feature.MINOR_SHMEM, mode=Mode.MISSING | Mode.MINOR, fd=memfd)
    assert watched.place(CONTINUE, 0, None).error == errno.EFAULT


@pytest.mark.parametrize("punched", [False, True], ids=["there", "punched"])
def test_settling_a_minor_fault(watch: Watch, memfd: int, punched: bool) -> None:
    """Its page may be gone by then: the thread that waits has to fault again, as on any hole."""
    watched = watch(features=Feature.MINOR_SHMEM, mode=Mode.MISSING | Mode.MINOR, fd=memfd)
    os.pwrite(memfd, page_of(7), PAGE)
    touch = watched.touch(1)
    fault = watched.wait_fault()
    assert fault.minor
    if punched:
        assert libc.fallocate(memfd, PUNCH_HOLE | KEEP_SIZE, Offset(PAGE), Offset(PAGE)) == 0
    assert watched.uffd.settle(fault, watched.at(1), bytes(PAGE), PAGE).error == 0
    if punched:
        again = watched.wait_fault()
        assert not again.minor
        assert watched.uffd.settle(again, watched.at(1), bytes(PAGE), PAGE) == placed(1)
    assert touch.join() == page_of(0 if punched else 7)


def staging(pages: int, byte: int, page_size: int = PAGE) -> Mapped:
    """Pages that can be moved away: private, anonymous, present and aligned."""
    mapped = Mapped(pages * page_size)
    mapped.buffer(0, mapped.size)[:] = page_of(byte, mapped.size)
    return mapped


def test_move_takes_the_pages_out_of_where_they_were(watch: Watch) -> None:
    watched = watch(features=Feature.MOVE)
    source = staging(3, 7)
    touch = watched.touch(2)
    watched.wait_fault()
    assert watched.place(MOVE, 0, source.buffer(0, source.size), 3) == placed(3)
    assert touch.join() == watched.read_page(0) == page_of(7)
    assert bytes(source.buffer(0, PAGE)) == bytes(PAGE)
    source.close()


def test_move_copies_what_cannot_be_moved(watch: Watch, memfd: int) -> None:
    """Pages of a file are not anonymous."""
    watched = watch(features=Feature.MOVE)
    os.pwrite(memfd, page_of(7) * 4, 0)
    source = Mapped(4 * PAGE, memfd)
    assert watched.place(MOVE, 0, source.buffer(0, source.size), 4) == placed(4)
    assert watched.read_page(3) == page_of(7)
    assert bytes(source.buffer(0, PAGE)) == page_of(7)
    source.close()


def test_wake_alone_lets_the_thread_fault_again(watch: Watch) -> None:
    watched = watch()
    touch = watched.touch(0)
    first = watched.wait_fault()
    watched.uffd.wake(watched.at(0), PAGE)
    assert watched.wait_fault() == first
    assert touch.is_waiting
    watched.place(COPY, 0, page_of(7))
    assert touch.join() == page_of(7)


def test_unregister_lets_everybody_go_with_zeros(watch: Watch) -> None:
    """This is why it must not be done before all pages are in place."""
    watched = watch()
    touch = watched.touch(0)
    watched.wait_fault()
    watched.uffd.unregister(watched.at(0), 4 * PAGE)
    assert touch.join() == bytes(PAGE)


def test_unregister_forgets_nobody_who_faults_just_then(watch: Watch) -> None:
    delays = random.Random(1)
    for _ in range(500):
        watched = watch()
        touch = watched.touch(0, 2 * PAGE)
        watched.wait_fault()
        watched.place(ZERO, 0, bytes(PAGE))
        # about the time from one page to the next
        until = time.perf_counter_ns() + delays.randrange(20_000)
        while time.perf_counter_ns() < until:
            pass
        watched.uffd.unregister(watched.at(0), 4 * PAGE)
        assert touch.join() == bytes(2 * PAGE)
        watched.close()


POISONED = """
import resource, sys
from pagenet import _native
from pagenet.uffd import Feature, Mode, Userfaultfd
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
uffd = Userfaultfd.open(Feature.POISON)
memory = _native.Mapped(3 * 4096)
uffd.register(memory.address, memory.size, Mode.MISSING)
for page, how in enumerate((_native.COPY, _native.POISON, _native.COPY)):
    print(uffd.place(how, memory.address + page * 4096, bytes(4096), 4096, 4096).placed)
for page in (0, 2, 1):
    _native.copy_out(memory.address + page * 4096, memoryview(bytearray(8)))
    print("survived", page, flush=True)
"""


def test_poisoned_page_is_sigbus_at_the_touch(kernel: Feature) -> None:
    if Feature.POISON not in kernel:
        pytest.skip("the kernel has no UFFDIO_POISON")
    result = subprocess.run([sys.executable, "-c", POISONED], capture_output=True, text=True)
    assert result.returncode == -signal.SIGBUS
    assert result.stdout.splitlines() == ["4096", "4096", "4096", "survived 0", "survived 2"]


def test_poison_spares_pages_that_are_there(watch: Watch) -> None:
    watched = watch(features=Feature.POISON)
    watched.place(COPY, 1, page_of(7))
    assert watched.place(POISON, 0, None, 4) == placed(3, existed=1)
    assert watched.read_page(1) == page_of(7)


# ---- what goes wrong while placing ----


@pytest.mark.parametrize("there", [{0}, {3}, {1, 4}, {2, 3}, set(range(6))], ids=str)
def test_existing_pages_are_counted_and_kept(watch: Watch, there: set[int]) -> None:
    watched = watch(6)
    for page in there:
        watched.place(COPY, page, page_of(7))
    data = b"".join(page_of(10 + page) for page in range(6))
    assert watched.place(COPY, 0, data, 6) == placed(6 - len(there), existed=len(there))
    assert [watched.read_page(page)[0] for page in range(6)] == [
        7 if page in there else 10 + page for page in range(6)
    ]


def test_waiter_for_a_page_that_exists_is_woken(watch: Watch, memfd: int) -> None:
    """A third party placed it first, and did not wake."""
    watched = watch(fd=memfd)
    touch = watched.touch(1)
    watched.wait_fault()
    os.pwrite(memfd, page_of(7), PAGE)  # into the page cache, which wakes no thread
    assert touch.is_waiting
    assert watched.place(COPY, 1, page_of(8)) == placed(0, existed=1)
    assert touch.join() == page_of(7)


def test_page_that_is_not_mapped_is_absent(watch: Watch) -> None:
    watched = watch(5)
    data = b"".join(page_of(10 + page) for page in range(5))
    # splits the range into two, neither of which contains the run
    watched.uffd.unregister(watched.at(1), PAGE)
    assert watched.place(COPY, 0, data, 5) == placed(4, absent=1)
    assert [watched.read_page(page)[0] for page in (0, 2, 3, 4)] == [10, 12, 13, 14]
    assert watched.place(COPY, 1, data, 1) == placed(0, absent=1)


def test_nothing_can_be_placed_while_a_removal_is_unread(watch: Watch) -> None:
    watched = watch(8, Feature.EVENT_REMOVE)
    advice = watched.call(libc.madvise, Address(watched.at(6)), Size(2 * PAGE), mmap.MADV_DONTNEED)
    assert select.select([watched.uffd.fd], [], [], PATIENCE)[0]
    data = page_of(7) * 4
    assert watched.place(COPY, 0, data, 4) == placed(0, error=errno.EAGAIN)
    assert watched.place(ZERO, 0, bytes(PAGE), 4) == placed(0, error=errno.EAGAIN)
    assert _native.uffd_probe(watched.uffd.fd, watched.at(0)) == errno.EAGAIN
    assert advice.is_waiting
    assert watched.uffd.read() == [Removed(watched.at(6), watched.at(8))]
    assert advice.join() == 0
    assert watched.place(COPY, 0, data, 4) == placed(4)
    assert _native.uffd_probe(watched.uffd.fd, watched.at(0)) == 0


def give_up(address: int, pages: int, advice: int) -> None:
    for page in range(pages):
        assert libc.madvise(Address(address + page * PAGE), Size(PAGE), advice) == 0


@pytest.mark.parametrize(
    "how", [COPY, ZERO, CONTINUE, MOVE], ids=["copy", "zero", "continue", "move"]
)
def test_no_progress_is_lost_when_events_interrupt(watch: Watch, how: int) -> None:
    """A page that was counted twice would exist the second time; one that was never placed would
    fault at the end."""
    pages = 300
    features = Feature.EVENT_REMOVE | {CONTINUE: Feature.MINOR_SHMEM, MOVE: Feature.MOVE}.get(
        how, NO_FEATURES
    )
    fd = os.memfd_create("test", os.MFD_CLOEXEC) if how == CONTINUE else -1
    if fd >= 0:
        os.ftruncate(fd, 2 * pages * PAGE)
        os.pwrite(fd, page_of(7, pages * PAGE), 0)
    mode, advice = Mode.MISSING, mmap.MADV_DONTNEED
    if fd >= 0:
        mode, advice = mode | Mode.MINOR, mmap.MADV_REMOVE
    watched = watch(2 * pages, features, mode, fd)
    source = staging(pages, 7)
    removals = watched.call(give_up, watched.at(pages), pages, advice)
    done = existed = 0
    while done < pages * PAGE:
        data = {ZERO: memoryview(bytes(PAGE)), CONTINUE: None}.get(
            how, source.buffer(done, source.size - done)
        )
        result = watched.uffd.place(how, watched.at(0) + done, data, pages * PAGE - done, PAGE)
        done += result.done
        existed += result.existed
        assert result.error in (0, errno.EAGAIN)
        if result.error:
            watched.uffd.read()
            os.sched_yield()
    while removals.is_waiting:
        watched.uffd.read()
        os.sched_yield()
    removals.join()
    assert (done, existed) == (pages * PAGE, 0)
    expected = bytes(PAGE) if how == ZERO else page_of(7)
    assert watched.touch(0, pages * PAGE).join() == expected * pages
    source.close()
    if fd >= 0:
        os.close(fd)


DYING_OWNER = """
import socket, sys
from pagenet import _native
from pagenet.uffd import Mode, Userfaultfd
uffd = Userfaultfd.open()
memory = _native.Mapped(4096)
uffd.register(memory.address, memory.size, Mode.MISSING)
with socket.socket(fileno=int(sys.argv[1])) as to:
    socket.send_fds(to, [str(memory.address).encode()], [uffd.fd])
    to.recv(1)
"""


def test_memory_of_a_process_that_has_ended(kernel: Feature) -> None:
    with run_with_socket(DYING_OWNER) as (owner, connection):
        text, (fd,), _, _ = socket.recv_fds(connection, 100, 1)
        uffd, address = Userfaultfd.received(fd), int(text)
        assert _native.uffd_probe(uffd.fd, address) == 0
        owner.kill()
        owner.wait()
        assert _native.uffd_probe(uffd.fd, address) == errno.ESRCH
        assert uffd.place(COPY, address, page_of(7), PAGE, PAGE) == placed(0, error=errno.ESRCH)
        uffd.close()


def test_same_file_tells_copies_of_a_descriptor(kernel: Feature) -> None:
    first, second = Userfaultfd.open(), Userfaultfd.open()
    copy = os.dup(first.fd)
    assert _native.same_file(first.fd, os.getpid(), copy)
    assert not _native.same_file(first.fd, os.getpid(), second.fd)
    os.close(copy)
    first.close()
    second.close()


# ---- huge pages ----


def test_huge_pages(watch: Watch) -> None:
    with huge_pages(4):
        fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_HUGETLB)
        os.ftruncate(fd, 4 * HUGE_PAGE)
        features = Feature.MISSING_HUGETLBFS | Feature.MINOR_HUGETLBFS
        watched = watch(4, features, Mode.MISSING | Mode.MINOR, fd, HUGE_PAGE)
        second = Mapped(4 * HUGE_PAGE, fd, alignment=HUGE_PAGE)
        touches = [
            watched.call(copied_out, watched.at(page) + HUGE_PAGE - 8, 8) for page in range(4)
        ]
        faults: list[Event] = []
        while len(faults) < 4:
            faults += watched.wait_events()
        assert {event.address for event in faults if isinstance(event, Fault)} == {
            watched.at(page) for page in range(4)
        }
        assert watched.place(COPY, 0, page_of(7, HUGE_PAGE)) == placed(1, page_size=HUGE_PAGE)
        assert watched.place(ZERO, 1, bytes(HUGE_PAGE), 2) == placed(2, page_size=HUGE_PAGE)
        second.buffer(3 * HUGE_PAGE, HUGE_PAGE)[:] = page_of(8, HUGE_PAGE)
        assert watched.place(CONTINUE, 3, None) == placed(1, page_size=HUGE_PAGE)
        assert watched.place(COPY, 0, bytes(4 * HUGE_PAGE), 4) == placed(
            0, existed=4, page_size=HUGE_PAGE
        )
        assert [touch.join() for touch in touches] == [page_of(byte, 8) for byte in (7, 0, 0, 8)]
        watched.close()
        second.close()
        os.close(fd)
