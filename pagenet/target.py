"""Where pages go: what lanes ask of the memory, or the file, that they fill, and what its owner does meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .region import Region, Run
from .residency import Residency

__all__ = [
    "Event",
    "Fault",
    "Forked",
    "Outcome",
    "Owner",
    "Recoverable",
    "Remapped",
    "Removed",
    "Target",
    "Unmapped",
]


# ---- what happens to the memory of an owner ----


@dataclass(frozen=True, slots=True)
class Fault:
    """A thread waits for the page at ``address``. ``minor``: the page cache has it, the page table does not."""

    address: int
    write: bool
    minor: bool
    thread: int
    #: a write to a page that its owner has protected
    protected: bool = False


@dataclass(frozen=True, slots=True)
class Removed:
    """The owner gave up [start, end): it reads as zero from now on."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmapped:
    """The owner unmapped [start, end)."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Remapped:
    """The owner moved ``length`` bytes from ``start`` to ``to``."""

    start: int
    to: int
    length: int


@dataclass(frozen=True, slots=True)
class Forked:
    """The owner forked; ``uffd`` watches the child, and is the reader's to close."""

    uffd: int


Event = Fault | Removed | Unmapped | Remapped | Forked


# ---- where pages go ----


@dataclass(frozen=True, slots=True)
class Outcome:
    """Pages of a run that were dealt with, in order.

    ``again``: the owner's memory is changing. Read its events, all of them, then place what is left of the run.
    """

    placed: int
    existed: int = 0
    absent: int = 0
    again: bool = False

    @property
    def done(self) -> int:
        return self.placed + self.existed + self.absent


class Target(Protocol):
    """Memory, or a file, that a region moves into. Numbers pages as :attr:`region` does."""

    @property
    def region(self) -> Region:
        """The source's blocks, in the page sizes of this target."""
        ...

    @property
    def placement(self) -> str:
        """How pages get into place: ``copy``, ``move``, ``continue`` or ``file``."""
        ...

    @property
    def event_fd(self) -> int | None:
        """Readable when :meth:`read_events` has something to say; None for a target that nobody touches yet."""
        ...

    def scope(self) -> Sequence[Run]:
        """The pages that are to become resident, each run within a block."""
        ...

    def read_events(self) -> list[Event]: ...

    def pages_between(self, start: int, end: int) -> Sequence[Run]:
        """The pages that lie at the owner's addresses [start, end)."""
        ...

    def page_of(self, fault: Fault) -> int | None:
        """The page that a fault waits for. None: it is outside of what the owner announced."""
        ...

    def piece_of(self, page: int) -> Run:
        """The pages around ``page`` that one run may hold: in its block, and at consecutive addresses of the owner."""
        ...

    def place(self, run: Run, data: memoryview | None) -> Outcome:
        """Put ``data`` (or zeros, for None) into the pages of ``run`` and wake whoever waits for them.

        :exc:`~pagenet.errors.OwnerGone` if the memory no longer exists.
        """
        ...

    def settle(self, page: int | None, fault: Fault) -> bool:
        """Answer ``fault`` on ``page``, which has been placed, or given up by its owner, before. None: it
        is outside of what the owner announced; whoever waits there is told by SIGBUS, or gets zeros if the
        owner wants that, or waits on where the kernel can do neither.

        False: the owner's memory is changing. Read its events, all of them, and call again.
        """
        ...

    def wake(self, run: Run) -> None:
        """Let whoever waits for pages of ``run`` try again."""
        ...

    def discard(self, run: Run) -> None:
        """``run`` was given up by the owner while its bytes were in flight: leave none of them behind."""
        ...

    async def wait_gone(self) -> None:
        """Return when the owner is gone."""
        ...

    def close(self, missing: Sequence[Run]) -> None:
        """Let go. ``missing`` pages never came: whoever touches them must wait or be told, and never read zeros."""
        ...


@runtime_checkable
class Recoverable(Protocol):
    """What else a target has whose memory outlives the process that fills it: another one may go on with it."""

    def open_residency(self, source: bytes) -> Residency:
        """The map of pages: a new one, or what is left of a dead destination's, which :attr:`~Residency.is_recovered`.

        :exc:`~pagenet.errors.UsageError` if that one filled the memory from another source than the one of that identity.
        """
        ...

    def write(self, run: Run, data: memoryview | None) -> bool:
        """Bring the bytes (None: zeros) of ``run`` where :meth:`publish` makes them visible, and nobody sees them before.

        False: this memory is not of that kind. Nothing was done, and they are to be placed.
        """
        ...

    def publish(self, run: Run, *, again: bool = False) -> Outcome:
        """The second half of placing pages. ``again``: it may have been done before, which does no harm; a page that its owner
        has given up since counts as absent."""
        ...


@runtime_checkable
class Stored(Protocol):
    """What else a target has whose pages must be on a disk before it may be let go."""

    async def wait_stored(self) -> None:
        """Every page is in place: return when they are there to stay. Given up before, or never called: none of them are."""
        ...


class Owner(Protocol):
    """Somebody whose memory is to be filled, before it is known how large it must be."""

    async def attach(self, region: Region) -> Target:
        """The owner's memory for ``region``."""
        ...
