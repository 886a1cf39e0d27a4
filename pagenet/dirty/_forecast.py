"""What a migration over a given link would take, by what was seen."""

from __future__ import annotations

from dataclasses import dataclass

from ._history import History

__all__ = ["Forecast", "forecast"]

# A precopy that has not converged by then does not.
_MOST_ROUNDS = 100
# What a round must at least gain to be worth sending.
_GAIN = 0.95


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of moving all of a region, each page with its full size, over a link that carries nothing
    else.

    ``precopy_rounds``: rounds until what is left can be sent within the downtime that is allowed,
    the first of which sends everything; None: never. ``precopy_seconds`` and ``precopy_bytes``: of
    all rounds and the rest. ``postcopy_seconds``: until the last page has come. ``hybrid_rounds``:
    rounds until another one would leave no less; ``hybrid_rest``: bytes that were written since
    they were sent, and come after the switch, in ``hybrid_rest_seconds``. ``is_extrapolated``: the
    rounds take longer than what was seen.
    """

    bytes_per_second: float
    precopy_rounds: int | None
    precopy_seconds: float | None
    precopy_bytes: float | None
    postcopy_seconds: float
    hybrid_rounds: int
    hybrid_seconds: float
    hybrid_rest: float
    hybrid_rest_seconds: float
    is_extrapolated: bool


def forecast(history: History, bytes_per_second: float, downtime: float = 0.3) -> Forecast | None:
    """The forecast for a link. ``downtime``: the seconds for which precopy may stop the guest. None
    if nothing was seen."""
    if not history.seconds:
        return None
    size = float(history.region.size)
    lefts = _lefts(history, bytes_per_second, downtime)
    rounds = next(
        (number for number, left in enumerate(lefts) if number and left <= downtime), None
    )
    hybrid = next(
        (at for at in range(1, len(lefts) - 1) if lefts[at + 1] > _GAIN * lefts[at]),
        len(lefts) - 1,
    )
    seen = sum(second.seconds for second in history.seconds)
    sent = None if rounds is None else sum(lefts[: rounds + 1])
    return Forecast(
        bytes_per_second=bytes_per_second,
        precopy_rounds=rounds,
        precopy_seconds=sent,
        precopy_bytes=None if sent is None else sent * bytes_per_second,
        postcopy_seconds=size / bytes_per_second,
        hybrid_rounds=hybrid,
        hybrid_seconds=sum(lefts[:hybrid]),
        hybrid_rest=lefts[hybrid] * bytes_per_second,
        hybrid_rest_seconds=lefts[hybrid],
        is_extrapolated=size / bytes_per_second > seen,
    )


def _lefts(history: History, bytes_per_second: float, downtime: float) -> list[float]:
    """Seconds that sending takes: of everything, and of what is left after each round, until that
    is short enough, or becomes no less."""
    lefts = [history.region.size / bytes_per_second]
    while len(lefts) <= _MOST_ROUNDS:
        lefts.append(history.written_in(lefts[-1]) / bytes_per_second)
        if lefts[-1] <= downtime or lefts[-1] >= lefts[-2]:
            break
    return lefts
