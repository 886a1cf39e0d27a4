"""The other side of a floor, as a process of its own: ``python -m pagenet.bench.peer``, started by
pagenet-bench alone.

``pages SOCKET PAGE_SIZE`` answers requests with pages. ``bytes SOCKET MEMFD SIZE`` keeps a copy of
that memory. Over its unix socket it takes connections, each with an order (how many bytes, in
chunks of which size), and sends the bytes over them. ``memory MEMFD SIZE`` keeps a copy in private
memory, prints its address, and waits for the end of its input. ``pings SOCKET DIRECTORY SIZE``
answers pings with that many bytes, and ``stream SOCKET DIRECTORY LENGTH CHUNK`` sends bytes once:
with TLS and the certificates in DIRECTORY, or, if it is empty, without. ``handler SOCKET MEMFD
SIZE`` fills the memory of the owners that connect to the unix socket at that path, with as little
as that takes, until the end of its input; it prints a line once they may.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress

from .. import _native
from .._native.testing import (
    bench_answer_pings,
    bench_handler,
    bench_memcpy,
    bench_page_server,
    bench_send,
    bench_tls_send,
)
from ..children import module_command

__all__ = ["ORDER", "READY", "peer_command"]

#: an order: how many bytes to send, and how many in a chunk
ORDER = struct.Struct("<QQ")
#: sent when orders may come
READY = b"."


def peer_command(role: str, *arguments: int | str) -> list[str]:
    return module_command("pagenet.bench.peer", role, *map(str, arguments))


def _send_pages(fd: int, page_size: int) -> None:
    with socket.socket(fileno=fd) as sock:
        bench_page_server(sock.fileno(), page_size)


def _copy_of(memfd: int, size: int) -> _native.Mapped:
    source, memory = _native.Mapped(size, memfd), _native.Mapped(size)
    bench_memcpy(memory.address, source.address, size)
    source.close()
    return memory


def _send_bytes(fd: int, memfd: int, size: int) -> None:
    memory = _copy_of(memfd, size)
    with socket.socket(fileno=fd) as orders:
        orders.send(READY)
        while True:
            order, fds, _, _ = socket.recv_fds(orders, ORDER.size, 1)
            if not fds:
                break
            length, chunk = ORDER.unpack(order)
            with socket.socket(fileno=fds[0]) as sock:
                bench_send(sock.fileno(), memory.address, length, chunk)


def _hold_memory(memfd: int, size: int) -> None:
    memory = _copy_of(memfd, size)
    print(memory.address, flush=True)
    os.read(0, 1)


def _handle(path: str, memfd: int, size: int) -> None:
    memory = _native.Mapped(size, memfd)
    _native.populate(memory.address, size)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1024)
        listener.setblocking(False)
        print(flush=True)
        bench_handler(listener.fileno(), memory.address, size, 0)


_ROLES: dict[str, Callable[..., None]] = {
    "pages": _send_pages,
    "bytes": _send_bytes,
    "handler": _handle,
    "memory": _hold_memory,
    "pings": bench_answer_pings,
    "stream": bench_tls_send,
}


def main() -> int:
    role, *arguments = sys.argv[1:]
    with suppress(BrokenPipeError, ConnectionResetError):  # the bench has ended
        _ROLES[role](*(int(word) if word.isdecimal() else word for word in arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
