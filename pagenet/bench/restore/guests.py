"""Guests that are restored: ``python -m pagenet.bench.restore.guests``, started by pagenet-bench
alone.

Its one argument is a JSON object: ``socket`` (of the handler), ``size`` and ``seed`` of the memory,
which is a mapping of the handler's cache (``shared``) or anonymous, how many guests there are
(``count``), ``in_turn`` or all at once, a memfd with the numbers of the
pages that they touch (``pages``), and one for what comes of it (``results``). Each guest is a
process.

Guests that come at once are told first, as a JSON list of their pids. At a byte on stdin they
arrive. When all have touched their pages, a JSON list of samples is told: how many bytes of all of
them were resident, and when, in ns of CLOCK_MONOTONIC. They stay until the end of the input.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from ..._native.testing import Guest

__all__ = ["FACTS", "WORD"]

#: bytes of each number in the memfds
WORD = 8
#: numbers in front of each guest's touches in ``results``: when it began to connect, how many pages
#: were wrong, and the errno of what failed
FACTS = 3
# Seconds between two samples.
_SAMPLE = 0.02


@dataclass(frozen=True, slots=True)
class _Task:
    socket: str
    size: int
    seed: int
    count: int
    shared: bool
    in_turn: bool
    pages: int
    results: int


def _words(fd: int) -> memoryview:
    return memoryview(mmap.mmap(fd, os.fstat(fd).st_size)).cast("Q")


class _Gate:
    """A pipe: something that happens once, or once in each guest."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def open(self) -> None:
        os.close(self.writing)

    def wait(self) -> None:
        os.close(self.writing)
        os.read(self.reading, 1)


class _Guests:
    def __init__(self, task: _Task) -> None:
        self._task = task
        self._pages = _words(task.pages)
        self._results = _words(task.results)
        self._pids: list[int] = []

    def in_turn(self) -> None:
        for number in range(self._task.count):
            self._fork(number)
            os.waitpid(self._pids.pop(), 0)

    def at_once(self) -> None:
        ready, go, done, leave = _Gate(), _Gate(), _Gate(), _Gate()
        for number in range(self._task.count):
            self._fork(number, ready, go, done, leave)
        self._hear_all(ready)
        _tell(self._pids)
        os.read(0, 1)
        held = self._resident()
        go.open()
        samples = [(time.monotonic_ns(), 0)]
        heard = 0
        while heard < self._task.count:
            if select.select([done.reading], [], [], _SAMPLE)[0]:
                heard += len(os.read(done.reading, self._task.count))
            if len(self._pids) and time.monotonic_ns() - samples[-1][0] > _SAMPLE * 1e9:
                samples.append((time.monotonic_ns(), self._resident() - held))
        samples.append((time.monotonic_ns(), self._resident() - held))
        _tell(samples)
        while os.read(0, 1):
            pass
        leave.open()

    def end(self) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self._pids:
            os.waitpid(pid, 0)

    def _hear_all(self, gate: _Gate) -> None:
        heard = 0
        while heard < self._task.count:
            heard += len(os.read(gate.reading, self._task.count))

    def _resident(self) -> int:
        total = 0
        for pid in self._pids:
            with open(f"/proc/{pid}/statm") as file:
                total += int(file.read().split()[1])
        return total * mmap.PAGESIZE

    def _fork(self, number: int, *gates: _Gate) -> None:
        if pid := os.fork():
            self._pids.append(pid)
            return
        try:
            self._be_guest(number, *gates)
        finally:
            os._exit(0)

    def _be_guest(self, number: int, *gates: _Gate) -> None:
        task, touches = self._task, len(self._pages) // self._task.count
        mine = FACTS + 2 * touches
        facts = self._results[number * mine : number * mine + FACTS]
        guest = Guest(
            task.socket,
            task.size,
            task.seed,
            self._pages[number * touches : (number + 1) * touches],
            self._results[number * mine + FACTS : (number + 1) * mine],
            task.shared,
        )
        try:
            guest.prepare()
            if gates:
                os.write(gates[0].writing, b".")
                gates[1].wait()
            guest.arrive()
        except OSError as error:
            facts[2] = error.errno or 1
        facts[0], facts[1] = guest.connected, guest.wrong
        if gates:
            os.write(gates[2].writing, b".")
            gates[3].wait()


def _tell(what: object) -> None:
    print(json.dumps(what), flush=True)


def main() -> NoReturn:
    task = _Task(**json.loads(sys.argv[1]))
    guests = _Guests(task)
    try:
        if task.in_turn:
            _tell([])
            os.read(0, 1)
            guests.in_turn()
            _tell([])
        else:
            guests.at_once()
    finally:
        guests.end()
    sys.exit(0)


if __name__ == "__main__":
    main()
