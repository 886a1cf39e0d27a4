"""The first touches of a real program, which knows nothing of pagenet, recorded and played."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import trio
from namespaces import needs_namespaces
from processes import run

import pagenet
from pagenet import UffdSocket
from pagenet.bench._traces import make_trace
from pagenet.qemu._preload import preload_library

pytestmark = pytest.mark.usefixtures("uffd_permitted")

PAGE = 4096
RECORD = 16
SIZE = 8 << 20

# Looks up numbers in a sorted file by bisection, in the order given.
PROGRAM = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
    for wanted in map(int, sys.argv[2:]):
        low, high = 0, len(data) // 16
        while low < high:
            middle = (low + high) // 2
            if int(data[16 * middle : 16 * middle + 16]) < wanted:
                low = middle + 1
            else:
                high = middle
        assert int(data[16 * low : 16 * low + 16]) == wanted
print('{"event": "found"}', flush=True)
sys.stdin.read()
"""


def bisected(wanted: int) -> list[int]:
    """The pages that it looks at."""
    low, high, pages = 0, SIZE // RECORD, []
    while low < high:
        middle = (low + high) // 2
        pages.append(middle * RECORD // PAGE)
        low, high = (middle + 1, high) if middle < wanted else (low, middle)
    return [*pages, low * RECORD // PAGE]


@needs_namespaces
async def test_a_real_program_is_recorded_and_played(tmp_path: Path) -> None:
    source, touches = tmp_path / "source", tmp_path / "touches"
    source.write_bytes(b"".join(b"%015d\n" % number for number in range(SIZE // RECORD)))
    wanted = [400_000, 17, 123_456]
    owner = UffdSocket(tmp_path / "uffd.sock")
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="pagenet-test-") as file:
        os.truncate(file.fileno(), SIZE)
        status = os.stat(file.fileno())
        variables = {
            "LD_PRELOAD": str(preload_library()),
            "PAGENET_UFFD_SOCKET": str(owner.path),
            "PAGENET_UFFD_FILES": f"{status.st_dev}:{status.st_ino}",
        }
        command = [sys.executable, "-c", PROGRAM, file.name, *map(str, wanted)]
        await owner.listen()
        try:
            with trio.fail_after(60):
                async with (
                    pagenet.serve(str(source), listen="tcp://127.0.0.1:0") as server,
                    run(command, env=os.environ | variables, stdin=subprocess.PIPE) as program,
                    pagenet.pull(server.uri, owner, background="off", prefetch=(0, 0), record=touches),
                ):
                    await program.event("found")
        finally:
            owner.close()
    expected = list(dict.fromkeys(page for number in wanted for page in bisected(number)))
    assert list(make_trace(f"recorded={touches}", SIZE)) == expected
    check_played(touches, len(expected))


def check_played(touches: Path, pages: int) -> None:
    options = ["--trace", f"recorded={touches}", "--order", "off,recorded", "--rate", "none", "--size", "8M", "--json"]
    command = [sys.executable, "-m", "pagenet.cli.bench", "workload", *options]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    rows = [event for event in map(json.loads, said.splitlines()) if event["event"] == "result"]
    assert [row["order"] for row in rows] == ["off", "recorded"]
    assert all((row["touches"], row["pages"]) == (pages, pages) for row in rows)
    assert rows[0]["blocked"] == pages
