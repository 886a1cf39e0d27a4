"""Sources without a ``pagenet-serve``: files, snapshots and objects, served within this process to
its own destinations."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import quote

import trio

from . import transport
from .errors import PagenetError
from .events import EventHandler, ignore_events
from .nurseries import open_failing_nursery
from .source.memory import STORE_TIMEOUT, Source, is_object, open_source_in_thread
from .source.serving import serve
from .tcp import PairTransport
from .tls import Tls

__all__ = ["direct_source", "is_direct"]

_SCHEME = "inside"
# Seconds that destinations have for their own ends, once they were told that the source is lost.
_PARTING = 10.0
_URI = re.compile(r"[a-z][a-z0-9+.-]*://")


def is_direct(uri: str) -> bool:
    """Whether ``uri`` names a source to be opened, and not one that listens elsewhere."""
    if _URI.match(uri):
        return is_object(uri)
    return uri.partition(":")[0] not in transport.schemes()


@asynccontextmanager
async def direct_source(
    uri: str,
    *,
    cache: str | os.PathLike[str] | None = None,
    cache_size: int | None = None,
    store_timeout: float = STORE_TIMEOUT,
    tls: Tls | None = None,
    peers: Sequence[str] = (),
    on_event: EventHandler = ignore_events,
) -> AsyncIterator[str]:
    """A URI from which :func:`pagenet.pull` and :func:`pagenet.host` get the pages of ``uri`` in
    this Trio run, for as long as the block runs: of any number of destinations.

    That is ``uri`` itself if a source listens there (``tcp://``, ``rdma://``, ``unix:``). Otherwise
    ``uri`` and the options are what :func:`pagenet.open_source` takes: an object, a snapshot, a
    file. No other process can reach it; credentials that a destination dials with are not used.

    Raises what :func:`pagenet.open_source` raises. :exc:`~pagenet.errors.SourceLost`, in the block,
    if the source is lost and the block has not ended within 10 s: its destinations are told first.
    """
    if not is_direct(uri):
        yield uri
        return
    opened = await open_source_in_thread(
        uri,
        cache=cache,
        cache_size=cache_size,
        store_timeout=store_timeout,
        tls=tls,
        peers=peers,
        on_event=on_event,
    )
    with opened as source:
        async with open_failing_nursery() as nursery:
            yield await nursery.start(_serve, source, uri)
            nursery.cancel_scope.cancel()


async def _serve(source: Source, name: str, task_status: trio.TaskStatus[str]) -> None:
    if _SCHEME not in transport.schemes():
        transport.register(_SCHEME, PairTransport())
    try:
        async with serve(source, listen=f"{_SCHEME}:{quote(name)}") as server:
            task_status.started(server.uri)
            await trio.sleep_forever()
    except PagenetError:
        await trio.sleep(_PARTING)
        raise
