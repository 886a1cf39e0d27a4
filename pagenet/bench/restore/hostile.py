"""A guest that means no good: ``python -m pagenet.bench.restore.hostile SOCKET``, started by
pagenet-bench alone.

Again and again it sends garbage instead of a handshake, holds connections on which it says nothing,
and has a child that hands its memory over, waits for a page, and is killed. It prints a line once
it has begun, and goes on until it is killed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from array import array
from collections import deque
from contextlib import suppress

from ..._native.testing import Guest

_SIZE = 64 << 20
_SILENT = 8
_GARBAGE = (b"[{}]", b"\0" * 4096, b"[" * 60000, b'[{"base_host_virt_addr":1,"size":1,"offset":9}]')
# Seconds that the child has, and between two rounds.
_PAUSE = 0.005


def _connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(1)
    with suppress(OSError):
        sock.connect(path)
    return sock


def _send_garbage(path: str) -> None:
    for garbage in _GARBAGE:
        with _connected(path) as sock, suppress(OSError):
            sock.sendall(garbage)


def _die_half_way(path: str) -> None:
    pid = os.fork()
    if not pid:
        try:
            pages = memoryview(array("Q", range(_SIZE // 4096)))
            touches = memoryview(bytearray(16 * len(pages))).cast("Q")
            guest = Guest(path, _SIZE, 0, pages, touches)
            guest.prepare()
            guest.arrive()
        finally:
            os._exit(0)
    time.sleep(_PAUSE)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def main() -> None:
    path = sys.argv[1]
    os.nice(19)  # it comes from elsewhere, but shares the processors of this host
    silent = deque[socket.socket](maxlen=_SILENT)
    print(flush=True)
    while True:
        if len(silent) == _SILENT:
            silent[0].close()
        silent.append(_connected(path))
        _send_garbage(path)
        _die_half_way(path)
        time.sleep(_PAUSE)


if __name__ == "__main__":
    main()
