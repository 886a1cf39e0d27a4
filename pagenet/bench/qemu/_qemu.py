"""A running guest moves between two QEMUs, by QEMU's own means and by pagenet's, over the same
link."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from statistics import median
from typing import Literal

import trio

from ..._native.testing import bench_claim_memory
from ...errors import UsageError
from .._environment import available_memory
from .._site import Link, check_tools, open_link, open_site
from ._qemu_guest import QEMU, Guest, GuestFiles, Machine, Story, start_machine
from ._qemu_methods import METHODS, OURS, Method, Outcome, monotonic

__all__ = ["Migration", "QemuOptions", "QemuResult", "Target", "measure_qemu", "targets_of"]

#: seconds before the command over which the guest's own rate is measured
BEFORE_SECONDS = 2.0
#: seconds for which the guest is watched after its last page has come
AFTER_SECONDS = 1.0
#: Mbit/s of the link that the targets are set for
TARGET_RATE = 1000
#: pages that the guest (tools/guest) writes at random for each page of its sweep through all that
#: it works on
WRITES_PER_SWEPT = 4
_PAGE = 4096
#: a downtime up to this many times another counts as no longer: it varies by some ms with the
#: scheduler
SAME = 1.25
# Seconds, beyond the time that the link takes for all of the RAM four times.
_PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class QemuOptions:
    """``rams``: bytes; ``rate``: of the link, in Mbit/s, None for a loopback; ``work``, ``hot``:
    percent of the RAM that the guest works on, and that it writes to."""

    files: GuestFiles
    rams: Sequence[int] = (512 << 20,)
    rate: int | None = TARGET_RATE
    rounds: int = 3
    methods: Sequence[str] = tuple(METHODS)
    work: int = 60
    hot: int = 12
    cpus: int = 1
    accel: Literal["tcg", "kvm"] = "tcg"


@dataclass(frozen=True, slots=True)
class Migration:
    """One migration. All times are in seconds of time.monotonic().

    ``asked``: the command was given; ``began``: QEMU was told to migrate; ``stopped``, ``resumed``:
    when the guest was, by its QEMUs' own clocks; ``outcome``: what the method reports; ``wire``:
    bytes on the link; ``work``: bytes that the guest works on; ``rate``: of the link, in Mbit/s.
    """

    method: str
    ram: int
    round: int
    asked: float
    began: float
    stopped: float | None
    resumed: float | None
    outcome: Outcome
    wire: int
    story: Story
    work: int
    rate: float | None

    @property
    def converged(self) -> bool:
        return self.outcome.completed is not None

    @property
    def is_right(self) -> bool:
        return self.story.unbroken and self.story.bad == 0

    @property
    def _end(self) -> float | None:
        return None if self.outcome.completed is None else self.outcome.completed + AFTER_SECONDS

    def total_s(self) -> float | None:
        return None if self.outcome.completed is None else self.outcome.completed - self.began

    def command_s(self) -> float | None:
        """Seconds in all, with those before QEMU is told, in which the guest is not disturbed."""
        return None if self.outcome.completed is None else self.outcome.completed - self.asked

    def wire_bytes(self) -> int:
        return self.wire

    def downtime_ms(self) -> float | None:
        return (
            None
            if self.stopped is None or self.resumed is None
            else (self.resumed - self.stopped) * 1e3
        )

    def longest_gap_ms(self) -> float | None:
        return None if self._end is None else self.story.longest_gap(self.asked, self._end) * 1e3

    def lost_ms(self) -> float | None:
        """How long the guest would have needed, at its rate before the migration, for the work that
        it did not do during it."""
        if self._end is None:
            return None
        did = self.story.rate(self.asked, self._end) / self.writes_per_s()
        return (1 - did) * (self._end - self.asked) * 1e3

    def least_lost_ms(self) -> float | None:
        """A lower bound of :meth:`lost_ms` for pages that come after the switch: in whichever order
        they come, the guest completes a sweep through the memory that it works on no sooner than
        all of that has come over the link. None over a loopback."""
        if self.rate is None:
            return None
        writes = self.work / _PAGE * WRITES_PER_SWEPT
        return max(0.0, self.work * 8 / (self.rate * 1e6) - writes / self.writes_per_s()) * 1e3

    def writes_per_s(self) -> float:
        """Pages that the guest wrote per second before the command."""
        return self.story.rate(self.asked - BEFORE_SECONDS, self.asked)


@dataclass(frozen=True, slots=True)
class QemuResult:
    """All rounds of one method with one size of RAM."""

    method: str
    ram: int
    migrations: Sequence[Migration]

    def median(self, of: Callable[[Migration], float | None]) -> float | None:
        """Over the migrations that have the figure, which mostly those have that converged; None if
        none has it."""
        values = [value for value in map(of, self.migrations) if value is not None]
        return median(values) if values else None

    def typical(self) -> Migration:
        """The migration to draw: the one with the median of the longest gaps."""
        return sorted(self.migrations, key=lambda one: one.longest_gap_ms() or 0.0)[
            len(self.migrations) // 2
        ]


async def measure_qemu(
    options: QemuOptions, on_migration: Callable[[Migration], None]
) -> list[QemuResult]:
    """A result for each size and method. In each round each method has its turn. ``on_migration``
    is called with each migration.

    :exc:`UsageError`, :exc:`~pagenet.errors.Unsupported` if it cannot be done here;
    :exc:`~pagenet.errors.PagenetError` if a guest does not arrive. Migrations after which the guest
    was not what it was are in the results.
    """
    check_tools(QEMU)
    _check_memory(options)
    done: dict[tuple[int, str], list[Migration]] = {
        (ram, name): [] for ram in options.rams for name in options.methods
    }
    async with open_link(options.rate) as link:
        for number in range(options.rounds):
            for ram, name in done:
                guest = Guest(
                    options.files, ram, options.work, options.hot, options.cpus, options.accel
                )
                migration = await _migrate_once(METHODS[name](), guest, link, number)
                done[ram, name].append(migration)
                on_migration(migration)
    return [QemuResult(name, ram, migrations) for (ram, name), migrations in done.items()]


def _check_memory(options: QemuOptions) -> None:
    """:exc:`UsageError` without room for two machines, of which both have all their RAM in the end.
    By default /dev/shm may take half of a system's memory."""
    needed = 2 * max(options.rams)
    status = os.statvfs("/dev/shm")
    for there, where in (
        (available_memory(), "memory"),
        (status.f_bavail * status.f_frsize, "/dev/shm"),
    ):
        if there < needed:
            raise UsageError(
                f"two guests of {needed >> 21} MiB need {needed >> 20} MiB: {where} has"
                f" {there >> 20} left"
            )


