"""A store of objects for the bench, longer paths to it, and bare obstore beside pagenet."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import trio

from .._peers import Relay, Source, relayed
from .s3 import BUCKET, s3_server

if TYPE_CHECKING:
    from obstore.store import ObjectStore

__all__ = ["Bare", "Span", "Store", "open_store", "spans_of"]

# Requests at a time.
_MOST = 64


class Span(NamedTuple):
    start: int
    length: int


def spans_of(pages: Sequence[int], page: int, chunk: int, size: int) -> list[Span]:
    """The aligned chunks that have ``pages``, in the order in which those are first wanted."""
    numbers = dict.fromkeys(number * page // chunk for number in pages)
    return [Span(n * chunk, min(chunk, size - n * chunk)) for n in numbers]


class Bare:
    """obstore alone. Its calls block."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        from obstore.store import from_url

        self._store: ObjectStore = from_url(
            f"s3://{BUCKET}",
            endpoint=environment["AWS_ENDPOINT_URL"],
            region=environment["AWS_REGION"],
            access_key_id=environment["AWS_ACCESS_KEY_ID"],
            secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            client_options={"allow_http": True},
        )

    def put(self, key: str, source: Source) -> None:
        import obstore

        with mmap(source.fd, source.size) as content, memoryview(content) as view:
            obstore.put(self._store, key, bytes(view))

    def get(self, key: str, span: Span) -> int:
        """How long one GET takes, in ns."""
        import obstore

        began = time.monotonic_ns()
        obstore.get_range(self._store, key, start=span.start, length=span.length)
        return time.monotonic_ns() - began

    def get_all(self, key: str, spans: Sequence[Span]) -> int:
        """How long it takes to get them all, several at a time, in ns."""
        return asyncio.run(self._get_all(key, spans))

    async def _get_all(self, key: str, spans: Sequence[Span]) -> int:
        import obstore

        places = asyncio.Semaphore(_MOST)

        async def get(span: Span) -> None:
            async with places:
                await obstore.get_range_async(
                    self._store, key, start=span.start, length=span.length
                )

        began = time.monotonic_ns()
        await asyncio.gather(*map(get, spans))
        return time.monotonic_ns() - began


@dataclass(frozen=True, slots=True)
class Store:
    """A real S3 server. ``environment``: what its clients need."""

    environment: Mapping[str, str]

    async def put(self, key: str, source: Source) -> str:
        """The URI of an object with those bytes, from now on."""
        await trio.to_thread.run_sync(Bare(self.environment).put, key, source)
        return f"s3://{BUCKET}/{key}"

    @asynccontextmanager
    async def farther(self, seconds: float, rate: int = 0) -> AsyncIterator[tuple[Store, Relay]]:
        """The same store, with so many seconds on the way in each direction, and ``rate`` bytes a
        second on each connection (0: as fast as can be)."""
        async with relayed(self.environment["AWS_ENDPOINT_URL"], seconds, rate) as relay:
            there = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay.port}"}
            yield Store({**self.environment, **there}), relay


@asynccontextmanager
async def open_store(size: int) -> AsyncIterator[Store]:
    """A server for ``size`` bytes, in memory."""
    with ExitStack() as stack:
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="pagenet-bench-", dir="/dev/shm")
        )
        opening = s3_server(Path(directory), size)
        yield Store(await trio.to_thread.run_sync(stack.enter_context, opening))
