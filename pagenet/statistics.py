"""What a transfer has done so far, as frozen snapshots."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ClassStatistics", "Histogram", "ServingStatistics", "TransferStatistics"]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Latencies in nanoseconds, counted in buckets: exact below 16, then eight to the octave (12.5 % wide)."""

    buckets: tuple[int, ...]

    @property
    def count(self) -> int:
        return sum(self.buckets)

    def percentile(self, share: float) -> float | None:
        """The latency, in ns, that ``share`` (0 to 1) of them do not exceed; None if there are none. Off by up to 6 %."""
        rank = share * self.count
        seen = 0
        for index, count in enumerate(self.buckets):
            seen += count
            if count and seen >= rank:
                return (_lower_bound(index) + _lower_bound(index + 1)) / 2
        return None

    def since(self, earlier: Histogram) -> Histogram:
        """What has been counted after ``earlier`` was."""
        return Histogram(tuple(now - then for now, then in zip(self.buckets, earlier.buckets, strict=True)))

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

    ``pages`` placed, in ``runs`` replies, ``zero_pages`` of them as a flag; ``wire_bytes`` received for them; ``existed``:
    found in place already; ``dropped``: came but were no longer wanted; ``requests`` sent; ``faults`` that this class was
    asked to answer; ``deferred``: times that placing had to wait for the owner's events to be read; ``latency``: from the
    fault's event to the page in place (demand alone). ``lz4_runs``: of the runs, those that came compressed, ``lz4_bytes``
    of pages in ``lz4_wire_bytes``. ``sampled``: of prefetched pages, those whose first touch is seen; ``sampled_used``: those
    of them that were touched. ``outside_faults``: of the faults, those at addresses that the owner announced
    nothing about.
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

    ``pages``: in its scope; ``size``: the same in bytes; ``done``: of those pages, in place or given up by their owner.
    """

    pages: int
    done: int
    size: int
    seconds: float
    placement: str
    demand: ClassStatistics
    prefetch: ClassStatistics
    background: ClassStatistics

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
        """Of pages that came compressed."""
        return sum(class_.lz4_bytes for class_ in self._classes)

    @property
    def lz4_ratio(self) -> float | None:
        """What compressed pages were to what they became; None if there were none."""
        wire = sum(class_.lz4_wire_bytes for class_ in self._classes)
        return self.lz4_bytes / wire if wire else None

    @property
    def lz4_share(self) -> float:
        """Of all that came as bytes, and not as a flag, the share (0 to 1) that came compressed."""
        raw = self.wire_bytes - sum(class_.lz4_wire_bytes for class_ in self._classes)
        return self.lz4_bytes / (self.lz4_bytes + raw) if self.lz4_bytes else 0.0

    @property
    def prefetch_unused(self) -> float | None:
        """Of prefetched pages, the share (0 to 1) not touched while the transfer went on, by a sample of one in sixteen.

        None where that cannot be known: in private memory, where a page that has come raises no fault, and before any of the
        sample came.
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
    """What destinations have asked a source for, all of them together.

    ``pages``: of the region; ``size``: the same in bytes; ``asked``: pages asked for so far, the same one perhaps more than
    once; ``demanded``: those of them that somebody waited for. ``seconds``: since the source is being served.
    """

    pages: int
    size: int
    asked: int
    demanded: int
    seconds: float

    @property
    def done(self) -> int:
        """Pages that one destination, if it is the only one, has at most."""
        return min(self.asked, self.pages)
