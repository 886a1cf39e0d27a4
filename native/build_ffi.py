"""Builds pagenet._pagenet, the C core, as a cffi API-mode extension. Run by setup.py."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from cffi import FFI

HERE = Path("native")  # setuptools runs in the project's root and wants relative sources
SOURCES = [
    "uffd.c", "attach.c", "place.c", "residency.c", "memory.c", "thread.c", "window.c", "pack.c", "choice.c", "prompt.c",
    "pace.c", "ring.c", "dest.c", "lane.c", "faults.c", "replies.c", "feed.c", "loop.c",
    "verbs.c", "chunks.c", "rdma.c", "keys.c", "source.c", "pattern.c", "workload.c", "bench.c",
]  # fmt: skip

HEADERS = ["pagenet.h", "pace.h"]


def declarations() -> str:
    """The headers as cffi wants them: without their preprocessor lines."""
    lines = [line for name in HEADERS for line in (Path(__file__).parent / name).read_text().splitlines()]
    return "\n".join(line for line in lines if not line.startswith("#"))


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "pagenet._pagenet",
    "\n".join(f'#include "{name}"' for name in HEADERS),
    sources=[str(HERE / name) for name in SOURCES],
    include_dirs=[str(HERE)],
    libraries=["lz4"],
    depends=[str(HERE / name) for name in HEADERS],
    extra_compile_args=[
        "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter",
        *shlex.split(os.environ.get("PAGENET_CFLAGS", "")),
    ],
    extra_link_args=["-pthread", "-ldl", *shlex.split(os.environ.get("PAGENET_LDFLAGS", ""))],
)  # fmt: skip
