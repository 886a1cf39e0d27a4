"""When the background begins: at once, after a time, or when faults become few."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import trio

from ..errors import UsageError
from .pacing import Background

__all__ = ["Start", "begin_background", "parse_start"]

# Faults are counted over WINDOW_SECONDS; the count is checked LOOKS times in that time.
WINDOW_SECONDS = 1.0
LOOKS = 10
# As seconds, more than ten days; as faults a second, more than any machine has.
_MOST = 1e6


@dataclass(frozen=True, slots=True)
class Start:
    """Begin after ``after`` seconds; with ``rate``, once fewer than ``rate`` faults have come
    within the last second."""

    after: float = 0.0
    rate: float | None = None


def parse_start(text: str) -> Start:
    """Parse ``after=SECONDS`` or ``rate=FAULTS``. :exc:`UsageError` for anything else."""
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if name == "after" and 0 <= number <= _MOST:
        return Start(after=number)
    if name == "rate" and 0 < number <= _MOST:
        return Start(rate=number)
    raise UsageError(f"{text[:40]!r} is neither after=SECONDS nor rate=N, with N faults a second")


async def begin_background(
    background: Background, start: Start, count_faults: Callable[[], int]
) -> None:
    """Wait for ``start``, counted from now on, and begin. ``count_faults`` returns the number of
    faults so far."""
    await trio.sleep(start.after)
    if start.rate is not None:
        await _until_fewer(start.rate, count_faults)
    background.begin()


async def _until_fewer(rate: float, count_faults: Callable[[], int]) -> None:
    counts = deque([count_faults()], maxlen=LOOKS + 1)
    while len(counts) <= LOOKS or counts[-1] - counts[0] >= rate * WINDOW_SECONDS:
        await trio.sleep(WINDOW_SECONDS / LOOKS)
        counts.append(count_faults())
