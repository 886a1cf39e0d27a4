"""Owners, sources and commands in children forked from the test's own process: in the guest,
starting another Python takes seconds."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import trio

from pagenet import serve
from pagenet._native import testing


class Workload:
    """``pagenet.testing.workload``, and its events."""

    def __init__(self, pid: int, output: int) -> None:
        self.pid = pid
        self._lines = trio.lowlevel.FdStream(output)
        self._unread = b""

    async def event(self, name: str) -> dict[str, Any]:
        """The next event of that name."""
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                said: dict[str, Any] = json.loads(line)
                if said["event"] == name:
                    return said
                assert said["event"] != "error", said
            else:
                more = await self._lines.receive_some()
                assert more, f"the workload ended before it said {name!r}"
                self._unread += more

    async def verified(self) -> dict[str, Any]:
        said = await self.event("verified")
        assert said["bad"] == 0, said
        return said

    async def aclose(self) -> None:
        await self._lines.aclose()


@asynccontextmanager
async def forked_workload(socket: Path, *arguments: str | int) -> AsyncIterator[Workload]:
    """A workload with ``arguments`` as its --help has them. It is killed at the end of the block,
    if it still runs."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(writing, 1)
        os._exit(testing.run_workload(["workload", "--socket", str(socket), *map(str, arguments)]))
    os.close(writing)
    workload = Workload(pid, reading)
    try:
        yield workload
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(os.waitpid, pid, 0)
            await workload.aclose()


class Server:
    """``pagenet.serve`` in a child. Make it outside of Trio, which cannot run within itself."""

    def __init__(self, source: str, listen: str = "rdma://127.0.0.1:0") -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                trio.run(_serve, source, listen, writing)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as said:
            self.uri = said.readline().strip()
        assert self.uri, "the server ended before it listened"

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


async def _serve(source: str, listen: str, writing: int) -> None:
    async with serve(source, listen=listen) as server:
        os.write(writing, f"{server.uri}\n".encode())
        await trio.sleep_forever()


class Command:
    """A command of pagenet's, or the workload, in a child. Make it outside of Trio, which cannot
    run within itself."""

    def __init__(
        self,
        main: Callable[[list[str]], int],
        *arguments: str | int | Path,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """``before``: called in the child."""
        reading, writing = os.pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.pid = os.fork()
        if not self.pid:
            os.dup2(writing, 1)
            os.dup2(self._errors.fileno(), 2)
            _run_and_exit(main, [str(argument) for argument in arguments], before)
        os.close(writing)
        self._said = os.fdopen(reading)
        self._status: int | None = None
        #: its events so far
        self.events: list[dict[str, Any]] = []

    @property
    def stderr(self) -> str:
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode()

    def event(self, name: str) -> dict[str, Any]:
        """The next event of that name."""
        for line in self._said:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == name:
                return self.events[-1]
        raise AssertionError(f"no {name!r} event, but {self.events} and: {self.stderr}")

    def wait(self) -> int:
        """Its exit code, or minus the number of the signal that ended it."""
        self.events += [json.loads(line) for line in self._said]
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill it, if it still runs."""
        if self._status is None:
            self.kill()
        self._said.close()
        self._errors.close()


def _run_and_exit(
    main: Callable[[list[str]], int], arguments: list[str], before: Callable[[], object]
) -> None:
    status: Any = 1
    try:
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        before()
        status = main(arguments)
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_workload(arguments: list[str]) -> int:
    """For :class:`Command`."""
    return testing.run_workload(["workload", *arguments])
