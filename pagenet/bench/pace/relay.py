"""A longer path to a source or a store: ``python -m pagenet.bench.pace.relay HOST PORT SECONDS
[RATE]``, started by pagenet-bench alone.

It joins each connection that it takes on loopback to one to HOST:PORT, with so many seconds on the
way and RATE bytes a second in each direction, prints the port that it listens on, and ends when its
input does. Then it prints how many bytes have come from HOST:PORT.
"""

from __future__ import annotations

import socket
import sys

from ..._native.testing import bench_relay


def main() -> None:
    host, port, delay, *rate = sys.argv[1:]
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        print(listener.getsockname()[1], flush=True)
        to, stop = (host, int(port), float(delay)), sys.stdin.fileno()
        print(bench_relay(listener.fileno(), *to, stop, *map(int, rate)), flush=True)


if __name__ == "__main__":
    main()
