"""A transport of one's own: a connection is a command's standard input and output.

    python transport.py serve FILE SOCKET        # on the source's host
    python transport.py pull 'pipe:ssh HOST python transport.py bridge SOCKET'

``pipe:COMMAND`` starts the command for each connection that is dialled. Here it logs in to the
source's host, and passes on what comes to the source's unix socket (``bridge``). Nothing has to
listen on the network. What is a socket, as here, runs in the lanes in C; any other object with the
methods of ``pagenet.transport.Connection`` runs in Trio.
"""

from __future__ import annotations

import os
import select
import shlex
import socket
import sys
from contextlib import suppress
from urllib.parse import SplitResult

import trio

import pagenet
from pagenet.tcp import SocketConnection
from pagenet.transport import Listener


class PipeTransport:
    async def dial(self, uri: SplitResult) -> SocketConnection:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                end = theirs.fileno()
                await trio.lowlevel.open_process(shlex.split(uri.path), stdin=end, stdout=end)
            except (OSError, ValueError) as error:
                ours.close()
                raise pagenet.SourceUnreachable(f"cannot start {uri.path!r}: {error}") from None
        ours.setblocking(False)
        return SocketConnection(trio.socket.from_stdlib_socket(ours), uri.geturl())

    async def listen(self, uri: SplitResult) -> Listener:
        raise pagenet.UsageError("pipe: only the side that dials can start a command")

    def is_private(self, uri: SplitResult) -> bool:
        return True  # who starts the command is who has the connection


def bridge(path: str) -> None:
    """Pass on what comes, in both directions, until both have ended, or one is reset."""
    with socket.socket(socket.AF_UNIX) as there, suppress(ConnectionError):
        there.connect(path)
        to = {0: there.fileno(), there.fileno(): 1}
        while to:
            for fd in select.select(list(to), [], [])[0]:
                if data := os.read(fd, 1 << 16):
                    while data:
                        data = data[os.write(to[fd], data) :]
                elif to.pop(fd) == there.fileno():
                    there.shutdown(socket.SHUT_WR)
                else:
                    os.close(1)


async def serve(path: str, at: str) -> None:
    async with pagenet.serve(path, listen=f"unix:{at}") as server:
        await server.wait_complete()


async def pull(uri: str) -> None:
    memory = pagenet.OwnMemory("memfd")
    async with pagenet.pull(uri, memory) as transfer:
        await transfer.wait_complete()
        print("complete:", transfer.statistics().done, "pages, lanes", transfer.lane)
    memory.close()


if __name__ == "__main__":
    pagenet.register("pipe", PipeTransport)
    match sys.argv[1:]:
        case ["serve", path, at]:
            trio.run(serve, path, at)
        case ["pull", uri]:
            trio.run(pull, uri)
        case ["bridge", path]:
            bridge(path)
