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
from typing import Literal, NamedTuple

import trio

from ..._native.testing import bench_claim_memory
from ...errors import PagenetError, UsageError
from ...qemu import QmpEvent
from .._environment import available_memory
from .._site import Link, check_tools, open_link, open_site
from ._qemu_guest import QEMU, Guest, GuestFiles, Machine, Story, start_machine
from ._qemu_methods import (
    ENCRYPTED,
    HYBRIDS,
    METHODS,
    OURS,
    USUAL,
    Method,
    Outcome,
    monotonic,
    with_windows,
)

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
#: the share of its work that a guest may lose while rounds of precopy run
MOST_LOST = 0.1
# Seconds, beyond the time that the link takes for all of the RAM four times.
_PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class QemuOptions:
    """``rams``: bytes; ``rate``: of the link, in Mbit/s, None for a loopback; ``work``, ``hot``:
    percent of the RAM that the guest works on, and that it writes to; ``windows``: bytes of the
    background in flight, with each of which pagenet moves the guest as well."""

    files: GuestFiles
    rams: Sequence[int] = (512 << 20,)
    rate: int | None = TARGET_RATE
    rounds: int = 3
    methods: Sequence[str] = USUAL
    windows: Sequence[int] = ()
    work: int = 60
    hot: int = 12
    cpus: int = 1
    accel: Literal["tcg", "kvm"] = "tcg"


