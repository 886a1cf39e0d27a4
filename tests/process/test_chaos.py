"""Owners of every kind move, while a seeded hand cuts links, drops packets, resets connections, and
stops and kills daemons and guards. Every byte is right in the end, and nobody types a word.

It takes ``SECONDS``; with ``--soak`` an hour, or PAGENET_CHAOS_SECONDS. PAGENET_CHAOS_SEED repeats
the choices of another run. ``--soak`` also shows how long an owner stalls for each kind of outage.
``tools/reliability.py`` does the same for a number of faults.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from cable import needs_cable, plugged_cable
from chaos import Hand, Record, Stall, Strike
from chaos_sites import KINDS, OUTAGES, Site, outage_stall, transfer
from vm import MISSING

from pagenet.uffd import probe

pytestmark = needs_cable

SECONDS = 30.0
SOAK = float(os.environ.get("PAGENET_CHAOS_SECONDS", "3600"))
SEED = os.environ.get("PAGENET_CHAOS_SEED") or str(time.time_ns())


@pytest.mark.parametrize(
    "seconds",
    [SECONDS, pytest.param(SOAK, marks=[pytest.mark.soak, pytest.mark.timeout(SOAK + 400)])],
)
async def test_chaos(
    seconds: float, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    probe()
    print(f"PAGENET_CHAOS_SEED={SEED}")
    hand = Hand(SEED)
    kinds = [kind for kind in KINDS if not (kind.startswith("QEMU") and MISSING)]
    end = trio.current_time() + seconds
    while trio.current_time() < end:
        directory = tmp_path / str(hand.record.transfers.total())
        directory.mkdir()
        await transfer(hand.draw("kinds", kinds), hand, directory)
    print(*hand.record.lines(), sep="\n")
    record_property("outcome", hand.record.lines()[-1])


def test_whose_stall_it_is() -> None:
    """That of the fault after which it has lasted longest."""
    record = Record()
    strikes = [Strike("guard killed", 1.0), Strike("cut", 1.2), Strike("reset", 4.0)]
    record.add(strikes, [Stall(3.0, 2.5), Stall(4.5, 0.3), Stall(0.5, 0.2)])
    assert record.longest == {"cut": 2.5, "reset": 0.3}
    assert record.fields() == {
        "transfers": {},
        "faults": {"cut": [1, 2.5], "guard killed": [1, 0.0], "reset": [1, 0.3]},
    }
    record.merge({"a guest": 1}, {"cut": [2, 1.0], "reset": [1, 0.5]})
    assert record.fields() == {
        "transfers": {"a guest": 1},
        "faults": {"cut": [3, 2.5], "guard killed": [1, 0.0], "reset": [2, 0.5]},
    }


@pytest.mark.soak
@pytest.mark.timeout(120)
@pytest.mark.parametrize("source_dials", [False, True], ids=["destination dials", "source dials"])
@pytest.mark.parametrize(("what", "seconds"), OUTAGES)
async def test_outages(
    what: str,
    seconds: float,
    source_dials: bool,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Prints the longest time that a touch has taken, beside that of the outage."""
    probe()
    async with plugged_cable() as cable:
        site = Site(cable, tmp_path, "native", random.Random(), source_dials)
        stall = await outage_stall(site, what, seconds)
    who = "source" if source_dials else "destination"
    print(f"{what}, {seconds:g} s; the {who} dials: longest stall {stall:.2f} s")
    record_property("outcome", f"{what}, {seconds:g} s: stall {stall:.2f} s")
