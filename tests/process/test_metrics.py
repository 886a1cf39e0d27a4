"""Metrics: what a real Prometheus scrapes is what pagenet-ctl tells; who may scrape; and what a
hostile one may take."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import trio
from processes import (
    PAGE,
    Process,
    check_verified,
    pull_command,
    run,
    run_server,
    run_workload,
    serve_command,
    write_pattern,
)

from pagenet.control import connect_control
from pagenet.errors import UsageError
from pagenet.metrics import MetricsAddress, parse_address
from pagenet.metrics._families import EDGES, _faults
from pagenet.statistics import BUCKETS, Histogram

pytestmark = pytest.mark.usefixtures("uffd_permitted")

SIZE = 4 << 20
PAGES = SIZE // PAGE


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_pattern(tmp_path_factory.mktemp("metrics") / "source", SIZE, zero_every=8))


async def get(address: str, path: str = "/metrics") -> tuple[int, str]:
    def fetch() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(address.removesuffix("/metrics") + path) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await trio.to_thread.run_sync(fetch)


async def get_unix(path: Path) -> str:
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")
        return b"".join([part async for part in stream]).decode()


def values(text: str) -> dict[str, float]:
    """Of each line: the name with its labels, and the value."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


def check_text(text: str) -> None:
    promtool = shutil.which("promtool")
    assert promtool is not None, "tools/bootstrap --tests installs prometheus"
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@asynccontextmanager
async def pulling(source: str, directory: Path, *more: str) -> AsyncIterator[tuple[Process, str]]:
    """pagenet-pull, and the address of its metrics."""
    options = ("--uffd-socket", str(directory / "owner"), "--control", str(directory / "ctl"))
    async with run_server(source, "--max-sessions", "50") as (_, uri):
        command = pull_command(uri, *options, "--metrics", "127.0.0.1:0", *more, lane="native")
        async with run(command) as daemon:
            yield daemon, (await daemon.event("metrics"))["address"]


