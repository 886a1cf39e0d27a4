"""native/choice.c, on links and processors that are made of numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from pagenet._native import Choice

CHUNK, WINDOW, SAMPLE = 256 << 10, 4 << 20, 32 << 10
SECOND = 10**9
GBIT = 1e9 / 125e6  # ns a byte on the wire


@dataclass
class Path:
    """A source that compresses, a link, and a destination that asks for the next chunk when one has
    come.

    All in ns a byte: of the wire ``link``; of pages ``read`` and ``pack`` at the source, ``place``
    and ``unpack`` at the destination. ``left``: the share of each chunk that is left when
    compressed, in turn.
    """

    link: float
    left: Callable[[], float]
    pack: float = 2.0
    read: float = 0.2
    place: float = 0.3
    unpack: float = 0.35
    noise: float = 0.0
    #: the share of chunks before or after which the processor does something else for 4 ms
    stalls: float = 0.0
    choice: Choice = field(default_factory=Choice)
    order: random.Random = field(default_factory=lambda: random.Random(1))

    def __post_init__(self) -> None:
        self.now = SECOND
        self.came: list[float] = []  # when the destination had each chunk
        self.link_free = self.placed = float(self.now)
        self.packed_bytes = self.bytes = self.samples = 0

    def spent(self, nanoseconds: float) -> int:
        return int(nanoseconds * (1 + self.noise * self.order.random()))

    def stall(self) -> int:
        return SECOND // 250 if self.order.random() < self.stalls else 0

    def send(self, mode: str = "auto") -> None:
        """One chunk, once there is room for it in the window."""
        window = WINDOW // CHUNK
        asked = self.came[-window] if len(self.came) >= window else 0.0
        if asked > self.now:
            self.now = int(asked)
            if self.link_free < self.now:  # nothing is in flight
                self.choice.resume(self.now)
        began, left = self.now, self.left()
        self.now += self.stall()
        packing = mode == "lz4" or (mode == "auto" and self.choice.packs)
        cost = self.read
        if packing:
            took = self.spent(self.pack * CHUNK)
            self.choice.tried(CHUNK, int(left * CHUNK) if left < 0.95 else 0, took)
            self.now += took
        elif mode == "auto" and self.choice.wants_sample(began):
            took = self.spent(self.pack * SAMPLE)
            self.choice.tried(SAMPLE, int(left * SAMPLE) if left < 0.95 else 0, took)
            self.now += took
            self.samples += 1
        packing = packing and left < 0.95
        wire = int(CHUNK * left) if packing else CHUNK
        self.now += self.spent(cost * CHUNK)
        self.link_free = max(self.link_free, self.now) + self.spent(self.link * wire)
        self.placed = (
            max(self.placed, self.link_free)
            + self.stall()
            + self.spent((self.place + packing * self.unpack) * CHUNK)
        )
        self.came.append(self.placed)
        self.choice.answered(CHUNK, wire, began, self.now)
        self.packed_bytes += packing * CHUNK
        self.bytes += CHUNK

    def run(self, size: int, mode: str = "auto") -> float:
        """Seconds until ``size`` bytes of pages are in place."""
        start = self.placed
        for _ in range(size // CHUNK):
            self.send(mode)
        return (self.placed - start) / SECOND


def times(size: int, **path: object) -> dict[str, float]:
    return {mode: Path(**path).run(size, mode) for mode in ("auto", "lz4", "none")}  # type: ignore[arg-type]


def always(left: float) -> Callable[[], float]:
    return lambda: left


def mixed(*left: float) -> Callable[[], float]:
    """These values, each for a long stretch."""

    def stretches() -> Iterator[float]:
        order = random.Random(7)
        while True:
            yield from [order.choice(left)] * order.randint(1, 100)

    return stretches().__next__


LINKS = {
    "100 Mbit/s": 10 * GBIT,
    "1 Gbit/s": GBIT,
    "2.5 Gbit/s": GBIT / 2.5,
    "10 Gbit/s": GBIT / 10,
    "memory": 0.15,
}
# A mixture has a position, so each path gets a mixture of its own.
CONTENTS: dict[str, Callable[[], Callable[[], float]]] = {
    "program": lambda: always(0.4),
    "random": lambda: always(1.0),
    "nearly zero": lambda: always(0.02),
    "mixed": lambda: mixed(0.4, 1.0),
    "all kinds": lambda: mixed(0.1, 0.3, 0.6, 0.9, 1.0),
}


@pytest.mark.parametrize("left", CONTENTS)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("noise", [0, 0.5])
def test_close_to_the_better_of_the_two(link: str, left: str, noise: float) -> None:
    pack = 0.1 if left == "random" else 0.5 if left == "nearly zero" else 2.0
    took = {
        mode: Path(LINKS[link], CONTENTS[left](), pack=pack, noise=noise).run(1 << 30, mode)
        for mode in ("auto", "lz4", "none")
    }
    assert took["auto"] <= 1.03 * took["none"]
    assert took["auto"] <= 1.15 * min(took.values()) + 0.25  # it has to measure first


def test_program_text_on_a_gigabit_goes_twice_as_fast() -> None:
    took = times(512 << 20, link=GBIT, left=always(0.4))
    assert took["auto"] < took["none"] / 2


def test_fast_link_costs_not_even_samples() -> None:
    path = Path(0.15, always(0.4))
    path.run(1 << 30)
    assert path.packed_bytes == 0
    assert path.samples == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stalls", [0.01, 0.05, 0.2])
def test_busy_machine_is_not_a_slow_link(stalls: float, seed: int) -> None:
    took = {
        mode: Path(0.15, always(0.4), stalls=stalls, order=random.Random(seed)).run(1 << 30, mode)
        for mode in ("auto", "none")
    }
    assert took["auto"] < 1.25 * took["none"]  # by chance alone they differ by 10 %


def test_what_is_random_is_sampled_seldom_and_never_tried() -> None:
    path = Path(GBIT, always(1.0), pack=0.1)
    seconds = path.run(1 << 30)
    assert path.packed_bytes == 0
    assert path.samples <= seconds / 0.02 + 1


def test_slow_destination_is_not_a_slow_link() -> None:
    """Compressing looks faster and is not: it is tried ever more seldom."""
    path = Path(0.15, always(0.4), place=20)
    path.run(4 << 30)
    assert path.packed_bytes < 0.1 * path.bytes


def test_link_that_becomes_faster_and_slower() -> None:
    path = Path(GBIT, always(0.4))
    path.run(256 << 20)
    assert path.choice.packs
    path.link = 0.1
    path.run(4 << 30)
    assert not path.choice.packs
    path.link = 10 * GBIT
    path.run(64 << 20)
    assert path.choice.packs


def test_memory_that_becomes_random_and_readable_again() -> None:
    left = 0.4
    path = Path(GBIT, lambda: left)
    path.run(256 << 20)
    assert path.choice.packs
    left = 1.0
    path.run(64 << 20)
    assert not path.choice.packs
    left = 0.4
    path.run(64 << 20)
    assert path.choice.packs


@pytest.mark.parametrize(
    ("link", "packed"), [(10 * GBIT, True), (GBIT, True), (GBIT / 2.5, False), (0.15, False)]
)
def test_pages_that_somebody_waits_for(link: float, packed: bool) -> None:
    """Pages that are waited for pay for compressing in full, since nothing else is in flight
    meanwhile."""
    path = Path(link, always(0.4))
    path.run(512 << 20)
    assert path.choice.for_demand == packed


def test_idle_time_says_nothing_about_the_link() -> None:
    """A destination that asks for little: the link is not slow because of that."""
    path = Path(0.15, always(0.4))
    for _ in range(2000):
        path.send()
        path.now += SECOND // 100
        path.choice.resume(path.now)
    assert path.packed_bytes == 0
