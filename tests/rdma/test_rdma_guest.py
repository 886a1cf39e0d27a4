"""tools/rdma-guest: a command in a guest with an RDMA device, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rdma_guest import RDMA_GUEST, run_in_guest


def test_exit_status_output_and_files(tmp_path: Path) -> None:
    script = (
        "pwd; ls /sys/class/infiniband; echo kept > /mnt/exchange/out; echo lost > lost; echo"
        " $PYTHONPATH; exit 3"
    )
    done = run_in_guest("sh", "-c", script, options=("--exchange", tmp_path))
    root = str(RDMA_GUEST.parents[1])
    assert (done.returncode, done.stdout.split(), done.stderr) == (3, [root, "rxe0", root], "")
    assert (tmp_path / "out").read_text() == "kept\n"
    assert not (RDMA_GUEST.parents[1] / "lost").exists()


def test_panic() -> None:
    done = run_in_guest("sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60")
    assert (done.returncode, done.stderr) == (126, "rdma-guest: the guest's kernel panicked\n")


def test_time_is_over() -> None:
    done = run_in_guest("sleep", "600", timeout=2)
    assert (done.returncode, done.stderr) == (124, "rdma-guest: no end after 2 s\n")


def test_clock_that_counts_instructions() -> None:
    """A guest that sleeps executes no instructions."""
    done = run_in_guest("sleep", "200", options=("--icount",), timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_tools_are_missing(tmp_path: Path) -> None:
    code = "import os, rdma; os.access = lambda *_: False; rdma.main(['x'])"
    environment = {"PYTHONPATH": str(RDMA_GUEST.parent / "guest")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (
        done.stderr
        == "rdma-guest: qemu-system-x86_64 is not installed; Debian has it in qemu-system-x86\n"
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "there is no command to run"),
        (("--wire", "x", "true"), "--wire x: say listen:PATH"),
        (("--icount", "--cpus", "2", "true"), "--icount is for one processor"),
    ],
)
def test_usage(arguments: tuple[str, ...], complaint: str) -> None:
    done = subprocess.run([RDMA_GUEST, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert complaint in done.stderr
