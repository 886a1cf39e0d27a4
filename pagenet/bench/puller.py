"""A destination as a process of its own: ``python -m pagenet.bench.puller``, started by
pagenet-bench alone.

Its one argument is a JSON object: ``uri``, ``compress``, ``lane``, ``chunk``, ``tls_dir`` (empty:
without TLS), and ``fd``, a memfd with what the pages should be. It pulls the pages into memory of
its own, compares them with the memfd, and prints its figures as one JSON object.
"""

from __future__ import annotations

from typing import Any

import trio

from .. import _native
from ..destination.pulling import pull
from ..tls import Tls
from ..uffd import OwnMemory
from ._task import work_once

# Bytes compared at a time.
_STEP = 1 << 20


async def _pull(
    uri: str, compress: Any, lane: Any, chunk: int, tls_dir: str, fd: int
) -> dict[str, object]:
    memory = OwnMemory("anonymous")
    try:
        async with pull(
            uri,
            memory,
            background="linear",
            chunk=chunk,
            lane=lane,
            tls=Tls(tls_dir) if tls_dir else None,
            prefetch=(0, 0),
            compress=compress,
        ) as transfer:
            await transfer.wait_complete()
        statistics = transfer.statistics()
        return {
            "seconds": statistics.seconds,
            "bytes_wire": statistics.wire_bytes,
            "share": statistics.lz4_share,
            "ratio": statistics.lz4_ratio,
            "bad": await trio.to_thread.run_sync(_differs, memory, fd, statistics.size),
        }
    finally:
        memory.close()


def _differs(memory: OwnMemory, fd: int, size: int) -> int:
    """How many MiB differ from the memfd."""
    wanted = _native.Mapped(size, fd)
    try:
        bad = 0
        for start in range(0, size, _STEP):
            ours, theirs = bytearray(min(_STEP, size - start)), bytearray(min(_STEP, size - start))
            _native.copy_out(memory.address + start, memoryview(ours))
            _native.copy_out(wanted.address + start, memoryview(theirs))
            bad += ours != theirs
        return bad
    finally:
        wanted.close()


if __name__ == "__main__":
    work_once(_pull)
