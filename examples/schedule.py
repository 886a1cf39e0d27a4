"""A schedule of one's own: the background brings pages from the last to the first.

    python schedule.py FILE

It serves FILE to memory of this process, over a unix socket, and says which pages are still missing
half way. A schedule is asked for runs of missing pages, and told of faults: here it does not heed
them. Pages that threads wait for come first under every schedule.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

import trio

import pagenet
from pagenet import Region, Residency, Run, State


class Backwards:
    name = "backwards"

    def __init__(self, region: Region, residency: Residency) -> None:
        self._region, self._residency = region, residency
        self._end = region.pages  # pages from here on were named in this pass

    def note_faults(self, pages: Sequence[int], now: float) -> None:
        """Threads have waited for these pages."""

    def next_run(self, max_bytes: int) -> Run | None:
        run = self._last_missing(max_bytes)
        if run is None:  # pages that did not come, because the source was away, are missing again
            self._end = self._region.pages
            run = self._last_missing(max_bytes)
        return run

    def _last_missing(self, max_bytes: int) -> Run | None:
        while self._end > 0:
            block = self._region.block_index(self._end - 1)
            most = max(1, max_bytes // self._region.blocks[block].page_size)
            at = max(self._region.first_pages[block], self._end - most)
            end, self._end, found = self._end, at, None
            while (page := self._residency.find(State.MISSING, at, end)) is not None:
                rest = Run(page, end - page)
                found = Run(page, max(1, self._residency.span(rest, State.MISSING)))
                self._end, at = page, found.end
            if found is not None:
                return found
        return None


async def main(path: str) -> None:
    memory = pagenet.OwnMemory("memfd")
    with tempfile.TemporaryDirectory() as directory:
        async with (
            pagenet.serve(path, listen=f"unix:{directory}/link") as server,
            pagenet.pull(server.uri, memory, background=Backwards) as transfer,
        ):
            while transfer.statistics().done < transfer.region.pages // 2:  # noqa: ASYNC110
                await trio.sleep(0.001)
            print(transfer.background, transfer.missing()[:1])
            await transfer.wait_complete()
            print("complete:", transfer.statistics().done, "pages")
    memory.close()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
