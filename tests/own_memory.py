"""A library user that pulls into memory of its own: ``python own_memory.py URI SOURCE [listen]``.

Two threads read its pages in a random order while they come. It prints pagenet's events, a line for
each read that took more than 20 ms, and in the end how many pages are wrong, as JSON.
"""

from __future__ import annotations

import json
import random
import sys
import time
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import trio

import pagenet

PAGE = 4096
STALL = 0.02
THREADS = 2


def tell(event: str, /, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


async def read_pages(memory: pagenet.OwnMemory, pages: list[int], content: bytes) -> int:
    """Read them, one after the other. Returns how many are wrong."""
    wrong = 0
    for page in pages:
        began = time.monotonic()
        found = await memory.read(page * PAGE, PAGE)
        took = time.monotonic() - began
        wrong += found != content[page * PAGE : (page + 1) * PAGE]
        if took > STALL:
            tell("stall", end=began + took, seconds=took)
        await trio.sleep(0.001)
    return wrong


async def main(uri: str, source: str, *listening: str) -> int:
    content, wrong = Path(source).read_bytes(), 0
    memory = pagenet.OwnMemory("memfd")
    order = list(range(len(content) // PAGE))
    random.shuffle(order)

    async def read(mine: list[int]) -> None:
        nonlocal wrong
        wrong += await read_pages(memory, mine, content)

    listen = bool(listening)
    async with pagenet.pull(
        uri,
        memory,
        listen=listen,
        plaintext=listen,
        max_bandwidth=4_000_000,
        prefetch=(0, 0),
        reconnect_for=inf,
        on_event=tell,
    ) as transfer:
        async with trio.open_nursery() as nursery:
            for number in range(THREADS):
                nursery.start_soon(read, order[number::THREADS])
        await transfer.wait_complete()
    found = await memory.read(0, len(content))
    wrong += sum(
        found[at : at + PAGE] != content[at : at + PAGE] for at in range(0, len(content), PAGE)
    )
    tell("verified", bad=wrong)
    memory.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(trio.run(partial(main, *sys.argv[1:])))
