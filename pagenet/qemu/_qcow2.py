"""A qcow2 image whose only content is an internal snapshot: the form in which stock QEMU loads the
state of its devices into a machine that exists already (``snapshot-load``).

The format is that of QEMU's ``docs/interop/qcow2.txt``. All numbers are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["CLUSTER", "MAX_STATE_BYTES", "TAG", "snapshot_image"]

#: the snapshot's name
TAG = "pagenet"

_BITS = 16
#: bytes of a cluster
CLUSTER = 1 << _BITS
_ENTRIES = CLUSTER // 8  # of a table of 8-byte offsets
_COUNTS = CLUSTER // 2  # of a block of 2-byte reference counts
#: One cluster of second-level offsets leads to 512 MiB. The first level, and the table of blocks of
#: reference counts, have a cluster each.
MAX_STATE_BYTES = 1 << 36
_DISK_BYTES = CLUSTER  # of the disk, which is empty
_FIRST_OF_STATE = 1  # index in the first level: the state begins behind the disk
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")


def snapshot_image(state: bytes | bytearray | memoryview) -> Iterator[tuple[int, bytes]]:
    """The image with the machine's ``state``, at most ``MAX_STATE_BYTES`` of it: pieces, each with
    its offset. What lies between them is zero."""
    data = -(-len(state) // CLUSTER)
    tables = -(-data // _ENTRIES)
    fixed = 5 + tables + data  # header, table of counts, both first levels, list of snapshots
    counts = -(-fixed // _COUNTS)
    counts = -(-(fixed + counts) // _COUNTS)  # those blocks are counted too
    total = fixed + counts
    numbers = iter(range(total))
    header, count_table = next(numbers), next(numbers)
    count_blocks = [next(numbers) for _ in range(counts)]
    active, snapshots, level1 = next(numbers), next(numbers), next(numbers)
    level2 = [next(numbers) for _ in range(tables)]
    first = next(numbers, total)

    yield header * CLUSTER, _header(active, count_table, counts, snapshots)
    yield count_table * CLUSTER, _offsets(count_blocks)
    for number, block in enumerate(count_blocks):
        used = min(_COUNTS, total - number * _COUNTS)
        yield block * CLUSTER, struct.pack(">H", 1) * used
    yield snapshots * CLUSTER, _snapshot(level1, tables, len(state))
    yield level1 * CLUSTER + 8 * _FIRST_OF_STATE, _offsets(level2)
    for number, table in enumerate(level2):
        begin = first + number * _ENTRIES
        yield table * CLUSTER, _offsets(range(begin, min(begin + _ENTRIES, total)))
    view = memoryview(state)
    for number in range(data):
        piece = bytes(view[number * CLUSTER : (number + 1) * CLUSTER])
        yield (first + number) * CLUSTER, piece.ljust(CLUSTER, b"\0")


def _offsets(clusters: list[int] | range) -> bytes:
    return b"".join(struct.pack(">Q", cluster * CLUSTER) for cluster in clusters)


def _header(active: int, count_table: int, counts: int, snapshots: int) -> bytes:
    return _HEADER.pack(
        b"QFI\xfb",
        3,  # version
        0, 0,  # no backing file
        _BITS,
        _DISK_BYTES,
        0,  # not encrypted
        1, active * CLUSTER,
        count_table * CLUSTER, 1,
        1, snapshots * CLUSTER,
        0, 0, 0,  # no features
        4,  # 1 << 4 bits of a reference count
        _HEADER.size,
    )  # fmt: skip


def _snapshot(level1: int, tables: int, size: int) -> bytes:
    tag = TAG.encode()
    head = struct.pack(
        ">QIHHIIQII",
        level1 * CLUSTER, _FIRST_OF_STATE + tables,
        1, len(tag),  # bytes of its id and of its name
        0, 0, 0,  # when it was made
        0, 24,  # the size of the state is in the 24 bytes that follow
    )  # fmt: skip
    return head + struct.pack(">QQQ", size, _DISK_BYTES, 0) + b"1" + tag