@dataclass(frozen=True, slots=True)
class Migration:
    """One migration. All times are in seconds of time.monotonic().

    ``asked``: the command was given; ``began``: QEMU was told to migrate, or pagenet's first round
    of precopy began; ``stopped``, ``resumed``: when the guest was, by its QEMUs' own clocks;
    ``outcome``: what the method reports; ``wire``: bytes on the link; ``work``: bytes that the
    guest works on; ``rate``: of the link, in Mbit/s; ``failure``: why the guest did not arrive, or
    died there.
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
    failure: str | None = None

    @property
    def converged(self) -> bool:
        return self.outcome.completed is not None

    @property
    def is_right(self) -> bool:
        return self.failure is None and self.story.unbroken and self.story.bad == 0

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
        all of that has come over the link. None over a loopback, with precopy, and for a guest that
        did not arrive."""
        if self.rate is None or self.failure is not None or self.outcome.rounds is not None:
            return None
        writes = self.work / _PAGE * WRITES_PER_SWEPT
        return max(0.0, self.work * 8 / (self.rate * 1e6) - writes / self.writes_per_s()) * 1e3

    def precopy_work(self) -> float | None:
        """The guest's work from the beginning of precopy until the guest was stopped, or precopy
        given up, relative to its work before. None without precopy."""
        until = self.outcome.given_up if self.stopped is None else self.stopped
        if self.outcome.rounds is None or until is None:
            return None
        return self.story.rate(self.began, until) / self.writes_per_s()

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
    :exc:`~pagenet.errors.PagenetError` if a guest cannot be started. Migrations that failed, or
    after which the guest was not what it was, are in the results.
    """
    check_tools(QEMU)
    _check_memory(options)
    methods = {name: METHODS[name] for name in options.methods}
    methods |= with_windows(options.windows)
    done: dict[tuple[int, str], list[Migration]] = {
        (ram, name): [] for ram in options.rams for name in methods
    }
    async with open_link(options.rate) as link:
        for number in range(options.rounds):
            for ram, name in done:
                guest = Guest(
                    options.files, ram, options.work, options.hot, options.cpus, options.accel
                )
                migration = await _migrate_once(methods[name](), guest, link, number)
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
        stopped = resumed = failure = None
        try:
            outcome = await method.move(source, destination, patience)
            wire_bytes = link.wire_bytes() - before
            story, stopped, resumed = await _ending(source, destination, outcome)
        except PagenetError as error:
            # the other methods go on: QEMU's own may lose a guest
            failure, outcome = str(error), Outcome(None)
            story, wire_bytes = Story.of(source.serial), link.wire_bytes() - before
        told = next(filter(_is_setup, source.qmp.events), None)
    began = outcome.began or (asked if told is None else monotonic(told))
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
        failure,
    )


def _is_setup(event: QmpEvent) -> bool:
    return event.name == "MIGRATION" and event.data["status"] == "setup"


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


class _Rule(NamedTuple):
    """A figure is to be at most ``limit``, relative to that of the method ``other``."""

    words: str
    of: Callable[[Migration], float | None]
    other: str
    limit: float


_UNCAPPED_RULES = (_Rule("total, relative to QEMU postcopy's", Migration.total_s, "postcopy", 1.0),)
_RULES = (
    _Rule("total, relative to QEMU postcopy's", Migration.total_s, "postcopy", 1.02),
    _Rule("longest gap, relative to preempt's", Migration.longest_gap_ms, "preempt", 0.2),
    _Rule("guest work lost, relative to preempt's", Migration.lost_ms, "preempt", 0.33),
    _Rule("downtime, relative to QEMU postcopy's", Migration.downtime_ms, "postcopy", 1.0),
    _Rule("downtime, relative to preempt's", Migration.downtime_ms, "preempt", 1.0),
)
_HYBRID_RULES = (
    _Rule("longest gap, relative to preempt's", Migration.longest_gap_ms, "preempt", 0.1),
    _Rule(
        "longest gap, relative to qemu-hybrid-preempt's",
        Migration.longest_gap_ms,
        "qemu-hybrid-preempt",
        0.33,
    ),
    _Rule("guest work lost, relative to preempt's", Migration.lost_ms, "preempt", 0.33),
    _Rule(
        "guest work lost, relative to qemu-hybrid-preempt's",
        Migration.lost_ms,
        "qemu-hybrid-preempt",
        0.5,
    ),
    _Rule("downtime, relative to qemu-hybrid's", Migration.downtime_ms, "qemu-hybrid", 1.0),
    _Rule(
        "bytes on the wire, relative to qemu-hybrid's", Migration.wire_bytes, "qemu-hybrid", 1.05
    ),
)


def targets_of(results: Sequence[QemuResult], options: QemuOptions) -> list[Target]:
    """The targets for which figures were measured. They are set for 1 Gbit/s, and for a
    loopback."""
    if options.rate not in (None, TARGET_RATE):
        return []
    return [
        target
        for result in results
        for target in _targets_for(result, results, is_capped=options.rate is not None)
    ]


def _targets_for(
    result: QemuResult, results: Sequence[QemuResult], *, is_capped: bool
) -> list[Target]:
    if result.method in OURS and not is_capped:
        return _compared(result, results, _UNCAPPED_RULES)
    if result.method in OURS:
        downtime = result.median(Migration.downtime_ms)
        short = _ratio(f"{_who(result)}: downtime, relative to 10 ms", downtime, 10.0, 1.0)
        return [*_compared(result, results, _RULES), *short, *_not_growing(result, results)]
    if result.method in HYBRIDS and is_capped:
        own = HYBRIDS[result.method]
        rule = _Rule(f"downtime, relative to {own}'s", Migration.downtime_ms, own, 2.0)
        compared = _compared(result, results, (*_HYBRID_RULES, rule))
        return [*compared, *_kept_working(result), *_not_growing(result, results)]
    if result.method in ENCRYPTED and is_capped:
        return _compared(result, results, _encrypted_rules(ENCRYPTED[result.method]))
    return []


def _encrypted_rules(own: str) -> Sequence[_Rule]:
    """``own``: the same method without TLS."""
    gap, downtime = Migration.longest_gap_ms, Migration.downtime_ms
    return (
        _Rule(f"longest gap, relative to {own}'s", gap, own, 1.3),
        _Rule("longest gap, relative to preempt-tls's", gap, "preempt-tls", 0.25),
        _Rule(f"downtime, relative to {own}'s", downtime, own, 1.3),
    )


def _who(result: QemuResult) -> str:
    return f"{result.method}, {result.ram >> 20} MiB"


def _compared(
    result: QemuResult, results: Sequence[QemuResult], rules: Sequence[_Rule]
) -> list[Target]:
    others = {other.method: other for other in results if other.ram == result.ram}
    return [
        target
        for rule in rules
        if (other := others.get(rule.other)) is not None
        for target in _ratio(
            f"{_who(result)}: {rule.words}",
            result.median(rule.of),
            other.median(rule.of),
            rule.limit,
        )
    ]


def _not_growing(result: QemuResult, results: Sequence[QemuResult]) -> list[Target]:
    """The downtime is that of the first size of RAM."""
    first = next(other for other in results if other.method == result.method)
    if first is result:
        return []
    words = f"{_who(result)}: downtime, relative to that with {first.ram >> 20} MiB"
    of = Migration.downtime_ms
    return _ratio(words, result.median(of), first.median(of), SAME)


def _kept_working(result: QemuResult) -> list[Target]:
    work = result.median(Migration.precopy_work)
    if work is None:
        return []
    words = f"{_who(result)}: guest work lost during precopy, relative to undisturbed"
    return [Target(words, 1 - work, MOST_LOST)]


def _ratio(words: str, figure: float | None, other: float | None, limit: float) -> list[Target]:
    return [] if figure is None or not other else [Target(words, figure / other, limit)]
