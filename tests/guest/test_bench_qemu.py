"""pagenet-bench qemu: that it moves guests by all methods, how it reads their output, and that it
leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from namespaces import MISSING, needs_namespaces
from vm import guest_files, needs_guest

from pagenet.bench._plot import _METHOD_COLORS
from pagenet.bench.qemu._qemu import Migration, QemuOptions, QemuResult, targets_of
from pagenet.bench.qemu._qemu_guest import GuestFiles, Serial, Story
from pagenet.bench.qemu._qemu_methods import METHODS, Outcome
from pagenet.cli._bench_qemu import _METHODS as NAMES
from pagenet.cli.bench import main

SMALL = ("--ram", "160", "--workload", "30,10", "--rounds", "1")


def bench_command(*args: str) -> list[str]:
    files = guest_files()
    guest = ("--kernel", str(files.kernel), "--initrd", str(files.initrd))
    return [sys.executable, "-m", "pagenet.cli.bench", "qemu", *SMALL, *guest, "--json", *args]


# ---- measured ----


@needs_guest
@needs_namespaces
def test_guest_moves_by_qemu_and_by_pagenet(tmp_path: Path) -> None:
    picture = tmp_path / "work.svg"
    command = bench_command("--methods", "preempt,pagenet", "--plot", str(picture))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    said = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [one["method"] for one in said if one["event"] == "run"] == ["preempt", "pagenet"]
    assert said[-1]["event"] == "complete"
    figures = said[-1]["qemu"]
    assert (figures["rate_mbit"], figures["rounds"], figures["wrong"]) == (1000, 1, [])
    assert {target["met"] for target in figures["targets"]} <= {True, False}
    assert (
        len(figures["targets"]) == 4
    )  # those compared with a postcopy without preempt are left out
    preempt, pagenet = figures["results"]
    for one in (preempt, pagenet):
        assert (one["ram_mib"], one["rounds"], one["converged"], one["bad"], one["unbroken"]) == (
            160,
            1,
            1,
            0,
            True,
        )
        assert 0 < one["downtime_ms"] < one["total_s"] * 1000
        assert one["longest_gap_ms"] > 0
        assert one["total_s"] <= one["command_s"]
        assert (
            one["wire_bytes"] > 160 * 30 // 100 << 20
        )  # the memory that the guest works on is not zero
        assert one["writes_per_s"] > 0
    assert preempt["blocked_ms"] > 0
    assert preempt["fault_us"] == {"p50": None, "p99": None}
    assert pagenet["faults"] > 0
    assert 0 < pagenet["fault_us"]["p50"] <= pagenet["fault_us"]["p99"]
    assert "preempt" in picture.read_text()


def measured(*methods: str) -> tuple[dict[str, Any], int]:
    """What the bench reports in the end, and its exit status."""
    command = bench_command("--methods", ",".join(methods))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert ended.returncode in (0, 1), ended.stderr
    said = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [one["method"] for one in said if one["event"] == "run"] == list(methods)
    figures: dict[str, Any] = said[-1]["qemu"]
    return figures, ended.returncode


def check_hybrid(one: dict[str, Any]) -> None:
    assert one["precopy_rounds"] >= 1
    assert one["precopy_work"] > 0
    assert one["least_lost_ms"] is None
    assert one["total_s"] <= one["command_s"]
    # the rounds, in which most bytes travel, are part of the move
    assert one["total_s"] > 0.9 * one["wire_bytes"] * 8 / 1e9
    assert one["wire_bytes"] > 160 * 30 // 100 << 18  # compressed


@needs_guest
@needs_namespaces
def test_hybrid() -> None:
    figures, status = measured("hybrid", "hybrid-attach")
    assert (figures["wrong"], status) == ([], 0)
    for one in figures["results"]:
        assert (one["converged"], one["bad"], one["unbroken"]) == (1, 0, True)
        check_hybrid(one)
    words = [target["what"].rpartition(": ")[2] for target in figures["targets"]]
    assert words == ["guest work lost during precopy, relative to undisturbed"] * 2


@needs_guest
@needs_namespaces
@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", ["qemu-hybrid", "qemu-hybrid-preempt"])
def test_hybrid_of_qemu(method: str) -> None:
    """QEMU loses writes during precopy under TCG: its guest may not survive, and the bench goes
    on."""
    figures, status = measured(method)
    assert status == (1 if figures["wrong"] else 0)
    (one,) = figures["results"]
    if one["converged"]:
        check_hybrid(one)
    else:
        assert one["failures"] == 1
        assert figures["wrong"][0]["failure"]


def test_each_method_has_a_name() -> None:
    assert set(NAMES) == set(METHODS) == set(_METHOD_COLORS)


# ---- what is left ----


@contextmanager
def running_bench(*args: str) -> Iterator[subprocess.Popen[str]]:
    """Runs the bench. Yields it once it has a machine."""
    with subprocess.Popen(
        bench_command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while process.poll() is None and not machines(process.pid):
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def machines(bench: int) -> list[Path]:
    """The monitors of its QEMUs, in the directory of that bench."""
    found = []
    for path in Path(f"/proc/{bench}/task").glob("*/children"):
        with suppress(OSError):  # ended meanwhile
            for child in path.read_text().split():
                words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                found += [
                    Path(word[len("unix:") :].partition(",")[0])
                    for word in words
                    if ".qmp,server" in word
                ]
    return [monitor for monitor in found if monitor.exists()]


def is_used(directory: Path) -> bool:
    """Whether a process has the directory in its command line."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.fsencode(directory) in Path(f"/proc/{entry}/cmdline").read_bytes():
                    return True
            except OSError:
                continue  # ended meanwhile
    return False


