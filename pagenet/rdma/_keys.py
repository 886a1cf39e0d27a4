"""The source, in C: a thread for each connection hands out keys. Nothing that a destination waits
for runs in Trio."""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack
from dataclasses import replace

import trio

from .. import _native
from ..destination.native_lanes import owned, taken
from ..errors import ConnectionBroken, RemoteProtocolError, SourceLost, Unsupported
from ..nurseries import open_failing_nursery
from ..source.memory import Source
from ..transport import DetachedSocket
from ._constants import KEYS_IN_ANY_CASE
from ._lanes import Carrier, chunk_table
from ._memory import map_file, receive_endpoint
from ._path import Path
from ._pyverbs import is_limit
from ._wire import CHUNK_SIZE, Endpoint

__all__ = ["NativeMemory"]


class NativeMemory:
    """``source`` on one device, with ``pin_limit`` bytes of it registered at a time; the same in
    Trio is :class:`~._memory.RegisteredMemory`."""

    def __init__(self, source: Source, path: Path, pin_limit: int) -> None:
        self._path = path
        _, chunks = chunk_table(source.region)
        with ExitStack() as stack:
            blocks = [_mapped(block, stack) for block in source.native_blocks()]
            self._keys = _native.Keys(
                blocks,
                device=path.device,
                port=path.port,
                gid_index=path.gid_index,
                chunks=chunks,
                chunk_size=CHUNK_SIZE,
                pin_limit=pin_limit,
                in_any_case=KEYS_IN_ANY_CASE,
            )
            stack.callback(self._keys.close)
            self._cleanup = stack.pop_all()

    @property
    def pinned(self) -> int:
        """Bytes that are registered now."""
        return self._keys.pinned

    @property
    def granted(self) -> int:
        """Pages whose keys were granted until now."""
        return self._keys.granted

    def close(self) -> None:
        """Call after the last connection that it serves has ended. Idempotent."""
        self._cleanup.close()

    async def serve(self, carrier: Carrier, unread: bytes, keep: ExitStack) -> None:
        """As :meth:`pagenet.source.lanes.OneSided.serve_reads`. ``keep`` closes the socket, which
        is taken from ``carrier``."""
        stream = bytearray(unread)
        theirs = await receive_endpoint(carrier, stream)
        with ExitStack() as stack:
            reader, ours = self._open_reader(theirs, stack)
            await carrier.send(ours.encode())
            end = await _run(reader, taken(keep, carrier), bytes(stream), stack)
        match end.kind:
            case _native.END_FAILED:
                raise SourceLost(end.text)
            case _native.END_PROTOCOL:
                raise RemoteProtocolError(end.text)
            case _native.END_BROKEN:
                raise (Unsupported if is_limit(end.error) else ConnectionBroken)(end.text)

    def _open_reader(
        self, theirs: Endpoint, stack: ExitStack
    ) -> tuple[_native.KeyReader, Endpoint]:
        path = self._path
        mtu, reads, psn = (
            min(path.mtu, theirs.mtu),
            min(path.reads, theirs.reads),
            secrets.randbelow(1 << 24),
        )
        try:
            reader = _native.KeyReader(self._keys)
            stack.callback(reader.close)
            reader.connect(
                psn,
                gid=theirs.gid,
                number=theirs.number,
                peer_psn=theirs.psn,
                lid=theirs.lid,
                mtu=mtu,
                reads=reads,
            )
        except OSError as error:
            raise ConnectionBroken(
                f"cannot join the peer's queue pair from {path}: {error.strerror}"
            ) from None
        return reader, Endpoint(path.gid, path.lid, reader.number, psn, mtu, reads)


async def _run(
    reader: _native.KeyReader, sock: DetachedSocket, unread: bytes, stack: ExitStack
) -> _native.End:
    stop_fd = owned(stack, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    async def stop_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            os.eventfd_write(stop_fd, 1)

    async with open_failing_nursery() as nursery:
        nursery.start_soon(stop_when_cancelled)
        end = await trio.to_thread.run_sync(
            reader.run, sock.fd, stop_fd, unread, sock.tls, limiter=trio.CapacityLimiter(1)
        )
        nursery.cancel_scope.cancel()
    return end


def _mapped(block: _native.SourceBlock, stack: ExitStack) -> _native.SourceBlock:
    """``block``, with the address at which it is mapped if it is a file."""
    if block.fd < 0:
        return block
    mapped = map_file(block.fd, block.pages * block.page_size)
    stack.callback(mapped.close)
    return replace(block, address=mapped.address)
