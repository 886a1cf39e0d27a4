"""All rows of ``pagenet-bench restore``, one after the other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from . import _local, _remote
from ._store import Store, open_store
from ._what import Curve, Figure, RestoreOptions
from .s3 import check_s3

__all__ = ["RestoreResult", "measure_restore"]

_LOCAL: dict[str, Callable[[RestoreOptions], Awaitable[list[Figure]]]] = {
    "warm": _local.warm,
    "chain": _local.chain,
    "many": _local.many,
    "start": _local.start,
}


@dataclass(slots=True)
class RestoreResult:
    figures: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)


async def measure_restore(
    options: RestoreOptions, tell: Callable[[Figure], None] = lambda figure: None
) -> RestoreResult:
    """The chosen rows. ``tell`` gets each figure as soon as there is one. :exc:`UsageError` if a
    row needs what is not installed; :exc:`PagenetError` if a guest got a wrong page."""
    options.check()
    result = RestoreResult()
    async with AsyncExitStack() as stack:
        at: Store | None = None
        if not set(options.rows) <= set(_LOCAL):
            check_s3()
            at = await stack.enter_async_context(open_store(options.size + options.memory))
        for row in options.rows:
            if row in _LOCAL:
                figures = await _LOCAL[row](options)
            else:
                assert at is not None
                figures = await _remote_row(row, options, at, result.curves)
            for figure in figures:
                tell(figure)
            result.figures += figures
    return result


async def _remote_row(
    row: str, options: RestoreOptions, at: Store, curves: list[Curve]
) -> list[Figure]:
    if row == "store":
        return await _remote.store(options, at)
    measure = {"clones": _remote.clones, "recorded": _remote.recorded}[row]
    figures, drawn = await measure(options, at)
    curves += drawn
    return figures
