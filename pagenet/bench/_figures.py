"""Latencies and rates, and how several rounds become one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

__all__ = ["Sample", "median"]


@dataclass(slots=True)
class Sample:
    """Latencies in ns, by round. A quantile is the median of the rounds' quantiles: one bad round
    is not the result."""

    rounds: list[Sequence[int]] = field(default_factory=list)

    def add(self, latencies: Sequence[int]) -> None:
        self.rounds.append(sorted(latencies))

    @property
    def count(self) -> int:
        return sum(map(len, self.rounds))

    def microseconds(self, share: float) -> float | None:
        """The latency in us that ``share`` (0 to 1) of the touches do not exceed; None if there are
        none."""
        quantiles = [_quantile(latencies, share) for latencies in self.rounds if latencies]
        return round(median(quantiles) / 1000, 2) if quantiles else None

    def ratio(self, floor: Sample, share: float) -> float | None:
        """The quantile at ``share`` over that of ``floor`` in the same round: the median of the
        rounds. None if no round has both."""
        pairs = [
            (ours, least)
            for ours, least in zip(self.rounds, floor.rounds, strict=False)
            if ours and least
        ]
        ratios = [_quantile(ours, share) / _quantile(least, share) for ours, least in pairs]
        return round(median(ratios), 2) if ratios else None

    def pooled(self) -> list[int]:
        """All rounds' latencies, ascending."""
        return sorted(latency for latencies in self.rounds for latency in latencies)


def _quantile(latencies: Sequence[int], share: float) -> int:
    return latencies[min(len(latencies) - 1, int(share * len(latencies)))]
