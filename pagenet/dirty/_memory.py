"""The memory to watch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..errors import PagenetError, UsageError
from ..qemu import Machine
from ..region import MAX_BLOCKS, Block, Region
from ..uffd import Mapping, OtherProcess
from ..uffd._process import refusal

__all__ = ["WatchedMemory", "memory_of", "memory_of_qemu", "parse_range"]

# Devices are mapped under names in /dev, and so is memory.
_MEMORY_IN_DEV = ("/dev/shm/", "/dev/hugepages/", "/dev/zero")
_MAX_ADDRESS = 1 << 57


@dataclass(frozen=True, slots=True)
class WatchedMemory:
    """What :class:`pagenet.WriteTracker` takes: ``mappings`` of process ``pid`` are ``region``."""

    pid: int
    mappings: tuple[Mapping, ...]
    region: Region


@dataclass(frozen=True, slots=True)
class _Part:
    """A mapping as /proc/PID/smaps has it. ``page_size``: that of the kernel there."""

    start: int
    end: int
    mode: str
    name: str
    page_size: int


def parse_range(text: str) -> tuple[int, int]:
    """First address and bytes of ``START-END`` or ``START+SIZE``, in any base that Python has.
    :exc:`UsageError` for anything else."""
    found = re.fullmatch(r"(\w{1,20})([-+])(\w{1,20})", text)
    try:
        first, second = (int(found[group], 0) for group in (1, 3)) if found else (0, 0)
    except ValueError:
        first = second = 0
    assert found is None or found[2] in "-+"
    size = second - first if found and found[2] == "-" else second
    if size <= 0 or not 0 <= first < _MAX_ADDRESS or size > _MAX_ADDRESS - first:
        raise UsageError(f"{text[:60]!r} is no range of addresses: write START-END or START+SIZE")
    return first, size


def memory_of(pid: int, ranges: Sequence[tuple[int, int]] = ()) -> WatchedMemory:
    """The memory of process ``pid`` in ``ranges`` (first address, bytes), or else all memory that
    it has mapped shared and writable.

    :exc:`UsageError` if it has none there, :exc:`~pagenet.errors.OwnerGone` if it has ended,
    :exc:`~pagenet.errors.Unsupported` if this user may not look into it.
    """
    parts = _parts_of(pid)
    if not ranges:
        ranges = [(part.start, part.end - part.start) for part in _joined(parts)]
    if not ranges:
        raise UsageError(
            f"process {pid} has no memory that is mapped shared and writable: name addresses"
            " (--range)"
        )
    if len(ranges) > MAX_BLOCKS:
        raise UsageError(f"process {pid} has {len(ranges)} pieces of shared memory: name some")
    named = [(f"{start:#x}", start, size) for start, size in ranges]
    return _watched(pid, named, parts)


def memory_of_qemu(pid: int, machine: Machine) -> WatchedMemory:
    """The RAM of the QEMU that runs as ``pid``, a block for each memory backend. Errors as of
    :func:`memory_of`."""
    named = [(backend.name, backend.address, backend.size) for backend in machine.backends]
    return _watched(pid, named, _parts_of(pid))


def _watched(
    pid: int, named: Sequence[tuple[str, int, int]], parts: Sequence[_Part]
) -> WatchedMemory:
    blocks, mappings, offset = list[Block](), list[Mapping](), 0
    for name, start, size in named:
        page_size = _page_size_at(pid, start, parts)
        if start % page_size:
            raise UsageError(f"{start:#x} is not the address of a page of {page_size} bytes")
        blocks.append(Block(name, size, page_size))
        mappings.append(Mapping(start, size, offset, page_size))
        offset += size
    return WatchedMemory(pid, tuple(mappings), Region(blocks))


def _page_size_at(pid: int, address: int, parts: Sequence[_Part]) -> int:
    for part in parts:
        if part.start <= address < part.end:
            return part.page_size
    raise UsageError(f"process {pid} has mapped nothing at {address:#x}")


_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)")


def _parts_of(pid: int) -> list[_Part]:
    try:
        with closing(OtherProcess(pid)) as process:
            text = Path(f"/proc/{pid}/smaps").read_text(errors="surrogateescape")
            if process.has_ended:
                raise ProcessLookupError
            return list(_read_parts(text))
    except ProcessLookupError:
        raise _ended(pid) from None
    except OSError as error:
        raise refusal(pid, error) from None


def _ended(pid: int) -> PagenetError:
    return refusal(pid, ProcessLookupError(3, os.strerror(3)))


def _read_parts(text: str) -> Iterator[_Part]:
    head = None
    for line in text.splitlines():
        if found := _HEAD.fullmatch(line):
            head = found
        elif head and line.startswith("KernelPageSize:"):
            start, end = int(head[1], 16), int(head[2], 16)
            yield _Part(start, end, head[3], head[4], int(line.split()[1]) << 10)


def _joined(parts: Sequence[_Part]) -> Iterator[_Part]:
    """Shared, writable memory: adjacent parts of one file are one."""
    last = None
    for part in filter(_is_memory, parts):
        if last and (last.end, last.name, last.page_size) == (
            part.start,
            part.name,
            part.page_size,
        ):
            last = _Part(last.start, part.end, last.mode, last.name, last.page_size)
            continue
        if last:
            yield last
        last = part
    if last:
        yield last


def _is_memory(part: _Part) -> bool:
    name = part.name
    is_device = name.startswith("/dev/") and not name.startswith(_MEMORY_IN_DEV)
    return part.mode == "rw-s" and name.startswith("/") and not is_device
