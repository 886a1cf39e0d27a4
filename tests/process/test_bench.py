"""pagenet-bench: that it measures, compared with what, and what it prints. Never how fast: that
depends on the machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from namespaces import needs_namespaces
from processes import plant_pagenet, threads_in_faults

from pagenet import PagenetError
from pagenet.bench import FLOORS, Sample
from pagenet.bench._far import order_bytes, order_pages
from pagenet.bench._peers import running
from pagenet.bench.attacker import ATTACKS
from pagenet.cli.bench import main

SMALL_FAULT = ("--size", "16M", "--touches", "200", "--rounds", "1", "--threads", "1,3")


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pagenet.cli.bench", *args],
        capture_output=True,
        text=True,
        timeout=60,
    )


def events(*args: str) -> list[dict[str, Any]]:
    ended = bench(*args, "--json")
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def results(said: list[dict[str, Any]], suite: str) -> list[dict[str, Any]]:
    return [event for event in said if event["event"] == "result" and event["suite"] == suite]


def test_all_ends_with_one_object_of_figures_and_floors() -> None:
    *_, last = events("--size", "16M", "--touches", "200", "--rounds", "1", "--threads", "1")
    assert last["event"] == "complete"
    figures = [
        last["fault"]["idle"]["p50_us"],
        last["fault"]["idle"]["floor_p50_us"],
        last["fault"]["idle"]["floor_local_p50_us"],
        last["fault"]["loaded"]["p99_us"],
        last["stream"]["best_gbps"],
        last["stream"]["floor_copy_gbps"],
        last["stream"]["floor_receive_gbps"],
        last["stream"]["floor_memcpy_gbps"],
    ]
    assert all(figure > 0 for figure in figures)
    assert {
        "kernel",
        "page_size",
        "congestion_control",
        "cpus",
        "mtu_lo",
        "lane",
        "pagenet",
    } <= last["environment"].keys()


def test_track() -> None:
    said = events("track", "--sizes", "16M,32M", "--dirty", "8M", "--rounds", "2")
    small, large = results(said, "track")
    assert (small["bytes"], large["bytes"]) == (16 << 20, 32 << 20)
    for result in (small, large):
        assert result["written_pages"] == 1024
        assert not result["filled"]
        assert min(result[f"{name}_ms"] for name in ("arm", "clean", "dirty", "close")) > 0
        assert min(result[f"{name}_floor_ms"] for name in ("clean", "dirty")) > 0
        assert result["write_floor_us"] > 0
    assert said[-1]["track"]["sizes"] == [
        {name: value for name, value in result.items() if name not in ("event", "suite")}
        for result in (small, large)
    ]


def test_track_leaves_out_what_does_not_fit() -> None:
    said = events("track", "--sizes", "4096G,4M", "--fill", "--rounds", "1")
    (left_out,) = (event for event in said if event["event"] == "too_large")
    assert left_out["bytes"] == 4 << 40
    (result,) = results(said, "track")
    assert (result["bytes"], result["filled"]) == (4 << 20, True)


async def test_a_child_that_ends_at_once_has_said_why() -> None:
    async with running(["sh", "-c", "echo first >&2; echo why >&2"]) as child:
        with pytest.raises(PagenetError, match=r"ended at once: why$"):
            await child.first_line()


def test_children_are_of_this_pagenet_and_not_of_one_that_lies_here(tmp_path: Path) -> None:
    plant_pagenet(tmp_path)
    command = [
        sys.executable,
        "-P",
        "-m",
        "pagenet.cli.bench",
        "stream",
        "--size",
        "4M",
        "--rounds",
        "1",
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("lane", "memory", "placement", "threads"),
    [
        ("native", "anonymous", {"copy"}, [1, 3]),
        ("native", "memfd", {"continue"}, [1]),
        ("trio", "anonymous", {"copy"}, [2]),
    ],
)
def test_fault(lane: str, memory: str, placement: set[str], threads: list[int]) -> None:
    many = ("--threads", ",".join(map(str, threads)))
    said = events(
        "fault", *SMALL_FAULT, *many, "--lane", lane, "--memory", memory, "--transport", "unix"
    )
    assert [result["threads"] for result in results(said, "fault")] == threads
    for result in results(said, "fault"):
        assert (result["lane"], result["transport"]) == (lane, "unix")
        assert result["placement"] in placement
        idle = result["idle"]
        # all 200 touches, unless the machine is so busy that the time is over before
        assert 0 < idle["touches"] <= 200
        assert 0 < idle["floor_touches"] <= 200
        assert 0 < idle["floor_local_touches"] <= 200
        assert 0 < idle["floor_p50_us"] <= idle["floor_p99_us"] <= idle["floor_p999_us"]
        assert 0 < idle["p50_us"] <= idle["p99_us"] <= idle["p999_us"]
        assert result["loaded"]["touches"] + result["loaded"]["not_counted"] == 200
        assert result["busy"]["touches"] > 0


def test_fault_counts_no_page_that_prefetch_brought() -> None:
    said = events(
        "fault",
        "--size",
        "4M",
        "--touches",
        "1024",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--prefetch",
        "64,64",
    )
    (result,) = results(said, "fault")
    assert 0 < result["idle"]["touches"] < 1024


def test_stream_measures_every_placement_and_source() -> None:
    said = events("stream", "--size", "16M", "--rounds", "1")
    rows = results(said, "stream")
    floors = {row["name"]: row["gbps"] for row in rows if row["floor"]}
    assert floors.keys() == {"memcpy", "send/recv", *FLOORS.values()}
    assert all(gbps > 0 for gbps in floors.values())
    others = [row for row in rows if not row["floor"]]
    assert all(row["gbps"] > 0 and row["ratio"] > 0 and row["bytes"] == 16 << 20 for row in others)
    assert {row["name"] for row in others} == {"copy", "move", "continue", "continue-allocated"}
    assert {(row["source"], row["zero_share"]) for row in others} >= {("file", 0.0), ("file", 0.5)}


def test_stream_on_trio_lanes() -> None:
    said = events(
        "stream",
        "--size",
        "4M",
        "--rounds",
        "1",
        "--lane",
        "trio",
        "--placement",
        "copy",
        "--zero-every",
        "0",
    )
    assert {row["lane"] for row in results(said, "stream") if not row["floor"]} == {"trio"}


def test_stream_by_lanes_and_chunk() -> None:
    options = (
        "--placement",
        "copy",
        "--source",
        "file",
        "--zero-every",
        "0",
        "--lanes",
        "1,3",
        "--chunk",
        "64K",
    )
    rows = results(events("stream", "--size", "4M", "--rounds", "1", *options), "stream")
    assert [row["lanes"] for row in rows if not row["floor"]] == [1, 3]
    assert {row["chunk"] for row in rows} == {64 << 10}


def test_scale() -> None:
    said = events("scale", "--sizes", "4M,64M", "--touches", "300", "--rounds", "1")
    small, large = results(said, "scale")
    assert [small["bytes"], large["bytes"]] == [4 << 20, 64 << 20]
    assert all(
        row["touches"] == 300 and 0 < row["p50_us"] <= row["p99_us"] for row in (small, large)
    )
    assert small["p50_to_first"] == 1
    assert large["p50_to_first"] > 0
    # At least one byte of the map for each page; the rest is what a small region cannot hide.
    assert 1 <= large["destination_bytes_per_page"] < 400
    assert 0 <= large["source_bytes_per_page"] < 400


def test_hostile() -> None:
    """Every attack is on, and an honest destination gets its pages beside it."""
    said = events("hostile", "--rounds", "1")
    rows = {result["attack"]: result for result in results(said, "hostile")}
    assert set(rows) == set(said[-1]["hostile"]) == {"alone", *ATTACKS}
    assert all(row["p50_us"] > 0 and row["p99_to_alone"] > 0 for row in rows.values())


def test_null() -> None:
    said = events("null", "--rounds", "1")
    assert len(results(said, "null")) == 9
    assert all(result["per_second"] > 0 for result in results(said, "null"))
    assert len(said[-1]["null"]) == 9


FAR = {
    "fault": ("--rounds", "1", "--threads", "1", "--touches", "50"),
    "stream": ("--rounds", "1", "--placement", "copy", "--size", "4M"),
}


@contextmanager
def far_source(tmp_path: Path) -> Iterator[str]:
    """Where a pagenet-serve listens that the bench has not started."""
    source = tmp_path / "source"
    source.write_bytes(b"x" * (4 << 20))
    serving = [
        sys.executable,
        "-m",
        "pagenet.cli.serve",
        str(source),
        "--listen",
        "tcp://127.0.0.1:0",
        "--json",
    ]
    with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())["uri"]
        finally:
            server.kill()


@pytest.mark.parametrize("command", ["fault", "stream"])
def test_a_peer_elsewhere_has_no_floor_of_a_socket(command: str, tmp_path: Path) -> None:
    with far_source(tmp_path) as uri:
        *_, last = events(command, "--uri", uri, *FAR[command])
    if command == "fault":
        assert (
            last["fault"]["idle"]["touches"] == last["fault"]["idle"]["floor_local_touches"] == 50
        )
        assert last["fault"]["idle"]["floor_p50_us"] is None
    else:
        assert last["stream"]["best_gbps"] > 0
        assert last["stream"]["floor_copy_gbps"] is None


@pytest.fixture
def floors() -> Iterator[str]:
    """Where a peer for the floors listens."""
    command = [
        sys.executable,
        "-m",
        "pagenet.cli.bench",
        "peer",
        "--listen",
        "tcp://127.0.0.1:0",
        "--size",
        "4M",
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdout is not None
        yield json.loads(peer.stdout.readline())["uri"]
        peer.send_signal(signal.SIGINT)
        assert peer.wait(10) == 130


@pytest.mark.parametrize("command", ["fault", "stream"])
def test_far_peer_has_floors_too(command: str, floors: str, tmp_path: Path) -> None:
    with far_source(tmp_path) as uri:
        *_, last = events(command, "--uri", uri, "--floors", floors, *FAR[command])
    figure = (
        last["fault"]["idle"]["floor_p50_us"]
        if command == "fault"
        else last["stream"]["floor_copy_gbps"]
    )
    assert figure > 0


@pytest.mark.parametrize(
    "order",
    [b"", b"page", b"x" * 24, order_bytes(8 << 20, 4096), order_bytes(4096, 8192), order_pages(0)],
)
def test_peer_turns_away_who_makes_no_sense(order: bytes, floors: str) -> None:
    port = int(floors.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(order)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    # the next client is accepted, and leaves early
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(order_bytes(4 << 20, 4096))
        assert sock.recv(1, socket.MSG_WAITALL)


def test_tables_put_each_figure_beside_its_floor() -> None:
    ended = bench("fault", *SMALL_FAULT)
    assert ended.returncode == 0, ended.stderr
    rows = [
        "bare C, page at hand",
        "bare C request, reply, copy",
        "idle",
        "a Trio task busy",
        "background flat out",
    ]
    assert all(
        row in ended.stdout for row in [*rows, "prefetch off", "x floor", "congestion control"]
    )


@pytest.mark.parametrize(("suffix", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_plot(suffix: str, magic: bytes, tmp_path: Path) -> None:
    picture = tmp_path / f"latency.{suffix}"
    *_, plotted, _ = events("fault", *SMALL_FAULT, "--threads", "1", "--plot", str(picture))
    assert plotted == {"event": "plotted", "file": str(picture)}
    assert picture.read_bytes().startswith(magic)


def stop_while_touches_wait(source: int, bench: int) -> None:
    """Stop the source, so that touches wait from now on. At the moment of the stop no thread may be
    waiting: then it is tried again."""
    deadline = time.monotonic() + 20
    while True:
        while not threads_in_faults(bench):
            assert time.monotonic() < deadline, "no touch waits"
        os.kill(source, signal.SIGSTOP)
        os.waitid(os.P_PID, source, os.WSTOPPED)
        if threads_in_faults(bench):
            return
        os.kill(source, signal.SIGCONT)


@pytest.mark.usefixtures("uffd_permitted")
@pytest.mark.parametrize("who", ["source", "bench"])
def test_whoever_ends_early_ends_touches_that_wait(who: str, tmp_path: Path) -> None:
    """Pages that never come are a SIGBUS to the bench's own threads. It must not end the bench."""
    source = tmp_path / "source"
    source.write_bytes(b"x" * (64 << 20))
    serving = [
        sys.executable,
        "-m",
        "pagenet.cli.serve",
        str(source),
        "--listen",
        "tcp://127.0.0.1:0",
        "--json",
    ]
    with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        uri = json.loads(server.stdout.readline())["uri"]
        command = [
            sys.executable,
            "-m",
            "pagenet.cli.bench",
            "fault",
            "--uri",
            uri,
            "--touches",
            "16384",
            "--json",
        ]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as running:
            try:
                assert running.stdout is not None
                assert running.stdout.readline()  # it prints the environment, and begins
                # Of two sessions the first asks for the size alone, and touches begin with the
                # second.
                said = [json.loads(server.stdout.readline())["event"] for _ in range(3)]
                assert said == ["connected", "left", "connected"]
                stop_while_touches_wait(server.pid, running.pid)
                if who == "source":
                    server.kill()
                else:
                    running.send_signal(signal.SIGINT)
                _, complaints = running.communicate(timeout=20)
            finally:
                running.kill()
                server.kill()
    assert (running.returncode, complaints.count("\n")) == (
        (4, 1) if who == "source" else (130, 0)
    ), complaints


