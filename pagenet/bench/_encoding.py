"""What compression brings: the same pages uncompressed, compressed, and with ``auto``, by content
and by link.

Both sides are processes of their own, in network namespaces if the link has a rate. The encodings
that are compared are measured in turn, and every page is verified after its transfer.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import trio

from ..certificates import make_certificates
from ..errors import PagenetError, UsageError
from ..protocol import Compress
from ..transport import LaneKind
from ._content import CONTENTS, Content
from ._environment import available_memory
from ._figures import median
from ._peers import served_at
from ._site import inside, open_link
from ._task import worked

__all__ = [
    "ENCODINGS",
    "EncodingOptions",
    "EncodingResult",
    "EncodingTarget",
    "encoding_targets",
    "measure_encodings",
]

#: by name: the ``compress`` that the destination asks for
ENCODINGS: dict[str, Compress] = {"raw": "none", "lz4": "lz4", "auto": "auto"}
#: auto compared with raw: (content, Mbit/s or None) -> the lowest ratio of their rates that meets
#: the target
_AT_LEAST: dict[tuple[str, int | None], float] = {
    ("compressible", 1000): 2.0,
    ("random", 1000): 0.97,
}
_NEVER_SLOWER = 0.97
_CLOSE_TO_BEST = 0.9
_CLOSE_TO_BEST_TLS = 0.95


@dataclass(frozen=True, slots=True)
class EncodingOptions:
    """``size``, ``chunk``: bytes. ``rates``: of the link, in Mbit/s; None is loopback, without a
    limit. ``tls``: all of it encrypted."""

    lane: LaneKind = "native"
    size: int = 512 << 20
    chunk: int = 256 << 10
    encodings: Sequence[str] = tuple(ENCODINGS)
    contents: Sequence[str] = CONTENTS[:2]
    rates: Sequence[int | None] = (None,)
    rounds: int = 3
    tls: bool = False


@dataclass(slots=True)
class EncodingResult:
    """Lists have an entry for each round: ``seconds`` for ``size`` bytes, ``wires`` in bytes,
    ``shares`` that went compressed (0 to 1). ``ratios`` are of what went compressed, in rounds in
    which anything did."""

    encoding: str
    content: str
    rate: int | None
    size: int
    seconds: list[float] = field(default_factory=list)
    wires: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def mbps(self) -> float:
        """10^6 bytes of pages a second."""
        return round(self.size / median(self.seconds) / 1e6, 1)

    @property
    def wire_bytes(self) -> int:
        return int(median(self.wires))

    @property
    def share(self) -> float:
        return round(median(self.shares), 3)

    @property
    def ratio(self) -> float | None:
        return round(median(self.ratios), 2) if self.ratios else None


class EncodingTarget(NamedTuple):
    """``times``: the rate of ``auto`` over that of ``other``."""

    content: str
    rate: int | None
    other: str
    times: float
    at_least: float

    @property
    def met(self) -> bool:
        return self.times >= self.at_least


async def measure_encodings(options: EncodingOptions) -> list[EncodingResult]:
    """A result for each rate, content and encoding.

    Raises :exc:`~pagenet.errors.Unsupported` if a link cannot be limited here, :exc:`UsageError` if
    there is too little memory, and :exc:`PagenetError` if pages differ after a transfer."""
    if (needed := 3 * options.size) > available_memory():
        raise UsageError(
            f"this takes {needed >> 20} MiB of memory, and {available_memory() >> 20} are available"
        )
    results = []
    for rate in options.rates:
        async with _link(rate) as ends, _certificates(ends.address, options) as directory:
            for name in options.contents:
                with Content(name, options.size) as content:
                    results += await _measure(content, rate, ends, directory, options)
    return results


class _Ends(NamedTuple):
    """The prefixes of the source's and the destination's commands, and the address at which the
    source listens."""

    source: Sequence[str]
    destination: Sequence[str]
    address: str


@asynccontextmanager
async def _link(rate: int | None) -> AsyncIterator[_Ends]:
    if rate is None:
        yield _Ends([], [], "127.0.0.1")
        return
    async with open_link(rate) as link:
        yield _Ends(inside(link.destination), inside(link.source), link.address)


@asynccontextmanager
async def _certificates(address: str, options: EncodingOptions) -> AsyncIterator[str]:
    """A directory of them, or nothing."""
    if not options.tls:
        yield ""
        return
    with tempfile.TemporaryDirectory(prefix="pagenet-bench-") as scratch:
        await trio.to_thread.run_sync(make_certificates, Path(scratch), [address])
        yield str(Path(scratch) / address)


async def _measure(
    content: Content,
    rate: int | None,
    ends: _Ends,
    directory: str,
    options: EncodingOptions,
) -> list[EncodingResult]:
    where = f"tcp://{ends.address}:0"
    security = ("--tls-dir", directory) if directory else ("--plaintext",)
    results = [EncodingResult(name, content.name, rate, content.size) for name in options.encodings]
    async with served_at(
        where, content.spec, *security, "--lane", options.lane, inside=ends.source
    ) as server:
        for _ in range(options.rounds):
            for result in results:
                await _pull(result, server.uri, directory, ends.destination, content, options)
    return results


async def _pull(
    result: EncodingResult,
    uri: str,
    directory: str,
    destination: Sequence[str],
    content: Content,
    options: EncodingOptions,
) -> None:
    wanted = {
        "uri": uri,
        "compress": ENCODINGS[result.encoding],
        "lane": options.lane,
        "chunk": options.chunk,
        "tls_dir": directory,
    }
    told = await worked(
        "pagenet.bench.puller", {**wanted, "fd": content.fd}, content.fd, inside=destination
    )
    if told["bad"]:
        raise PagenetError(
            f"{told['bad']} MiB are not what they should be after {result.encoding} of"
            f" {result.content} pages"
        )
    result.seconds.append(told["seconds"])
    result.wires.append(told["bytes_wire"])
    result.shares.append(told["share"])
    if told["ratio"] is not None:
        result.ratios.append(told["ratio"])


def encoding_targets(
    results: Sequence[EncodingResult], *, tls: bool = False
) -> list[EncodingTarget]:
    """The targets of ``auto`` for which figures were measured."""
    close = _CLOSE_TO_BEST_TLS if tls else _CLOSE_TO_BEST
    found = []
    for auto in results:
        if auto.encoding != "auto" or auto.content == "zero":
            continue
        others = {
            r.encoding: r.mbps
            for r in results
            if (r.content, r.rate) == (auto.content, auto.rate) and r is not auto
        }
        if raw := others.get("raw"):
            at_least = _AT_LEAST.get((auto.content, auto.rate), _NEVER_SLOWER)
            found.append(
                EncodingTarget(auto.content, auto.rate, "raw", round(auto.mbps / raw, 3), at_least)
            )
        if len(others) == 2:
            times = round(auto.mbps / max(others.values()), 3)
            found.append(
                EncodingTarget(auto.content, auto.rate, "the better of the two", times, close)
            )
    return found
