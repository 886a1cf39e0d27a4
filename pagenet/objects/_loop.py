"""One thread, and asyncio in it: what obstore can be awaited from, unlike Trio.

A request that is awaited can be given up at any point. One that a thread blocks in cannot.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ..shared_thread import SharedThread

__all__ = ["Loop"]

T = TypeVar("T")


# Seconds for which the threads of obstore are waited for at most, and between two looks.
_QUIET_SECONDS = 1.0
_LOOK_SECONDS = 0.001


@atexit.register
def _wait_quiet() -> None:
    """Wait until no other thread does anything. A thread of obstore that has just brought a result
    still lets go of objects of Python's. If it finds the interpreter ending, it aborts the process:
    every fourth process on a busy machine that ends right after a request."""
    end, before = time.monotonic() + _QUIET_SECONDS, ""
    while time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
        now = _activity()
        if now == before and "(running)" not in now:
            return
        before = now


def _activity() -> str:
    """What other threads are doing, and how often each has begun to."""
    words = []
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has ended
            status = Path(f"/proc/self/task/{thread}/status").read_text()
            if int(thread) != threading.get_native_id():
                found = re.findall(r"^(?:State|\w*ctxt_switches):.*", status, re.MULTILINE)
                words += [thread, *found]
    return " ".join(words)


class Loop(SharedThread):
    """The loop of this process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="pagenet objects", daemon=True
        )
        self._thread.start()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have the thread call ``function``."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` in the thread, and wait for its result."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
