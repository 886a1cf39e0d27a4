"""The HTTP endpoint: ``GET /metrics``, and nothing else. Time, bytes and connections that peers may
take are bounded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import trio

from ..errors import UsageError
from ..nurseries import open_failing_nursery
from ..unix_socket import UnixSocketFile
from ._address import MetricsAddress

if TYPE_CHECKING:
    from ._families import Subject

__all__ = ["serve_metrics"]

# Connections at a time; others wait in the backlog.
_MOST = 8
_BACKLOG = 16
# Seconds that a peer has for its request; and to take the answer, too.
_REQUEST_PATIENCE, _PATIENCE = 2.0, 10.0
_PIECE = 4096


def _libraries() -> tuple[ModuleType, ModuleType]:
    """h11, and prometheus_client's text. :exc:`UsageError` if they are not installed."""
    try:
        import h11
        import prometheus_client.exposition
    except ImportError:
        raise UsageError(
            "--metrics needs prometheus_client and h11: pip install 'pagenet[metrics]'"
        ) from None
    return h11, prometheus_client.exposition


@asynccontextmanager
async def serve_metrics(
    address: MetricsAddress, program: str, subject: Callable[[], Subject]
) -> AsyncIterator[MetricsAddress]:
    """Serve the metrics of what ``subject`` returns, for as long as the block runs. Yields the
    address, with the port that it has if ``address`` names port 0.

    A unix socket is for this user and root. :exc:`~pagenet.errors.UsageError` if nobody can listen
    there, or if a library is missing.
    """
    h11, exposition = _libraries()
    from ._families import families

    class Collector:
        def collect(self) -> object:
            return families(program, subject())

    def text() -> bytes:
        found: bytes = exposition.generate_latest(Collector())
        return found

    endpoint = _Endpoint(h11, exposition.CONTENT_TYPE_LATEST, text)
    async with _listening(address) as (listener, there), open_failing_nursery() as nursery:
        nursery.start_soon(endpoint.accept, listener)
        yield there
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _listening(
    address: MetricsAddress,
) -> AsyncIterator[tuple[trio.SocketListener, MetricsAddress]]:
    if address.path is not None:
        file = UnixSocketFile(address.path, f"--metrics {address}", _BACKLOG)
        try:
            yield trio.SocketListener(file.socket), address
        finally:
            file.close()
        return
    try:
        [listener] = await trio.open_tcp_listeners(
            address.port, host=address.host, backlog=_BACKLOG
        )
    except OSError as error:
        raise UsageError(
            f"--metrics {address}: cannot listen: {error.strerror or error}; choose another address"
        ) from None
    async with listener:
        port = listener.socket.getsockname()[1]
        yield listener, MetricsAddress(None, address.host, port)


class _Endpoint:
    """``text``: the metrics now, of the type ``content_type``."""

    def __init__(self, h11: ModuleType, content_type: str, text: Callable[[], bytes]) -> None:
        self._h11, self._content_type, self._text = h11, content_type, text

    async def accept(self, listener: trio.SocketListener) -> None:
        places = trio.CapacityLimiter(_MOST)
        async with open_failing_nursery() as nursery:
            while True:
                async with places:
                    pass  # there is a place
                stream = await self._next(listener)
                nursery.start_soon(partial(self._meet, stream, places))

    async def _next(self, listener: trio.SocketListener) -> trio.SocketStream:
        while True:
            try:
                return await listener.accept()
            except OSError:  # no descriptors: others will end
                await trio.sleep(0.1)

    async def _meet(self, stream: trio.SocketStream, places: trio.CapacityLimiter) -> None:
        async with places, stream:
            with trio.move_on_after(_PATIENCE), suppress(trio.BrokenResourceError):
                await self._answer(stream)

    async def _answer(self, stream: trio.SocketStream) -> None:
        connection = self._h11.Connection(self._h11.SERVER)
        try:
            request = None
            with trio.move_on_after(_REQUEST_PATIENCE):
                request = await self._receive(connection, stream)
            status, body = self._page(request)
        except self._h11.RemoteProtocolError as error:
            status, body = error.error_status_hint, f"{error}\n".encode()
        if status is None or connection.our_state is not self._h11.SEND_RESPONSE:
            return
        headers = [
            ("Content-Type", self._content_type if status == 200 else "text/plain; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        response = self._h11.Response(status_code=status, headers=headers)
        parts = (response, self._h11.Data(data=body), self._h11.EndOfMessage())
        await stream.send_all(b"".join(connection.send(part) or b"" for part in parts))

    async def _receive(self, connection: object, stream: trio.SocketStream) -> object:
        """The request; None: the peer has left."""
        while True:
            event = connection.next_event()  # type: ignore[attr-defined]
            if event is not self._h11.NEED_DATA:
                return event if isinstance(event, self._h11.Request) else None
            connection.receive_data(await stream.receive_some(_PIECE))  # type: ignore[attr-defined]

    def _page(self, request: object) -> tuple[int | None, bytes]:
        if request is None:
            return None, b""
        method, target = request.method, request.target  # type: ignore[attr-defined]
        if target.partition(b"?")[0] != b"/metrics":
            return 404, b"the metrics are at /metrics\n"
        if method != b"GET":
            return 405, b"GET is all that there is\n"
        return 200, self._text()
