"""Memory is copied over RDMA in rounds while its owner writes to it and punches holes into it: no
key, and no word about zeros, outlives its round."""

from __future__ import annotations

import random

import pytest
import trio
from processes import PAGE, can_track
from written import PATIENCE, Written, check_frozen, copying, freeze_after

from pagenet import OwnMemory
from pagenet.rdma import CHUNK_SIZE
from pagenet.source.precopy import Precopy
from pagenet.transport import LaneKind

LISTEN = "rdma://127.0.0.1:0"
CHUNK_PAGES = CHUNK_SIZE // PAGE
TRIES = 4


@pytest.mark.parametrize("notes", [True, False] if can_track() else [True])
@pytest.mark.parametrize("lane", ["native", "trio"])
async def test_random_moments(lane: LaneKind, notes: bool) -> None:
    for seed in range(TRIES):
        choose = random.Random(seed)
        precopy = Precopy(choose.choice([1, 2, 3]))
        size = choose.randint(1, 900) * PAGE
        written, memory = Written("memfd", size, seed, punches=True), OwnMemory("memfd")
        try:
            moving = copying(written, memory, lane, listen=LISTEN, notes=notes)
            async with moving as (rounds, transfer):
                await freeze_after(1 + choose.random(), precopy, written, rounds)
                await check_frozen(written, memory, transfer)
        finally:
            written.close()
            memory.close()


@pytest.mark.parametrize("lane", ["native", "trio"])
async def test_zeros_are_forgotten(lane: LaneKind) -> None:
    """Written to: a chunk of zeros, and a page of zeros in a chunk of others. Zero since: a page
    of others."""
    written, memory = Written("memfd", 2 * CHUNK_PAGES * PAGE, 0), OwnMemory("memfd")
    try:
        written.write(CHUNK_PAGES, 1)
        written.write(CHUNK_PAGES + 2, 1)
        async with copying(written, memory, lane, listen=LISTEN, notes=True) as (rounds, transfer):
            with trio.fail_after(PATIENCE):
                await rounds.wait_over()
            for page, byte in ((0, 2), (CHUNK_PAGES + 1, 2), (CHUNK_PAGES + 2, 0)):
                written.write(page, byte)
            assert (await rounds.look()).left == 3
            await rounds.next()
            with trio.fail_after(PATIENCE):
                await rounds.wait_over()
            written.punch(CHUNK_PAGES)
            written.write(CHUNK_PAGES, 3)
            await rounds.pause()
            assert await rounds.freeze() == 1
            await check_frozen(written, memory, transfer)
    finally:
        written.close()
        memory.close()
