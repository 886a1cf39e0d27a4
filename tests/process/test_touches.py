"""The file of a program's first touches, and the time between them; and a player that works as long
as the file has it."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from namespaces import needs_namespaces

from pagenet import UsageError
from pagenet.bench.workload._touches import Touches, load_touches
from pagenet.bench.workload._traces import make_trace
from pagenet.cli.bench import main

PAGES = 1000
MIB = 1 << 20

touched = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(0, 3600 * 10**9)),
    unique_by=lambda touch: touch[0],
)


@given(touched)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, touches: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("touches") / "touches"
    Touches(PAGES, tuple(touches)).save(path)
    assert load_touches(path) == Touches(PAGES, tuple(touches))


def test_it_is_small(tmp_path: Path) -> None:
    path = tmp_path / "touches"
    Touches(20_000, tuple((page * 7 % 20_000, 60_000) for page in range(20_000))).save(path)
    assert path.stat().st_size < 9 * 20_000


def test_as_a_trace(tmp_path: Path) -> None:
    """The work before a touch that is left out is done before the next touch."""
    path = tmp_path / "touches"
    Touches(PAGES, ((5, 10), (700, 20), (3, 30), (600, 40))).save(path)
    trace = make_trace(f"recorded={path}", MIB)
    assert trace.work_ns is not None
    assert (list(trace.pages), list(trace.work_ns)) == ([5, 3], [10, 50])


GOOD = {"format": "pagenet-trace", "version": 1, "pages": PAGES, "touches": [3, 0, 0, 500]}
WHOLE: bytes = msgpack.packb(GOOD)


def refuses(path: Path, body: bytes) -> str:
    path.write_bytes(body)
    with pytest.raises(UsageError) as caught:
        load_touches(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_whole_truncated_and_longer(tmp_path: Path) -> None:
    path = tmp_path / "touches"
    path.write_bytes(WHOLE)
    assert load_touches(path) == Touches(PAGES, ((3, 0), (4, 500)))
    for length in range(len(WHOLE)):
        assert "is not a trace, or a broken one" in refuses(path, WHOLE[:length])
    for more in (b"\0", b"\xc1", WHOLE):
        assert "is not a trace, or a broken one" in refuses(path, WHOLE + more)


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_a_byte_that_is_wrong(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int) -> None:
    """The file is refused, or is another valid trace."""
    path = tmp_path_factory.mktemp("touches") / "touches"
    path.write_bytes(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    with suppress(UsageError):
        touches = load_touches(path)
        assert all(0 <= page < touches.pages and work >= 0 for page, work in touches.touches)


@given(st.binary(max_size=100))
def test_noise(tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    refuses(tmp_path_factory.mktemp("touches") / "touches", body)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"format": "another"}, "not a trace of pagenet's"),
        ({"format": "pagenet-touches"}, "not a trace of pagenet's"),
        ({"version": 2}, "a trace of version 2: this pagenet reads version 1"),
        *[
            (wrong, "broken trace")
            for wrong in [
                {"pages": 0},
                {"pages": 1 << 60},
                {"pages": "many"},
                {"pages": True},
                {"touches": {}},
                {"touches": [3]},
                {"touches": [PAGES, 0]},
                {"touches": [-1, 0]},
                {"touches": [3, -1]},
                {"touches": [3, 3601 * 10**9]},
                {"touches": [3, 1.5]},
                {"touches": [True, 0]},
                {"touches": [3, 0, -1, 0]},
            ]
        ],
    ],
)
def test_what_makes_no_sense_is_one_line(
    wrong: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "touches"
    assert words in refuses(path, msgpack.packb({**GOOD, **wrong}))
    if wrong != {"format": "pagenet-touches"}:  # a recording's name: there is another error
        assert main(["workload", "--trace", f"recorded={path}"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def played(*options: str) -> dict[str, float]:
    where = ("--order", "off", "--rate", "none", "--size", "1M", "--json")
    command = [sys.executable, "-m", "pagenet.cli.bench", "workload", *where, *options]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    row: dict[str, float] = next(
        event for event in map(json.loads, said.splitlines()) if event["event"] == "result"
    )
    return row


@needs_namespaces
def test_it_is_played_with_the_work_between(tmp_path: Path) -> None:
    path = tmp_path / "touches"
    touches = Touches(PAGES, ((5, 1000), (7, 300_000_000), (3, 400_000_000)))
    touches.save(path)
    own = played("--trace", f"recorded={path}")
    assert (own["touches"], own["blocked"]) == (3, 3)
    assert own["seconds"] >= 0.7
    assert own["to_50"] > 0.3
    assert played("--trace", f"recorded={path}", "--work", "1")["seconds"] < 0.7
