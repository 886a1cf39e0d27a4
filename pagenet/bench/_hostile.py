"""How long an honest destination waits for a page while another peer of the same source attacks it.

Pages are asked for one at a time on a demand lane, by a blocking socket in a process that does
nothing else: alone, and beside each attack in turn. The attacker is a process of its own, and
niced: an attack comes over the network, but here attacker and source share processors.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from ..destination.sources import dial_source
from ..errors import PagenetError
from ..protocol import LANE_HEADER_SIZE, Channel, Class, Request
from ..region import Run
from ..transport import Detachable
from ._far import blocking
from ._figures import Sample
from ._peers import Source, running, served
from .attacker import ATTACKS, attacker_command

__all__ = ["MOST_BESIDE", "HostileOptions", "HostileResult", "measure_hostile"]

PAGE = 4096
#: the highest ratio of p99 beside an attack to p99 alone, in the same round, that meets the target
MOST_BESIDE = 3.0


@dataclass(frozen=True, slots=True)
class HostileOptions:
    """``pages``: asked for in each round, alone and beside each attack; ``size``: bytes of the
    source."""

    rounds: int = 5
    pages: int = 4000
    size: int = 256 << 20


@dataclass(slots=True)
class HostileResult:
    """``attack``: its name, or empty for the destination alone."""

    attack: str
    latencies: Sample = field(default_factory=Sample)


async def measure_hostile(options: HostileOptions) -> list[HostileResult]:
    """A result for the destination alone, and then one for each attack."""
    results = [HostileResult(attack) for attack in ("", *ATTACKS)]
    with Source(options.size) as source:
        for number in range(options.rounds):
            for result in results:
                async with (
                    served(source.spec, "tcp", "native") as server,
                    _attacked(result.attack, server.uri),
                ):
                    order = random.Random(number)
                    pages = [order.randrange(options.size // PAGE) for _ in range(options.pages)]
                    result.latencies.add(await _ask_for(server.uri, pages))
    return results


@asynccontextmanager
async def _attacked(attack: str, uri: str) -> AsyncIterator[None]:
    """Run the block while the attack is on. The attacker ends with the block."""
    if not attack:
        yield
        return
    async with running(attacker_command(attack, uri)) as attacker:
        await attacker.first_line()
        yield


async def _ask_for(uri: str, pages: list[int]) -> array[int]:
    """How long each of those pages took, in ns."""
    async with dial_source(uri) as session:
        connection = await session.open_lane(Channel.DEMAND)
        assert isinstance(connection, Detachable)
        async with blocking(connection) as sock:

            def ask() -> array[int]:
                took = array("q")
                reply = memoryview(bytearray(LANE_HEADER_SIZE + PAGE))
                for number, page in enumerate(pages):
                    began = time.monotonic_ns()
                    sock.sendall(Request(number, Class.DEMAND, Run(page, 1)).encode())
                    got = 0
                    while got < len(reply):
                        if not (count := sock.recv_into(reply[got:])):
                            raise PagenetError("the source has closed an honest destination's lane")
                        got += count
                    took.append(time.monotonic_ns() - began)
                return took

            return await trio.to_thread.run_sync(ask)
