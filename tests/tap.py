"""A process in the middle, that reads, changes or cuts what passes."""

from __future__ import annotations

from urllib.parse import urlsplit

import trio


class Tap:
    """Passes bytes between a listener and who dials it, keeps them, and may spoil or cut them."""

    def __init__(self, uri: str, local_address: str | None = None) -> None:
        """``local_address``: where it dials from."""
        self._to, self._from = urlsplit(uri).port or 0, local_address
        #: what went in each direction of each connection
        self.seen: list[bytearray] = []
        self.spoils = self.cuts = False

    async def run(self, task_status: trio.TaskStatus[str]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        task_status.started(f"tcp://127.0.0.1:{port}")
        await trio.serve_listeners(self._pass_on, listeners)

    async def _pass_on(self, near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", self._to, local_address=self._from)
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._one_way, near, far)
            await self._one_way(far, near)
            nursery.cancel_scope.cancel()

    async def _one_way(self, origin: trio.SocketStream, to: trio.SocketStream) -> None:
        seen = bytearray()
        self.seen.append(seen)
        try:
            async for data in origin:
                seen += data
                if self.cuts:
                    await origin.aclose()
                    await to.aclose()
                    return
                spoilt = bytes(data[:-1]) + bytes([data[-1] ^ 1]) if self.spoils else data
                await to.send_all(spoilt)
            await to.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
