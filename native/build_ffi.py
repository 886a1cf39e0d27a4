"""Builds pagenet._pagenet, the C core, and pagenet._pagenet_testing, for tests and benches, as cffi
API-mode extensions.

Run by setup.py. The second is not linked into the first, so that code that moves memory never loads
it. They share no state, and sources that both need are compiled into each.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from cffi import FFI

HERE = Path("native")  # setuptools runs in the project's root and wants relative sources
SOURCES = [
    "uffd.c", "attach.c", "track.c", "place.c", "residency.c", "memory.c", "thread.c",
    "window.c", "pack.c", "choice.c", "demand_choice.c", "pace.c",
    "ring.c", "dest.c", "lane.c", "faults.c", "replies.c", "feed.c", "loop.c",
    "cache.c", "cached.c", "crew.c", "greet.c",
    "verbs.c", "chunks.c", "rdma.c", "keys.c", "source.c", "sock.c", "tls.c", "snapshot.c",
    "frames.c",
]  # fmt: skip
TESTING_SOURCES = [
    "testing/pattern.c", "testing/workload.c", "testing/bench.c", "testing/relay.c",
    "testing/tls.c", "testing/handshake.c", "testing/restore.c",
    "uffd.c", "residency.c", "memory.c",
]  # fmt: skip


def declarations(header: str) -> str:
    """The header as cffi wants it: without preprocessor lines."""
    lines = (Path(__file__).parent / header).read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def extension(name: str, headers: list[str], sources: list[str], libraries: list[str]) -> FFI:
    builder = FFI()
    builder.cdef("\n".join(map(declarations, headers)))
    builder.set_source(
        name,
        "\n".join(f'#include "{header}"' for header in headers),
        sources=[str(HERE / source) for source in sources],
        include_dirs=[str(HERE)],
        libraries=libraries,
        depends=sorted(map(str, HERE.glob("**/*.h"))),
        extra_compile_args=[
            "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter",
            *shlex.split(os.environ.get("PAGENET_CFLAGS", "")),
        ],
        extra_link_args=["-pthread", *shlex.split(os.environ.get("PAGENET_LDFLAGS", ""))],
    )  # fmt: skip
    return builder


core = extension(
    "pagenet._pagenet", ["pagenet.h", "pace.h"], SOURCES, ["lz4", "ssl", "crypto", "dl"]
)
testing = extension(
    "pagenet._pagenet_testing", ["testing/testing.h"], TESTING_SOURCES, ["ssl", "crypto"]
)
