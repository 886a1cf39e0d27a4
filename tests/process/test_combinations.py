"""Everything that can be chosen, drawn together, and changed while it runs: each page is right,
whatever the choice."""

from __future__ import annotations

from pathlib import Path

import pytest
from combinations import CHOICES, SEEDS, check_moves, drawn

from pagenet import register
from pagenet.testing import MemoryTransport

pytestmark = pytest.mark.usefixtures("uffd_permitted")


@pytest.mark.parametrize(
    "seed",
    [*range(SEEDS), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(100, 300))],
)
async def test_drawn(seed: int, tmp_path: Path) -> None:
    register("memory", MemoryTransport())
    await check_moves(drawn(seed), seed, tmp_path)


def test_each_is_drawn() -> None:
    for name, choices in CHOICES.items():
        assert {str(drawn(seed)[name]) for seed in range(SEEDS)} == {str(one) for one in choices}
