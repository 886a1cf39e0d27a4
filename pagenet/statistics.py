"""Statistics of a transfer, as frozen snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["ClassStatistics", "Histogram", "ServingStatistics", "TransferStatistics"]


#: of a histogram, as in native/pagenet.h
BUCKETS = 320


@dataclass(frozen=True, slots=True)
class Histogram:
    """Latencies in nanoseconds, counted in buckets: exact below 16, then eight buckets to the
    octave (12.5 % wide)."""

    buckets: tuple[int, ...]

    @classmethod
    def empty(cls) -> Histogram:
        return cls((0,) * BUCKETS)

    @property
    def count(self) -> int:
        return sum(self.buckets)

    def percentile(self, share: float) -> float | None:
        """The latency, in ns, that ``share`` (0 to 1) of the latencies do not exceed.

        Accurate within 6 %. None if nothing was counted.
        """
        rank = share * self.count
        seen = 0
        for index, count in enumerate(self.buckets):
            seen += count
            if count and seen >= rank:
                return (_lower_bound(index) + _lower_bound(index + 1)) / 2
        return None

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """Of each bucket in which something was counted: the lowest latency in it and the lowest of
        the next bucket, in ns, and how many."""
        for index, count in enumerate(self.buckets):
            if count:
                yield _lower_bound(index), _lower_bound(index + 1), count

    def plus(self, other: Histogram) -> Histogram:
        return Histogram(
            tuple(one + more for one, more in zip(self.buckets, other.buckets, strict=True))
        )

    def since(self, earlier: Histogram) -> Histogram:
        """The latencies counted since ``earlier`` was taken."""
        return Histogram(
            tuple(now - then for now, then in zip(self.buckets, earlier.buckets, strict=True))
        )

    def microseconds(self, share: float) -> float | None:
        value = self.percentile(share)
        return None if value is None else round(value / 1000, 1)


def _lower_bound(bucket: int) -> int:
    if bucket < 16:
        return bucket
    octave, step = divmod(bucket, 8)
    return (8 + step) << (octave - 1)


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """One class of transfer (demand, prefetch or background).

    ``pages`` placed, in ``runs`` replies, ``zero_pages`` of them as a flag; ``wire_bytes`` received
    for them; ``existed``: found in place already; ``dropped``: came but were no longer wanted;
    ``requests`` sent; ``faults`` that this class was asked to answer; ``deferred``: times that
    placing had to wait for the owner's events to be read; ``latency``: from the fault's event to
    the page in place (demand alone). ``lz4_runs``: of the runs, those that came compressed:
    ``lz4_bytes`` of pages, as ``lz4_wire_bytes``. ``sampled``: of prefetched pages, those whose
    first touch is seen; ``sampled_used``: of the sampled pages, those that were touched.
    ``outside_faults``: of the faults, those at addresses that the owner did not announce.
    """

    pages: int
    runs: int
    zero_pages: int
    wire_bytes: int
    existed: int
    dropped: int
    requests: int
    faults: int
    deferred: int
    lz4_runs: int
    lz4_bytes: int
    lz4_wire_bytes: int
    sampled: int
    sampled_used: int
    outside_faults: int
    latency: Histogram


@dataclass(frozen=True, slots=True)
class TransferStatistics:
    """A whole transfer.

    ``pages``: in its scope; ``size``: the same in bytes; ``done``: those of the pages that are in
    place or given up by their owner. ``seconds``: since the transfer began. ``copied``: pages that
    have come while the source's owner still runs, and are not in place: they may change.
    """

    pages: int
    done: int
    size: int
    seconds: float
    placement: str
    demand: ClassStatistics
    prefetch: ClassStatistics
    background: ClassStatistics
    copied: int = 0

    @property
    def here(self) -> int:
        """The pages that need not come, as far as is known."""
        return self.done + self.copied

    @property
    def complete(self) -> bool:
        return self.done == self.pages

    @property
    def wire_bytes(self) -> int:
        return self.demand.wire_bytes + self.prefetch.wire_bytes + self.background.wire_bytes

    @property
    def zero_pages(self) -> int:
        return self.demand.zero_pages + self.prefetch.zero_pages + self.background.zero_pages

    @property
    def lz4_bytes(self) -> int:
        """Uncompressed bytes of the pages that came compressed."""
        return sum(class_.lz4_bytes for class_ in self._classes)

    @property
    def lz4_ratio(self) -> float | None:
        """Of the pages that came compressed, the uncompressed size divided by that on the wire;
        None if none came."""
        wire = sum(class_.lz4_wire_bytes for class_ in self._classes)
        return self.lz4_bytes / wire if wire else None

    @property
    def lz4_share(self) -> float:
        """The share (0 to 1) that came compressed, of the uncompressed bytes of all pages except
        those that came as a flag."""
        raw = self.wire_bytes - sum(class_.lz4_wire_bytes for class_ in self._classes)
        return self.lz4_bytes / (self.lz4_bytes + raw) if self.lz4_bytes else 0.0

    @property
    def prefetch_unused(self) -> float | None:
        """The share (0 to 1) of prefetched pages not touched during the transfer.

        Estimated from a sample of one page in sixteen. None where it cannot be known: in private
        memory, where a page in place raises no fault, and before a page of the sample has come.
        """
        sampled = self.prefetch.sampled
        return 1 - self.prefetch.sampled_used / sampled if sampled else None

    @property
    def _classes(self) -> tuple[ClassStatistics, ...]:
        return self.demand, self.prefetch, self.background

    @property
    def fault_latency(self) -> Histogram:
        return self.demand.latency


@dataclass(frozen=True, slots=True)
class ServingStatistics:
    """The requests of all destinations of a source together.

    ``pages``: of the region; ``size``: the same in bytes; ``asked``: pages requested so far, a page
    requested twice counting twice; ``demanded``: those of them that a thread waited for.
    ``seconds``: since serving began.
    """

    pages: int
    size: int
    asked: int
    demanded: int
    seconds: float

    @property
    def here(self) -> int:
        """The maximum of pages that the destination can have, if there is only one."""
        return min(self.asked, self.pages)
