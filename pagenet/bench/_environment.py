"""The environment that figures depend on: figures without it cannot be compared."""

from __future__ import annotations

import mmap
import os
import platform
import re
from pathlib import Path

import trio

from .. import __version__

__all__ = ["available_memory", "environment"]


def environment() -> dict[str, object]:
    return {
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "page_size": mmap.PAGESIZE,
        "congestion_control": _read("/proc/sys/net/ipv4/tcp_congestion_control"),
        "mtu_lo": _read("/sys/class/net/lo/mtu"),
        "huge_shmem": _chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "python": platform.python_version(),
        "trio": trio.__version__,
        "pagenet": __version__,
    }


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    match = re.search(r"^MemAvailable: *(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(match[1]) << 10 if match else 1 << 62


def _cpu_model() -> str:
    match = re.search(r"^model name\s*: (.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match[1] if match else platform.machine()


def _chosen(path: str) -> str:
    """Of ``always [never] advise``, the one in brackets."""
    match = re.search(r"\[(\w+)\]", _read(path))
    return match[1] if match else "unknown"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"
