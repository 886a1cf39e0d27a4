"""tools/demo_restore.py, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from stores import skip_without_s3

pytestmark = pytest.mark.usefixtures("uffd_permitted")

ROOT = Path(__file__).parents[2]


def demo(*args: str) -> subprocess.CompletedProcess[str]:
    skip_without_s3()
    command = [sys.executable, str(ROOT / "tools" / "demo_restore.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


def test_demo_checks_every_byte_of_every_guest() -> None:
    done = demo("--guests", "3", "--size", "4M", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    restored = json.loads(done.stdout)
    assert (restored["verified"], restored["wrong"]) == (3 * 1024, 0)
    assert [each["verified"] for each in restored["guests"]] == [1024] * 3
    assert 4 << 20 <= restored["fetched"] < 5 << 20  # once, whoever asks


def test_demo_notices_one_wrong_byte() -> None:
    done = demo("--guests", "2", "--size", "4M", "--corrupt-one-byte")
    assert done.returncode == 1
    assert done.stderr == "demo-restore: wrong pages: 2\n"
    assert "2 guests of 4 MiB, restored in " in done.stdout
