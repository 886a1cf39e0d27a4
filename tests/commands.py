"""Commands to a transfer while it runs, drawn at random: those that a destination has."""

from __future__ import annotations

import random
from pathlib import Path

import trio

from pagenet import ConnectionBroken, SourceUnreachable, UsageError
from pagenet.control import COMMANDS, ControlClient, connect_control

#: commands that a transfer refuses
NOT_FOR_A_TRANSFER = {"stop", "switch", "rounds", "reclaim", "add", "remove"}


async def command_at_random(client: ControlClient, draw: random.Random, recording: Path) -> None:
    match draw.choice(sorted(COMMANDS.keys() - NOT_FOR_A_TRANSFER)):
        case "schedule":
            await client.command(
                "schedule",
                name=draw.choice(["hot", "follow", "linear", "off", f"recorded={recording}"]),
            )
        case "bandwidth":
            await client.command(
                "bandwidth", rate=draw.choice([None, 1, 100_000, 5_000_000, 1_000_000_000])
            )
        case "prefetch":
            await client.command(
                "prefetch", window=draw.choice([None, [0, 0], [8, 8], [256, 0], [0, 256]])
            )
        case name:
            await client.command(name)


async def tell_at_random(path: Path, draw: random.Random, recording: Path, seconds: float) -> None:
    """Give commands for that time, or until the transfer is over."""
    try:
        with trio.move_on_after(seconds):
            async with connect_control(path) as client:
                while True:
                    await command_at_random(client, draw, recording)
                    await trio.sleep(draw.choice([0, 0.001, 0.01]))
    except UsageError as error:
        if "the transfer is over" not in str(error):
            raise
    except (ConnectionBroken, SourceUnreachable):
        return
