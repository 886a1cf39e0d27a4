"""Filling a file: a target that nobody touches while it is filled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import trio

from .errors import PagenetError, UsageError
from .region import Region, Run
from .target import Outcome, Target
from .uffd import Event, Fault

__all__ = ["IntoFile"]


class IntoFile:
    """Fill a file. It appears under its name when every page is in it, and not before."""

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
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        try:
            if path.exists() and not path.is_file():
                raise UsageError(f"{path} is not a regular file")
            self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(f"cannot create {self._partial}: {error.strerror}") from None
        try:
            os.ftruncate(self._fd, region.size)
        except OSError as error:
            self.close([Run(0, 1)])
            raise UsageError(f"cannot make {self._partial} {region.size} bytes long: {error.strerror}") from None

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
            offset = self.region.offset_of_page(run.first)
            try:
                while data:
                    written = os.pwrite(self._fd, data, offset)
                    data, offset = data[written:], offset + written
            except OSError as error:
                raise PagenetError(f"cannot write {self._partial}: {error.strerror}") from None
        return Outcome(placed=run.count)

    def settle(self, page: int | None, fault: Fault) -> bool:
        raise NotImplementedError("a file has no faults")

    def wake(self, run: Run) -> None:
        raise NotImplementedError("nobody waits for a file")

    def discard(self, run: Run) -> None:
        raise NotImplementedError("a file has nobody who gives up pages")

    async def wait_gone(self) -> None:
        await trio.sleep_forever()

    def close(self, missing: Sequence[Run]) -> None:
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        if missing:
            self._partial.unlink(missing_ok=True)
        else:
            self._partial.replace(self._path)
