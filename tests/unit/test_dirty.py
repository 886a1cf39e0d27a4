"""pagenet/dirty: rates and working sets, the forecast, recordings on disk, ranges of addresses."""

from __future__ import annotations

import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagenet import Block, PagenetError, Region, UsageError
from pagenet.dirty import (
    DirtyRecorder,
    DirtyRecording,
    History,
    Second,
    dirty_file,
    forecast,
    load_dirty,
    parse_range,
    write_dirty,
)
from pagenet.dirty._qemu import measured

PAGE = 4096
REGION = Region([Block("ram", 100 * PAGE), Block("huge", 4 << 20, 2 << 20)])


def second(*pages: int, early: int = 0, seconds: float = 1.0) -> Second:
    return Second(seconds, sum(1 << page for page in pages), early, 0.1)


def pages(first: int, count: int) -> int:
    return ((1 << count) - 1) << first


# ---- rates and working sets ----


def test_bytes_are_those_of_each_block() -> None:
    history = History(REGION)
    assert history.bytes_in(0) == 0
    assert history.bytes_in(1 << 99 | 1) == 2 * PAGE
    assert history.bytes_in(1 << 99 | 1 << 100) == PAGE + (2 << 20)
    assert history.bytes_in(pages(0, 102)) == REGION.size


def test_figures_of_each_second() -> None:
    history = History(REGION)
    first = history.add(second(1, 2, seconds=2.0))
    assert (first.at, first.rate, first.windows) == (2.0, PAGE, (2 * PAGE, None, None))
    for number in range(8):
        assert history.add(second(number)).windows == (PAGE, None, None)
    tenth = history.add(second(50))
    assert (tenth.at, tenth.windows) == (11.0, (PAGE, 9 * PAGE, None))
    assert history.mean_rate == PAGE
    for _ in range(49):
        history.add(second())
    assert history.add(second()).windows == (0, 0, 9 * PAGE)


def test_old_seconds_are_dropped_but_not_the_last_minute() -> None:
    large = Region([Block("ram", 1 << 40)])
    history = History(large)
    for _ in range(200):
        history.add(second(1))
    assert 60 <= len(history.seconds) < 200
    assert history.mean_rate == PAGE


def test_what_is_written_in_a_time() -> None:
    """10 pages in the first tenth, 20 in a second, 30 in two, and no more."""
    bits = [pages(0, 20), pages(10, 20)] * 4
    history = History(REGION, [Second(1.0, each, 10 * PAGE, 0.1) for each in bits])
    for duration, count in [(0, 0), (0.05, 5), (0.1, 10), (0.55, 15), (1, 20), (1.5, 25), (2, 30)]:
        assert history.written_in(duration) == pytest.approx(count * PAGE), duration
    assert history.written_in(5.5) == history.written_in(1000) == pytest.approx(30 * PAGE)
    assert History(REGION).written_in(1) == 0


def test_a_growing_working_set_is_extrapolated_up_to_the_region() -> None:
    history = History(REGION, [second(10 * n, 10 * n + 1, early=PAGE) for n in range(5)])
    assert history.written_in(10) == pytest.approx(20 * PAGE)
    assert history.written_in(1e9) == REGION.size


# ---- the forecast ----


def region_of(mib: int) -> Region:
    return Region([Block("ram", mib << 20)])


def test_nothing_seen_is_no_forecast() -> None:
    assert forecast(History(REGION), 1e6) is None


def test_guest_that_writes_nothing() -> None:
    history = History(region_of(100), [Second(1.0, 0, 0, 0.1)] * 200)
    found = forecast(history, 1 << 20)
    assert found is not None
    assert (found.precopy_rounds, found.precopy_seconds) == (1, 100)
    assert (found.postcopy_seconds, found.hybrid_rest, found.hybrid_rounds) == (100, 0, 1)
    assert not found.is_extrapolated


def test_hot_set_that_is_written_all_the_time() -> None:
    """10 MiB over and over: at 1 MiB/s never done, at 100 MiB/s after a round."""
    bits, size = pages(0, 2560), 10 << 20
    history = History(region_of(100), [Second(1.0, bits, size, 0.1)] * 20)
    slow = forecast(history, 1 << 20)
    assert slow is not None
    assert (slow.precopy_rounds, slow.precopy_seconds, slow.precopy_bytes) == (None, None, None)
    assert (slow.hybrid_rounds, slow.hybrid_rest) == (1, size)
    assert slow.is_extrapolated
    fast = forecast(history, 100 << 20)
    assert fast is not None
    assert fast.precopy_rounds == 1
    assert fast.precopy_seconds == pytest.approx(1.1)
    assert fast.hybrid_seconds == 1.0
    assert fast.hybrid_rest_seconds == pytest.approx(0.1)


