"""The examples: each does what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *args: str | Path) -> str:
    ended = subprocess.run(
        [sys.executable, EXAMPLES / name, *args], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    return ended.stdout


def test_schedule(uffd_permitted: None, tmp_path: Path) -> None:
    """Half way, the pages that are missing are the first ones."""
    memory = tmp_path / "memory"
    memory.write_bytes(os.urandom(32 << 20))
    half_way, complete = run("schedule.py", memory).splitlines()
    found = re.fullmatch(r"backwards \[\('memory', 0, (\d+)\)\]", half_way)
    assert found or half_way == "backwards []", half_way  # it was quicker than the eye
    assert complete == "complete: 8192 pages"


def test_transport(uffd_permitted: None, tmp_path: Path) -> None:
    """The command that it starts need not log in anywhere."""
    memory, at = tmp_path / "memory", tmp_path / "socket"
    memory.write_bytes(os.urandom(8 << 20))
    example = str(EXAMPLES / "transport.py")
    serving = subprocess.Popen([sys.executable, example, "serve", memory, at])
    try:
        while not at.exists():
            assert serving.poll() is None
            time.sleep(0.01)
        bridge = shlex.join([sys.executable, example, "bridge", str(at)])
        told = run("transport.py", "pull", f"pipe:{bridge}")
        assert told == "complete: 2048 pages, lanes native\n"
        assert serving.wait(30) == 0
    finally:
        serving.kill()
        serving.wait()


def test_firecracker_owner(uffd_permitted: None, tmp_path: Path) -> None:
    """Every byte of both regions is the source's; the page that was given up reads as zeros."""
    memory, at, owner = tmp_path / "memory", tmp_path / "socket", tmp_path / "owner"
    content = b"\xff" * 4096 + os.urandom((8 << 20) - 4096)
    memory.write_bytes(content)
    example = EXAMPLES / "firecracker_owner.c"
    subprocess.run(["cc", "-Wall", "-Wextra", "-Werror", "-O1", "-o", owner, example], check=True)
    command = [sys.executable, "-m", "pagenet.cli.pull", str(memory), "--uffd-socket", str(at)]
    pulling = subprocess.Popen([*command, "--no-guard"], stdout=subprocess.PIPE, text=True)
    assert pulling.stdout is not None
    try:
        while not at.exists():
            assert pulling.poll() is None
            time.sleep(0.01)
        told = subprocess.run([owner, at, str(len(content))], stdout=subprocess.PIPE, timeout=60)
        assert (told.returncode, told.stdout.decode()) == (0, f"{sum(content)} 0\n")
        pulling.communicate(timeout=30)
    finally:
        pulling.kill()
        pulling.communicate()
    assert pulling.returncode in (0, 5)  # every page had come before the owner ended, or not


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.iterdir()))
def test_each_example_has_a_test(name: str) -> None:
    tests = [*EXAMPLES.parent.glob("tests/*/test_*.py")]
    assert any(name in test.read_text() for test in tests)
