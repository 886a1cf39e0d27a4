"""Pages over RDMA compared with perftest on the same device: ib_read_lat and ib_read_bw, run in
turn with pagenet.

Both sides are on this host. perftest's READs sleep until they are done, as pagenet's do on a host
with few processors. The floor of a fault is one READ of a page, plus a fault that a bare loop in C
answers with the page at hand. perftest registers memory and connects queue pairs before its clock
starts. So faults that first wait for a chunk's key are counted apart, and the background's clock
starts when a first page has come.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import trio

from .._native.testing import bench_touch
from ..destination.pulling import pull
from ..errors import PagenetError, Unsupported
from ..rdma import CHUNK_SIZE, default_path
from ..uffd import OwnMemory
from ._fault import LIMIT_SECONDS, FaultOptions, FaultResult, measure_faults
from ._figures import median
from ._peers import Served, Source, running, served
from .workload._toucher import Toucher

__all__ = ["RdmaOptions", "RdmaResult", "measure_rdma"]

PAGE = 4096
#: bytes that the background reads at a time
CHUNK = 256 << 10
_TICKS = 100  # per second, of the times in /proc/PID/stat, on every Linux


@dataclass(frozen=True, slots=True)
class RdmaOptions:
    size: int = 256 << 20
    touches: int = 500
    rounds: int = 3


@dataclass(slots=True)
class RdmaResult:
    """Lists have an entry for each round: latencies in us, rates in 10^9 bytes a second, ``set_up``
    in seconds, ``source_cpu`` in seconds of user and of system time for ``size`` bytes by
    transport. Properties are of the medians."""

    path: str = ""
    size: int = 0
    read_lat: list[float] = field(default_factory=list)
    read_bw: list[float] = field(default_factory=list)
    background: list[float] = field(default_factory=list)
    background_allocated: list[float] = field(default_factory=list)
    set_up: list[float] = field(default_factory=list)
    source_cpu: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    faults: FaultResult = field(default_factory=lambda: FaultResult(1))

    @property
    def fault_floor(self) -> float | None:
        """One READ plus one fault with the page at hand, in us."""
        local = self.faults.floor_local.microseconds(0.5)
        return None if local is None else round(median(self.read_lat) + local, 1)

    @property
    def fault_ratio(self) -> float | None:
        ours, floor = self.faults.idle.microseconds(0.5), self.fault_floor
        return None if ours is None or not floor else round(ours / floor, 2)

    @property
    def background_ratio(self) -> float:
        return round(median(self.background) / median(self.read_bw), 2)

    @property
    def background_allocated_ratio(self) -> float:
        return round(median(self.background_allocated) / median(self.read_bw), 2)


async def measure_rdma(options: RdmaOptions) -> RdmaResult:
    """:exc:`Unsupported` if there is no RDMA device, or no perftest."""
    path = default_path()
    result = RdmaResult(str(path), options.size)
    fault = FaultOptions(
        threads=(1,),
        touches=options.touches,
        size=options.size,
        transport="rdma",
        rounds=1,
        only_idle=True,
        area=CHUNK_SIZE,
    )
    for _ in range(options.rounds):
        result.read_lat.append(
            await _perftest("ib_read_lat", path.device, path.gid_index, PAGE, 1000, column=4)
        )
        [faults] = await measure_faults(fault)
        result.faults.floor_local.rounds += faults.floor_local.rounds
        result.faults.idle.rounds += faults.idle.rounds
        result.faults.first.rounds += faults.first.rounds
        mbps = await _perftest("ib_read_bw", path.device, path.gid_index, CHUNK, 200, column=3)
        result.read_bw.append(mbps * 2**20 / 1e9)
        for transport in ("rdma", "tcp"):
            pulled = await _pull_all(options.size, transport)
            result.source_cpu.setdefault(transport, []).append(pulled.cpu)
            if transport == "rdma":
                result.background.append(options.size / pulled.seconds / 1e9)
                result.set_up.append(pulled.set_up)
        pulled = await _pull_all(options.size, "rdma", allocate=True)
        result.background_allocated.append(options.size / pulled.seconds / 1e9)
    return result


async def _perftest(
    program: str, device: str, gid: int, size: int, iterations: int, column: int
) -> float:
    """One run of ``program``, as server and as client: the figure in ``column`` of its last
    line."""
    with socket.socket() as probe:  # a port that is free now
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        program,
        "-d",
        device,
        "-x",
        str(gid),
        "-s",
        str(size),
        "-n",
        str(iterations),
        "-F",
        "-e",
        "-p",
        str(port),
    ]
    try:
        async with running(command):
            for _ in range(100):  # the server does not tell when it is ready
                done = await trio.run_process(
                    [*command, "127.0.0.1"], capture_stdout=True, capture_stderr=True, check=False
                )
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


class _Pulled(NamedTuple):
    set_up: float
    seconds: float
    #: of the source's process, user and system
    cpu: tuple[float, float]


async def _pull_all(
    size: int, transport: Literal["rdma", "tcp"], allocate: bool = False
) -> _Pulled:
    """All of it in the background, into shared memory, whose pages are allocated before with
    ``allocate``. The clock starts when a first page has come."""
    with Source(size) as source:
        async with served(source.spec, transport, "native") as serving:
            memory = OwnMemory("memfd", allocate=allocate)
            try:
                pulled = await _pull_from(serving, memory)
                if bad := await trio.to_thread.run_sync(source.differs, memory.address):
                    raise PagenetError(
                        f"{bad} pages are not what they should be after a transfer over {transport}"
                    )
            finally:
                memory.close()
    return pulled


async def _pull_from(serving: Served, memory: OwnMemory) -> _Pulled:
    before, began = _cpu_seconds(serving.pid), trio.current_time()
    async with pull(serving.uri, memory, background="off", prefetch=(0, 0)) as transfer:
        toucher = Toucher(lambda: bench_touch(memory.address, PAGE, [0], 1, LIMIT_SECONDS))
        try:
            await toucher.latencies()
            begins = trio.current_time()
            transfer.set_background("linear")
            await transfer.wait_complete()
        finally:
            toucher.join()
        ended = trio.current_time()
    user, system = (now - then for now, then in zip(_cpu_seconds(serving.pid), before, strict=True))
    return _Pulled(begins - began, ended - begins, (user, system))


def _cpu_seconds(pid: int) -> tuple[float, float]:
    fields: Sequence[str] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / _TICKS, int(fields[12]) / _TICKS
