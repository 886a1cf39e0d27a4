"""What TLS costs: a page that a thread waits for, and the background, beside bare loops of OpenSSL
over the same kind of socket, and beside the same without TLS."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from .._native.testing import bench_claim_memory, bench_ping, bench_tls_receive
from ..certificates import make_certificates
from ..destination.pulling import pull
from ..tls import Tls
from ..uffd import OwnMemory
from ._fault import FaultOptions, measure_faults
from ._figures import Sample, median
from ._peers import Source, connected_peer, served_at

__all__ = ["TlsOptions", "TlsResult", "measure_tls"]

PAGE = 4096
HEADER = 24
CHUNK = 256 << 10


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """``size``: bytes of the memory; ``touches``: of pages, and pings, in each round; ``lanes``:
    numbers of background lanes."""

    rounds: int = 5
    size: int = 512 << 20
    touches: int = 4000
    lanes: tuple[int, ...] = (1, 2)


@dataclass(slots=True)
class TlsResult:
    """With TLS (``encrypted``) or without: latencies of bare pings, and of touches, and rates in
    bytes a second, of bare writes, and of the background by its number of lanes; a list has the
    rounds."""

    encrypted: bool
    ping: Sample = field(default_factory=Sample)
    idle: Sample = field(default_factory=Sample)
    loaded: Sample = field(default_factory=Sample)
    floor: list[float] = field(default_factory=list)
    background: dict[int, list[float]] = field(default_factory=dict)

    @property
    def floor_rate(self) -> float:
        return float(median(self.floor))

    def rate(self, lanes: int) -> float:
        return float(median(self.background[lanes]))


async def measure_tls(options: TlsOptions) -> tuple[TlsResult, TlsResult]:
    """Without TLS, and with it: in turn, round by round."""
    plain, encrypted = TlsResult(encrypted=False), TlsResult(encrypted=True)
    with tempfile.TemporaryDirectory(prefix="pagenet-bench-") as scratch:
        make_certificates(Path(scratch), ["127.0.0.1"])
        directory = str(Path(scratch) / "127.0.0.1")
        with Source(options.size) as source:
            for _ in range(options.rounds):
                for result in (plain, encrypted):
                    await _round(result, source, directory if result.encrypted else "", options)
    return plain, encrypted


async def _round(result: TlsResult, source: Source, directory: str, options: TlsOptions) -> None:
    size = options.size
    async with connected_peer("tcp", "pings", directory, HEADER + PAGE) as sock:
        ping = partial(bench_ping, sock.fileno(), directory, HEADER + PAGE, options.touches)
        result.ping.add(await trio.to_thread.run_sync(ping))
    async with connected_peer("tcp", "stream", directory, size, CHUNK) as sock:
        receive = partial(bench_tls_receive, sock.fileno(), directory, size, CHUNK)
        result.floor.append(size / await trio.to_thread.run_sync(receive))
    tls = Tls(directory) if directory else None
    arguments = ("--tls-dir", directory) if directory else ()
    async with served_at("tcp://127.0.0.1:0", source.spec, *arguments) as server:
        [faults] = await measure_faults(
            FaultOptions(threads=(1,), touches=options.touches, rounds=1, uri=server.uri, tls=tls)
        )
        for sample, rounds in ((result.idle, faults.idle), (result.loaded, faults.loaded)):
            sample.rounds += rounds.rounds
        for lanes in options.lanes:
            rate = await _background(server.uri, tls, lanes, size)
            result.background.setdefault(lanes, []).append(rate)


async def _background(uri: str, tls: Tls | None, lanes: int, size: int) -> float:
    """Bytes a second of a transfer in which no thread touches anything."""
    await trio.to_thread.run_sync(bench_claim_memory, size)
    memory = OwnMemory("anonymous")
    try:
        async with pull(
            uri, memory, tls=tls, background="linear", background_lanes=lanes, compress="none"
        ) as transfer:
            began = trio.current_time()
            await transfer.wait_complete()
            return size / (trio.current_time() - began)
    finally:
        memory.close()