NO_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
from pagenet.cli.bench import main
sys.exit(main(["fault", "--plot", "x.svg"]))
"""


def test_plot_without_matplotlib_is_one_line() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", NO_MATPLOTLIB], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert ended.stderr == "pagenet-bench: --plot needs matplotlib: pip install 'pagenet[plot]'\n"


@pytest.mark.parametrize(
    ("args", "exit_code", "reason"),
    [
        (["fault", "--uri", "tcp://127.0.0.1:1"], 3, "nothing answers"),
        (["stream", "--uri", "tcp://127.0.0.1:1"], 3, "nothing answers"),
        (
            ["fault", "--uri", "tcp://127.0.0.1:1", "--floors", "tcp://127.0.0.1:1"],
            3,
            "nothing answers",
        ),
        (["stream", "--floors", "tcp://127.0.0.1:1"], 2, "name both"),
        (["peer", "--listen", "tcp://0.0.0.0:0"], 2, "--plaintext"),
        (["fault", "--threads", "0"], 2, "'0' is not a number"),
        (["fault", "--threads", "300"], 2, "more than 256"),
        (["fault", "--plot", "picture.pdf"], 2, ".svg or .png"),
        (["fault", "--plot", "nowhere/at/all.svg"], 2, "not a directory"),
        (["fault", "--size", "4097"], 2, "whole number"),
        (["fault", "--size", "4M", "--memory", "hugetlb", "--lane", "other"], 2, "--lane"),
        (["stream", "--placement", "copy,paste"], 2, "paste: there are"),
        (["stream", "--size", "100000G"], 2, "MiB of memory"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    args: list[str], exit_code: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(args)
    except SystemExit as leaving:  # as argparse does it
        code = leaving.code
    complaints = capsys.readouterr().err
    assert code == exit_code
    assert complaints.count("\n") == 1
    assert reason in complaints


def test_a_quantile_is_the_median_of_the_rounds() -> None:
    sample, floor = Sample(), Sample()
    for ours, least in (
        ([30, 10, 20], [5, 5, 5]),
        ([4000, 4000, 4000], [1000, 1000, 1000]),
        ([2000] * 3, [1000] * 3),
    ):
        sample.add(ours)
        floor.add(least)
    assert sample.microseconds(0.5) == 2.0
    assert sample.ratio(floor, 0.5) == 4.0
    assert (sample.count, sample.pooled()[0]) == (9, 10)
    assert Sample().microseconds(0.5) is None
    assert sample.ratio(Sample(), 0.5) is None


# ---- compression ----


@pytest.mark.parametrize("tls", [(), ("--tls",)])
def test_encodings(tls: tuple[str, ...]) -> None:
    said = events(
        *("stream", "--content", "compressible,random,zero", "--size", "8M", "--rounds", "1"), *tls
    )
    found = {
        (result["content"], result["encoding"]): result for result in results(said, "encodings")
    }
    assert list(found) == [
        (content, name)
        for content in ("compressible", "random", "zero")
        for name in ("raw", "lz4", "auto")
    ]
    packed = found["compressible", "lz4"]
    assert packed["share"] > 0.99
    assert packed["ratio"] == pytest.approx(2.5, rel=0.05)
    assert packed["bytes_wire"] == pytest.approx((8 << 20) / packed["ratio"], rel=0.02)
    assert found["random", "lz4"]["share"] == found["compressible", "raw"]["share"] == 0
    assert found["zero", "lz4"]["bytes_wire"] < 1 << 16
    assert all(result["mbps"] > 0 and result["rate"] is None for result in found.values())
    held = said[-1]["encodings"]["targets"]
    assert {(target["content"], target["other"]) for target in held} == {
        (content, other)
        for content in ("compressible", "random")
        for other in ("raw", "the better of the two")
    }
    assert all(target["met"] == (target["times"] >= target["at_least"]) for target in held)


@needs_namespaces
def test_encodings_over_a_limited_link() -> None:
    ended = bench(
        "stream",
        "--content",
        "random",
        "--encoding",
        "raw,auto",
        "--rate",
        "200",
        "--size",
        "4M",
        "--rounds",
        "1",
    )
    assert ended.returncode == 0, ended.stderr
    assert "auto, random, 200 Mbit/s: " in ended.stdout
    assert "at least 0.97x" in ended.stdout


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--encoding", "zip"), "zip: there are raw, lz4, auto"),
        (("--content", "text"), "text: there are compressible, random, zero"),
        (("--rate", "fast"), "'fast' is not a number from 1 on"),
        (
            ("--rate", "none", "--transport", "unix"),
            "compression is measured between processes here, over tcp",
        ),
    ],
)
def test_encodings_that_make_no_sense(options: tuple[str, ...], complaint: str) -> None:
    ended = bench("stream", *options)
    assert ended.returncode == 2
    assert complaint in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_tls() -> None:
    """Every figure is there, with encryption and without; nothing here depends on how good they
    are."""
    said = events("tls", "--rounds", "1")
    rows = {result["name"]: result for result in results(said, "tls")}
    assert set(rows) == {"plain", "tls"}
    for row in rows.values():
        assert all(row[name] > 0 for name in row if name.endswith(("_us", "_gbps")))
    assert rows["plain"].keys() == rows["tls"].keys()
    assert len(said[-1]["tls"]["targets"]) == 3


def test_guard() -> None:
    said = events("guard", "--rounds", "1")
    [result] = results(said, "guard")
    assert result["guarded_p50_us"] > 0
    assert result["restart_ratio"] > 0
    assert 0 < result["guard_bytes"] < 1 << 20
    assert len(said[-1]["guard"]["targets"]) == 3
