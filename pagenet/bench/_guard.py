"""What the guard costs, and how long an owner waits when its destination is killed: with a guard,
beside a pagenet-pull that somebody starts at once."""

from __future__ import annotations

import array
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from ..children import module_command
from ..errors import PagenetError
from ..testing.workload import workload_command
from ._figures import Sample, median
from ._peers import Child, Source, running, served_at

__all__ = ["GuardOptions", "GuardResult", "measure_guard"]

PAGE = 4096
# Only touched pages come, one by one, so that each touch is a fault.
_ALONE = ("--background", "off", "--prefetch", "0,0", "--json")
# In seconds: from the first touch to the kill, and for anything at all.
_HALF_WAY = 0.2
_DEADLINE = 60.0
# In /proc/PID/status.
_GUARD = r"^Name:\s*pagenet-guard$.*^VmRSS:\s*(\d+) kB"


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """``size``: bytes of the memory, each page of which is touched once in each round."""

    rounds: int = 5
    size: int = 64 << 20


@dataclass(slots=True)
class GuardResult:
    """Latencies of faults without and with a guard; the guard's memory in bytes; and the seconds
    that a thread waited when the destination was killed, by round: with a guard, and where
    ``pagenet-pull --resume`` was started in the same moment."""

    plain: Sample = field(default_factory=Sample)
    guarded: Sample = field(default_factory=Sample)
    memory: int = 0
    restarted: list[float] = field(default_factory=list)
    started: list[float] = field(default_factory=list)

    def see_guard(self, pid: int) -> None:
        """Note the memory of the guard of process ``pid``."""
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            status = Path(f"/proc/{child}/status").read_text()
            if found := re.search(
                r"^Name:\s*pagenet-guard$.*^VmRSS:\s*(\d+) kB", status, re.M | re.S
            ):
                self.memory = max(self.memory, int(found[1]) << 10)

    @property
    def restart_ratio(self) -> float:
        return float(median(self.restarted)) / float(median(self.started))


async def measure_guard(options: GuardOptions) -> GuardResult:
    """All in turn, round by round. :exc:`~pagenet.errors.PagenetError` if a page is wrong."""
    result = GuardResult()
    with Source(options.size) as source:
        async with served_at("tcp://127.0.0.1:0", source.spec) as server:
            move = partial(_move, server.uri, options.size)
            for _ in range(options.rounds):
                result.plain.add(await move("--no-guard"))
                result.guarded.add(await move(watch=result.see_guard))
                result.restarted.append(max(await move(killed=True)) / 1e9)
                result.started.append(max(await move("--no-guard", killed=True)) / 1e9)
    return result


async def _move(
    uri: str,
    size: int,
    *options: str,
    killed: bool = False,
    watch: Callable[[int], None] = lambda pid: None,
) -> Sequence[int]:
    """Fill the memory of an owner that touches each page once. Returns the latencies in ns.
    ``killed``: kill its pagenet-pull in the middle; without a guard, another one resumes."""
    pull = ("pagenet.cli.pull", uri, *_ALONE)
    with tempfile.TemporaryDirectory(prefix="pagenet-bench-") as name:
        directory = Path(name)
        socket = str(directory / "owner")
        async with (
            running(module_command(*pull, "--uffd-socket", socket, *options)) as pulling,
            AsyncExitStack() as stack,
        ):
            events = _Lines(pulling)
            await events.wait("waiting")
            owner = await stack.enter_async_context(running(_owner(directory, size)))
            await events.wait("owner")
            watch(pulling.process.pid)
            if killed:
                await trio.sleep(_HALF_WAY)
                pulling.process.kill()
                if options:
                    command = module_command(*pull, "--resume", str(owner.process.pid), *options)
                    resuming = await stack.enter_async_context(running(command))
                    events = _Lines(resuming)
            verified = await _Lines(owner).wait("verified")
            await events.wait("complete")
        if verified["bad"]:
            raise PagenetError(f"{verified['bad']} pages were wrong")
        found = array.array("Q")
        found.frombytes((directory / "latencies").read_bytes())
        return found


def _owner(directory: Path, size: int) -> list[str]:
    return workload_command(
        *("--socket", str(directory / "owner"), "--size", str(size), "--memory", "memfd"),
        *("--keep-map", "--order", "random", "--threads", "1", "--touches", str(size // PAGE)),
        *("--latency-out", str(directory / "latencies")),
    )


class _Lines:
    """The events that a process prints."""

    def __init__(self, child: Child) -> None:
        assert child.process.stdout is not None
        self._stream = child.process.stdout
        self._unread = b""

    async def wait(self, name: str) -> dict[str, Any]:
        """The next event of that name. :exc:`PagenetError` if it does not come."""
        with trio.move_on_after(_DEADLINE):
            while True:
                *lines, self._unread = self._unread.split(b"\n")
                for number, line in enumerate(lines):
                    event: dict[str, Any] = json.loads(line)
                    if event["event"] == name:
                        self._unread = b"\n".join([*lines[number + 1 :], self._unread])
                        return event
                if not (more := await self._stream.receive_some()):
                    raise PagenetError(f"a process that the bench started ended before {name!r}")
                self._unread += more
        raise PagenetError(f"a process that the bench started did not say {name!r}")
