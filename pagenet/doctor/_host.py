"""Limits, memory, and the network of this host."""

from __future__ import annotations

import importlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from ..system_packages import make_importable
from ._check import Check, absent, fine, lacking

__all__ = ["host_checks"]

# Each guest of --many takes about twenty descriptors.
_DESCRIPTORS = 16384
_DEVICES = Path("/sys/class/infiniband")


def host_checks() -> Iterator[Check]:
    yield _descriptors()
    yield _overcommit()
    yield _huge_pages()
    yield _congestion()
    yield from _rdma()


def _descriptors() -> Check:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit == resource.RLIM_INFINITY or limit >= _DESCRIPTORS:
        return fine("descriptors", f"at most {limit} a process")
    advice = (
        f"pagenet-pull --many has room for about {limit // 20} guests; raise the hard limit"
        " (LimitNOFILE= of a unit, ulimit -Hn)"
    )
    return lacking("descriptors", f"at most {limit} a process", advice)


def _overcommit() -> Check:
    mode = _read("/proc/sys/vm/overcommit_memory").strip()
    if mode != "2":
        return fine("overcommit", f"mode {mode or 'unknown'}")
    advice = "memory that is not there yet counts at once: sysctl vm.overcommit_memory=0"
    return lacking("overcommit", "mode 2, strict", advice)


def _huge_pages() -> Check:
    found = dict(re.findall(r"^(HugePages_\w+):\s*(\d+)", _read("/proc/meminfo"), re.M))
    total, free = int(found.get("HugePages_Total", 0)), int(found.get("HugePages_Free", 0))
    if total:
        return fine("huge pages", f"{free} of {total} are free")
    advice = "no guests or caches of huge pages: sysctl vm.nr_hugepages=COUNT"
    return absent("huge pages", "none are reserved", advice)


def _read(path: str) -> str:
    """Empty if it is not there: a container may hide it."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _congestion() -> Check:
    directory = "/proc/sys/net/ipv4"
    now = _read(f"{directory}/tcp_congestion_control").strip()
    known = _read(f"{directory}/tcp_available_congestion_control").split()
    if now == "bbr" or not now:
        return fine("TCP", f"congestion control {now or 'unknown'}")
    more = "" if "bbr" in known else "modprobe tcp_bbr; "
    advice = f"on a path that loses packets, bbr is faster: {more}sysctl"
    advice += " net.ipv4.tcp_congestion_control=bbr"
    return absent("TCP", f"congestion control {now}", advice)


def _rdma() -> Iterator[Check]:
    devices = sorted(path.name for path in _DEVICES.iterdir()) if _DEVICES.is_dir() else []
    if not devices:
        yield absent("RDMA", "no device", "rdma:// cannot be used on this host")
        return
    yield fine("RDMA", ", ".join(devices))
    try:
        make_importable("pyverbs")
        importlib.import_module("pyverbs.device")
    except ImportError as error:
        yield lacking(
            "pyverbs", str(error), "rdma:// cannot be used: install python3-pyverbs of this system"
        )
    else:
        yield fine("pyverbs", "there")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if locked == resource.RLIM_INFINITY:
        yield fine("locked memory", "without a limit")
    else:
        advice = "memory over RDMA is locked: raise the limit (LimitMEMLOCK=infinity, ulimit -Hl)"
        yield lacking("locked memory", f"at most {locked >> 20} MiB", advice)
