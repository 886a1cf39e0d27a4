"""The interface of the memory or file that lanes fill, and the events of its owner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from .region import Region, Run
from .residency import Residency

__all__ = [
    "POISON_PATIENCE",
    "Event",
    "Fault",
    "Forked",
    "OnLoss",
    "Outcome",
    "Owned",
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
    """A thread waits for the page at ``address``. ``minor``: the page cache has it, the page table
    does not."""

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
    """How many pages of a run were handled, from its beginning on.

    ``again``: the owner's memory is changing. Read all of its events, then place the
    rest of the run.
    """

    placed: int
    existed: int = 0
    absent: int = 0
    again: bool = False

    @property
    def done(self) -> int:
        return self.placed + self.existed + self.absent


class Target(Protocol):
    """Memory or a file that a region moves into. Page numbers are those of :attr:`region`."""

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
        """Readable when :meth:`read_events` has events; None if no thread touches the target
        yet."""
        ...

    def scope(self) -> Sequence[Run]:
        """The pages that are to become resident, each run within a block."""
        ...

    def read_events(self) -> list[Event]: ...

    def pages_between(self, start: int, end: int) -> Sequence[Run]:
        """The pages that lie at the owner's addresses [start, end)."""
        ...

    def page_of(self, fault: Fault) -> int | None:
        """The page that a fault waits for. None: the fault is outside of the memory that the owner
        announced."""
        ...

    def piece_of(self, page: int) -> Run:
        """The pages around ``page`` that one run may hold: in its block, and at consecutive
        addresses of the owner."""
        ...

    def place(self, run: Run, data: memoryview | None) -> Outcome:
        """Put ``data`` (None: zeros) into the pages of ``run`` and wake their waiters.

        :exc:`~pagenet.errors.OwnerGone` if the memory no longer exists.
        """
        ...

    def settle(self, page: int | None, fault: Fault) -> bool:
        """Answer ``fault`` on ``page``, which was placed or given up by its owner before.

        ``page`` is None for a fault outside of the memory that the owner announced: the thread that
        waits there gets SIGBUS, or zeros if the owner wants that; where the kernel can do neither,
        the thread goes on waiting.

        False: the owner's memory is changing. Read all of its events, and call again.
        """
        ...

    def wake(self, run: Run) -> None:
        """Let the threads that wait for pages of ``run`` try again."""
        ...

    def discard(self, run: Run) -> None:
        """Remove the bytes of ``run``, which the owner gave up while they were in flight."""
        ...

    async def wait_gone(self) -> None:
        """Return when the owner is gone."""
        ...

    def close(self, missing: Sequence[Run]) -> None:
        """Release the memory or file. The ``missing`` pages never came.

        A thread that touches one of them must wait or get an error, and never read zeros.
        """
        ...


@runtime_checkable
class Recoverable(Protocol):
    """A target whose memory outlives the process that fills it.

    Another process may continue the transfer.
    """

    def open_residency(self, source: bytes) -> Residency:
        """The map of pages: a new one, or the one that a dead destination left.

        In the second case its :attr:`~Residency.is_recovered` is true.
        :exc:`~pagenet.errors.UsageError` if the dead destination filled the memory from a source
        with another identity than ``source``.
        """
        ...

    def write(self, run: Run, data: memoryview | None) -> bool:
        """Write the bytes (None: zeros) of ``run``, invisible to the owner until :meth:`publish`.

        False: this memory cannot do that. Nothing was written: call :meth:`place` instead.
        """
        ...

    def publish(self, run: Run, *, again: bool = False) -> Outcome:
        """Make the pages of ``run`` visible, after :meth:`write`.

        ``again``: they may have been published before, which does no harm; a page that its owner
        has given up since then counts as absent.
        """
        ...


@runtime_checkable
class Stored(Protocol):
    """A target whose pages must be on a disk before it may be closed."""

    async def wait_stored(self) -> None:
        """Return when the pages, all of which are in place, are stored for good.

        If it is cancelled or never called, none of them is stored.
        """
        ...


#: seconds for which poisoning goes on without progress, while an owner changes its memory all the
#: time
POISON_PATIENCE = 5.0
#: what becomes of the owner when the source is lost for good: it waits, its missing pages are
#: poisoned, or it is killed
OnLoss = Literal["wait", "poison", "kill"]


@runtime_checkable
class Owned(Protocol):
    """A target that is the memory of a process, the owner."""

    def check_loss(self, on_loss: OnLoss) -> None:
        """:exc:`~pagenet.errors.Unsupported` if that cannot be done to this owner."""
        ...

    def poison(self, run: Run) -> Outcome:
        """Poison the pages of ``run`` that are not there: a thread that touches one, or waits for
        one now, gets SIGBUS.

        :exc:`~pagenet.errors.OwnerGone` if the memory no longer exists.
        """
        ...

    def kill(self) -> int | None:
        """Send SIGKILL to the owner. Returns its pid; None: it has ended already."""
        ...


class Owner(Protocol):
    """A process or file whose memory is to be filled, before its size is known."""

    async def attach(self, region: Region) -> Target:
        """The owner's memory for ``region``."""
        ...
