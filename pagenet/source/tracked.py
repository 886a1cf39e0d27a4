"""The process that writes to a source's memory, which is copied meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import trio

from ..errors import OwnerGone, PagenetError, UsageError
from ..region import Region
from ..uffd import Mapping, OtherProcess, WriteTracker
from ..uffd._process import Mapped, refusal
from .memory import Source

__all__ = ["SourceOwner"]

# Seconds that the threads of a process may take to stop. One that waits for a disk takes long.
_STOP_SECONDS = 10.0
_LOOK_SECONDS = 0.0005


class SourceOwner:
    """The one process whose memory ``source`` is. Close it.

    :exc:`UsageError` if the source is not memory of one process: ``pid:PID:START-END``, or
    ``/proc/PID/fd/N`` that the process has mapped once, shared and writable.
    """

    def __init__(self, source: Source) -> None:
        pids = {owned[0] for owned in source.owners if owned is not None}
        if len(pids) != 1 or None in source.owners:
            raise UsageError(
                "only the memory of one process can be tracked: pid:PID:START-END, or"
                " /proc/PID/fd/N"
            )
        self.pid = pids.pop()
        if self.pid == os.getpid():
            raise UsageError("a process cannot be stopped by itself: track another one's memory")
        try:
            self._process = OtherProcess(self.pid)
        except OSError as error:
            raise refusal(self.pid, error) from None
        try:
            self._mappings = list(self._find(source))
        except OSError as error:
            self.close()
            raise refusal(self.pid, error) from None
        except BaseException:
            self.close()
            raise

    def _find(self, source: Source) -> Iterator[Mapping]:
        sizes = {part.start: part.page_size for part in self._process.mapped_pages()}
        offset = 0
        for owned, block in zip(source.owners, source.region.blocks, strict=True):
            assert owned is not None
            where = owned[1]
            address = where if isinstance(where, int) else self._address_of(where, block.size)
            start = max((start for start in sizes if start <= address), default=0)
            yield Mapping(address, block.size, offset, sizes.get(start, 4096))
            offset += block.size

    def _address_of(self, file: tuple[int, int], size: int) -> int:
        parts = [
            part
            for part in self._process.maps()
            if (part.device, part.inode) == file and "w" in part.mode
        ]
        first = [part for part in parts if part.offset == 0]
        if len(first) != 1 or not _are_one(parts) or parts[-1].end - parts[0].start < size:
            raise UsageError(
                f"process {self.pid} has not mapped that file once, and as a whole, to write to it"
            )
        return first[0].start

    def track(self, region: Region) -> WriteTracker:
        """A tracker of the memory, which is ``region``. Raises what
        :class:`~pagenet.WriteTracker` does. It takes a few ms for each GiB."""
        return WriteTracker(self.pid, self._mappings, region)

    def is_stopped(self) -> bool:
        """Whether none of its threads runs, as it was stopped by a signal. :exc:`OSError` if it has
        ended."""
        states = set()
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            text = Path(f"/proc/{self.pid}/task/{thread}/stat").read_text()
            states.add(text.rpartition(")")[2].split()[0])
        return states <= {"T", "t", "Z", "X"}

    async def stop(self) -> None:
        """Stop the process (SIGSTOP). Returns when none of its threads runs.

        :exc:`~pagenet.errors.OwnerGone` if it has ended, :exc:`~pagenet.errors.PagenetError` if it
        does not stop for 10 s.
        """
        try:
            signal.pidfd_send_signal(self._process.pidfd, signal.SIGSTOP)
            with trio.move_on_after(_STOP_SECONDS):
                while not self.is_stopped():  # noqa: ASYNC110
                    await trio.sleep(_LOOK_SECONDS)
                return
        except OSError:
            raise OwnerGone(f"process {self.pid} has ended") from None
        self.go_on()
        raise PagenetError(f"process {self.pid} did not stop for {_STOP_SECONDS:g} s")

    def go_on(self) -> None:
        """Let the process run again (SIGCONT), if it is there."""
        try:
            signal.pidfd_send_signal(self._process.pidfd, signal.SIGCONT)
        except ProcessLookupError:
            return

    def close(self) -> None:
        self._process.close()


def _are_one(parts: Sequence[Mapped]) -> bool:
    """Whether ``parts`` of a file are adjacent, and shared: private ones hide what is written."""
    return all(part.mode.endswith("s") for part in parts) and all(
        after.start == part.end and after.offset - after.start == part.offset - part.start
        for part, after in pairwise(parts)
    )
