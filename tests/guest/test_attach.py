"""native/attach.c: a process is stopped, given descriptors, and released, and does not notice."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pagenet import _native
from pagenet.uffd import probe
from pagenet.uffd._userfaultfd import DEVICE

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="attaching is for x86-64")

# Reports that it is ready, does something, and reports the result. The C library's errno tells what
# Python would hide.
VICTIM = """
import ctypes, json, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def say(**words):
    print(json.dumps(words), flush=True)
def poll():
    return libc.poll(None, 0, 700)
def nanosleep():
    return libc.nanosleep((ctypes.c_long * 2)(0, 700_000_000), None)
def read():
    return libc.read(0, ctypes.create_string_buffer(1), 1)
def futex():
    lock = threading.Lock()
    lock.acquire()
    return int(lock.acquire(timeout=0.7))
def alarms():
    seen = []
    signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    total, until = 0, time.monotonic() + 0.7
    while time.monotonic() < until:
        total += sum(range(1000)) - 499500
    signal.setitimer(signal.ITIMER_REAL, 0)
    return total + (0 if len(seen) > 100 else 1)
say(event="ready", fds=sorted(os.listdir("/proc/self/fd")))
began = time.monotonic()
answer = globals()[sys.argv[1]]()
say(answer=answer, errno=ctypes.get_errno(), seconds=time.monotonic() - began,
    fds=sorted(os.listdir("/proc/self/fd")),
    blocked=sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
"""


@pytest.fixture(autouse=True)
def uffd_permitted() -> None:
    probe()


@contextmanager
def victim(does: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM, does],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stdout is not None
    words: dict[str, object] = json.loads(process.stdout.readline())
    return words


@contextmanager
def pidfd_of(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def plant(pid: int) -> _native.Planted:
    with pidfd_of(pid) as pidfd:
        return _native.plant(pid, pidfd, DEVICE)


def uproot(pid: int, planted: _native.Planted) -> None:
    with pidfd_of(pid) as pidfd:
        _native.uproot(pid, pidfd, planted)


def links(pid: int) -> list[str]:
    return [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]


@pytest.mark.parametrize("does", ["poll", "nanosleep", "futex", "read", "alarms"])
def test_nothing_is_noticed(does: str) -> None:
    with victim(does) as process:
        ready = heard(process)
        time.sleep(0.05)  # it may have got there by now; if not, this moment is as good
        until = time.monotonic() + 0.4  # it ends 0.7 s after it has begun, however busy the machine
        for _ in range(20):
            if time.monotonic() > until:
                break
            planted = plant(process.pid)
            assert planted.refused == 0
            there = links(process.pid)
            assert "anon_inode:[userfaultfd]" in there
            assert "/memfd:pagenet-residency (deleted)" in there
            uproot(process.pid, planted)
        if does == "read":
            assert process.stdin is not None
            process.stdin.write("x")
            process.stdin.flush()
        told = heard(process)
        assert told["answer"] == (1 if does == "read" else 0)
        assert told["errno"] == 0
        assert told["fds"] == ready["fds"]
        assert told["blocked"] == []
        assert process.wait() == 0
        if does != "read":
            assert float(str(told["seconds"])) > 0.69, (
                "a system call that has a time began anew, and did not end early"
            )


def test_descriptors_are_made_there() -> None:
    with victim("read") as process:
        heard(process)
        planted = plant(process.pid)
        pidfd = os.pidfd_open(process.pid)
        uffd, file = (
            _native.take_descriptor(pidfd, number) for number in (planted.uffd, planted.map)
        )
        try:
            _native.uffd_api(uffd, 0)
            assert os.fstat(file).st_size == 0
        finally:
            for fd in (uffd, file, pidfd):
                os.close(fd)


def error_of(pid: int) -> int:
    with pytest.raises(OSError) as raised:  # noqa: PT011 - it is all about errno
        plant(pid)
    return raised.value.errno or 0


def test_stopped_process() -> None:
    with victim("poll") as process:
        heard(process)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert error_of(process.pid) == errno.EBUSY
        process.send_signal(signal.SIGCONT)
        assert heard(process)["answer"] == 0


def test_process_that_is_traced_already() -> None:
    seize = "ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), None, None)"
    tracer = f"import ctypes, sys, time; {seize}; print(flush=True); time.sleep(60)"
    with victim("read") as process:
        heard(process)
        with subprocess.Popen(
            [sys.executable, "-c", tracer, str(process.pid)], stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            other.stdout.readline()
            assert error_of(process.pid) == errno.EPERM
            other.kill()
        assert plant(process.pid).refused == 0


def test_process_that_has_ended() -> None:
    with victim("poll") as process:
        process.kill()
        process.wait()
        assert error_of(process.pid) == errno.ESRCH


def test_number_that_is_another_process_by_now() -> None:
    """The pidfd is that of a process that has ended; the process that has its number now is left
    alone."""
    with victim("poll") as ended, victim("poll") as process:
        assert heard(ended)["event"] == heard(process)["event"] == "ready"
        with pidfd_of(ended.pid) as pidfd:
            ended.kill()
            ended.wait()
            with pytest.raises(ProcessLookupError):
                _native.plant(process.pid, pidfd, DEVICE)
        assert heard(process)["answer"] == 0


def test_userfaultfd_is_refused_there() -> None:
    """The process is unprivileged, and the device node is for root: the kernel refuses the
    userfaultfd in that process, and nothing is left behind."""
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd is set")
    code = (
        "import os, sys; os.setgroups([]), os.setgid(65534), os.setuid(65534); print(flush=True);"
        " sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        before = sorted(links(process.pid))
        assert plant(process.pid).refused == errno.EPERM
        assert sorted(links(process.pid)) == before
        process.kill()
