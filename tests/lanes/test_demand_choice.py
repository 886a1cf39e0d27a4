"""native/demand_choice.c: whether pages that a thread waits for come compressed, on links made of
numbers; and lanes that use it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from lanes import Driver, Memory, Rig, wait_until

from pagenet._native import DemandChoice
from pagenet.protocol import Encoding

PAGE = 4096
GBIT = 1e9 / 125e6  # ns a byte on the wire
BOTH = 1 << Encoding.RAW | 1 << Encoding.ZERO | 1 << Encoding.LZ4


class Path:
    """Pages one after the other, over a link with a time for each byte and a delay, both in ns; and
    what LZ4 leaves of each page."""

    def __init__(
        self,
        link: float,
        delay: float,
        left: Callable[[], float],
        noise: float = 0.0,
        seed: int = 1,
    ) -> None:
        self.link, self.delay, self.left, self.noise = link, delay, left, noise
        self.choice, self.order = DemandChoice(), random.Random(seed)
        self.packed = 0

    def page(self, packs: bool) -> float:
        left = self.left() if packs else 1.0
        took = self.delay + left * PAGE * self.link + packs * 8_000 + (left < 1) * 2_000
        if self.order.random() < self.noise:  # it waited for a processor
            took += self.order.expovariate(1 / 500_000)
        return took

    def run(self, pages: int, mode: str = "auto") -> float:
        """ns for ``pages`` pages."""
        total = 0.0
        for _ in range(pages):
            packs = mode == "lz4" or (mode == "auto" and self.choice.packs)
            took = self.page(packs)
            total += took
            self.packed += packs
            if mode == "auto":
                self.choice.came(packs, int(took))
        return total


def times(pages: int, *path: object, **more: object) -> dict[str, float]:
    return {mode: Path(*path, **more).run(pages, mode) for mode in ("auto", "lz4", "none")}  # type: ignore[arg-type]


def always(left: float) -> Callable[[], float]:
    return lambda: left


def mixed() -> Callable[[], float]:
    order = random.Random(3)
    return lambda: order.choice([0.4, 0.4, 1.0])


LINKS = {
    "10 Mbit/s": 100 * GBIT,
    "100 Mbit/s": 10 * GBIT,
    "1 Gbit/s": GBIT,
    "10 Gbit/s": GBIT / 10,
    "memory": 0.1,
}


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("delay", [40_000, 60_000, 2_000_000])
@pytest.mark.parametrize(
    "left", [always(0.4), always(1.0), mixed()], ids=["text", "random", "mixed"]
)
@pytest.mark.parametrize("link", LINKS)
def test_never_much_slower_than_none_and_close_to_the_better(
    link: str, left: Callable[[], float], delay: float, noise: float
) -> None:
    took = times(10_000, LINKS[link], delay, left, noise=noise)
    assert took["auto"] <= 1.03 * took["none"]
    assert took["auto"] <= 1.1 * min(took.values())


def test_program_text_on_a_slow_link_comes_twice_as_fast() -> None:
    took = times(5000, LINKS["100 Mbit/s"], 50_000, always(0.4))
    assert took["auto"] < 0.65 * took["none"]
    took = times(5000, LINKS["10 Mbit/s"], 50_000, always(0.4))
    assert took["auto"] < 0.45 * took["none"]


@pytest.mark.parametrize("link", ["10 Gbit/s", "memory"])
def test_where_a_page_is_here_at_once_nothing_is_tried(link: str) -> None:
    path = Path(LINKS[link], 50_000, always(0.4))
    path.run(20_000)
    assert path.packed == 0


def test_trials_that_show_nothing_become_seldom() -> None:
    path = Path(LINKS["100 Mbit/s"], 50_000, always(1.0))
    path.run(1000)
    first = path.packed
    path.run(100_000)
    assert first > 0
    assert path.packed < 10 * 64


def test_a_link_that_becomes_faster_and_slower() -> None:
    path = Path(LINKS["100 Mbit/s"], 20_000, always(0.4))
    for link, packed in [("100 Mbit/s", True), ("memory", False), ("100 Mbit/s", True)]:
        path.link = LINKS[link]
        path.run(5000)
        before = path.packed
        path.run(1000)
        assert (path.packed - before > 800) if packed else (path.packed - before < 200)


def test_what_was_asked_for_before_a_change_says_nothing() -> None:
    choice = DemandChoice()
    while not choice.packs:
        choice.came(packs=False, nanoseconds=500_000)
    for _ in range(1000):
        choice.came(packs=False, nanoseconds=1)
    assert choice.packs
    for _ in range(64):
        choice.came(packs=True, nanoseconds=400_000)
    assert choice.packs


@pytest.mark.parametrize("lane", ["native", "trio"])
def test_lanes_ask_for_what_comes_sooner(lane: Driver) -> None:
    """The peer is slow to send pages that are not compressed."""
    with Rig(Memory("copy", 400, 8, None), lane, start=("demand",), encodings=BOTH) as rig:
        packed = []
        for page in range(200):
            touch = rig.touch(page)
            rig.demand.wait_asked(page + 1)
            (asked,) = rig.demand.open
            packed.append(not asked.request.encodings & 1 << Encoding.RAW)
            time.sleep(0.0005 if packed[-1] else 0.003)
            rig.demand.send(rig.demand.answer(asked, 1, zero=False, pack=packed[-1])[1])
            touch.join()
        assert not any(packed[:64])
        assert all(packed[65:])
        wait_until(lambda: rig.count("lz4_runs") == sum(packed), "all of those came compressed")
