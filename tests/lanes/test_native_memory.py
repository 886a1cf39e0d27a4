"""native/memory.c: page bytes that Python must not look at."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagenet._pagenet import ffi, lib

pytestmark = pytest.mark.native

PAGE = 4096

# Prints where its bytes are, and waits until stdin ends. By the pattern the byte at every offset is
# known.
VICTIM = """
import ctypes, sys
size = int(sys.argv[1])
memory = ctypes.create_string_buffer(bytes(i * 7 % 251 for i in range(size)), size)
print(ctypes.addressof(memory), flush=True)
sys.stdin.read()
"""


def zero_run(memory: bytes | bytearray, page_size: int = PAGE) -> tuple[int, bool]:
    zero = ffi.new("int *")
    run = lib.pn_zero_run(ffi.from_buffer(memory), len(memory) // page_size, page_size, zero)
    return run, bool(zero[0])


def read_process(pid: int, address: int, length: int) -> tuple[int, bytes]:
    buffer = bytearray(length)
    return lib.pn_read_process(pid, address, ffi.from_buffer(buffer), length), bytes(buffer)


@pytest.mark.parametrize("page_size", [4096, 2 << 20])
def test_zero_run_of_zeros(page_size: int) -> None:
    assert zero_run(bytearray(3 * page_size), page_size) == (3, True)


@pytest.mark.parametrize("page_size", [4096, 2 << 20])
@pytest.mark.parametrize("at", [0, 1, 7, 8, 9, 15, 16, 2047, 2048, -9, -8, -7, -1])
def test_one_byte_anywhere_makes_a_page_nonzero(page_size: int, at: int) -> None:
    memory = bytearray(page_size)
    memory[at] = 1
    assert zero_run(memory, page_size) == (1, False)


@pytest.mark.parametrize("bit", range(8))
def test_one_bit_is_enough(bit: int) -> None:
    memory = bytearray(PAGE)
    memory[1234] = 1 << bit
    assert zero_run(memory) == (1, False)


def test_equal_words_are_not_zeros() -> None:
    assert zero_run(b"\x01" * PAGE) == (1, False)


def test_zero_run_stops_at_the_first_page_that_differs() -> None:
    assert zero_run(bytes(2 * PAGE) + b"x" * PAGE + bytes(PAGE)) == (2, True)
    assert zero_run(b"x" * 2 * PAGE + bytes(PAGE) + b"x" * PAGE) == (2, False)


@given(st.lists(st.none() | st.integers(0, PAGE - 1), min_size=1, max_size=40))
def test_zero_run_against_plain_python(nonzero_at: list[int | None]) -> None:
    memory = bytearray(len(nonzero_at) * PAGE)
    for page, at in enumerate(nonzero_at):
        if at is not None:
            memory[page * PAGE + at] = 0x80
    first, *_ = groups = [
        (is_zero, len(list(run)))
        for is_zero, run in itertools.groupby(at is None for at in nonzero_at)
    ]
    assert zero_run(memory) == (first[1], first[0])
    assert sum(length for _, length in groups) == len(nonzero_at)


@pytest.fixture
def own_pages() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 4 * PAGE) as memory:
        memory[:] = bytes(range(256)) * (4 * PAGE // 256)
        yield memory


def address_of(memory: mmap.mmap) -> int:
    with memoryview(memory) as view:
        return int(ffi.cast("uintptr_t", ffi.from_buffer(view)))


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 4 * PAGE), (0, 0), (0, 1), (1, PAGE), (PAGE - 1, 2), (4 * PAGE - 1, 1)],
)
def test_reads_exactly_what_was_asked(own_pages: mmap.mmap, offset: int, length: int) -> None:
    expected = own_pages[offset : offset + length]
    assert read_process(os.getpid(), address_of(own_pages) + offset, length) == (0, expected)


@pytest.mark.parametrize("stopped", [False, True])
def test_reads_another_process(stopped: bool) -> None:
    """A VMM that is a source is stopped while it is read."""
    size = 300_000
    command = [sys.executable, "-c", VICTIM, str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as victim:
        assert victim.stdout is not None
        address = int(victim.stdout.readline())
        if stopped:
            victim.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, victim.pid, os.WSTOPPED | os.WNOWAIT)
        answer = read_process(victim.pid, address, size)
        victim.kill()
    assert answer == (0, bytes(i * 7 % 251 for i in range(size)))


@pytest.mark.soak
def test_reads_more_than_the_kernel_gives_at_once() -> None:
    """One call gets at most 0x7ffff000 bytes. The tail then comes from, and goes to, where the
    first part ended."""
    size, mark = (2 << 30) + PAGE, b"the end"
    with mmap.mmap(-1, size) as there, mmap.mmap(-1, size) as here:
        there[-len(mark) :] = mark
        assert lib.pn_read_process(os.getpid(), address_of(there), ffi.from_buffer(here), size) == 0
        assert here[-len(mark) :] == mark


def test_unmapped_memory_is_a_bad_address() -> None:
    assert read_process(os.getpid(), 0, 1)[0] == -errno.EFAULT


def test_range_that_ends_in_unmapped_memory_is_a_bad_address() -> None:
    """The kernel reads what it can, and returns EFAULT only when asked for the rest."""
    fd = os.memfd_create("two pages, one with memory")
    os.ftruncate(fd, 2 * PAGE)
    with mmap.mmap(fd, 2 * PAGE) as memory:
        os.ftruncate(fd, PAGE)
        os.close(fd)
        assert read_process(os.getpid(), address_of(memory), PAGE)[0] == 0
        assert read_process(os.getpid(), address_of(memory), 2 * PAGE)[0] == -errno.EFAULT


def test_process_that_is_gone() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert read_process(child.pid, 0x1000, 1)[0] == -errno.ESRCH
