"""A delay on the way to a source: ``python -m pagenet.bench.pace.relay HOST PORT SECONDS``, started
by pagenet-bench alone.

It joins each connection that it takes on loopback to one to HOST:PORT, with so many seconds on the
way in each direction, prints the port that it listens on, and ends when its input does.
"""

from __future__ import annotations

import socket
import sys

from ..._native.testing import bench_relay


def main() -> None:
    host, port, delay = sys.argv[1:]
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        print(listener.getsockname()[1], flush=True)
        bench_relay(listener.fileno(), host, int(port), float(delay), sys.stdin.fileno())


if __name__ == "__main__":
    main()
