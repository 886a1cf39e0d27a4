"""Memory by address, for bytes that Python must not look at: it would wait for a missing page with
the GIL held."""

from __future__ import annotations

import errno
import mmap

from ._library import check, ffi, lib

Buffer = bytes | bytearray | memoryview | mmap.mmap


def populate(address: int, size: int) -> bool:
    """Allocate every page of that memory now, rather than at its first touch. False: this kernel
    cannot (before 5.14).

    :exc:`OSError` if there is not that much memory. Call it in a thread.
    """
    try:
        check(lib.pn_populate(address, size))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def buffer_address(buffer: mmap.mmap) -> int:
    """Where it is, for as long as it is mapped."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def store(address: int, data: Buffer) -> None:
    """Write to memory of this process that may be gone: then :exc:`OSError` (EFAULT), and no
    signal."""
    check(lib.pn_store(address, ffi.from_buffer(data), len(data)))


def punch(fd: int, length: int) -> None:
    """Replace the first ``length`` bytes of a file by a hole."""
    check(lib.pn_punch(fd, length))


def leading_alike(data: memoryview, pages: int, page_size: int) -> tuple[int, bool]:
    """How many pages from the start of ``data`` are all zero pages, or all other pages, and whether
    they are zero pages."""
    zero = ffi.new("int *")
    count = lib.pn_zero_run(ffi.from_buffer(data), pages, page_size, zero)
    return count, bool(zero[0])


def zero_map(fd: int, offset: int, pages: int, page_size: int) -> tuple[bytes, int]:
    """A bitmap of the zero pages among ``pages`` pages of a file from ``offset`` on, and their
    number.

    Raises :exc:`OSError`: ENODATA if the file ends before.
    """
    bits = bytearray(-(-pages // 8))
    count = lib.pn_zero_map(fd, offset, pages, page_size, ffi.from_buffer("uint8_t[]", bits))
    check(min(0, count))
    return bytes(bits), count


def read_process(pid: int, address: int, into: memoryview) -> None:
    check(lib.pn_read_process(pid, address, ffi.from_buffer(into), len(into)))


def copy_out(address: int, into: memoryview) -> None:
    """Copy ``len(into)`` bytes from ``address``, which may fault: call it in a thread."""
    lib.pn_copy(ffi.from_buffer(into), ffi.cast("void *", address), len(into))


class MappedFile:
    """The first ``size`` bytes of a file, mapped shared, by address: Python never looks at them.
    ``writable``: mapped writable, although nothing writes to them."""

    def __init__(self, size: int, fd: int, writable: bool) -> None:
        self.size = size
        self.address = _check_address(lib.pn_map_file(size, fd, writable))

    def map_ahead(self, offset: int, length: int) -> None:
        """Enter pages into the page table, if they are in memory and the kernel can do that (from
        5.14 on). That is cheaper than one by one, when each is wanted."""
        lib.pn_map_ahead(self.address + offset, length)

    def close(self) -> None:
        if self.address:
            lib.pn_unmap_memory(self.address, self.size)
            self.address = 0


class Mapped:
    """Memory of this process, by address: anonymous, or a shared mapping of file ``fd`` from
    ``offset`` on.

    Python never looks at the bytes, so a missing page never faults with the GIL held.
    """

    def __init__(
        self, size: int, fd: int = -1, offset: int = 0, alignment: int = mmap.PAGESIZE
    ) -> None:
        self.size = size
        self.address = _check_address(lib.pn_map_memory(size, fd, offset, alignment))

    def close(self) -> None:
        if self.address:
            lib.pn_unmap_memory(self.address, self.size)
            self.address = 0

    def buffer(self, offset: int, length: int) -> memoryview:
        """A view for the kernel to read into or write from; valid until :meth:`close`.

        :exc:`ValueError` if it would reach past the end, or the memory is closed.
        """
        if not self.address or offset + length > self.size:
            raise ValueError("outside the mapping, or it is closed")
        return memoryview(ffi.buffer(ffi.cast("char *", self.address + offset), length))


def _check_address(address: int) -> int:
    if address > 2**64 - 4096:  # -errno, as the kernel itself packs it
        check(address - 2**64)
    return address
