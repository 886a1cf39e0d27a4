"""Pages over RDMA beside what perftest measures of the same device: ib_read_lat and ib_read_bw, run in turn with ours.

Both sides are on this host. READs of perftest's sleep until they are done, as ours do on a few processors. The floor of a fault
is one READ of a page, and a fault answered by a bare loop in C with the page at hand.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from ..errors import PagenetError, Unsupported
from ..pulling import pull
from ..rdma import default_path
from ..uffd import OwnMemory
from ._fault import FaultOptions, FaultResult, measure_faults
from ._figures import median
from ._peers import Source, running, served

__all__ = ["RdmaOptions", "RdmaResult", "measure_rdma"]

PAGE = 4096
#: what the background reads at a time
CHUNK = 256 << 10
_TICKS = 100  # a second, of the times in /proc/PID/stat, on every Linux


@dataclass(frozen=True, slots=True)
class RdmaOptions:
    size: int = 256 << 20
    touches: int = 500
    rounds: int = 3


@dataclass(slots=True)
class RdmaResult:
    """Medians of the rounds. Latencies in us, rates in 10^9 bytes a second, ``source_cpu`` in seconds for ``size`` bytes by
    transport."""

    path: str = ""
    size: int = 0
    read_lat: list[float] = field(default_factory=list)
    read_bw: list[float] = field(default_factory=list)
    background: list[float] = field(default_factory=list)
    source_cpu: dict[str, list[float]] = field(default_factory=dict)
    faults: FaultResult = field(default_factory=lambda: FaultResult(1))

    @property
    def fault_floor(self) -> float | None:
        """One READ, and one fault with the page at hand."""
        local = self.faults.floor_local.microseconds(0.5)
        return None if local is None else round(median(self.read_lat) + local, 1)

    @property
    def fault_ratio(self) -> float | None:
        ours, floor = self.faults.idle.microseconds(0.5), self.fault_floor
        return None if ours is None or not floor else round(ours / floor, 2)

    @property
    def background_ratio(self) -> float:
        return round(median(self.background) / median(self.read_bw), 2)


async def measure_rdma(options: RdmaOptions) -> RdmaResult:
    """:exc:`Unsupported` if there is no RDMA device, or no perftest."""
    path = default_path()
    result = RdmaResult(str(path), options.size)
    fault = FaultOptions(
        threads=(1,), touches=options.touches, size=options.size, transport="rdma", rounds=1, only_idle=True
    )
    for _ in range(options.rounds):
        result.read_lat.append(await _perftest("ib_read_lat", path.device, path.gid_index, PAGE, 1000, column=4))
        [faults] = await measure_faults(fault)
        result.faults.floor_local.rounds += faults.floor_local.rounds
        result.faults.idle.rounds += faults.idle.rounds
        mbps = await _perftest("ib_read_bw", path.device, path.gid_index, CHUNK, 200, column=3)
        result.read_bw.append(mbps * 2**20 / 1e9)
        for transport in ("rdma", "tcp"):
            seconds, cpu = await _pull_all(options.size, transport)
            result.source_cpu.setdefault(transport, []).append(cpu)
            if transport == "rdma":
                result.background.append(options.size / seconds / 1e9)
    return result


async def _perftest(program: str, device: str, gid: int, size: int, iterations: int, column: int) -> float:
    """One run against itself: a figure of its last line."""
    with socket.socket() as probe:  # a port that is free now
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "-d", device, "-x", str(gid), "-s", str(size), "-n", str(iterations), "-F", "-e", "-p", str(port)]
    try:
        async with running(command):
            for _ in range(100):  # the server says nothing when it is ready
                done = await trio.run_process([*command, "127.0.0.1"], capture_stdout=True, capture_stderr=True, check=False)
                if done.returncode == 0:
                    return _last_figure(done.stdout.decode(), column)
                await trio.sleep(0.1)
    except FileNotFoundError:
        raise Unsupported(f"{program} is not installed: it is in the package perftest") from None
    raise PagenetError(f"{program} failed: {done.stderr.decode().strip() or done.returncode}")


def _last_figure(output: str, column: int) -> float:
    rows = [line.split() for line in output.splitlines()]
    figures = [row for row in rows if len(row) > column and all(_is_number(word) for word in row)]
    if not figures:
        raise PagenetError("perftest's output has no line of figures")
    return float(figures[-1][column])


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdecimal()


async def _pull_all(size: int, transport: str) -> tuple[float, float]:
    """All of it in the background, into shared memory: seconds, and seconds of the source's processors."""
    with Source(size) as source:
        async with served(source.spec, transport, "native") as serving:
            before = _cpu_seconds(serving.pid)
            memory = OwnMemory("memfd")
            try:
                async with pull(serving.uri, memory, background="linear", prefetch=(0, 0)) as transfer:
                    await transfer.wait_complete()
                cpu = _cpu_seconds(serving.pid) - before
                if bad := await trio.to_thread.run_sync(source.differs, memory.address):
                    raise PagenetError(f"{bad} pages are not what they should be after a transfer over {transport}")
            finally:
                memory.close()
    return transfer.statistics().seconds, cpu


def _cpu_seconds(pid: int) -> float:
    fields: Sequence[str] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