async def _migrate_once(method: Method, guest: Guest, link: Link, number: int) -> Migration:
    # This machine may be a guest, and its host may have taken back the memory that is free here:
    # getting that again takes long.
    await trio.to_thread.run_sync(bench_claim_memory, 2 * guest.ram)
    async with open_site(link) as site, AsyncExitStack() as stack:
        starting = start_machine(site, guest, "source", at=link.source, shared=method.shared)
        source = await stack.enter_async_context(starting)
        destination = await method.wait_there(site, guest, stack)
        await source.serial.wait_beats(BEFORE_SECONDS + 0.5)
        patience = _PATIENCE + 4 * (guest.ram * 8 / (link.rate * 1e6) if link.rate else 0)
        before, asked = link.wire_bytes(), time.monotonic()
        outcome = await method.move(source, destination, patience)
        wire_bytes = link.wire_bytes() - before
        began = monotonic(await source.qmp.wait_event("MIGRATION", where=_is_setup, patience=1))
        story, stopped, resumed = await _ending(source, destination, outcome)
    work = guest.ram * guest.work // 100
    return Migration(
        method.name,
        guest.ram,
        number,
        asked,
        began,
        stopped,
        resumed,
        outcome,
        wire_bytes,
        story,
        work,
        link.rate,
    )


def _is_setup(data: dict[str, object]) -> bool:
    return data["status"] == "setup"


async def _ending(
    source: Machine, destination: Machine, outcome: Outcome
) -> tuple[Story, float | None, float | None]:
    """The guest's story, once it has verified all of its memory, and when it was stopped and
    resumed (None if it did not move)."""
    if outcome.completed is None:
        await source.serial.wait_verified()
        return Story.of(source.serial), None, None
    stop = await source.qmp.wait_event("STOP", patience=1)
    resume = await destination.qmp.wait_event("RESUME", patience=1)
    await trio.sleep(outcome.completed + AFTER_SECONDS - time.monotonic())
    with suppress(ProcessLookupError):
        os.kill(source.pid, signal.SIGKILL)  # the guest has left this machine
    await destination.serial.wait_verified()
    return Story.of(source.serial, destination.serial), monotonic(stop), monotonic(resume)


# ---- targets ----


@dataclass(frozen=True, slots=True)
class Target:
    """``figure`` is to be at most ``limit``. ``words``: which figure of what."""

    words: str
    figure: float
    limit: float

    @property
    def is_met(self) -> bool:
        return self.figure <= self.limit


def targets_of(results: Sequence[QemuResult], options: QemuOptions) -> list[Target]:
    """The targets for which figures were measured. They are set for 1 Gbit/s, and for a
    loopback."""
    targets: list[Target] = []
    ours = [result for result in results if result.method in OURS]
    if options.rate not in (None, TARGET_RATE):
        return []
    for result in ours:
        others = {other.method: other for other in results if other.ram == result.ram}
        who = f"{result.method}, {result.ram >> 20} MiB"
        postcopy, preempt = others.get("postcopy"), others.get("preempt")
        wanted: list[tuple[str, Callable[[Migration], float | None], QemuResult | None, float]] = [
            (
                "total, relative to QEMU postcopy's",
                Migration.total_s,
                postcopy,
                1.0 if options.rate is None else 1.02,
            )
        ]
        if options.rate is not None:
            wanted += [
                ("longest gap, relative to preempt's", Migration.longest_gap_ms, preempt, 0.2),
                ("guest work lost, relative to preempt's", Migration.lost_ms, preempt, 0.33),
                ("downtime, relative to QEMU postcopy's", Migration.downtime_ms, postcopy, 1.0),
                ("downtime, relative to preempt's", Migration.downtime_ms, preempt, 1.0),
            ]
        for words, of, other, limit in wanted:
            if other is not None:
                targets += _ratio(f"{who}: {words}", result.median(of), other.median(of), limit)
        if options.rate is not None:
            targets += _ratio(
                f"{who}: downtime, relative to 10 ms",
                result.median(Migration.downtime_ms),
                10.0,
                1.0,
            )
            first = next(other for other in ours if other.method == result.method)
            if first is not result:
                words = f"{who}: downtime, relative to that with {first.ram >> 20} MiB"
                targets += _ratio(
                    words,
                    result.median(Migration.downtime_ms),
                    first.median(Migration.downtime_ms),
                    SAME,
                )
    return targets


def _ratio(words: str, figure: float | None, other: float | None, limit: float) -> list[Target]:
    return [] if figure is None or not other else [Target(words, figure / other, limit)]
