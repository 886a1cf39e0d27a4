"""Daemons have their control sockets in one directory, where pagenet-ctl finds them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from processes import Process, run, serve_command, write_pattern

from pagenet.control import control_directory, found_sockets

SIZE = 1 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pattern(tmp_path_factory.mktemp("found") / "source", SIZE))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    there = tmp_path / "run"
    monkeypatch.setenv("PAGENET_CONTROL_DIR", str(there))
    return there


@asynccontextmanager
async def serving(source: str, *more: str) -> AsyncIterator[Process]:
    command = serve_command(source, "--listen", "tcp://127.0.0.1:0", *more)
    async with run(command, env={**os.environ}) as server:
        await server.event("listening")
        yield server


def ctl(*args: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "pagenet.cli.ctl", *args)
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def listed() -> dict[int, dict[str, object]]:
    told = ctl("list", "--json")
    assert (told.returncode, told.stderr) == (0, "")
    return {row["pid"]: row for row in map(json.loads, told.stdout.splitlines())}


async def test_daemons_are_listed_and_spoken_to(source: str, directory: Path) -> None:
    async with serving(source) as one:
        assert directory.stat().st_mode & 0o777 == 0o700
        [path] = directory.iterdir()
        assert path.name == f"pagenet-serve.{one.pid}"
        assert path.stat().st_mode & 0o777 == 0o600
        assert json.loads(ctl("status", "--json").stdout)["pid"] == one.pid  # it is the only one
        async with serving(source) as other:
            rows = listed()
            assert set(rows) == {one.pid, other.pid}
            row = rows[one.pid]
            assert (row["program"], row["state"]) == ("pagenet-serve", "waiting")
            assert str(row["with"]).startswith("tcp://127.0.0.1:")
            words = ctl("list").stdout
            assert str(one.pid) in words
            assert str(other.pid) in words
            several = ctl("status")
            assert several.returncode == 2
            assert f"{one.pid}" in several.stderr
            told = json.loads(ctl(str(other.pid), "status", "--json").stdout)
            assert told["pid"] == other.pid
            assert ctl(str(other.pid), "stop").returncode == 0
            assert await other.wait() == 143
        assert set(listed()) == {one.pid}
        one.send_signal(signal.SIGTERM)
        await one.wait()
    assert not [*directory.iterdir()]


async def test_service(source: str, directory: Path) -> None:
    """It has its socket there, by a name that somebody chose, as the units have it."""
    directory.mkdir(mode=0o700)
    async with serving(source, "--control", str(directory / "web.ctl")) as server:
        assert set(listed()) == {server.pid}
        assert json.loads(ctl("status", "--json").stdout)["pid"] == server.pid


async def test_socket_of_a_killed_daemon(source: str, directory: Path) -> None:
    """It is not listed, and the next daemon removes it."""
    async with serving(source) as killed:
        await killed.kill()
        assert [found.pid for found in found_sockets()] == [killed.pid]
        assert listed() == {}
        assert ctl("list").stdout.startswith("no daemons")
    unreachable = ctl("status")
    assert unreachable.returncode == 3
    assert unreachable.stderr.count("\n") == 1
    async with serving(source) as other:
        assert [found.pid for found in found_sockets()] == [other.pid]


async def test_daemons_without_a_socket_there(source: str, directory: Path) -> None:
    async with serving(source, "--control", "none"):
        assert not directory.exists()
    directory.mkdir(mode=0o700)
    directory.chmod(0o777)  # another user may have put something there
    async with serving(source):
        assert not [*directory.iterdir()]
    directory.rmdir()
    directory.write_text("a file")
    async with serving(source):
        assert listed() == {}


def test_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGENET_CONTROL_DIR", "")
    assert control_directory() is None
    monkeypatch.delenv("PAGENET_CONTROL_DIR")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert control_directory() == Path("/run/user/1000/pagenet")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert control_directory() is None
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert control_directory() == Path("/run/pagenet")
