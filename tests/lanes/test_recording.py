"""The order in which pages were waited for: recorded, merged, and replayed."""

from __future__ import annotations

import random
from pathlib import Path

import msgpack
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import pagenet
from pagenet import Block, Region, Run, UsageError
from pagenet.background.recording import Recorder, Recording, load_recording
from pagenet.background.schedule import Recorded
from pagenet.cli.pull import main
from pagenet.residency import Residency, State
from pagenet.transport import LaneKind

MIB = 1 << 20
PAGE = 4096
REGION = Region([Block("low", MIB), Block("high", 2 * MIB)])


def recorded(*pages: int, region: Region = REGION) -> Recording:
    recorder = Recorder(region)
    recorder.note(pages)
    return recorder.recording()


@given(st.lists(st.lists(st.integers(0, REGION.pages - 1), max_size=80), min_size=1, max_size=4))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, runs: list[list[int]]
) -> None:
    path = tmp_path_factory.mktemp("recording") / "touches"
    recording = recorded(*runs[0])
    for pages in runs[1:]:
        recording = recording.merge(recorded(*pages))
    recording.save(path)
    assert load_recording(path) == recording
    assert set(recording.order) == {page for pages in runs for page in pages}


def test_a_page_is_recorded_at_its_first_touch() -> None:
    assert recorded(9, 3, 9, 4, 3).pages_in(REGION) == [9, 3, 4]


def test_it_is_small(tmp_path: Path) -> None:
    pick = random.Random(1)
    path = tmp_path / "touches"
    recorded(
        *[pick.randrange(1 << 18) for _ in range(20_000)], region=Region([Block("ram", 1 << 30)])
    ).save(path)
    assert path.stat().st_size < 8 * 20_000


def test_runs_are_merged_by_their_mean_rank_and_strays_come_last() -> None:
    merged = recorded(2, 1, 3, 4).merge(recorded(2, 1, 3, 4)).merge(recorded(1, 2, 3, 4, 99))
    assert merged.pages_in(REGION) == [2, 1, 3, 4, 99]
    assert (merged.runs, merged.seen) == (3, (3, 3, 3, 3, 1))


