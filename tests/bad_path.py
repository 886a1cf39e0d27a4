"""A path that loses packets and delays them: two TUN devices, and a process that passes packets
from each to the other. Kernels without netem have none.

``python bad_path.py LOSS DELAY RATE SEED`` makes the devices ``source`` and ``destination``, prints
a line, and passes packets until it is killed.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 1, 0x1000
_LARGEST = 1 << 16
# Seconds of packets that wait for the rate, and no more: what is behind them is dropped.
_QUEUE = 0.2


@dataclass(frozen=True)
class BadPath:
    """Of each direction alone: ``loss``, the share of packets that are lost; ``delay``, seconds
    that each of the others takes, so that a round trip takes two of them; ``rate``, bytes a
    second."""

    loss: float
    delay: float
    rate: float = 2.5e6
    seed: int = 0

    def command(self) -> list[str]:
        return [sys.executable, __file__, *map(str, (self.loss, self.delay, self.rate, self.seed))]


class _Direction:
    def __init__(self, path: BadPath, origin: int, to: int) -> None:
        self._path, self._origin, self._to = path, origin, to
        self._chance = random.Random(path.seed + origin)
        self._on_the_way: deque[tuple[float, bytes]] = deque()
        self._free = 0.0  # time when the last packet has left

    def take(self, now: float) -> None:
        packet = os.read(self._origin, _LARGEST)
        leaves = max(now, self._free) + len(packet) / self._path.rate
        if self._chance.random() < self._path.loss or leaves > now + _QUEUE:
            return
        self._free = leaves
        self._on_the_way.append((leaves + self._path.delay, packet))

    def pass_on(self, now: float) -> float:
        """Pass on what is due. Returns when the next packet is."""
        while self._on_the_way and self._on_the_way[0][0] <= now:
            os.write(self._to, self._on_the_way.popleft()[1])
        return self._on_the_way[0][0] if self._on_the_way else now + 1


def _open_tun(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR)
    request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(device, _TUNSETIFF, request)
    return device


def main() -> None:
    loss, delay, rate, seed = map(float, sys.argv[1:])
    path = BadPath(loss, delay, rate, int(seed))
    near, far = _open_tun("source"), _open_tun("destination")
    directions = {near: _Direction(path, near, far), far: _Direction(path, far, near)}
    print(flush=True)
    while True:
        now = time.monotonic()
        due = min(direction.pass_on(now) for direction in directions.values())
        for device in select.select([near, far], [], [], max(0.0, due - time.monotonic()))[0]:
            directions[device].take(time.monotonic())


if __name__ == "__main__":
    main()