@needs_guest
@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_it_is_stopped(number: int) -> None:
    with running_bench("--methods", "pagenet", "--rate", "none") as process:
        (monitor,) = machines(process.pid)
        assert is_used(monitor.parent)
        process.send_signal(number)
        _, complaints = process.communicate(timeout=20)
        deadline = time.monotonic() + 10
        while (monitor.parent.exists() or is_used(monitor.parent)) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not monitor.parent.exists()
    assert not is_used(monitor.parent)
    assert (process.returncode, complaints) == (
        (130, "") if number == signal.SIGINT else (-signal.SIGKILL, "")
    )


# ---- refused ----

NOT_ROOT = """
import os, sys
os.geteuid = lambda: 1000
from pagenet.cli.bench import main
sys.exit(main(["qemu", "--kernel", sys.executable]))
"""


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@needs_guest
def test_needs_root() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", NOT_ROOT], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 7
    assert (
        ended.stderr == "pagenet-bench: network namespaces need root: run pagenet-bench as root\n"
    )


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--ram", "512,64"], "a guest of 64 MiB"),
        (["--rate", "fast"], "'fast' is not a number"),
        (["--methods", "pagenet,teleport"], "teleport: there are precopy"),
        (["--workload", "60"], "is not WORK,HOT"),
        (["--workload", "10,20"], "is not WORK,HOT"),
        (["--workload", "90,20"], "is not WORK,HOT"),
        (["--kernel", "/nowhere"], "/nowhere is not there"),
        (["--initrd", "/nowhere"], "--initrd goes with --kernel"),
        (["--ram", "1048576", "--kernel", sys.executable], "MiB need"),
        (["--plot", "picture.pdf"], ".svg or .png"),
    ],
)
@needs_guest
def test_bad_usage_is_one_line(
    args: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["qemu", *args])
    except SystemExit as leaving:  # as argparse does it
        code = leaving.code
    complaints = capsys.readouterr().err
    assert (code, complaints.count("\n")) == (2, 1)
    assert reason in complaints


# ---- how a guest's output is read ----


def said(*beats: tuple[float, int, int], rest: str = "", first: str = "") -> Serial:
    """A machine whose guest has sent heartbeats: (time, number, writes so far) each."""
    serial = Serial("guest", Path("nowhere"))
    for time_, seq, writes in beats:
        text = f"HB seq={seq} t=0 w={writes} dw=0 bad=0 sweeps=0 sw=0 gap_us=0\r\n"
        serial.feed((first + text).encode(), time_)
        first = ""
    serial.feed(rest.encode(), beats[-1][0])
    return serial


def test_story_over_two_machines() -> None:
    story = Story.of(said((1.0, 0, 100), (2.0, 1, 200)), said((5.0, 2, 230), (6.0, 3, 330)))
    assert (story.unbroken, story.bad) == (True, 0)
    assert story.longest_gap(1.5, 5.5) == 3.0
    assert story.longest_gap(5.5, 6.0) == 1.0
    assert story.writes_at(1.5) == 150
    assert (story.writes_at(0.0), story.writes_at(9.0)) == (100, 330)
    assert story.rate(1.0, 2.0) == 100.0
    assert story.rate(2.0, 5.0) == 10.0