def test_a_region_may_have_changed() -> None:
    pages = (5, 255, 256, 300, 256 + 511)
    smaller = Region([Block("new", MIB), Block("high", MIB), Block("low", MIB // 2)])
    assert recorded(*pages).pages_in(smaller) == [512 + 5, 256, 300]
    assert recorded(*pages).merge(recorded(7, region=smaller)).pages_in(smaller) == [
        517,
        7,
        256,
        300,
    ]
    huge = REGION.with_page_sizes([PAGE, 2 * MIB])
    assert recorded(*pages).pages_in(huge) == [5, 255, 256]
    assert recorded(256, region=huge).pages_in(REGION) == list(range(256, 768))


GOOD: dict[str, object] = {
    "format": "pagenet-touches",
    "version": 1,
    "runs": 1,
    "blocks": [["ram", MIB]],
    "touches": [3, 2, 1],
}
WRONG: list[dict[str, object]] = [
    {"blocks": [["ram", 5]]},
    {"blocks": 7},
    {"blocks": [["ram"]]},
    {"blocks": [[b"ram", MIB]]},
    {"runs": 0},
    {"runs": "many"},
    {"touches": [1, 2]},
    {"touches": [-1, 2, 1]},
    {"touches": [255, 2, 1]},
    {"touches": [0, 0, 1]},
    {"touches": [0, 1, 2]},
    {"touches": [0, 1 << 60, 1]},
    {"touches": [0, 1.5, 1]},
    {"touches": [True, 1, 1]},
    {"touches": {}},
]
ODD: list[object] = [[], {}, None, 1, b"x"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not a recording"),
        (b"\x93\x01", "not a recording"),
        (msgpack.packb(GOOD)[:-1], "not a recording"),
        (msgpack.packb(GOOD) + b"\x00", "not a recording"),
        (msgpack.packb([1, 2]), "not a recording of pagenet's"),
        (msgpack.packb({"format": "another"}), "not a recording of pagenet's"),
        *[
            (msgpack.packb({**GOOD, "format": other}), "not a recording of pagenet's")
            for other in ODD
        ],
        (msgpack.packb({**GOOD, "version": 2}), "version 2: this pagenet reads version 1"),
        (msgpack.packb({**GOOD, "format": [1]}), "not a recording of pagenet's"),
        (msgpack.packb({**GOOD, "format": {}}), "not a recording of pagenet's"),
        (msgpack.packb({**GOOD, "version": "1\n"}), "its version is no number"),
        (
            b"\x82\xa6format\xafpagenet-touches\xa7version" + b"\x91" * 1020 + b"\0",
            "its version is no number",
        ),
        *[(msgpack.packb({**GOOD, **wrong}), "broken recording") for wrong in WRONG],
    ],
)
def test_a_broken_file_is_one_line(
    body: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "touches"
    path.write_bytes(body)
    with pytest.raises(UsageError, match=words):
        load_recording(path)
    command = ["unix:/nowhere", "--into", str(tmp_path / "copy")]
    for option in (["--background", f"recorded={path}"], ["--record", str(path)]):
        assert main([*command, *option]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert path.read_bytes() == body


@pytest.mark.parametrize(
    "body", [[[]] * 30, [[[]] * 3] * 8, [{}] * 30, [{str(number): number} for number in range(15)]]
)
def test_a_file_has_no_more_values_than_are_ever_written(
    body: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "touches"
    path.write_bytes(msgpack.packb({**GOOD, "more": body}))
    load_recording(path)
    monkeypatch.setattr("pagenet.background.recording._MOST_VALUES", 31)
    with pytest.raises(UsageError, match="more values than any that pagenet writes"):
        load_recording(path)


def test_no_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "unix:/nowhere",
                "--into",
                str(tmp_path / "x"),
                "--background",
                f"recorded={tmp_path / 'none'}",
            ]
        )
        == 2
    )
    assert "cannot read the recording" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["unix:/nowhere", "--into", str(tmp_path / "x"), "--background", "recorded="])


def take(schedule: Recorded, residency: Residency, runs: int) -> list[Run]:
    taken = []
    for _ in range(runs):
        if (run := schedule.next_run(4 * MIB)) is not None:
            residency.replace(run, State.MISSING, State.COMING)
            taken.append(run)
    return taken


def test_it_is_replayed_then_what_is_beside_it_then_the_rest() -> None:
    region = Region([Block("ram", 8 * MIB)])
    with Residency(region.pages) as residency:
        schedule = Recorded(region, residency, [1000, 200, 201, 202, 5])
        residency.set(Run(5, 1), State.RESIDENT)
        assert take(schedule, residency, 2) == [Run(1000, 1), Run(200, 3)]
        beside = take(schedule, residency, 5)
        assert beside == [Run(960, 40), Run(1001, 23), Run(192, 8), Run(203, 53), Run(0, 5)]
        rest = take(schedule, residency, 99)
        assert sum(run.count for run in beside + rest) == region.pages - 5


def test_a_run_that_goes_elsewhere_is_followed_there() -> None:
    region = Region([Block("ram", 64 * MIB)])
    with Residency(region.pages) as residency:
        schedule = Recorded(region, residency, range(0, 8000, 2))
        take(schedule, residency, 3)
        schedule.note_faults([10_000], 1.0)
        where = [run.first // 64 == 10_000 // 64 for run in take(schedule, residency, 2)]
        assert where == [True, False]


@pytest.mark.parametrize("lane", ["native", "trio"])
async def test_a_transfer_is_recorded_and_replayed(lane: LaneKind, tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "touches"
    source.write_bytes(random.Random(1).randbytes(4 * MIB))
    pages = random.Random(2).sample(range(1024), 60)
    for run in (1, 2):
        memory = pagenet.OwnMemory("anonymous")
        try:
            async with (
                pagenet.serve(str(source), listen="tcp://127.0.0.1:0") as server,
                pagenet.pull(
                    server.uri,
                    memory,
                    lane=lane,
                    background="off",
                    prefetch=(0, 0),
                    record=str(path),
                ) as transfer,
            ):
                for page in pages:
                    await memory.read(page * PAGE, 1)
                transfer.set_background("linear")
                with trio.fail_after(20):
                    await transfer.wait_complete()
        finally:
            memory.close()
        recording = load_recording(path)
        assert (recording.runs, list(recording.order)) == (run, pages)
    memory = pagenet.OwnMemory("anonymous")
    try:
        async with (
            pagenet.serve(str(source), listen="tcp://127.0.0.1:0") as server,
            pagenet.pull(
                server.uri, memory, lane=lane, background=f"recorded={path}", max_bandwidth=1
            ) as transfer,
        ):
            assert transfer.background == "recorded"
            # one page, until a change of the limit lets the next one through
            for step in range(10):
                with trio.fail_after(20):
                    while (done := transfer.statistics().done) <= step:  # noqa: ASYNC110
                        await trio.sleep(0.001)
                transfer.set_max_bandwidth(1)
            came = [transfer.filling.residency.state(page) is State.RESIDENT for page in pages]
            assert done <= came.count(True) < len(pages)
            assert came == sorted(came, reverse=True)
            transfer.set_max_bandwidth(None)
            with trio.fail_after(20):
                await transfer.wait_complete()
    finally:
        memory.close()
    assert not list(tmp_path.glob("*.partial"))
