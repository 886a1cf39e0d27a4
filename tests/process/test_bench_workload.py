"""pagenet-bench workload: the orders of the background with the same touches. Only counts are
checked, not times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from namespaces import needs_namespaces

from pagenet import UsageError
from pagenet.background.recording import Recorder
from pagenet.bench import ORDERS, TRACES, WorkloadResult, workload_targets
from pagenet.bench.workload._least import least_stall
from pagenet.bench.workload._traces import alike, make_trace
from pagenet.cli.bench import main
from pagenet.region import Block, Region

MIB = 1 << 20


def workload(*args: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "pagenet.cli.bench", "workload", *args, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize("trace", TRACES)
def test_traces_are_what_they_say(trace: str) -> None:
    pages = make_trace(trace, 64 * MIB, 4000).pages
    assert len(pages) == 4000
    assert max(pages) < 64 * MIB // 4096
    assert pages == make_trace(trace, 64 * MIB, 4000).pages


def test_the_usual_trace_is_the_one_that_the_targets_are_about() -> None:
    pages = set(make_trace("zipf", 1 << 30).pages)
    assert 20_000 < len(pages) < 26_000
    assert 1200 < len({page // 64 for page in pages}) <= 1350
    first, second = (
        make_trace("phases", 1 << 30).pages[part]
        for part in (slice(0, 40_000), slice(40_000, None))
    )
    assert max(first) < min(second)


def test_a_recorded_trace(tmp_path: Path) -> None:
    recorder = Recorder(Region([Block("ram", 8 * MIB)]))
    recorder.note([5, 3, 2000, 7])
    recorder.recording().save(tmp_path / "touches")
    trace = make_trace(f"recorded={tmp_path / 'touches'}", 4 * MIB)
    assert (list(trace.pages), trace.work_ns) == ([5, 3, 7], None)
    with pytest.raises(UsageError, match="no trace"):
        make_trace("backwards", MIB)


@needs_namespaces
def test_hot_blocks_fewer_touches_than_linear_and_off(tmp_path: Path) -> None:
    picture = tmp_path / "workload.svg"
    orders = ("off", "linear 8/8", "hot", "recorded", "clairvoyant")
    memory = ("--size", "64M", "--touches", "8000")
    said = workload("--trace", "zipf", "--order", ",".join(orders), *memory, "--plot", str(picture))
    rows = {event["order"]: event for event in said if event["event"] == "result"}
    assert tuple(rows) == orders
    off, linear, hot = (rows[order]["blocked"] for order in ("off", "linear 8/8", "hot"))
    # Each page blocks once, and once more if it is touched between its thread's wakeup and the
    # change of the map.
    assert rows["off"]["pages"] <= off < 1.02 * rows["off"]["pages"]
    assert rows["off"]["pages"] == rows["off"]["came"]["demand"]
    assert rows["off"]["wasted_bytes"] == 0
    assert hot < off / 4
    assert hot < linear
    # These orders replay. On a busy machine a replay is later than hot, but far better than an
    # order that knows nothing.
    assert rows["recorded"]["blocked"] < off / 2
    assert rows["clairvoyant"]["blocked"] < off / 2
    assert all(row["stall_seconds"] > 0 and row["to_50"] is not None for row in rows.values())
    assert {(target["order"], target["figure"]) for target in said[-1]["workload"]["targets"]} == {
        (order, figure) for order in ("hot", "recorded") for figure in ("blocked", "stall")
    }
    assert picture.read_bytes().startswith(b"<?xml")


@needs_namespaces
@pytest.mark.parametrize("lane", ["native", "trio"])
def test_every_trace_on_loopback(lane: str) -> None:
    traces = list(TRACES) if lane == "native" else ["phases", "sequential"]
    where = ("--trace", ",".join(traces), "--rate", "none", "--bandwidth", "none", "--lane", lane)
    said = workload("--order", "hot", "--size", "16M", "--touches", "1500", *where)
    rows = {event["trace"]: event for event in said if event["event"] == "result"}
    assert list(rows) == traces
    assert all(0 < row["blocked"] <= 1.02 * row["pages"] for row in rows.values())
    assert rows["sequential"]["blocked"] < rows["sequential"]["pages"] / 4


@needs_namespaces
@pytest.mark.parametrize("lane", ["native", "trio"])
def test_what_is_prefetched_in_vain_is_estimated_in_shared_memory(
    lane: str, tmp_path: Path
) -> None:
    """All that came and was not touched was prefetched, so the bench knows what the sample should
    show."""
    recorder = Recorder(Region([Block("ram", 64 * MIB)]))
    recorder.note(
        page
        for first in range(8, 16000, 17)
        for page in (first, *range(first + 1, first + 1 + first % 9))
    )
    recorder.recording().save(tmp_path / "touches")
    where = (
        "--rate",
        "none",
        "--bandwidth",
        "1",
        "--memory",
        "memfd",
        "--lane",
        lane,
        "--size",
        "64M",
        "--work",
        "1",
    )
    said = workload("--order", "linear 8/8", "--trace", f"recorded={tmp_path / 'touches'}", *where)
    row = next(event for event in said if event["event"] == "result")
    prefetched = row["came"]["prefetch"]
    wasted = row["wasted_bytes"] // 4096 / prefetched
    assert 0.4 < wasted < 0.95
    assert row["prefetch_unused"] == pytest.approx(wasted, abs=0.1)


@needs_namespaces
def test_how_soon_a_change_of_phase_is_followed() -> None:
    """Shares of the working set are reached in ascending order, too."""
    where = ("--size", "64M", "--touches", "30000", "--rate", "none", "--bandwidth", "10")
    said = workload("--trace", "phases", "--order", "hot", *where)
    row = next(event for event in said if event["event"] == "result")
    assert 0 < row["to_50"] <= row["to_90"] <= row["to_99"] <= row["seconds"]
    assert 0 <= row["followed"] < row["seconds"]


def test_targets_are_held_against_the_same_trace() -> None:
    def result(order: str, blocked: int, trace: str = "zipf") -> WorkloadResult:
        return WorkloadResult(
            trace, order, 100, 100, [{"blocked": blocked, "stall": blocked / 1000, "followed": 0.1}]
        )

    targets = workload_targets(
        [
            result("off", 1000),
            result("hot", 100),
            result("linear 8/8", 150),
            result("hot", 5, "phases"),
        ]
    )
    met = {(target.trace, target.figure, target.other): target.met for target in targets}
    assert met == {
        ("zipf", "blocked", "0.1 x off"): True,
        ("zipf", "stall", "0.1 x off"): True,
        ("zipf", "blocked", "0.5 x linear 8/8"): False,
        ("zipf", "stall", "0.5 x linear 8/8"): False,
        ("phases", "followed", "seconds"): True,
    }


@pytest.mark.parametrize("name", ["zipf", "random"])
def test_no_order_does_better_than_chance(name: str) -> None:
    """Over a link that carries only what is waited for, every page is waited for; over a link
    without limits, only the first page is. In between, a faster link, or more work between touches,
    means less stall, but never none."""
    size, touches = 256 * MIB, 20_000
    pages, trace = size // 4096, make_trace(name, size, touches).pages
    same = alike(name, pages)
    assert same is not None
    none, slow, fast, endless = (
        least_stall(trace, pages, same, 50e-6, 1e-4, rate) for rate in (1, 1e7, 1e8, 1e15)
    )
    assert none.blocked == pytest.approx(len(set(trace)), rel=0.03)
    assert none.blocked > slow.blocked > fast.blocked > 100 > endless.blocked
    assert fast.stall == pytest.approx(fast.blocked * 1e-4)
    assert least_stall(trace, pages, same, 500e-6, 1e-4, 1e7).blocked < slow.blocked
    assert alike("sequential", pages) is None


def test_where_all_pages_are_alike_counts_compare_orders_with_one_window() -> None:
    figures = {"hot": (106, 1.0), "linear": (100, 1.0), "linear 8/8": (50, 0.9)}
    results = [
        WorkloadResult("random", order, 9, 9, [{"blocked": b, "stall": s}])
        for order, (b, s) in figures.items()
    ]
    assert {(target.other, target.figure): target.met for target in workload_targets(results)} == {
        ("1.05 x linear", "blocked"): False,
        ("1.05 x linear", "stall"): True,
        ("1.05 x linear 8/8", "stall"): False,
    }


@pytest.mark.parametrize(
    ("recorded", "clairvoyant", "met"), [(45, 3, 1), (60, 3, 0), (500, 240, 1), (500, 220, 0)]
)
def test_a_replay_is_held_against_the_best_order_and_what_starting_costs(
    recorded: int, clairvoyant: int, met: int
) -> None:
    results = [
        WorkloadResult("zipf", order, 100, 100, [{"blocked": blocked, "stall": blocked / 5000}])
        for order, blocked in (("recorded", recorded), ("clairvoyant", clairvoyant))
    ]
    assert {(target.figure, target.met) for target in workload_targets(results)} == {
        ("blocked", met),
        ("stall", met),
    }


def test_without_root_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("pagenet.bench._site.check_tools", lambda *tools: None)
    assert main(["workload", "--trace", "zipf", "--size", "16M", "--touches", "10"]) == 7
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--trace", "backwards"],
        ["--order", "best"],
        ["--rate", "0"],
        ["--trace", "recorded=/nowhere"],
        ["--plot", "x.txt"],
    ],
)
def test_bad_usage_is_one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["workload", *options])
    except SystemExit as ended:
        code = ended.code  # type: ignore[assignment]
    assert code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert set(ORDERS) >= {"off", "hot"}
