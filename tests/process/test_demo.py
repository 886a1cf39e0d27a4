"""tools/demo.py, as a user runs it, and the example in docs/library.md."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagenet.errors import Unsupported
from pagenet.testing.pattern import pattern_command, write_pattern
from pagenet.uffd import probe

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "tools" / "demo.py"
SIZE = 64 << 20
PAGES = SIZE // 4096


def command(*args: str) -> list[str]:
    return [sys.executable, str(DEMO), "--size", "64M", *args]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the demo puts its sockets. Every test checks that they are gone at the end."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, check=False)


def moved(output: str) -> dict[str, Any]:
    """The outcome that ``--json`` prints first, before any error."""
    outcome = json.loads(output.splitlines()[0])
    assert outcome["event"] == "moved"
    return dict(outcome)


@pytest.mark.parametrize(
    ("memory", "listen", "placement"),
    [("anonymous", "tcp", "copy"), ("memfd", "unix", "continue"), ("tmpfs", "tcp", "continue")],
)
def test_every_byte_arrives(memory: str, listen: str, placement: str) -> None:
    done = run("--memory", memory, "--listen", listen, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    outcome = moved(done.stdout)
    assert (outcome["verified"], outcome["wrong"], outcome["placement"]) == (PAGES, 0, placement)
    assert outcome["demand"] + outcome["prefetch"] + outcome["background"] == PAGES
    assert 0 < outcome["zero"] < PAGES / 4
    assert 0 < outcome["bytes_wire"] - (PAGES - outcome["zero"]) * 4096 < SIZE / 100  # headers
    assert outcome["first_touch_us"] > 0
    assert 0 <= outcome["touches_while_moving"] <= outcome["touches"] == PAGES // 2


def test_table_for_people() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "pagenet-serve: serving 64 MiB on tcp://127.0.0.1:" in done.stdout
    rows = [
        [cell.strip() for cell in line.split("│")[1:3]]
        for line in done.stdout.splitlines()
        if line.startswith("│")
    ]
    assert ["pages verified", str(PAGES)] in rows
    assert ["pages wrong", "0"] in rows


def test_one_wrong_byte_is_noticed() -> None:
    done = run("--corrupt-one-byte", "--json")
    assert done.returncode == 1
    outcome = moved(done.stdout)
    assert (outcome["verified"], outcome["wrong"], outcome["first_wrong"]) == (PAGES, 1, PAGES // 2)
    assert done.stderr == f"demo: wrong pages: 1, the first of them is page {PAGES // 2}\n"


def test_process_that_fails_is_named() -> None:
    done = run("--threads", "0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "demo: owner ended with exit code 2"


def test_too_little_memory_is_one_line() -> None:
    done = run("--size", "64000G")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("demo: not enough room in /dev/shm: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("stopping", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["writer:", "pagenet-serve:", "pagenet-pull:", "owner:"])
def test_signal_leaves_nothing(moment: str, stopping: signal.Signals) -> None:
    """Processes and files in /dev/shm are looked for after every test (conftest.py)."""
    with subprocess.Popen(
        command(), stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith(moment):
                demo.send_signal(stopping)
                break
        rest = demo.stdout.read()
    assert demo.returncode == 128 + stopping
    assert "pages verified" not in rest


def test_example_of_the_library(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        probe()
    except Unsupported as error:
        pytest.skip(str(error))
    document = (ROOT / "docs" / "library.md").read_text()
    _, _, example = document.partition("<!-- tests/process/test_demo.py runs this -->\n```python\n")
    directory = tmp_path_factory.mktemp("example")
    write_pattern(directory / "guest.memory", 1 << 20)
    code = example.partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=directory
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("4096 256 ")


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["/dev/full", "--size", "1M"], 1, "pattern: /dev/full: No space left on device"),
        (["/dev/null", "--size", "5000"], 2, "'5000' is not a whole number of 4096-byte pages"),
    ],
)
def test_pattern_that_cannot_be_written(args: list[str], status: int, words: str) -> None:
    done = subprocess.run(pattern_command(*args), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr.splitlines()[-1]
