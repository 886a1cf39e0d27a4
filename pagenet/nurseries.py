"""A nursery that fails with the error itself.

Trio wraps whatever leaves a nursery in exception groups, since several tasks may fail at once. Of
several errors of pagenet's own, one is the cause and the others follow from it (the lanes of a lost
source all break). Callers get the cause alone, to catch by name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import trio

from .errors import (
    ConnectionBroken,
    ConnectionClosed,
    PagenetError,
    SourceDisconnected,
    SourceLost,
)

__all__ = ["open_failing_nursery", "running_beside"]


@asynccontextmanager
async def open_failing_nursery() -> AsyncIterator[trio.Nursery]:
    """Like :func:`trio.open_nursery`, but a single error, or the cause among several of pagenet's
    own, is raised without a group."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        error = _cause(group)
        if error is None:
            raise
        raise error from error.__cause__


@asynccontextmanager
async def running_beside(
    task: Callable[..., Awaitable[object]], *args: object
) -> AsyncIterator[None]:
    """Run ``task`` beside the block, and cancel it at the end of the block. An error of the task
    ends the block."""
    async with open_failing_nursery() as nursery:
        nursery.start_soon(task, *args)
        yield
        nursery.cancel_scope.cancel()


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    errors = [error for error in _leaves(group) if not isinstance(error, trio.Cancelled)]
    if len(errors) == 1:
        return errors[0]
    if errors and all(isinstance(error, PagenetError) for error in errors):
        return min(errors, key=_distance)
    return None


def _distance(error: BaseException) -> int:
    """How far ``error`` is from the cause. The task that meets the cause ends the session; to the
    next tasks that is the loss of the source, and to the last a broken connection."""
    if isinstance(error, ConnectionBroken | ConnectionClosed):
        return 3
    if isinstance(error, SourceDisconnected):
        return 2
    return 1 if isinstance(error, SourceLost) else 0


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