def test_line_cut_by_the_switch() -> None:
    line = "HB seq=2 t=0 w=300 dw=0 bad=0 sweeps=0 sw=0 gap_us=0"
    before = said((1.0, 0, 100), (2.0, 1, 200), rest=line[:20])
    after = Serial("guest", Path("nowhere"))
    after.feed(f"{line[20:]}\r\n".encode(), 3.0)
    story = Story.of(before, after)
    assert story.unbroken
    assert [beat.seq for beat in story.beats] == [0, 1, 2]


@pytest.mark.parametrize("next_", [0, 1, 3])
def test_story_that_is_broken(next_: int) -> None:
    assert not Story.of(said((1.0, 0, 100), (2.0, 1, 200)), said((5.0, next_, 230))).unbroken


@pytest.mark.parametrize("again", [1, 3])
def test_character_that_is_said_again(again: int) -> None:
    """QEMU's serial port may repeat the character that it was sending when the guest was stopped,
    anywhere in a line."""
    line = "HB seq=2 t=0 w=300 dw=0 bad=0 sweeps=0 sw=0 gap_us=0\r"
    for cut in range(1, len(line) + 1):
        before = said((1.0, 0, 100), (2.0, 1, 200), rest=line[:cut])
        story = Story.of(
            before, said((6.0, 3, 330), first=line[cut - 1] * again + line[cut:] + "\n")
        )
        assert story.unbroken, line[:cut]
        assert [(beat.seq, beat.bad, beat.sweeps) for beat in story.beats[2:]] == [
            (2, 0, 0),
            (3, 0, 0),
        ]


@pytest.mark.parametrize("waited", [2, 5, 17])
def test_characters_that_come_out_of_both_machines(waited: int) -> None:
    """The port was blocked when the guest was stopped: the source sends what its port holds, and so
    does the destination."""
    line = "HB seq=2 t=0 w=300 dw=0 bad=0 sweeps=0 sw=0 gap_us=0\r"
    for cut in range(waited, len(line) + 1):
        before = said((1.0, 0, 100), (2.0, 1, 200), rest=line[:cut])
        story = Story.of(before, said((6.0, 3, 330), first=line[cut - waited :] + "\n"))
        assert story.unbroken, line[:cut]
        assert [(beat.seq, beat.bad) for beat in story.beats[2:]] == [(2, 0), (3, 0)]


def test_garbled_heartbeat() -> None:
    story = Story.of(said((1.0, 0, 100), rest="HB seq;"), said((2.0, 1, 200)))
    assert story.broken == "HB seq;HB seq=1 t=0 w=200 dw=0 bad=0 sweeps=0 sw=0 gap_us=0"


def test_wrong_page() -> None:
    before, after = said((1.0, 0, 100)), Serial("guest", Path("nowhere"))
    after.feed(b"HB seq=1 t=0 w=200 dw=0 bad=3 sweeps=0 sw=0 gap_us=0\r\n", 2.0)
    story = Story.of(before, after)
    assert (story.unbroken, story.bad) == (True, 3)
    assert not replace(migration("pagenet", 14.1, 12.0), story=story).is_right
    assert migration("pagenet", 14.1, 12.0).is_right


def migration(method: str, completed: float | None, end: float) -> Migration:
    """A migration asked for at 10 s, of a guest that writes 100 pages a second before, and stands
    still from 10 s to ``end``."""
    beats = [(number / 2, number, number * 50) for number in range(21)]
    after = [(end + number / 2, 21 + number, 1000 + number * 50) for number in range(20)]
    story = Story.of(said(*beats), said(*after))
    outcome = Outcome(completed, faults=7)
    return Migration(
        method, 512 << 20, 0, 10.0, 10.1, 10.2, 10.25, outcome, 5 << 20, story, 100 * 4096, 1
    )


def test_figures_of_a_migration() -> None:
    one = migration("pagenet", 14.1, 12.0)
    assert one.writes_per_s() == 100.0
    assert one.total_s() == pytest.approx(4.0)
    assert one.command_s() == pytest.approx(4.1)
    assert one.downtime_ms() == pytest.approx(50.0)
    assert one.longest_gap_ms() == pytest.approx(2000.0)
    assert one.lost_ms() == pytest.approx(2000.0)
    # 100 pages take 3.28 s at 1 Mbit/s; the 400 writes that belong to them would have taken 4.
    assert one.least_lost_ms() == 0.0
    assert replace(one, work=1000 * 4096, rate=0.5).least_lost_ms() == pytest.approx(
        (65.536 - 40) * 1000
    )
    assert replace(one, rate=None).least_lost_ms() is None


