"""The first touches of real programs, which know nothing of pagenet: recorded by pagenet-bench
trace, and played."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from namespaces import needs_namespaces

from pagenet.bench.workload._touches import Touches, load_touches
from pagenet.bench.workload._traces import make_trace
from pagenet.cli.bench import main

pytestmark = pytest.mark.usefixtures("uffd_permitted")

PAGE = 4096
RECORD = 16
SIZE = 8 << 20
WANTED = [400_000, 17, 123_456]

# Looks up numbers in a sorted file by bisection, in the order given.
BISECT = """
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
        data[16 * low : 16 * low + 16] = b"%015d\\n" % -1
print("found", flush=True)
sys.exit(3)
"""


def bisected(wanted: int) -> list[int]:
    """The pages that the bisection for ``wanted`` looks at."""
    low, high, pages = 0, SIZE // RECORD, []
    while low < high:
        middle = (low + high) // 2
        pages.append(middle * RECORD // PAGE)
        low, high = (middle + 1, high) if middle < wanted else (low, middle)
    return [*pages, low * RECORD // PAGE]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "numbers"
    path.write_bytes(b"".join(b"%015d\n" % number for number in range(SIZE // RECORD)))
    return path


def trace_command(
    data: Path, output: Path, program: str, *arguments: str, json: bool = False
) -> list[str]:
    options = ["--data", str(data), "--output", str(output), *(["--json"] if json else [])]
    command = [sys.executable, "-c", program, "{}", *arguments]
    return [sys.executable, "-m", "pagenet.cli.bench", "trace", *options, "--", *command]


def traced(data: Path, output: Path, program: str, *arguments: str) -> tuple[int, str, str]:
    ended = subprocess.run(
        trace_command(data, output, program, *arguments), capture_output=True, text=True, timeout=60
    )
    return ended.returncode, ended.stdout, ended.stderr


@needs_namespaces
def test_a_real_program_is_traced_and_played(data: Path, tmp_path: Path) -> None:
    """The program has its own output and exit status, and a copy of its data."""
    output, before = tmp_path / "touches", data.read_bytes()
    status, said, told = traced(data, output, BISECT, *map(str, WANTED))
    assert (status, said) == (3, "found\n")
    worked = sum(work for _, work in load_touches(output).touches) / 1e9
    assert (
        told
        == f"pagenet-bench: {len(expected())} of 2048 pages touched, after {worked:.3f} s of work:"
        f" {output}\n"
    )
    assert list(make_trace(f"recorded={output}", SIZE).pages) == expected()
    assert data.read_bytes() == before
    assert list(tmp_path.iterdir()) == [output]
    check_played(output, len(expected()))


def expected() -> list[int]:
    return list(dict.fromkeys(page for number in WANTED for page in bisected(number)))


def check_played(touches: Path, pages: int) -> None:
    options = [
        "--trace",
        f"recorded={touches}",
        "--order",
        "off,recorded",
        "--rate",
        "none",
        "--size",
        "8M",
        "--json",
    ]
    command = [sys.executable, "-m", "pagenet.cli.bench", "workload", *options]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    rows = [event for event in map(json.loads, said.splitlines()) if event["event"] == "result"]
    assert [row["order"] for row in rows] == ["off", "recorded"]
    assert all((row["touches"], row["pages"]) == (pages, pages) for row in rows)
    assert rows[0]["blocked"] == pages


# Touches pages of the file, as it was opened and mapped; computes for a while before each of them,
# and prints for how long.
TOUCH = """
import mmap, sys, time
access = getattr(mmap, sys.argv[3])
with open(sys.argv[1], sys.argv[2]) as file, mmap.mmap(file.fileno(), 0, access=access) as data:
    for argument in sys.argv[4:]:
        page, seconds = argument.split(":")
        began = time.thread_time_ns()
        while time.thread_time_ns() - began < float(seconds) * 1e9:
            pass
        print(time.thread_time_ns() - began)
        assert data[4096 * int(page) : 4096 * int(page) + 16] == b"%015d\\n" % (256 * int(page))
"""


@pytest.mark.parametrize(
    "how",
    ["r+b ACCESS_WRITE", "r+b ACCESS_READ", "rb ACCESS_READ", "r+b ACCESS_COPY", "rb ACCESS_COPY"],
)
def test_however_it_is_mapped_and_opened(how: str, data: Path, tmp_path: Path) -> None:
    assert traced(data, tmp_path / "touches", TOUCH, *how.split(), "9:0", "2000:0", "3:0")[0] == 0
    assert [page for page, _ in load_touches(tmp_path / "touches").touches] == [9, 2000, 3]


def test_how_long_it_works_between(data: Path, tmp_path: Path) -> None:
    """The times are those that the program prints. Time that it waits or sleeps is not work."""
    touches = ["1:0", "2:0.05", "3:0.005", "4:0.1"]
    status, said, _ = traced(data, tmp_path / "touches", TOUCH, "rb", "ACCESS_READ", *touches)
    assert status == 0
    for (_, work), own in zip(
        load_touches(tmp_path / "touches").touches, map(int, said.split()), strict=True
    ):
        assert own <= work < own + 20_000_000


# Maps the file again in a child, and in parts, and by many threads; reads it, too. All of them find
# the data right.
MANY = """
import mmap, os, sys, threading
def check(data, page, at=0):
    assert data[4096 * (page - at) : 4096 * (page - at) + 16] == b"%015d\\n" % (256 * page), page
