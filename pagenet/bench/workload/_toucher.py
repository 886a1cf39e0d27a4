"""Touches memory, in C, from a thread that can be left behind."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from contextlib import suppress

import trio

__all__ = ["Toucher"]


class Toucher:
    """Touches in a thread of its own: a touch that is not answered can be left behind, until the
    end of the failed transfer ends it."""

    def __init__(self, touch: Callable[[], array[int]]) -> None:
        self._touch = touch
        self._token = trio.lowlevel.current_trio_token()
        self._ended = trio.Event()
        self._thread = threading.Thread(target=self._run, name="pagenet-bench-touch")
        self._outcome: array[int] | BaseException = array("Q")

    def _run(self) -> None:
        try:
            self._outcome = self._touch()
        except BaseException as error:
            self._outcome = error
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._ended.set)

    async def latencies(self) -> array[int]:
        self._thread.start()
        await self._ended.wait()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()
