"""pagenet-bench pace: pagenet's window beside fixed ones. Only counts and lower bounds are checked,
not speed."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from namespaces import needs_namespaces

from pagenet.bench import Cell, CellResult
from pagenet.children import module_command
from pagenet.cli.bench import main

CELL = Cell(1000, 0, 1, "random", 0)
SMALL = ("--size", "8M", "--trace", "random", "--work", "0", "--rounds", "1", "--window", "64K")


def told(stall: float, wrong: int = 0) -> dict[str, Any]:
    return {"stall": stall, "complete": 2 * stall, "wrong": wrong}


def pace(*args: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "pagenet.cli.bench", "pace", *args, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_best_of_the_ladder_ratio_and_noise() -> None:
    rounds = {
        None: [told(1.1), told(1.2), told(1.0)],
        4096: [told(2.0), told(2.0), told(2.0)],
        8192: [told(1.0, wrong=1), told(1.0), told(1.5)],
    }
    result = CellResult(CELL, 1 << 20, rounds)
    assert result.best("stall") == 8192
    assert result.ratio("stall") == pytest.approx(1.1)
    assert result.noise("stall") == pytest.approx(0.5)
    assert result.wrong == 1


def figures(stall: float, complete: float) -> list[dict[str, Any]]:
    return [{"stall": stall, "complete": complete, "wrong": 0}]


@pytest.mark.parametrize(
    ("small", "large", "better"),
    [
        ((1.0, 1.0), (1.0, 1.0), None),
        ((0.9, 1.1), (1.1, 0.9), None),  # each is better in one figure alone
        ((0.9, 1.0), (1.1, 0.9), 4096),
        ((0.96, 0.96), (1.1, 0.9), None),
        ((2.0, 2.0), (0.9, 0.9), 8192),
    ],
)
def test_a_better_choice(
    small: tuple[float, float], large: tuple[float, float], better: int | None
) -> None:
    rounds = {None: figures(1.0, 1.0), 4096: figures(*small), 8192: figures(*large)}
    assert CellResult(CELL, 1 << 20, rounds).better() == better


def test_every_other_window_was_stopped() -> None:
    result = CellResult(CELL, 1 << 20, {None: [told(1.1)]}, {4096, 8192})
    assert result.best("stall") is None
    assert result.ratio("stall") == 1


@needs_namespaces
def test_a_window_that_cannot_be_the_best_is_stopped() -> None:
    # 256 chunks, each of which takes a round trip of 20 ms: 5 s.
    said = pace("--rate", "none", "--delay", "20", *SMALL[:-1], "4K,1M", "--size", "32M")
    result = next(event for event in said if event["event"] == "result")
    assert result["stopped"] == ["4K"]
    assert list(result["windows"]) == ["auto", "1M"]
    assert result["best"]["stall"] == "1M"


@needs_namespaces
def test_links_delays_and_threads() -> None:
    said = pace("--rate", "none,1000", "--delay", "5", "--threads", "3", *SMALL)
    results = [event for event in said if event["event"] == "result"]
    assert [(result["rate"], result["trip"]) for result in results] == [
        (None, 5), (1000, 5),
    ]  # fmt: skip
    for result in results:
        assert result["wrong"] == 0
        assert list(result["windows"]) == ["auto", "64K"]
        assert all(figures["blocked"] > 0 for figures in result["windows"].values())
        assert all(figures["complete"] > 0 for figures in result["windows"].values())
    assert said[-1]["event"] == "complete"
    assert said[-1]["pace"]["wrong"] == 0


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


@contextmanager
def relaying(listener: socket.socket, delay: str) -> Iterator[tuple[str, int]]:
    """A relay to ``listener``, which ends with its input. Yields its address."""
    port = listener.getsockname()[1]
    command = module_command("pagenet.bench.pace.relay", "127.0.0.1", str(port), delay)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as relay:
        assert relay.stdin is not None
        assert relay.stdout is not None
        yield "127.0.0.1", int(relay.stdout.readline())
        relay.stdin.close()
        assert relay.wait(10) == 0


def test_relay_serves_any_number_of_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, relaying(listener, "0") as where:
        for _ in range(200):
            with socket.create_connection(where) as near:
                far, _ = listener.accept()
                with far:
                    near.sendall(b"?")
                    assert far.recv(1) == b"?"


def test_relay_delays_and_changes_nothing() -> None:
    data = random.Random(1).randbytes(3 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener, relaying(listener, "0.01") as where:
        near = socket.create_connection(where)
        far, _ = listener.accept()
        with near, far:
            for here, there in ((near, far), (far, near)):
                began = time.monotonic()
                here.sendall(b"?")
                assert there.recv(1) == b"?"
                assert time.monotonic() - began >= 0.01
            sender = threading.Thread(target=send_all, args=[near, data])
            sender.start()
            with far.makefile("rb") as file:
                assert file.read() == data, "and its end is passed on"
            sender.join()
            far.sendall(b"answer")
            assert near.recv(6) == b"answer"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--threads", "65"], "65 threads are more than 64"),
        (["--delay", "-1"], "-1: each is 0 to 1000"),
        (["--window", "100"], "whole number of 4096-byte pages"),
        (["--rate", "fast"], "--rate"),
        (["--trace", "backwards"], "--trace"),
    ],
)
def test_bad_options(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pace", *arguments])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