with open(sys.argv[1], "rb") as file:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        check(data, 7)
        if not (child := os.fork()):
            check(data, 8)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as again:
                for page in (9, 7, 10): check(again, page)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        check(data, 11)
    for page in range(20, 40):
        with mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ, offset=4096 * page) as part:
            check(part, page, page)
    file.seek(4096 * 50)
    assert file.read(16) == b"%015d\\n" % (256 * 50)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        def check_from(first): [check(data, page) for page in range(first, 1600, 4)]
        threads = [threading.Thread(target=check_from, args=[first])
                   for first in range(100, 104)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
"""


def test_processes_threads_and_parts(data: Path, tmp_path: Path) -> None:
    """What is mapped is watched. What a child inherits from its parent is not, but it works, and so
    does reading."""
    assert traced(data, tmp_path / "touches", MANY)[0] == 0
    pages = [page for page, _ in load_touches(tmp_path / "touches").touches]
    assert pages[:24] == [7, 9, 10, 11, *range(20, 40)]
    assert sorted(pages[24:]) == list(range(100, 1600))


# ---- how it ends ----

WAIT = TOUCH + 'print("touched", flush=True); sys.stdin.read(); print("ended")'


@contextmanager
def waiting(data: Path, output: Path) -> Iterator[subprocess.Popen[str]]:
    """Runs the block while the program has touched two pages and waits for the end of its input."""
    command = trace_command(data, output, WAIT, "rb", "ACCESS_READ", "9:0", "2000:0")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "touched\n":
            pass
        yield process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end(number: signal.Signals, data: Path, tmp_path: Path) -> None:
    """The program is told to end too, and what was seen so far is kept."""
    with waiting(data, tmp_path / "touches") as process:
        process.send_signal(number)
        process.wait(timeout=30)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + number, "")
    assert err.startswith("pagenet-bench: 2 of 2048 pages touched")
    assert [page for page, _ in load_touches(tmp_path / "touches").touches] == [9, 2000]


def test_killed(data: Path, tmp_path: Path) -> None:
    """The program continues by itself."""
    with waiting(data, tmp_path / "touches") as process:
        process.kill()
        process.wait()
        out, err = process.communicate(timeout=30)
    assert (out, err) == ("ended\n", "")
    assert list(tmp_path.iterdir()) == []


def test_the_programs_signal_is_its_status(data: Path, tmp_path: Path) -> None:
    program = TOUCH + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert (
        traced(data, tmp_path / "touches", program, "rb", "ACCESS_READ", "9:0")[0]
        == 128 + signal.SIGKILL
    )
    assert load_touches(tmp_path / "touches") == Touches(
        SIZE // PAGE, ((9, load_touches(tmp_path / "touches").touches[0][1]),)
    )


def test_for_machines(data: Path, tmp_path: Path) -> None:
    command = trace_command(
        data, tmp_path / "touches", TOUCH + "time.sleep(1.2)", "rb", "ACCESS_READ", "9:0", json=True
    )
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert int(ended.stdout) >= 0
    progress, end = map(json.loads, ended.stderr.splitlines())
    assert progress == {"event": "progress", "touched": 1, "pages": SIZE // PAGE}
    assert (end["event"], end["touched"], end["file"]) == ("traced", 1, str(tmp_path / "touches"))


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["--data", "{data}", "--output", "{output}"], 2, "say which program"),
    (["--data", "{data}", "--output", "{output}", "--", "true"], 2,
        "no argument of the program has {} in it"),
    (["--data", "{data}", "--output", "{output}", "--", "/nowhere", "{}"], 2,
        "cannot run /nowhere: No such file"),
    (["--data", "{data}", "--output", "{output}", "--", "true", "{}"], 1,
        "has touched no page of a mapping of its data"),
    (["--data", "{data}", "--output", "{output}", "--", "false", "{}"], 1,
        "false ended with status 1, and has touched no"),
    (["--data", "/nowhere", "--output", "{output}", "--", "true", "{}"], 2,
        "cannot copy /nowhere into memory: No such file"),
    (["--data", "/dev/null", "--output", "{output}", "--", "true", "{}"], 2,
        "is empty, or no file that could be mapped"),
    (["--data", "/", "--output", "{output}", "--", "true", "{}"], 2,
        "is empty, or no file that could be mapped"),
    (["--output", "{output}", "--", "true", "{}"], 2, "required: --data"),
])  # fmt: skip
def test_bad_usage_is_one_line(
    arguments: list[str],
    code: int,
    words: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"{data}": str(data), "{output}": str(tmp_path / "touches")}
    try:
        ended = main(["trace", *(names.get(argument, argument) for argument in arguments)])
    except SystemExit as exit_:
        ended = exit_.code  # type: ignore[assignment]
    assert ended == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    status, _, err = traced(
        data, tmp_path / "nowhere" / "touches", TOUCH, "rb", "ACCESS_READ", "9:0"
    )
    assert status == 2
    assert err.splitlines() == [
        f"pagenet-bench: cannot write the trace {tmp_path}/nowhere/touches: No such file or"
        " directory"
    ]


AS_NOBODY = """
import os, sys
from pagenet.cli.bench import main
os.setgroups([]), os.setgid(65534), os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


def test_where_it_is_not_permitted(data: Path, tmp_path: Path) -> None:
    """The user may have no userfaultfd: an error before the program is run."""
    command = trace_command(data, tmp_path / "touches", TOUCH, "rb", "ACCESS_READ", "9:0")[3:]
    ended = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *command], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (7, "")
    (line,) = ended.stderr.splitlines()
    assert "userfaultfd" in line
