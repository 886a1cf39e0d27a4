"""The memory to watch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from ..errors import UsageError
from ..qemu import Machine
from ..region import MAX_BLOCKS, Block, Region
from ..sizes import MAX_ADDRESS, split_range
from ..uffd import MappedPages, Mapping, OtherProcess
from ..uffd._process import refusal

__all__ = ["WatchedMemory", "memory_of", "memory_of_qemu", "parse_range"]

# Devices are mapped under names in /dev, and so is memory.
_MEMORY_IN_DEV = ("/dev/shm/", "/dev/hugepages/", "/dev/zero")


@dataclass(frozen=True, slots=True)
class WatchedMemory:
    """What :class:`pagenet.WriteTracker` takes: ``mappings`` of process ``pid`` are ``region``."""

    pid: int
    mappings: tuple[Mapping, ...]
    region: Region


def parse_range(text: str) -> tuple[int, int]:
    """First address and bytes of ``START-END`` or ``START+SIZE``, in any base that Python has.
    :exc:`UsageError` for anything else."""
    first, size = split_range(text) or (0, 0)
    if size <= 0 or first >= MAX_ADDRESS or size > MAX_ADDRESS - first:
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
    pid: int, named: Sequence[tuple[str, int, int]], parts: Sequence[MappedPages]
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


def _page_size_at(pid: int, address: int, parts: Sequence[MappedPages]) -> int:
    for part in parts:
        if part.start <= address < part.end:
            return part.page_size
    raise UsageError(f"process {pid} has mapped nothing at {address:#x}")


def _parts_of(pid: int) -> list[MappedPages]:
    try:
        with closing(OtherProcess(pid)) as process:
            return process.mapped_pages()
    except OSError as error:
        raise refusal(pid, error) from None


def _joined(parts: Sequence[MappedPages]) -> Iterator[MappedPages]:
    """Shared, writable memory: adjacent parts of one file are one."""
    last = None
    for part in filter(_is_memory, parts):
        if last and (last.end, last.name, last.page_size) == (
            part.start,
            part.name,
            part.page_size,
        ):
            last = replace(last, end=part.end)
            continue
        if last:
            yield last
        last = part
    if last:
        yield last


def _is_memory(part: MappedPages) -> bool:
    name = part.name
    is_device = name.startswith("/dev/") and not name.startswith(_MEMORY_IN_DEV)
    return part.mode == "rw-s" and name.startswith("/") and not is_device
