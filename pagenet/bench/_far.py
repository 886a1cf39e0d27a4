"""The other side of the floors on another host: what ``pagenet-bench peer`` runs there, and how to
reach it.

A client sends one order of 24 bytes: pages in reply to requests, or a number of bytes in chunks of
a given size.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

from .. import _native, transport
from .._native.testing import bench_page_server, bench_send
from ..errors import PagenetError, UsageError
from ..events import EventHandler
from ..nurseries import open_failing_nursery
from ..session import receive_exactly
from ..transport import Connection, Detachable
from ._peers import Source

__all__ = ["blocking", "far_socket", "order_bytes", "order_pages", "serve_floors"]

_ORDER = struct.Struct("<4s4xQQ")
_PAGES, _BYTES = b"page", b"byte"
# Seconds to wait for the order of a client that has connected.
_ORDER_TIMEOUT = 10.0
_MAX_PAGE = 2 << 20
_MAX_CONNECTIONS = 16


async def serve_floors(uri: str, size: int, *, plaintext: bool, on_event: EventHandler) -> None:
    """Serve floors at ``uri`` until cancelled. Sends at most ``size`` bytes over a connection.
    Events: ``listening``, ``refused``."""
    with Source(size) as source, await transport.listen(uri, plaintext=plaintext) as listener:
        memory = _native.Mapped(size, source.fd)
        limiter = trio.CapacityLimiter(_MAX_CONNECTIONS)
        try:
            async with open_failing_nursery() as nursery:
                on_event("listening", uri=listener.uri)
                while True:
                    connection = await listener.accept()
                    nursery.start_soon(_answer, connection, memory, limiter, on_event)
        finally:
            memory.close()


async def _answer(
    connection: Connection,
    memory: _native.Mapped,
    limiter: trio.CapacityLimiter,
    on_event: EventHandler,
) -> None:
    peer = connection.peer
    try:
        work = await _order(connection, memory)
        async with blocking(connection) as sock:
            await trio.to_thread.run_sync(work, sock.fileno(), limiter=limiter)
    except (PagenetError, trio.TooSlowError) as error:
        on_event(
            "refused",
            peer=peer,
            reason=str(error) or f"it asked for nothing for {_ORDER_TIMEOUT:g} s",
        )
    except OSError:
        pass  # the client has left
    finally:
        connection.close()


async def _order(connection: Connection, memory: _native.Mapped) -> Callable[[int], None]:
    order = bytearray(_ORDER.size)
    with trio.fail_after(_ORDER_TIMEOUT):
        await receive_exactly(connection, memoryview(order))
    what, length, piece = _ORDER.unpack(order)
    if what == _PAGES and 0 < piece <= _MAX_PAGE:
        return partial(bench_page_server, page_size=piece)
    if what == _BYTES and 0 < piece <= length <= memory.size:
        return partial(bench_send, address=memory.address, length=length, chunk=piece)
    there_is = f"at most {memory.size} bytes, in chunks, or pages of at most {_MAX_PAGE}"
    raise PagenetError(f"it asks for what there is not: there are {there_is}")


@asynccontextmanager
async def blocking(connection: Connection) -> AsyncIterator[socket.socket]:
    """The connection's socket, blocking, for a loop in C in a thread. A cancellation shuts it down,
    which ends the loop. :exc:`UsageError` if the connection has no socket."""
    if not isinstance(connection, Detachable):
        raise UsageError(f"{connection.peer}: the floors need a transport over sockets")
    with socket.socket(fileno=connection.detach().fd) as sock:
        sock.setblocking(True)

        async def shut_down_when_cancelled() -> None:
            try:
                await trio.sleep_forever()
            finally:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

        async with open_failing_nursery() as nursery:
            nursery.start_soon(shut_down_when_cancelled)
            await trio.lowlevel.checkpoint()
            yield sock
            nursery.cancel_scope.cancel()


def order_pages(page_size: int) -> bytes:
    return _ORDER.pack(_PAGES, 0, page_size)


def order_bytes(length: int, chunk: int) -> bytes:
    return _ORDER.pack(_BYTES, length, chunk)


@asynccontextmanager
async def far_socket(uri: str) -> AsyncIterator[socket.socket]:
    """A blocking connection, of the kind that pagenet uses, to the ``pagenet-bench peer`` at
    ``uri``. The peer waits for an order."""
    connection = await transport.dial(uri)
    try:
        async with blocking(connection) as sock:
            yield sock
    finally:
        connection.close()
