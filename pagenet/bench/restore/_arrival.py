"""A daemon that restores guests, the least that could, and guests that arrive at either."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import trio

from ...children import module_command
from ...control import connect_control
from ...errors import PagenetError
from ...nurseries import open_failing_nursery
from .._peers import Child, Source, running
from .._site import Daemon
from ..peer import peer_command
from .guests import FACTS, WORD

__all__ = [
    "Arrival",
    "Host",
    "Touched",
    "Weight",
    "arriving",
    "bare_handler",
    "hosting",
    "pss_of",
    "socket_in",
]

# Seconds for anything at all, and more for each guest of an arrival.
_DEADLINE, _MORE = 300.0, 1.0
# Seconds between two questions whether guests have left.
_PAUSE = 0.02


# ---- guests ----


@dataclass(frozen=True, slots=True)
class Touched:
    """One guest. Times in ns of CLOCK_MONOTONIC: when it began to connect, when each of its touches
    was over, and how long it took."""

    connected: int
    ended: Sequence[int]
    took: Sequence[int]

    @property
    def first(self) -> int:
        """From connecting to the end of the first touch, in ns."""
        return self.ended[0] - self.connected

    @property
    def last(self) -> int:
        """The same for the last."""
        return self.ended[-1] - self.connected


class Arrival:
    """Guests that are about to arrive. Made by :func:`arriving`."""

    def __init__(self, child: Child, pids: Sequence[int], results: int, count: int) -> None:
        self.pids = pids
        self._child = child
        self._results = results
        self._count = count
        #: when (ns of CLOCK_MONOTONIC) so many bytes of all guests were resident
        self.samples: list[tuple[int, int]] = []

    async def go(self) -> list[Touched]:
        """Have them arrive. Returns once all have touched their pages; the guests that came at once
        are still there. :exc:`PagenetError` if one could not, or found a wrong page."""
        assert self._child.process.stdin is not None
        await self._child.process.stdin.send_all(b".")
        patience = _DEADLINE + _MORE * self._count
        with trio.move_on_after(patience) as scope:
            self.samples = [(at, held) for at, held in json.loads(await self._child.first_line())]
        if scope.cancelled_caught:
            raise PagenetError(f"guests of the bench were not done after {patience:g} s")
        words = array("Q")
        words.frombytes(os.pread(self._results, os.fstat(self._results).st_size, 0))
        each = len(words) // self._count
        return [_touched(words[each * i : each * (i + 1)]) for i in range(self._count)]


def _touched(words: array[int]) -> Touched:
    connected, wrong, error = words[:FACTS]
    if error:
        raise PagenetError(f"a guest of the bench could not be restored: {os.strerror(error)}")
    if wrong:
        raise PagenetError(f"{wrong} pages of a guest of the bench were wrong")
    half = (len(words) - FACTS) // 2
    return Touched(connected, words[FACTS : FACTS + half], words[FACTS + half :])


@asynccontextmanager
async def arriving(
    socket: Path,
    size: int,
    pages: Sequence[Sequence[int]],
    *,
    shared: bool = False,
    in_turn: bool = False,
) -> AsyncIterator[Arrival]:
    """Guests of ``size`` bytes for the handler at ``socket``, each of which touches a sequence of
    ``pages``, all of them as long. Their memory is anonymous, or (``shared``) a private mapping of
    the handler's cache. They end with the block."""
    touches = array("Q", (page for each in pages for page in each))
    numbers = FACTS * len(pages) + 2 * len(touches)
    wanted, results = _memfd(touches.tobytes()), _memfd(bytes(numbers * WORD))
    try:
        task = {
            "socket": str(socket),
            "size": size,
            "seed": 0,
            "count": len(pages),
            "shared": shared,
            "in_turn": in_turn,
            "pages": wanted,
            "results": results,
        }
        command = module_command("pagenet.bench.restore.guests", json.dumps(task))
        async with running(command, [wanted, results]) as child:
            pids = json.loads(await child.first_line())
            yield Arrival(child, pids, results, len(pages))
    finally:
        os.close(wanted)
        os.close(results)


def _memfd(content: bytes) -> int:
    fd = os.memfd_create("pagenet-bench", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return fd


# ---- who restores them ----


class Weight(NamedTuple):
    """What a process has: bytes of memory of its own, descriptors, threads."""

    bytes: int
    descriptors: int
    threads: int


class Host:
    """``pagenet-pull --many``. Made by :func:`hosting`."""

    def __init__(self, pid: int, socket: Path, control: Path) -> None:
        self.pid = pid
        self._control = control
        self.socket = socket

    def weight(self) -> Weight:
        status = Path(f"/proc/{self.pid}/status").read_text()
        kib = sum(int(found) for found in re.findall(r"^Rss(?:Anon|Shmem):\s*(\d+)", status, re.M))
        descriptors = len(os.listdir(f"/proc/{self.pid}/fd"))
        return Weight(kib << 10, descriptors, len(os.listdir(f"/proc/{self.pid}/task")))

    async def empty(self) -> None:
        """Return once the daemon has noticed that all guests have left. :exc:`PagenetError` if it
        does not."""
        with trio.move_on_after(_DEADLINE):
            async with connect_control(self._control) as control:
                while (await control.command("status")).get("guests_now", 1):  # noqa: ASYNC110
                    await trio.sleep(_PAUSE)
            return
        raise PagenetError("guests of the bench have left, and their daemon does not notice")


def socket_in(directory: Path) -> Path:
    """Where guests connect to the daemon that :func:`hosting` starts in ``directory``."""
    return directory / "owners"


@asynccontextmanager
async def hosting(
    uri: str, directory: Path, *options: str, env: Mapping[str, str] | None = None
) -> AsyncIterator[Host]:
    """``pagenet-pull --many`` of a source, with these options, and ``env`` in its environment. Its
    socket is in ``directory``."""
    socket, complaints = socket_in(directory), directory / "pagenet-pull.stderr"
    control = directory / "control"
    words = (uri, "--uffd-socket", str(socket), "--many", "--control", str(control), "--json")
    with complaints.open("wb") as errors:
        process = await trio.lowlevel.open_process(
            module_command("pagenet.cli.pull", *words, *options),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **(env or {})},
        )
    assert process.stdout is not None
    daemon = Daemon("pagenet-pull", process, complaints)
    try:
        async with open_failing_nursery() as nursery:
            nursery.start_soon(daemon.read, process.stdout)
            await daemon.event("added", _DEADLINE)
            host = Host(process.pid, socket, control)
            await host.empty()  # it answers once it has begun to take guests
            yield host
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            process.send_signal(signal.SIGTERM)  # and its guard ends with it
            with trio.move_on_after(_DEADLINE):
                await process.wait()
            await process.stdout.aclose()


@asynccontextmanager
async def bare_handler(source: Source, directory: Path) -> AsyncIterator[Path]:
    """The least that fills the memory of owners from ``source``. Yields its socket."""
    socket = directory / "bare"
    command = peer_command("handler", str(socket), source.fd, source.size)
    async with running(command, [source.fd]) as child:
        await child.first_line()
        yield socket
    socket.unlink()


def pss_of(pids: Sequence[int]) -> int:
    """Bytes of all those processes; what is shared counts once among those that share it."""
    return sum(map(_pss, pids))


def _pss(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) << 10 if found else 0
