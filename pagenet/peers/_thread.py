"""One thread, and Trio in it: where sessions with other sources live, whoever waits for them."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Generic, TypeVar

import trio

from ..shared_thread import SharedThread

__all__ = ["Call", "TrioThread"]

T = TypeVar("T")


class Call(Generic[T]):
    """A call that a :class:`TrioThread` makes."""

    def __init__(self, thread: TrioThread, work: Callable[[], Awaitable[T]]) -> None:
        self.future: Future[T] = Future()
        self._thread, self._work = thread, work
        self._scope = trio.CancelScope()

    def cancel(self) -> None:
        """Give it up, from any thread, if it has not ended. The future is then cancelled."""
        self._thread.soon(self._scope.cancel)

    async def run(self) -> None:
        with suppress(InvalidStateError):  # whoever waited has given it up
            try:
                with self._scope:
                    self.future.set_result(await self._work())
            except Exception as error:
                self.future.set_exception(error)
            finally:
                self.future.cancel()  # if it has not ended


class TrioThread(SharedThread):
    """The thread of this process."""

    def __init__(self) -> None:
        self._began = threading.Event()
        self._thread = threading.Thread(
            target=trio.run, args=(self._main,), name="pagenet peers", daemon=True
        )
        self._thread.start()
        self._began.wait()

    async def _main(self) -> None:
        async with trio.open_nursery() as self._nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._began.set()
            await trio.sleep_forever()

    def _end(self) -> None:
        self.soon(self._nursery.cancel_scope.cancel)
        self._thread.join()

    def soon(self, function: Callable[..., object], *arguments: Any) -> bool:
        """Have the thread call ``function``. False: it has ended."""
        try:
            self._token.run_sync_soon(function, *arguments)
        except trio.RunFinishedError:
            return False
        return True

    def spawn(self, task: Callable[[], Awaitable[object]]) -> None:
        """Start a task, which raises nothing. For what runs in the thread."""
        self._nursery.start_soon(task)

    def start(self, work: Callable[[], Awaitable[T]]) -> Call[T]:
        """Have the thread await what ``work`` returns. From any thread."""
        call = Call(self, work)
        if not self.soon(self.spawn, call.run):
            call.future.cancel()
        return call

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """As :meth:`start`, and wait for the result."""
        call = self.start(work)
        try:
            return call.future.result()
        except BaseException:
            call.cancel()
            raise
