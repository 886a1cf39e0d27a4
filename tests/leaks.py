"""What a test leaves behind: a snapshot before, a comparison after.

Three of the six kinds (files in /dev/shm, mounts, network namespaces) belong to the host, not to
this process. As root, the tests have mounts of their own, so several runs of them do not see each
other. Without root, other programs of the host make and remove such things at the same time:
``PAGENET_TEST_SHARED_HOST=1`` leaves these three kinds out.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

# Seconds. A thread that Python has joined may not have ended in the kernel yet, and neither may a
# killed child.
GRACE = 0.5


CLONE_NEWNS = 0x20000
MS_PRIVATE = 1 << 18


def own_mounts() -> bool:
    """Give this process a mount namespace with an empty /dev/shm and no named network namespace.
    Returns False if it may have none."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        return False
    # Each mount on its own: in a chroot, the root is no mount point.
    for line in _read("/proc/self/mountinfo").splitlines():
        point = re.sub(r"\\(\d{3})", lambda digits: chr(int(digits[1], 8)), line.split()[4])
        if " shared:" in line and libc.mount(b"none", point.encode(), None, MS_PRIVATE, None):
            return False
    for path in ("/dev/shm", "/run/netns"):
        if os.path.isdir(path) and libc.mount(b"tmpfs", path.encode(), b"tmpfs", 0, b"mode=1777"):
            return False
    return True


@dataclass(frozen=True)
class Snapshot:
    """Each kind maps the identity of a thing to its description. A field's name, with spaces, is
    that of the kind."""

    file_descriptor: dict[tuple[str, str], str]
    child_process: dict[str, str]
    thread: dict[str, str]
    file_in_dev_shm: dict[str, str]
    mount: dict[str, str]
    network_namespace: dict[str, str]


def snapshot() -> Snapshot:
    shared = os.environ.get("PAGENET_TEST_SHARED_HOST") == "1"
    tasks = os.listdir("/proc/self/task")
    return Snapshot(
        file_descriptor=_file_descriptors(),
        child_process={
            pid: pid for task in tasks for pid in _read(f"/proc/self/task/{task}/children").split()
        },
        thread={task: task for task in tasks if not _is_kept(task)},
        file_in_dev_shm={} if shared else _names("/dev/shm"),
        mount={} if shared else {line: line for line in _read("/proc/self/mountinfo").splitlines()},
        network_namespace={} if shared else _names("/run/netns"),
    )


def left_behind(before: Snapshot, grace: float = GRACE) -> list[str]:
    """What is there now and was not ``before``, in one line each. What goes away within ``grace``
    seconds does not count."""
    leaks = _compare(before, snapshot())
    if not leaks:
        return []
    gc.collect()  # slow, and only garbage cycles need it: only done if something was left
    deadline = time.monotonic() + grace
    while (leaks := _compare(before, snapshot())) and time.monotonic() < deadline:
        time.sleep(0.005)
    return leaks


def _compare(before: Snapshot, after: Snapshot) -> list[str]:
    return [
        f"{field.name.replace('_', ' ')}: {_describe(field.name, name)}"
        for field in fields(Snapshot)
        for key, name in getattr(after, field.name).items()
        if key not in getattr(before, field.name)
    ]


def _file_descriptors() -> dict[tuple[str, str], str]:
    """Keyed by number and target: a number that was closed and opened again as something else is a
    leak too."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue  # the descriptor that listdir itself had open
        found[number, target] = f"{number} -> {target}"
    return found


def _is_kept(task: str) -> bool:
    """Trio keeps an idle worker thread for ten seconds, under this name; a thread that still works
    has its function's name. obstore keeps the threads of its runtime, which are all named alike."""
    return _read(f"/proc/self/task/{task}/comm").startswith(("Trio thread", "tokio-"))


def _names(directory: str) -> dict[str, str]:
    try:
        return {name: name for name in os.listdir(directory)}
    except FileNotFoundError:
        return {}


def _read(path: str) -> str:
    """Empty if the process or thread has ended meanwhile."""
    try:
        return Path(path).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _describe(kind: str, name: str) -> str:
    """Called for leaks only: reading a command line for every child of every test would cost too
    much."""
    if kind == "child_process":
        command = _read(f"/proc/{name}/cmdline").replace("\0", " ").strip()
        return f"{name} {command or '(ended, and nobody waited for it)'}"
    if kind == "thread":
        return f"{name} ({_read(f'/proc/self/task/{name}/comm').strip()})"
    return name


def orphans(token: str) -> Iterator[str]:
    """Other processes that have ``token`` in their environment: the process that started them has
    died first."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            variables = (
                Path(f"/proc/{entry}/environ").read_bytes().decode(errors="replace").split("\0")
            )
        except OSError:
            continue  # ended meanwhile, or another user's
        if token in variables:
            test = next(
                (text for text in variables if text.startswith("PYTEST_CURRENT_TEST=")),
                "outside any test",
            )
            yield (
                f"{_describe('child_process', entry)}, started in"
                f" {test.removeprefix('PYTEST_CURRENT_TEST=')}"
            )