@asynccontextmanager
async def prometheus(address: str, directory: Path) -> AsyncIterator[str]:
    """A Prometheus that scrapes ``address``; yields where it answers."""
    program = shutil.which("prometheus")
    assert program is not None, "tools/bootstrap --tests installs prometheus"
    target = address.removeprefix("http://").removesuffix("/metrics")
    (directory / "prometheus.yml").write_text(
        "scrape_configs:\n- job_name: pagenet\n  scrape_interval: 200ms\n"
        f"  static_configs: [{{targets: ['{target}']}}]\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = await trio.lowlevel.open_process(
        [
            program,
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def query(prometheus: str, words: str) -> list[dict[str, Any]]:
    """What it answers, once it has anything to say."""
    path = "/api/v1/query?" + urllib.parse.urlencode({"query": words})
    with trio.fail_after(30):
        while True:
            try:
                found: list[dict[str, Any]] = json.loads((await get(prometheus, path))[1])["data"][
                    "result"
                ]
            except OSError:
                found = []  # it has not begun to listen
            if found:
                return found
            await trio.sleep(0.1)


async def test_prometheus_scrapes_what_status_tells(source: str, tmp_path: Path) -> None:
    async with pulling(source, tmp_path, "--background", "off") as (daemon, address):
        await daemon.event("waiting")
        words = ("--size", SIZE, "--zero-every", 8, "--touches", 200, "--order", "random")
        async with (
            run_workload(tmp_path / "owner", *words, "--wait-complete"),
            connect_control(tmp_path / "ctl") as control,
        ):
            before, status = -1, await control.command("status")
            with trio.fail_after(20):
                while not before == status.get("faults", 0) > 100:  # it has touched all
                    before = status.get("faults", 0)
                    await trio.sleep(0.5)
                    status = await control.command("status")
            async with prometheus(address, tmp_path) as there:
                [faults] = await query(there, "pagenet_faults_total")
                assert float(faults["value"][1]) == status["faults"]
                [count] = await query(there, "pagenet_fault_duration_seconds_count")
                assert 0 < float(count["value"][1]) <= status["faults"]
                [resident] = await query(there, "pagenet_resident_bytes")
                assert float(resident["value"][1]) == status["bytes_resident"]
                [wire] = await query(there, "sum(pagenet_wire_bytes_total)")
                assert float(wire["value"][1]) == status["bytes_wire"]
                [state] = await query(there, "pagenet_state == 1")
                assert state["metric"]["pagenet_state"] == status["state"] == "running"
                [p99] = await query(
                    there, "histogram_quantile(0.99, pagenet_fault_duration_seconds_bucket)"
                )
                assert float(p99["value"][1]) > 0
            check_text((await get(address))[1])


async def test_host_of_many_guests(source: str, tmp_path: Path) -> None:
    """What guests waited for stays when they have left."""
    async with pulling(source, tmp_path, "--many") as (daemon, address):
        await daemon.event("added")
        words = ("--size", SIZE, "--zero-every", 8, "--touches", 50, "--verify", "touched")
        for _ in range(2):
            async with run_workload(tmp_path / "owner", *words) as guest:
                await check_verified(guest)
        with trio.fail_after(20):
            while True:
                text = (await get(address))[1]
                found = values(text)
                if found["pagenet_guests"] == 0:
                    break
                await trio.sleep(0.1)
        check_text(text)
        ended = sum(
            found[f'pagenet_guests_ended_total{{result="{result}"}}']
            for result in ("completed", "gone")
        )
        assert ended == 2
        assert found['pagenet_pages{snapshot="default"}'] == PAGES
        assert found['pagenet_cache_bytes{snapshot="default"}'] > 0
        assert found["pagenet_fault_duration_seconds_count"] > 0


async def test_source_on_a_unix_socket(source: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    command = serve_command(source, "--listen", "tcp://127.0.0.1:0", "--metrics", f"unix:{path}")
    async with run(command) as server:
        await server.event("listening")
        assert path.stat().st_mode & 0o777 == 0o600
        head, _, text = (await get_unix(path)).partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 200")
        check_text(text)
        found = values(text)
        assert found['pagenet_region_bytes{snapshot=""}'] == SIZE
        assert found["pagenet_asked_pages_total"] == 0
        server.send_signal(signal.SIGTERM)
        await server.wait()
    assert not path.exists()


async def test_what_a_hostile_scraper_may_take(source: str, tmp_path: Path) -> None:
    """Connections that say nothing hold nobody up for long, and nonsense gets an error."""
    async with pulling(source, tmp_path) as (_, address):
        host, _, port = address.removeprefix("http://").removesuffix("/metrics").partition(":")
        for words in (b"nonsense\r\n\r\n", b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 200_000):
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                try:
                    await stream.send_all(words)
                    answer = b"".join([part async for part in stream])
                except trio.BrokenResourceError:
                    answer = b""  # it had more to say than anybody reads
                assert answer == b"" or re.match(rb"HTTP/1.1 4\d\d", answer), answer
        assert (await get(address, "/"))[0] == 404
        silent = [await trio.open_tcp_stream(host, int(port)) for _ in range(20)]
        with trio.fail_after(60):
            assert (await get(address))[0] == 200
        for stream in silent:
            await stream.aclose()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nowhere", "neither HOST:PORT nor unix:PATH"),
        ("localhost:", "neither HOST:PORT nor unix:PATH"),
        ("localhost:70000", "neither HOST:PORT nor unix:PATH"),
        ("unix:", "no path"),
        ("example:9000", "no IP address"),
        ("0.0.0.0:9000", "add --metrics-open"),
        ("[::]:9000", "add --metrics-open"),
        ("192.0.2.1:9000", "add --metrics-open"),
    ],
)
def test_addresses_that_are_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=re.escape(reason)):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address("localhost:9000") == MetricsAddress(None, "127.0.0.1", 9000)
    assert str(parse_address("[::1]:9000")) == "http://[::1]:9000/metrics"
    assert parse_address("0.0.0.0:9000", is_open=True).host == "0.0.0.0"
    assert parse_address("unix:/run/x").path == "/run/x"


async def test_bad_options_are_one_line(source: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        there = f"127.0.0.1:{taken.getsockname()[1]}"
        for more, reason in (
            (("--metrics", there), "cannot listen"),
            (("--metrics", "0.0.0.0:0"), "--metrics-open"),
            (("--metrics-open",), "goes with --metrics"),
            (("--metrics", f"unix:{source}"), "choose another path"),
        ):
            async with run(serve_command(source, "--listen", "tcp://127.0.0.1:0", *more)) as server:
                assert await server.wait() == 2
                assert reason in server.stderr
                assert server.stderr.count("\n") == 1


def test_each_latency_is_in_a_bucket_that_it_does_not_exceed() -> None:
    counts = [0] * BUCKETS
    for bucket in range(0, BUCKETS, 7):
        counts[bucket] = bucket
    histogram = Histogram(tuple(counts))
    [*samples] = _faults(histogram).samples
    buckets = {
        sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")
    }
    assert len(buckets) == len(EDGES) + 1
    for edge in EDGES:
        below = sum(count for _, high, count in histogram.ranges() if high <= edge * 1e9)
        assert buckets[repr(edge)] == below
    assert buckets["+Inf"] == histogram.count


def test_dashboard_names_metrics_that_exist(tmp_path: Path) -> None:
    dashboard = json.loads(files("pagenet.metrics").joinpath("dashboard.json").read_text())
    text = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    named = set(re.findall(r"pagenet_[a-z_]+", text))
    document = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    known = set(re.findall(r"`(pagenet_[a-z_]+)", document))
    assert len(named) > 10
    missing = {name for name in named if name.removesuffix("_bucket") not in known}
    assert not missing
