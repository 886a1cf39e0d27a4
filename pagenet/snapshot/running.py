"""A snapshot of memory whose owner runs.

The memory is copied into a file round by round, by the rules of ``source/rounds.py``: first all of
it, then what was written meanwhile. The owner stands still for what was written in the last round,
and for no longer than that takes to be read. What the file has then is the memory at that moment,
and the snapshot is made of it while the owner runs on.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol

import trio

from .. import _native
from ..errors import OwnerGone, PagenetError
from ..events import EventHandler
from ..nurseries import running_beside
from ..protocol import Message, Pause, Paused, Stale
from ..region import Run
from ..source.memory import Source, open_source
from ..source.precopy import Precopy
from ..source.rounds import Rounds, Tracker
from ..source.tracked import SourceOwner
from .creating import Created, check_creatable, create_snapshot
from .index import PAGE

__all__ = ["Owner", "RunningProcess", "create_running"]

# Bytes that are read before they are written, and those at most while the owner stands still: what
# is beyond them waits for the file.
_BATCH = 16 << 20
_MOST_FROZEN = 256 << 20
# Bits that are looked through at a time: of a batch of pages.
_BITS = _BATCH // PAGE // 8


class Owner(Protocol):
    """Who writes to the memory."""

    async def stop(self) -> None:
        """Return when it stands still. If this process is killed, it goes on."""
        ...

    async def go_on(self) -> None:
        """As it was before :meth:`stop`. Idempotent."""
        ...


class RunningProcess:
    """:class:`Owner`: a process, which is stopped by a signal (SIGSTOP). One that was stopped
    already stays so."""

    def __init__(self, owner: SourceOwner) -> None:
        self._owner = owner
        self._guard: trio.Process | None = None

    async def stop(self) -> None:
        try:
            if self._owner.is_stopped():
                return
        except OSError:
            raise OwnerGone(f"process {self._owner.pid} has ended") from None
        # It has the process go on if its stdin ends without a line: if we are killed.
        command = ["/bin/sh", "-c", 'read _ || kill -CONT "$1"', "sh", str(self._owner.pid)]
        self._guard = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, start_new_session=True
        )
        await self._owner.stop()

    async def go_on(self) -> None:
        guard, self._guard = self._guard, None
        if guard is None:
            return
        self._owner.go_on()
        assert guard.stdin is not None
        with suppress(trio.BrokenResourceError):  # it was killed
            await guard.stdin.send_all(b"\n")
        await guard.stdin.aclose()
        await guard.wait()


async def create_running(
    source: Source,
    owner: Owner,
    tracker: Tracker,
    target: str,
    base: str | None,
    on_event: EventHandler,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Created:
    """Make the snapshot ``target`` of ``source``, which ``owner`` writes to, as ``tracker`` tells.
    Otherwise as :func:`~.creating.create_snapshot`. The copy takes as much room in ``$TMPDIR`` as
    the memory has pages that are not zero.

    Events: ``round`` (one is over), ``resumed`` (``downtime_ms``: how long the owner stood still;
    ``pages``: that were read meanwhile).
    """
    await check_creatable(source, target, base)
    directory = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
    except OSError as error:
        raise _no_room(directory, error) from None
    with file:
        copy = _Copy(source, file.fileno())
        try:
            file.truncate(source.region.size)
            await _freeze(copy, owner, tracker, on_event)
        except OSError as error:
            raise _no_room(directory, error) from None
        with open_source(f"/proc/self/fd/{file.fileno()}") as copied:
            return await create_snapshot(copied, target, base, on_progress=on_progress)


def _no_room(directory: str, error: OSError) -> PagenetError:
    return PagenetError(f"no room for a copy in {directory} (TMPDIR): {error.strerror}")


async def _freeze(copy: _Copy, owner: Owner, tracker: Tracker, on_event: EventHandler) -> None:
    """Have the copy be the memory at one moment."""
    rounds = Rounds(copy.source.region, tracker, copy.hear, lambda: copy.copied, lambda: copy.zeros)
    async with running_beside(copy.run, rounds):
        await Precopy().run(rounds, on_event)
        await rounds.pause()
        await rounds.name_early()
        before = copy.copied
        try:
            await owner.stop()
            began = trio.current_time()
            await rounds.freeze()
            await copy.read.wait()
        finally:
            with trio.CancelScope(shield=True):
                await owner.go_on()
        downtime = trio.current_time() - began
        on_event("resumed", downtime_ms=round(1000 * downtime, 1), pages=copy.copied - before)
        await copy.whole.wait()


class _Copy:
    """The file that the memory is copied into: the destination of :class:`Rounds`."""

    def __init__(self, source: Source, fd: int) -> None:
        self.source, self._fd = source, fd
        #: pages until now, again and again, and those of the first round that were zero
        self.copied = self.zeros = 0
        #: all was read that is to be read, and all is in the file
        self.read, self.whole = trio.Event(), trio.Event()
        pages = source.region.pages
        self._lacking = bytearray(((1 << pages) - 1).to_bytes(-(-pages // 8), "little"))
        self._round = 1
        self._is_paused = self._is_frozen = False
        self._begins = trio.Event()

    async def hear(self, message: Message) -> None:
        """What :class:`Rounds` says to a destination."""
        if isinstance(message, Pause):
            self._is_paused = True
        elif isinstance(message, Stale):
            at, size = message.first // 8, len(self._lacking)
            for index, byte in enumerate(message.bits[: size - at], at):
                self._lacking[index] |= byte
            self._round, self._is_frozen = message.round + 1, message.frozen
            if not message.more:
                self._is_paused = False
                self._begins.set()

    async def run(self, rounds: Rounds) -> None:
        """Copy round after round."""
        while not self._is_frozen:
            await self._write(await self._read(_BATCH))
            self._begins = trio.Event()
            missing = int.from_bytes(self._lacking, "little").bit_count()
            rounds.hear(Paused(self._round, missing))
            await self._begins.wait()
        batch = await self._read(_MOST_FROZEN)
        self.read.set()
        await self._write(batch)
        self.whole.set()

    async def _read(self, most: int) -> list[tuple[int, memoryview]]:
        """Copy what is lacking, unless this is paused. What is left of it, ``most`` bytes or a
        little more, is returned: offsets and bytes."""
        batch: list[tuple[int, memoryview]] = []
        size = 0
        for runs in self._taken():
            for run in runs:
                data = memoryview(bytearray(run.count * PAGE))
                await self.source.read_into(run, data)
                batch.append((run.first * PAGE, data))
                size += len(data)
                self.copied += run.count
            if size >= most:
                await self._write(batch)
                batch, size = [], 0
            await trio.lowlevel.checkpoint()
            if self._is_paused:
                break
        return batch

    def _taken(self) -> Iterator[list[Run]]:
        """Take some pages at a time from those that are lacking."""
        for at in range(0, len(self._lacking), _BITS):
            bits = int.from_bytes(self._lacking[at : at + _BITS], "little")
            if bits:
                self._lacking[at : at + _BITS] = bytes(len(self._lacking[at : at + _BITS]))
                ones = re.finditer("1+", f"{bits:b}"[::-1])
                yield [Run(8 * at + one.start(), one.end() - one.start()) for one in ones]

    async def _write(self, batch: list[tuple[int, memoryview]]) -> None:
        await trio.to_thread.run_sync(self._write_pieces, batch)

    def _write_pieces(self, batch: list[tuple[int, memoryview]]) -> None:
        for offset, data in batch:
            if self._round == 1:
                self._write_new(offset, data)
            else:
                self._write_all(offset, data)

    def _write_new(self, offset: int, data: memoryview) -> None:
        """Leave holes for pages of zeros."""
        while data:
            pages = len(data) // PAGE
            alike, is_zero = _native.leading_alike(data, pages, PAGE)
            if is_zero:
                self.zeros += alike
            else:
                self._write_all(offset, data[: alike * PAGE])
            data, offset = data[alike * PAGE :], offset + alike * PAGE

    def _write_all(self, offset: int, data: memoryview) -> None:
        while data:
            count = os.pwrite(self._fd, data, offset)
            data, offset = data[count:], offset + count
