"""Filling a file: a target without an owner that touches it while it is filled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import trio

from ..region import Region, Run
from ..target import Event, Fault, Outcome, Target
from ..whole_file import WholeFile

__all__ = ["IntoFile"]


class IntoFile:
    """Fill the file at ``path``. It appears under its name once every page is in it and on the
    disk, and not before."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    async def attach(self, region: Region) -> Target:
        return FileTarget(self.path, region)


class FileTarget:
    """A regular file: blocks one after the other, holes where pages are zero."""

    placement = "file"
    event_fd = None

    def __init__(self, path: Path, region: Region) -> None:
        self.region = region
        self._file = WholeFile(path, "file")
        try:
            self._file.resize(region.size)
        except BaseException:
            self._file.close()
            raise

    def scope(self) -> Sequence[Run]:
        region = self.region
        return [Run(region.first_pages[i], block.pages) for i, block in enumerate(region.blocks)]

    def read_events(self) -> list[Event]:
        return []

    def pages_between(self, start: int, end: int) -> Sequence[Run]:
        raise NotImplementedError("a file has no addresses")

    def page_of(self, fault: Fault) -> int:
        raise NotImplementedError("a file has no faults")

    def piece_of(self, page: int) -> Run:
        index = self.region.block_index(page)
        return Run(self.region.first_pages[index], self.region.blocks[index].pages)

    def place(self, run: Run, data: memoryview | None) -> Outcome:
        if data is not None:
            self._file.write(data, self.region.offset_of_page(run.first))
        return Outcome(placed=run.count)

    def settle(self, page: int | None, fault: Fault) -> bool:
        raise NotImplementedError("a file has no faults")

    def wake(self, run: Run) -> None:
        pass  # no thread waits for a file

    def discard(self, run: Run) -> None:
        raise NotImplementedError("a file has no owner that gives up pages")

    async def wait_gone(self) -> None:
        await trio.sleep_forever()

    async def wait_stored(self) -> None:
        await self._file.wait_committed()

    def close(self, missing: Sequence[Run]) -> None:
        self._file.close()
