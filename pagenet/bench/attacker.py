"""A hostile peer, as a process of its own: ``python -m pagenet.bench.attacker ATTACK URI``, started
by pagenet-bench alone.

It prints a line when the attack is on, and continues until its input ends. Each attack is bounded:
in connections, and in requests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress

import trio

from .. import transport
from ..admission import raise_descriptor_limit
from ..children import module_command
from ..destination.source_session import SourceSession
from ..destination.sources import dial_source
from ..errors import PagenetError
from ..protocol import Channel, Class, Encoding, Request
from ..region import Run
from ..transport import Connection

__all__ = ["ATTACKS", "attacker_command"]

_UNIT_SHIFT = 16  # 256 MiB
_SILENT, _SESSIONS, _LANES = 600, 100, 8
_PAUSE = 0.002  # between two connections of a flood


def attacker_command(attack: str, uri: str) -> list[str]:
    return module_command("pagenet.bench.attacker", attack, uri)


async def _lanes(session: SourceSession, count: int) -> list[Connection]:
    return [await session.open_lane(Channel.BACKGROUND) for _ in range(count)]


async def _huge_units(uri: str, stack: AsyncExitStack, ready: Callable[[], None]) -> None:
    """Requests for compressed units of 256 MiB, of which not a byte is read."""
    session = await stack.enter_async_context(dial_source(uri))
    for lane in await _lanes(session, _LANES):
        unit = Run(0, min(1 << _UNIT_SHIFT, session.region.pages))
        encodings = 1 << Encoding.ZERO | 1 << Encoding.LZ4
        for number in range(4):
            await lane.send(
                Request(number, Class.BACKGROUND, unit, _UNIT_SHIFT, encodings).encode()
            )
    ready()
    await trio.sleep_forever()


async def _slow_readers(uri: str, stack: AsyncExitStack, ready: Callable[[], None]) -> None:
    """Requests for 128 MiB on each lane, which are read 4 KiB at a time."""
    session = await stack.enter_async_context(dial_source(uri))
    lanes = await _lanes(session, _LANES)
    buffer = memoryview(bytearray(4096))
    for lane in lanes:
        for number in range(32):
            await lane.send(Request(number, Class.BACKGROUND, Run(number * 1024, 1024)).encode())
    ready()
    while True:
        for lane in lanes:
            await lane.receive_into(buffer)
        await trio.sleep(0.001)


async def _silent_peers(uri: str, stack: AsyncExitStack, ready: Callable[[], None]) -> None:
    """More silent connections than a source keeps. Every 0.2 s all are closed and made again."""
    told = False
    while True:
        async with AsyncExitStack() as round_:
            for _ in range(_SILENT):
                round_.callback((await transport.dial(uri)).close)
            if not told:
                ready()
                told = True
            await trio.sleep(0.2)


async def _flood(uri: str, stack: AsyncExitStack, ready: Callable[[], None]) -> None:
    """Connections that are closed at once."""
    ready()
    while True:
        with suppress(PagenetError):
            (await transport.dial(uri)).close()
        await trio.sleep(_PAUSE)


async def _many_sessions(uri: str, stack: AsyncExitStack, ready: Callable[[], None]) -> None:
    """Nearly as many destinations as a source admits, which then do nothing."""
    for _ in range(_SESSIONS):
        session = await stack.enter_async_context(dial_source(uri))
        await session.open_lane(Channel.DEMAND)
    ready()
    await trio.sleep_forever()


Attack = Callable[[str, AsyncExitStack, Callable[[], None]], Awaitable[None]]
ATTACKS: dict[str, Attack] = {
    "huge units unread": _huge_units,
    "slow readers": _slow_readers,
    "silent peers": _silent_peers,
    "connections closed at once": _flood,
    "idle sessions": _many_sessions,
}


async def _main(attack: Attack, uri: str) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_until_input_ends, nursery.cancel_scope)
        async with AsyncExitStack() as stack:
            await attack(uri, stack, lambda: print(".", flush=True))


async def _until_input_ends(scope: trio.CancelScope) -> None:
    async with trio.lowlevel.FdStream(os.dup(0)) as stdin:
        while await stdin.receive_some():
            pass
    scope.cancel()


if __name__ == "__main__":
    os.nice(10)
    raise_descriptor_limit()
    trio.run(_main, ATTACKS[sys.argv[1]], sys.argv[2])
