"""Which areas faults are in, and how recently: a ranking that forgets."""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush

__all__ = ["Ranking"]


class Ranking:
    """Keys ranked by heat. Each key loses half of its heat in ``half_life`` seconds.

    At most ``most`` keys are kept: the coldest are forgotten.

    Heat is kept as the base-2 logarithm of its value extrapolated back to time 0. All heat decays
    alike, so the order does not depend on the time, and nothing has to be updated as time passes.
    """

    def __init__(self, half_life: float, most: int) -> None:
        self._half_life = half_life
        self._most = most
        self._heat: dict[int, float] = {}
        # (-heat, key) of the ranked keys; entries that no longer agree with _heat are void
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._heat)

    def warm(self, key: int, now: float, amount: float = 1.0) -> None:
        """Add ``amount`` of heat to ``key`` at ``now`` (seconds), and rank it (again)."""
        heat = now / self._half_life + math.log2(amount)
        old = self._heat.get(key)
        if old is not None:
            high, low = max(heat, old), min(heat, old)
            heat = high + math.log2(1 + 2.0 ** (low - high))
        self._heat[key] = heat
        heappush(self._heap, (-heat, key))
        if len(self._heat) > self._most:
            self._forget()
        elif len(self._heap) > 4 * self._most:
            self._compact()

    def hottest(self) -> int | None:
        """The ranked key with the most heat; None: no key is ranked."""
        while self._heap:
            heat, key = self._heap[0]
            if self._heat.get(key) == -heat:
                return key
            heappop(self._heap)
        return None

    def unrank(self, key: int) -> None:
        """Take ``key`` out of the ranking until it gets more heat, if it is the hottest."""
        if self.hottest() == key:
            heat, _ = heappop(self._heap)
            while self._heap and self._heap[0] == (heat, key):
                heappop(self._heap)

    def _forget(self) -> None:
        """Forget the colder half: half at a time, so that each key's share of the cost is small."""
        kept = sorted(self._heat, key=self._heat.__getitem__)[len(self._heat) // 2 :]
        self._heat = {key: self._heat[key] for key in kept}
        self._compact()

    def _compact(self) -> None:
        self._heap = list({entry for entry in self._heap if self._heat.get(entry[1]) == -entry[0]})
        heapify(self._heap)