def test_precopy_that_does_not_converge_has_no_figures() -> None:
    one = migration("precopy", None, 12.0)
    assert (one.converged, one.total_s(), one.longest_gap_ms(), one.lost_ms()) == (
        False,
        None,
        None,
        None,
    )
    result = QemuResult("precopy", one.ram, [one, migration("precopy", 14.1, 11.0)])
    assert result.median(Migration.longest_gap_ms) == pytest.approx(1000.0)


def test_work_during_precopy() -> None:
    """The guest of :func:`migration` stands still from 10 s on."""
    one = migration("hybrid", 14.1, 12.0)
    assert one.precopy_work() is None
    rounds = replace(one.outcome, rounds=2)
    assert replace(one, outcome=rounds, began=8.0, stopped=9.0).precopy_work() == pytest.approx(1.0)
    early = replace(one, outcome=rounds, began=9.0, stopped=11.0)
    assert early.precopy_work() == pytest.approx(0.5)
    assert early.total_s() == pytest.approx(5.1)
    assert early.least_lost_ms() is None
    given_up = replace(one.outcome, completed=None, rounds=9, given_up=11.0)
    assert replace(
        one, outcome=given_up, began=9.0, stopped=None, resumed=None
    ).precopy_work() == pytest.approx(0.5)


def test_guest_that_is_lost_has_no_figures() -> None:
    one = replace(migration("qemu-hybrid", None, 12.0), failure="the guest has ended")
    assert not one.is_right
    assert (one.total_s(), one.lost_ms(), one.least_lost_ms(), one.precopy_work()) == (None,) * 4


def test_targets_of_hybrids() -> None:
    def result(method: str, end: float, wire: int) -> QemuResult:
        one = migration(method, 14.1, end)
        hybrid = replace(one.outcome, rounds=1)
        return QemuResult(method, one.ram, [replace(one, outcome=hybrid, began=8.0, wire=wire)])

    results = [
        QemuResult("preempt", 512 << 20, [migration("preempt", 14.1, 14.0)]),
        result("qemu-hybrid", 12.0, 100),
        result("qemu-hybrid-preempt", 11.0, 100),
        QemuResult("attach", 512 << 20, [migration("attach", 14.1, 10.5)]),
        result("hybrid-attach", 10.25, 110),
    ]
    targets = [
        target
        for target in targets_of(results, QemuOptions(GuestFiles(Path("kernel"), None)))
        if target.words.startswith("hybrid")
    ]
    assert {
        target.words.rpartition(": ")[2]: (round(target.figure, 3), target.is_met)
        for target in targets
    } == {
        "longest gap, relative to preempt's": (0.125, False),
        "longest gap, relative to qemu-hybrid-preempt's": (0.5, False),
        "guest work lost, relative to preempt's": (0.062, True),
        "guest work lost, relative to qemu-hybrid-preempt's": (0.25, True),
        "downtime, relative to qemu-hybrid's": (1.0, True),
        "bytes on the wire, relative to qemu-hybrid's": (1.1, False),
        "downtime, relative to attach's": (1.0, True),
        "guest work lost during precopy, relative to undisturbed": (0.091, True),
    }
    assert targets_of(results, QemuOptions(GuestFiles(Path("kernel"), None), rate=None)) == []


def test_targets_are_beside_the_figures_that_they_are_set_for() -> None:
    options = QemuOptions(GuestFiles(Path("kernel"), None))
    results = [
        QemuResult("postcopy", 512 << 20, [migration("postcopy", 14.1, 12.0)]),
        QemuResult("preempt", 512 << 20, [migration("preempt", 14.1, 14.0)]),
        QemuResult("pagenet", 512 << 20, [migration("pagenet", 14.1, 10.5)]),
    ]
    targets = targets_of(results, options)
    assert {
        target.words.rpartition(": ")[2]: (round(target.figure, 3), target.is_met)
        for target in targets
    } == {
        "total, relative to QEMU postcopy's": (1.0, True),
        "longest gap, relative to preempt's": (0.125, True),
        "guest work lost, relative to preempt's": (0.125, True),
        "downtime, relative to QEMU postcopy's": (1.0, True),
        "downtime, relative to preempt's": (1.0, True),
        "downtime, relative to 10 ms": (5.0, False),
    }
