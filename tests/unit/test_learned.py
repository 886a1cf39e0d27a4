"""pagenet/background/learned.py: what guests wait for, learned from restore to restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagenet import Block, Region, UsageError
from pagenet.background import learned
from pagenet.background.learned import (
    Learned,
    LearnedSet,
    Restore,
    StartUp,
    Waits,
    learned_of,
    load_learned,
)
from pagenet.background.schedule import make_schedule
from pagenet.region import Run
from pagenet.residency import Residency, State

PAGES = 4096
REGION = Region([Block("one", PAGES * 4096)])


def restore(waited: dict[int, float], untouched: set[int] | None = None) -> Restore:
    return Restore(waited, untouched or set())


def test_order_is_that_of_the_mean_wait() -> None:
    known = LearnedSet.of(REGION)
    known.learn(restore({7: 10.0, 3: 20.0, 9: 5000.0}))
    known.learn(restore({3: 0.0, 7: 30.0}))
    assert known.order() == [3, 7, 9]
    assert known.order(start_up=True) == [3, 7]
    assert (known.pages[3], known.restores) == (Learned(10.0, 2, 0), 2)


def test_what_is_not_waited_for_falls_out() -> None:
    known = LearnedSet.of(REGION)
    known.learn(restore({1: 1.0, 2: 1.0}))
    for _ in range(learned.VAIN - 1):
        known.learn(restore({1: 1.0}, {2, 3}))
        assert 2 in known.pages
    known.learn(restore({1: 1.0}, {2}))
    assert list(known.pages) == [1]


def test_a_page_that_was_brought_tells_nothing() -> None:
    known = LearnedSet.of(REGION)
    known.learn(restore({1: 1.0}))
    for _ in range(100):
        known.learn(restore({}))
    assert known.pages == {1: Learned(1.0, 1, 0)}


def test_each_page_is_a_probe_in_its_turn() -> None:
    known = LearnedSet.of(REGION)
    known.learn(restore(dict.fromkeys(range(1000), 1.0)))
    seen = dict.fromkeys(range(1000), 0)
    for known.restores in range(1, 1 + 4 * learned.FEW_PROBES):
        probes = known.probes()
        assert 150 < len(probes) < 350  # a quarter
        for page in probes:
            seen[page] += 1
    assert set(seen.values()) == {4}
    for it in known.pages.values():
        it.hits = learned.FEW
    assert 30 < len(known.probes()) < 100  # a sixteenth


def test_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "MOST_PAGES", 10)
    known = LearnedSet.of(REGION)
    for _ in range(3):
        known.learn(restore({page: float(page) for page in range(5)}))
    known.learn(restore(dict.fromkeys(range(100, 200), 1.0)))
    assert len(known.pages) == 10
    assert set(range(5)) <= set(known.pages)


# ---- the file ----

SETS = st.builds(
    lambda pages: LearnedSet((("one", PAGES * 4096),), 9, pages),
    st.dictionaries(
        st.integers(0, PAGES - 1),
        st.builds(
            Learned, st.integers(0, 1 << 40).map(float), st.integers(1, 9), st.integers(0, 9)
        ),
        max_size=50,
    ),
)


@given(SETS)
def test_comes_back_as_it_was(known: LearnedSet) -> None:
    assert learned_of(known.encode(), "it") == known


def test_file(tmp_path: Path) -> None:
    path, known = tmp_path / "set", LearnedSet.of(REGION)
    known.learn(restore(dict.fromkeys(range(100, 200), 3.0)))
    path.write_bytes(known.encode())
    assert load_learned(path) == known
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=f"^{path}"):
            load_learned(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(UsageError, match="broken one"):
        load_learned(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"restores": 0},
        {"restores": True},
        {"restores": "x"},
        {"blocks": 3},
        {"blocks": [["one", 4097]]},
        {"pages": [0, 1, 1, 1]},
        {"pages": [-1, 1, 1, 1, 0]},
        {"pages": [0, PAGES + 1, 1, 1, 0]},
        {"pages": [0, 0, 1, 1, 0]},
        {"pages": [0, 1, -1, 1, 0]},
        {"pages": [0, 1, 1, 0, 0]},
        {"pages": [0, 1, 1, 2, 0]},
        {"pages": [0, 1, 1, 1, 2]},
        {"pages": [0, 1, 1.5, 1, 0]},
        {"pages": [0, 1, 1 << 60, 1, 0]},
    ],
)
def test_fields_that_make_no_sense(wrong: dict[str, Any]) -> None:
    known = LearnedSet.of(REGION)
    known.learn(restore({1: 1.0}))
    with pytest.raises(UsageError, match=r"^it is a broken learned set"):
        learned_of(msgpack.packb({**msgpack.unpackb(known.encode()), **wrong}), "it")


@given(st.binary(max_size=100))
def test_whatever_a_file_holds(tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "set"
    path.write_bytes(body)
    with pytest.raises(UsageError):
        load_learned(path)
    path.write_bytes(msgpack.packb({"format": learned.FORMAT, "version": 1, "pages": body}))
    with pytest.raises(UsageError):
        load_learned(path)


# ---- a restore ----


def test_waits_are_timed_from_the_beginning() -> None:
    now = 5.0
    waits = Waits(REGION, lambda: now)
    waits.note([3])
    now = 5.5
    waits.note([3, 4])
    assert waits.waited == {3: 0.0, 4: 500.0}


def test_waits_for_large_pages() -> None:
    region = Region([Block("one", PAGES * 4096, 16384)])
    waits = Waits(region, lambda: 0.0)
    waits.note([1])
    assert list(waits.waited) == [4, 5, 6, 7]


def test_start_up_in_order_and_then_the_rest() -> None:
    with Residency(PAGES) as residency:
        residency.set(Run(10, 2), State.RESIDENT)
        rest = make_schedule("linear", REGION, residency)
        order = StartUp(REGION, residency, [50, 51, 52, 10, 11, 5], rest)
        assert [order.next_run(8192) for _ in range(4)] == [
            Run(50, 2),
            Run(52, 1),
            Run(5, 1),
            Run(0, 2),
        ]
        alone = StartUp(REGION, residency, [5])
        assert [alone.next_run(4096), alone.next_run(4096)] == [Run(5, 1), None]
