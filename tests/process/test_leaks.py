"""The check for leaks that every other test runs under."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from leaks import Snapshot, left_behind, orphans, snapshot

LEAKY = """
import os

def test_leaks():
    os.dup(0)

def test_fails_and_leaks():
    os.dup(0)
    assert False

def test_is_clean():
    os.close(os.dup(0))
"""

# Until it runs the program, its environment cannot be read: where that comes from a disk first, for
# a while.
ORPHANING = """
import subprocess, time
from pathlib import Path

def test_orphans():
    subprocess.run(["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $! > pid"], check=True)
    pid = Path("pid").read_text().strip()
    while not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep"):
        time.sleep(0.01)
"""


@pytest.fixture
def before() -> Snapshot:
    return snapshot()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_nothing_is_left(before: Snapshot) -> None:
    assert left_behind(before, grace=0) == []


def test_file_descriptor(before: Snapshot, tmp_path: Path) -> None:
    with open(tmp_path / "forgotten", "w") as file:
        assert left_behind(before, grace=0) == [f"file descriptor: {file.fileno()} -> {file.name}"]
    assert left_behind(before, grace=0) == []


def test_file_descriptor_whose_number_is_used_again(tmp_path: Path) -> None:
    number = os.open(tmp_path, os.O_RDONLY)
    before = snapshot()
    os.close(number)
    assert os.open("/dev/null", os.O_RDONLY) == number
    leaks = left_behind(before, grace=0)
    os.close(number)
    assert leaks == [f"file descriptor: {number} -> /dev/null"]


def test_descriptor_in_a_garbage_cycle_does_not_count(before: Snapshot) -> None:
    class Owner:
        def __init__(self) -> None:
            self.me = self
            self.fd = os.dup(0)

        def __del__(self) -> None:
            os.close(self.fd)

    Owner()
    assert left_behind(before, grace=0) == []


def test_child(before: Snapshot) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            assert left_behind(before, grace=0) == [f"child process: {child.pid} sleep 60"]
        finally:
            child.kill()
    assert left_behind(before, grace=0) == []


def test_child_that_nobody_waited_for(before: Snapshot) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    leaks = left_behind(before, grace=0)
    os.waitpid(pid, 0)
    assert leaks == [f"child process: {pid} (ended, and nobody waited for it)"]


def test_child_of_another_thread(before: Snapshot) -> None:
    """The kernel lists children by the thread that started them; when a thread ends, another thread
    gets its children."""
    children: list[subprocess.Popen[bytes]] = []
    thread = threading.Thread(target=lambda: children.append(subprocess.Popen(["sleep", "60"])))
    thread.start()
    thread.join()
    with children[0] as child:
        leaks = left_behind(before, grace=0.05)  # the thread itself may end meanwhile
        child.kill()
    assert leaks == [f"child process: {child.pid} sleep 60"]


def test_thread(before: Snapshot) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    leaks = left_behind(before, grace=0)
    done.set()
    thread.join()
    assert [leak.partition(":")[0] for leak in leaks] == ["thread"]
    assert str(thread.native_id) in leaks[0]
    assert left_behind(before) == []


def test_file_in_dev_shm(before: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAGENET_TEST_SHARED_HOST", raising=False)
    file = Path(f"/dev/shm/pagenet-test-leaks-{os.getpid()}")
    file.touch()
    leaks = left_behind(before, grace=0)
    monkeypatch.setenv("PAGENET_TEST_SHARED_HOST", "1")
    leaks_on_a_shared_host = left_behind(before, grace=0)
    file.unlink()
    assert f"file in dev shm: {file.name}" in leaks
    assert leaks_on_a_shared_host == []


def test_mount(before: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAGENET_TEST_SHARED_HOST", raising=False)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.strip()}")
    leaks = left_behind(before, grace=0)
    subprocess.run(["umount", str(tmp_path)], check=True)
    assert any(leak.startswith("mount: ") and f" {tmp_path} " in leak for leak in leaks)


async def test_idle_worker_thread_of_trio_does_not_count(before: Snapshot) -> None:
    await trio.to_thread.run_sync(int)
    assert not [leak for leak in left_behind(before, grace=0) if leak.startswith("thread")]


async def test_busy_worker_thread_of_trio_counts(before: Snapshot) -> None:
    done = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.to_thread.run_sync, done.wait))
        await trio.testing.wait_all_tasks_blocked()
        leaks = left_behind(before, grace=0)
        done.set()
    assert [leak for leak in leaks if leak.startswith("thread")]


def test_orphans_are_known_by_their_environment(sleeper: subprocess.Popen[bytes]) -> None:
    token = f"PAGENET_TEST_SESSION={os.environ['PAGENET_TEST_SESSION']}"
    (found,) = [line for line in orphans(token) if line.startswith(f"{sleeper.pid} ")]
    assert found.startswith(f"{sleeper.pid} sleep 60, started in ")
    assert "test_orphans_are_known_by_their_environment" in found
    assert list(orphans("PAGENET_TEST_SESSION=another")) == []


def run_pytest(directory: Path, source: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parents[1]
    for name in ("conftest.py", "fuzzing.py", "leaks.py"):
        shutil.copy(here / name, directory)
    (directory / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "."]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True)


def test_fixture_names_the_test_and_the_leak(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, LEAKY)
    assert "ERROR test_it.py::test_leaks - Failed: the test left behind:" in result.stdout
    assert "file descriptor: " in result.stdout
    assert "ERROR test_it.py::test_fails_and_leaks" not in result.stdout
    assert "2 passed, 1 error" in result.stdout.replace("1 failed, ", "")


def test_session_ends_with_an_error_if_a_process_outlives_it(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, ORPHANING)
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 9)
    assert f"{pid} sleep 60, started in test_it.py::test_orphans" in result.stdout
    assert "1 passed, 1 error" in result.stdout


def test_it_is_cheap(before: Snapshot) -> None:
    """More than 2 ms in each test would be felt over thousands of tests. The best of 20 counts, as
    the machine is shared."""
    best = min(_seconds_of_both(before) for _ in range(20))
    assert best < 0.002


def _seconds_of_both(before: Snapshot) -> float:
    start = time.perf_counter()
    snapshot()
    left_behind(before)
    return time.perf_counter() - start
