"""An owner in a child of the test's own process: starting another Python takes the guest seconds."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from pagenet import _native, serve


class Workload:
    """``pagenet.testing.workload``, with what it says."""

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
    """With ``arguments`` as its --help has them. Killed in the end, if it still runs."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(writing, 1)
        os._exit(_native.run_workload(["workload", "--socket", str(socket), *map(str, arguments)]))
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