def test_rounds_that_become_shorter() -> None:
    """Each second 2560 other pages: 10 MiB/s, over a link of 20 MiB/s. Each round is half of the
    one before: 5, 2.5, 1.25, 0.625, 0.3125 and 0.156 s."""
    seconds = [Second(1.0, pages(2560 * number, 2560), 1 << 20, 0.1) for number in range(10)]
    found = forecast(History(region_of(100), seconds), 20 << 20)
    assert found is not None
    assert found.precopy_rounds == 5
    assert found.precopy_seconds == pytest.approx(9.84, abs=0.01)
    assert found.precopy_bytes == pytest.approx(9.84 * (20 << 20), rel=0.01)
    later = forecast(History(region_of(100), seconds), 20 << 20, downtime=3)
    assert later is not None
    assert later.precopy_rounds == 1


def test_guest_that_writes_faster_than_the_link() -> None:
    seconds = [Second(1.0, pages(2560 * number, 2560), 1 << 20, 0.1) for number in range(10)]
    found = forecast(History(region_of(100), seconds), 5 << 20)
    assert found is not None
    assert found.precopy_rounds is None
    assert found.hybrid_rounds == 1
    assert found.hybrid_rest == 100 << 20


@given(st.lists(st.integers(0, (1 << 102) - 1), min_size=1, max_size=80), st.floats(1, 1e12))
def test_every_forecast_makes_sense(bits: list[int], rate: float) -> None:
    plain = History(REGION)
    seconds = [Second(1.0, each, plain.bytes_in(each) // 2, 0.1) for each in bits]
    found = forecast(History(REGION, seconds), rate)
    assert found is not None
    assert 0 <= found.hybrid_rest <= REGION.size * 1.001
    assert found.hybrid_rounds >= 1
    if found.precopy_rounds is not None:
        assert found.precopy_seconds is not None
        assert found.precopy_seconds >= found.postcopy_seconds


# ---- recordings ----


def saved(recording: DirtyRecording, path: Path) -> bytes:
    with dirty_file(path) as file:
        write_dirty(recording, file)
    return path.read_bytes()


def recorded(*seconds: Second, region: Region = REGION) -> DirtyRecording:
    recorder = DirtyRecorder(region)
    for each in seconds:
        recorder.add(each)
    return recorder.recording()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


SECONDS = (second(0, 7, 101), second(), second(*range(102), early=PAGE), second(3, seconds=1.5))


def test_recording_comes_back(path: Path) -> None:
    saved(recorded(*SECONDS), path)
    loaded = load_dirty(path)
    assert loaded == recorded(*SECONDS)
    assert list(loaded.history().seconds) == list(SECONDS)
    assert path.stat().st_mode & 0o777 == 0o600


def test_recording_is_small(path: Path) -> None:
    """16 GiB, of which little is written: under 4 KiB a second."""
    region = Region([Block("ram", 16 << 30)])
    assert len(saved(recorded(*[second(1, 10**6)] * 10, region=region), path)) < 40 << 10


bitmaps = st.lists(st.integers(0, (1 << 102) - 1), max_size=8)


@given(bitmaps)
def test_any_recording_comes_back(
    tmp_path_factory: pytest.TempPathFactory, bits: list[int]
) -> None:
    path = tmp_path_factory.mktemp("dirty") / "file"
    seconds = [Second(1.0, each, 0, 0.1) for each in bits]
    saved(recorded(*seconds), path)
    assert list(load_dirty(path).history().seconds) == seconds


def test_truncated_anywhere_is_refused(path: Path) -> None:
    whole = saved(recorded(*SECONDS), path)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(UsageError):
            load_dirty(path)


@given(st.binary(min_size=1, max_size=20))
def test_garbage_behind_it_is_refused(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes
) -> None:
    path = tmp_path_factory.mktemp("dirty") / "file"
    whole = saved(recorded(*SECONDS), path)
    path.write_bytes(whole + garbage)
    with pytest.raises(UsageError, match="not a recording, or a broken one"):
        load_dirty(path)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_makes_sense(
    tmp_path_factory: pytest.TempPathFactory, at: int, by: int
) -> None:
    path = tmp_path_factory.mktemp("dirty") / "file"
    body = bytearray(saved(recorded(*SECONDS), path))
    body[at % len(body)] ^= by
    path.write_bytes(body)
    with suppress(UsageError):
        loaded = load_dirty(path)
        assert all(each.bits >> loaded.region.pages == 0 for each in loaded.history().seconds)


def fields(**changes: Any) -> bytes:
    bitmap = zlib.compress(bytes(13))
    usual = {
        "format": "pagenet-dirty",
        "version": 1,
        "blocks": [["ram", 100 * PAGE, PAGE]],
        "seconds": [[1_000_000, 0, 100_000, bitmap]],
    }
    return bytes(msgpack.packb({**usual, **changes}))


def row(*changes: tuple[int, object]) -> list[list[object]]:
    made: list[object] = [1_000_000, 0, 100_000, zlib.compress(bytes(13))]
    for index, value in changes:
        made[index] = value
    return [made]


def test_recording_by_hand(path: Path) -> None:
    path.write_bytes(fields())
    assert list(load_dirty(path).history().seconds) == [second()]


@pytest.mark.parametrize(("body", "reason"), [
    (fields(format="pagenet-touches"), "is not a recording of pagenet's"),
    (fields(version=2), "of version 2: this pagenet reads version 1"),
    (fields(version="1"), "its version is no number"),
    (fields(blocks=5), "its blocks make no sense"),
    (fields(blocks=[]), "a region has 1 to"),
    (fields(blocks=[["ram", 100 * PAGE]]), "its blocks make no sense"),
    (fields(blocks=[5]), "is a broken recording"),
    (fields(blocks=[["ram", 100 * PAGE, 3]]), "page size 3"),
    (fields(blocks=[["ram", 1 << 60, PAGE]]), "pages"),
    (fields(seconds={}), "its blocks make no sense"),
    (fields(seconds=[5]), "is a broken recording"),
    (fields(seconds=row((0, 0))), "its seconds make no sense"),
    (fields(seconds=row((0, 1 << 60))), "its seconds make no sense"),
    (fields(seconds=row((1, -1))), "its seconds make no sense"),
    (fields(seconds=row((1, 101 * PAGE))), "its seconds make no sense"),
    (fields(seconds=row((2, 2_000_000))), "its seconds make no sense"),
    (fields(seconds=row((3, b""))), "a bitmap has another size"),
    (fields(seconds=row((3, "text"))), "its seconds make no sense"),
    (fields(seconds=row((3, zlib.compress(bytes(12))))), "a bitmap has another size"),
    (fields(seconds=row((3, zlib.compress(bytes(14))))), "a bitmap has another size"),
    (fields(seconds=row((3, zlib.compress(bytes(1 << 24))))), "a bitmap has another size"),
    (fields(seconds=row((3, zlib.compress(bytes(13)) + b"x"))), "a bitmap has another size"),
    (fields(seconds=row((3, zlib.compress(bytes(13))[:-1]))), "a bitmap has another size"),
    (fields(seconds=row((3, zlib.compress(b"\xff" * 13)))), "a bitmap has another size"),
    (fields(seconds=row((3, b"not compressed"))), "is a broken recording"),
])  # fmt: skip
def test_recordings_that_make_no_sense(path: Path, body: bytes, reason: str) -> None:
    path.write_bytes(body)
    with pytest.raises(UsageError, match=reason) as raised:
        load_dirty(path)
    assert "\n" not in str(raised.value)


def test_recording_that_would_cost_too_much(path: Path) -> None:
    """Few bytes on disk, and 16 GiB of bitmaps: refused before any of them is unpacked."""
    path.write_bytes(fields(blocks=[["ram", 1 << 45, PAGE]], seconds=row() * 20))
    with pytest.raises(UsageError, match="more seconds than any that pagenet writes"):
        load_dirty(path)


def test_recorder_that_is_full() -> None:
    recorder = DirtyRecorder(Region([Block("ram", 1 << 40)]))
    count = 0
    while not recorder.is_full:
        recorder._rows.append((1, 0, 1, b""))
        count += 1
    assert count == (4 << 30) // (32 << 20)


# ---- QEMU's own figure ----


def test_answers_of_qemu() -> None:
    assert measured({"status": "unstarted"}) is None
    assert measured({"status": "measuring", "calc-time": 1}) is None
    assert measured({"status": "measured", "dirty-rate": 3, "calc-time": 1}) == 3 << 20


@pytest.mark.parametrize("answer", [
    None, 5, [], {}, {"status": 5}, {"status": []}, {"status": "measured"},
    {"status": "measured", "dirty-rate": "3"}, {"status": "measured", "dirty-rate": -1},
    {"status": "measured", "dirty-rate": True}, {"status": "measured", "dirty-rate": 1 << 90},
])  # fmt: skip
def test_answers_that_make_no_sense(answer: object) -> None:
    with pytest.raises(PagenetError, match="makes no sense"):
        measured(answer)


# ---- ranges of addresses ----


@pytest.mark.parametrize(("text", "found"), [
    ("0x1000-0x3000", (0x1000, 0x2000)),
    ("0x1000+0x3000", (0x1000, 0x3000)),
    ("4096+4096", (4096, 4096)),
])  # fmt: skip
def test_ranges(text: str, found: tuple[int, int]) -> None:
    assert parse_range(text) == found


@pytest.mark.parametrize(
    "text", ["", "-", "5", "5-", "5-3", "5+0", "x+1", "1++1", "0x10-0xzz", f"1+{1 << 60}", "-5+5"]
)
def test_no_ranges(text: str) -> None:
    with pytest.raises(UsageError, match="is no range of addresses"):
        parse_range(text)


@given(st.text(max_size=40))
def test_any_text_is_a_range_or_refused(text: str) -> None:
    with suppress(UsageError):
        start, size = parse_range(text)
        assert start >= 0
        assert size > 0
