"""A source for tests: ``python -m pagenet.testing.pattern FILE --size BYTES`` writes what the
workload expects to find.

Every word of the pattern depends on its page and place (``native/testing/pattern.c``), so
:mod:`pagenet.testing.workload`, given the same seed and share of zero pages, finds each byte that
is missing, stale or in the wrong place.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys

from .._native.testing import pattern_fill
from ..children import module_command
from ..sizes import parse_size

__all__ = ["parse_size", "pattern_command", "write_pattern"]

_CHUNK_PAGES = 256


def pattern_command(*args: str) -> list[str]:
    """The command line that writes a pattern with ``args``, on this Python."""
    return module_command("pagenet.testing.pattern", *args)


def write_pattern(
    path: str | os.PathLike[str], size: int, seed: int = 0, zero_every: int = 0
) -> None:
    """Make ``path`` a file of ``size`` bytes, in whole pages, of pattern ``seed``; one page in
    ``zero_every`` is zero.

    The file is written, not mapped: a full tmpfs is then an :exc:`OSError`, where a mapping gets
    SIGBUS.
    """
    chunk = memoryview(bytearray(_CHUNK_PAGES * mmap.PAGESIZE))
    # Written in place: the name may be that of an open file (/proc/PID/fd/N). Opening a FIFO
    # without a reader fails with ENXIO, and does not wait.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
    with open(os.open(path, flags, 0o666), "wb") as file:
        for first in range(0, size // mmap.PAGESIZE, _CHUNK_PAGES):
            pages = min(_CHUNK_PAGES, size // mmap.PAGESIZE - first)
            pattern_fill(chunk, first, pages, mmap.PAGESIZE, seed, zero_every)
            file.write(chunk[: pages * mmap.PAGESIZE])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pagenet.testing.pattern", description="Write a file that knows its bytes."
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "--size", type=parse_size, required=True, metavar="BYTES", help="suffixes K M G"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the pattern (%(default)s)"
    )
    parser.add_argument(
        "--zero-every",
        type=int,
        default=0,
        metavar="N",
        help="one page in N is zero (%(default)s: none)",
    )
    options = parser.parse_args()
    try:
        write_pattern(options.file, options.size, options.seed, options.zero_every)
    except OSError as error:
        print(f"pattern: {options.file}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
