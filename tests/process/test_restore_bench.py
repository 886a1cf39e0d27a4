"""pagenet-bench restore: what it measures, beside what, and that wrong pages are noticed. Never how
fast."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from stores import skip_without_s3

from pagenet.bench import RESTORE_ROWS
from pagenet.bench._peers import Source, relayed
from pagenet.bench.restore._arrival import arriving, bare_handler
from pagenet.bench.restore._store import Span, spans_of
from pagenet.bench.restore._what import Figure, RestoreOptions, pieces_of
from pagenet.errors import PagenetError

pytestmark = pytest.mark.usefixtures("uffd_permitted")

SMALL = (
    *("--rounds", "1", "--guests", "3", "--clones", "2", "--layers", "4"),
    *("--in-turn", "3", "--at-once", "3", "--hostile"),
    *("--size", "8M", "--working-set", "1M", "--memory", "8M", "--recorded", "1M"),
)


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagenet.cli.bench", "restore", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


def test_each_row_has_figures_beside_floors_and_limits(tmp_path: Path) -> None:
    skip_without_s3()
    plot = tmp_path / "restore.svg"
    ended = bench(*SMALL, "--json", "--plot", str(plot))
    assert ended.returncode == 0, ended.stderr
    *said, last = map(json.loads, ended.stdout.splitlines())
    figures: list[dict[str, Any]] = last["restore"]["figures"]
    told = [{**event} for event in said if event["event"] == "result"]
    assert [(each["row"], each["name"]) for each in told] == [
        (each["row"], each["name"]) for each in figures
    ]
    assert list(dict.fromkeys(each["row"] for each in figures)) == list(RESTORE_ROWS)
    for each in figures:
        # Between two daemons, whose own memory differs by more than so small a guest takes.
        is_difference = each["name"] == "memory of one more"
        assert each["value"] > 0 or is_difference, each
        assert each["floor"] is None or each["ratio"] > 0, each
        assert (each["met"] is None) == (each["limit"] is None), each
    by_name = {(each["row"], each["name"]): each for each in figures}
    fetched = by_name["clones", "from the store"]
    assert 1 <= fetched["floor"] <= 8.5  # MiB: no more than there are, and requests
    descriptors = by_name["many", "3 at once: descriptors"]
    # one more may be of the connection that has asked whether all guests have left
    assert descriptors["value"] <= descriptors["floor"] + 1
    assert by_name["many", "in turn beside a hostile one, p50"]["limit"] == 1.1
    words = plot.read_text()
    for name in ("clones", "recorded", "hot", "demand only", "1 clone", "2 clones"):
        assert f">{name}<" in words


def test_chosen_rows_as_a_table() -> None:
    ended = bench("--rows", "warm,start", "--guests", "2", "--rounds", "1")
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    limited = [line[0] for line in lines if line and line[-1] in ("met", "missed")]
    assert limited == ["warm", "2", "start"]
    assert "at most 3x" in ended.stdout


def test_guests_that_share_the_cache() -> None:
    ended = bench(*SMALL, "--rows", "warm,many", "--kind", "shared", "--json")
    assert ended.returncode == 0, ended.stderr
    last = json.loads(ended.stdout.splitlines()[-1])
    assert {each["row"] for each in last["restore"]["figures"]} == {"warm", "many"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rows", "cold"), "cold"),
        (
            ("--rows", "clones", "--size", "1M", "--working-set", "2M"),
            "more to touch than",
        ),
        (("--rows", "clones", "--size", "100K"), "102400 bytes are not whole pieces of 65536"),
    ],
)
def test_what_makes_no_sense_is_one_line(options: tuple[str, ...], words: str) -> None:
    ended = bench(*options)
    assert ended.returncode == 2
    assert words in ended.stderr.splitlines()[-1]


async def test_guests_notice_a_wrong_page(tmp_path: Path) -> None:
    with Source(1 << 20) as source:
        async with bare_handler(source, tmp_path) as bare:
            pages = [[5, 200], [7, 5]]
            async with arriving(bare, source.size, pages) as arrival:
                touched = await arrival.go()
                assert arrival.samples[-1][1] >= 4 * 4096
            assert [len(guest.ended) for guest in touched] == [2, 2]
            assert all(0 < guest.first <= guest.last for guest in touched)
            Path(source.spec).write_bytes(bytes(1 << 20))
            with pytest.raises(PagenetError, match="2 pages of a guest of the bench were wrong"):
                async with arriving(bare, source.size, pages, in_turn=True) as arrival:
                    await arrival.go()


async def test_a_handler_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(PagenetError, match="could not be restored: No such file"):
        async with arriving(tmp_path / "none", 1 << 20, [[0]]) as arrival:
            await arrival.go()


@contextmanager
def _sending(size: int) -> Iterator[str]:
    """The URL of who sends so many bytes to each that connects."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def send() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(bytes(size))

        thread = threading.Thread(target=send)
        thread.start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


async def test_a_relay_limits_the_rate_and_counts() -> None:
    """At least as long as the rate and the delay say: how fast a machine is does not matter."""
    size, rate, delay = 1 << 20, 8 << 20, 0.01
    with _sending(size) as url:
        async with relayed(url, delay, rate) as relay:
            began = trio.current_time()
            stream = await trio.open_tcp_stream("127.0.0.1", relay.port)
            got = 0
            async with stream:
                async for data in stream:
                    got += len(data)
            assert got == size
            assert trio.current_time() - began >= size / rate + delay
            assert await relay.answered() == size


def test_pieces_and_spans() -> None:
    pages = pieces_of(1 << 20, 256 << 10, 64 << 10)
    assert len(set(pages)) == len(pages) == 64
    assert all(pages[at] % 16 == 0 for at in range(0, 64, 16))
    assert sum(span.length for span in spans_of(pages, 4096, 64 << 10, 1 << 20)) == 256 << 10
    assert spans_of([3, 1, 300], 4096, 1 << 20, (1 << 20) + (1 << 19)) == [
        Span(0, 1 << 20),
        Span(1 << 20, 1 << 19),
    ]


def test_a_limit_is_of_the_ratio_or_of_the_value() -> None:
    assert Figure("row", "of a ratio", 3, floor=2, limit=1.5).met
    assert not Figure("row", "of a ratio", 3, floor=2, limit=1.4).met
    assert Figure("row", "at least", 6, floor=2, limit=3, at_least=True).met
    assert not Figure("row", "of the value", 17, limit=16).met
    assert Figure("row", "no limit", 17).met is None
    RestoreOptions().check()
