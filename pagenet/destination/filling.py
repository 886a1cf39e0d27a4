"""The destination's state, and the operations on it: faults come in, pages come in, the owner gives
pages up.

No method waits, and none asks for pages: :meth:`Filling.take_wanted` returns what to ask for. Each
method leaves residency, target and the list of waiting faults consistent with each other, so lanes
written as Trio tasks may call them in any order.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

import trio

from .. import _native
from ..errors import HandshakeError, OwnerGone, PagenetError
from ..protocol import Class, Encoding
from ..region import Region, Run
from ..residency import Residency, State
from ..statistics import TransferStatistics
from ..target import (
    POISON_PATIENCE,
    Fault,
    Forked,
    Outcome,
    Owned,
    Recoverable,
    Remapped,
    Removed,
    Target,
    Unmapped,
)
from .greeting import Greeting

__all__ = ["Filling"]


# Bytes on either side of a fault. A window of huge pages would only delay the next fault.
PREFETCH_LIMIT = 1 << 20
# Bytes that an adapting window may have in flight. The lane in C tunes this; in Trio a reply costs
# more than a page.
PREFETCHING = 128 << 10
# Pages that are in place, or given up.
_NOT_MISSING = (State.RESIDENT, State.REMOVING, State.REMOVED)
# Pages of the sample, not touched yet, that may be held at a time.
_MOST_HELD = 4096


class Filling:
    """Fills ``target``, from empty to complete. Owns ``target`` and its residency map.

    ``source``: the identity of the source. ``is_endless``: pages that are in place may have to be
    placed again, so it is never complete. Raises :exc:`~pagenet.errors.UsageError` if the target
    was begun with another source.
    """

    def __init__(self, target: Target, source: bytes = b"", *, is_endless: bool = False) -> None:
        self.target = target
        self._is_endless = is_endless
        self.region = target.region
        self._two_steps = target if isinstance(target, Recoverable) else None
        self.residency = (
            self._two_steps.open_residency(source)
            if self._two_steps
            else Residency(self.region.pages)
        )
        self.completed = trio.Event()
        #: chooses what is asked for around a page that a thread waits for
        self.window = _native.Window()
        self.prefetch = (0, 0)
        #: the encodings that pages are asked for in, a bit each
        self.encodings = 1 << Encoding.RAW | 1 << Encoding.ZERO
        # pages of the sample that are held until their first touch: see native/dest.c
        self._held = set[int]()
        self._prefetching = 0  # bytes that an adapting window has in flight
        # page -> monotonic ns of the first fault that waits for it
        self._faulted_at: dict[int, int] = {}
        self._faults: deque[tuple[Fault, int]] = deque()
        self._wanted: list[tuple[Class, Run]] = []
        self._faulted: list[int] = []
        self._withholds = False
        self._last_words: TransferStatistics | None = None
        self._left: list[Run] | None = None  # missing when it was closed
        self._started = time.monotonic()
        self._seconds: float | None = None
        try:
            self.residency.confine(target.scope())
            if self.residency.is_recovered:
                self._remove_again()
                self._recover()
            self.check_complete()
        except BaseException:
            self.residency.close()
            raise

    def _remove_again(self) -> None:
        """Act on the removals that a destination had read when it died. Bytes of such a page may be
        in the memory already, and must not be seen."""
        for start, end in self.residency.shared.removals():
            for run in self.target.pages_between(start, end):
                for state in (State.MISSING, State.READY):
                    self.residency.replace(run, state, State.REMOVING)
                self.residency.replace(run, State.RESIDENT, State.REMOVED)

    def _recover(self) -> None:
        """Go on where a destination has died: with the pages that it was placing, and with the
        threads that waited for it."""
        for run in self.target.scope():
            if self._two_steps is not None:
                self._publish_ready(run, self._two_steps)
        for run in self.target.scope():
            self._leave_all_removed(run)
            self.target.wake(run)  # faults that were read and never answered come again

    def ask_again(self) -> None:
        """Note that nothing which was asked for comes any more, because the source was lost. What
        threads wait for is to be asked for first, the longest wait first."""
        self._wanted.clear()
        self._prefetching = 0
        for run in self.target.scope():
            for state in (State.REQUESTED, State.COMING, State.PLACING):
                self.residency.replace(run, state, State.MISSING)
        self._recover()
        for page in self._faulted_at:
            if self._claim(Run(page, 1)).count:
                self._wanted.append((Class.DEMAND, Run(page, 1)))

    def adopt(self, greeting: Greeting) -> list[int]:
        """Go on with an owner whose first faults were answered, and end that. Returns the pages
        that its threads have waited for, in their order."""
        pages = []
        placed, removals = greeting.end()
        for offset, waited in placed:
            page = self.region.page_at_offset(offset)
            if self.residency.claim(Run(page, 1), State.MISSING, State.RESIDENT):
                for counter in ("pages", "runs", "faults"):
                    self.residency.add(Class.DEMAND, counter)
                self.residency.add_latency(Class.DEMAND, waited)
            pages.append(page)
        for start, end in removals:
            self._remove(start, end)
        for run in self.target.scope():
            self.target.wake(run)  # faults that were read and not answered come again
        self.check_complete()
        return pages

    def _publish_ready(self, run: Run, target: Recoverable) -> None:
        """Publish the READY pages of ``run``.

        In one pass from the first page to the last: the owner may write to the map meanwhile.
        """
        residency, first = self.residency, run.first
        while (found := residency.find(State.READY, first, run.end)) is not None:
            first = found
            ready = residency.span(Run(first, run.end - first), State.READY) or 1
            outcome = target.publish(Run(first, ready), again=True)
            # If a page is absent, its owner gave it up after it was published: a fault on it will
            # get zeros, like a fault on any other page that was given up.
            residency.set(Run(first, outcome.done), State.RESIDENT)
            residency.add(Class.BACKGROUND, "pages", outcome.done)
            first += outcome.done
            if outcome.again:
                self._drain_or_yield()

    def _leave_all_removed(self, run: Run) -> None:
        first = run.first
        while (page := self.residency.find(State.REMOVING, first, run.end)) is not None:
            self._leave_removed(page)
            first = page + 1

    @property
    def prefetch(self) -> tuple[int, int] | None:
        """Pages asked for after and before a page that a thread waits for; None: the window
        adapts."""
        return self.window.fixed

    @prefetch.setter
    def prefetch(self, prefetch: tuple[int, int] | None) -> None:
        self.window.fix(prefetch)

    # ---- while the source's owner still runs ----

    def withhold(self, withhold: bool) -> None:
        """Make pages that come to shared memory COPIED instead of visible, and leave faults
        unanswered; or no longer do, and have those faults come again."""
        self._withholds = withhold
        if not withhold:
            for run in self.target.scope():
                self.target.wake(run)

    def drop_stale(self, wire: Region, first: int, bits: bytes) -> None:
        """Make MISSING the COPIED pages whose bits are set. ``bits``: one for each page on the wire
        from ``first`` on; those behind the last page mean nothing."""
        end, changed = min(first + 8 * len(bits), wire.pages), 0
        for index in range(len(wire.blocks)):
            start, past = wire.first_pages[index : index + 2]
            low, high = max(start, first), min(past, end)
            if low < high:
                shift = self.region.unit_shift(index, wire)
                ours = self.region.first_pages[index]
                changed += self.residency.shared.stale(
                    ours, low - start, shift, bits, low - first, high - low
                )
        self.residency.add(Class.BACKGROUND, "pages", -changed)
        self.residency.add(Class.BACKGROUND, "dropped", changed)

    def keep_copied(self) -> None:
        """Make all COPIED pages RESIDENT: their bytes are the last. A thread that touches one has a
        minor fault, which is settled at once."""
        for run in self.target.scope():
            self.residency.replace(run, State.COPIED, State.RESIDENT)
        self.check_complete()

    def finish(self) -> None:
        """Let the owner go. Call when every page is in place."""
        self.target.close(())

    def close(self) -> None:
        """Release everything, complete or not. Idempotent."""
        if self._last_words is None:
            self._last_words = self.statistics()
            self._release()
            self._left = self.residency.missing()
            self.target.close(self._left)
            self.residency.close()

    def poison(self, target: Owned) -> int:
        """Poison the missing pages of ``target``, this one's. Returns how many were poisoned now.
        What the owner gives up meanwhile is not missing any more.

        It ends early if the owner ends, or changes its memory all the time.
        """
        poisoned, deadline = 0, time.monotonic() + POISON_PATIENCE
        for run in self.missing():
            first = run.first
            while first < run.end and time.monotonic() < deadline:
                state = self.residency.shared.state(first)
                part = Run(first, self.residency.shared.span(first, run.end, state) or 1)
                if state in _NOT_MISSING:
                    first = part.end
                    continue
                try:
                    outcome = target.poison(part)
                except OwnerGone:
                    return poisoned
                poisoned += outcome.placed
                first += outcome.done
                if outcome.done:
                    deadline = time.monotonic() + POISON_PATIENCE
                if outcome.again:
                    self._drain_or_yield()
        return poisoned

    def missing(self) -> list[Run]:
        """The pages that are neither in place nor given up; those at the end, once it is closed."""
        return self.residency.missing() if self._left is None else self._left

    @property
    def closed(self) -> bool:
        return self._last_words is not None

    # ---- the owner ----

    def read_events(self) -> None:
        """Read the events of the owner's userfaultfd, and act on them."""
        self._drain()
        while self._faults:
            batch = [self._faults.popleft() for _ in range(len(self._faults))]
            asked = [page for page in [self._answer(*fault) for fault in batch] if page is not None]
            for page in asked:  # after the pages that threads wait for
                self._prefetch_around(page)
            self._prefetch_more()
        self.check_complete()

    def take_wanted(self) -> list[tuple[Class, Run]]:
        """What is to be asked for on the demand lane, in order; new since the last call."""
        wanted, self._wanted = self._wanted, []
        return wanted

    def take_faulted(self) -> list[int]:
        """The pages that threads wait for, or waited for, in order; new since the last call."""
        faulted, self._faulted = self._faulted, []
        return faulted

    def _drain(self) -> None:
        """Read all events. Removals take effect at once. Faults are kept for later, because
        answering one may need another drain."""
        while events := self.target.read_events():
            now = time.monotonic_ns()
            for event in events:
                match event:
                    case Fault():
                        self._faults.append((event, now))
                    case Removed(start, end) | Unmapped(start, end):
                        self._remove(start, end)
                    case Remapped():
                        raise HandshakeError("the owner moved memory while it was being filled")
                    case Forked():  # not as long as the kernel writes the events
                        raise HandshakeError("the owner forked while its memory was being filled")

    def _remove(self, start: int, end: int) -> None:
        for run in self.target.pages_between(start, end):
            for page in range(run.first, run.end):
                placing = self.residency.state(page) in (State.PLACING, State.READY, State.REMOVING)
                self.residency.set(Run(page, 1), State.REMOVING if placing else State.REMOVED)
                self._held.discard(page)
            for page in [page for page in self._faulted_at if run.first <= page < run.end]:
                del self._faulted_at[page]
                self.target.wake(Run(page, 1))  # it will fault again, and get zeros

    def _answer(self, fault: Fault, now: int) -> int | None:
        """Do what the fault needs. Return its page if it was MISSING until now."""
        if self._withholds:
            return None
        page = self.target.page_of(fault)
        if page is None:
            self._answer_outside(fault)
            return None
        if page in self._held:
            self._held.remove(page)
            self.residency.add(Class.PREFETCH, "sampled_used")
            while not self.target.settle(page, fault):
                self._drain_or_yield()
            return None
        self.residency.add(Class.DEMAND, "faults")
        state = self.residency.state(page)
        if state not in (State.RESIDENT, State.REMOVED):
            self._faulted.append(page)
        match state:
            case State.MISSING | State.COMING:
                # COMING: the page is queued behind other background pages. Of its two copies, the
                # second to come is dropped.
                self.residency.set(Run(page, 1), State.REQUESTED)
                self._faulted_at.setdefault(page, now)
                self._wanted.append((Class.DEMAND, Run(page, 1)))
                return page if state is State.MISSING else None
            case State.REQUESTED | State.PLACING:
                self._faulted_at.setdefault(page, now)
            case _:
                while not self.target.settle(page, fault):
                    self._drain_or_yield()
        return None

    def _answer_outside(self, fault: Fault) -> None:
        self.residency.add(Class.DEMAND, "faults")
        self.residency.add(Class.DEMAND, "outside_faults")
        while not self.target.settle(None, fault):
            self._drain_or_yield()

    def _prefetch_around(self, page: int) -> None:
        """Ask for the MISSING pages after ``page``, then for those before it: on each side, up to
        the first page that is not MISSING.

        An adapting window is told of the fault instead.
        """
        piece, page_size = self.target.piece_of(page), self.region.page_size_at(page)
        if self.prefetch is None:
            self.window.fault(self.residency.shared, page, piece.first, piece.end, page_size)
            return
        limit = PREFETCH_LIMIT // page_size
        forward, backward = (min(pages, limit) for pages in self.prefetch)
        behind = Run(page + 1, min(forward, piece.end - page - 1))
        before = min(backward, page - piece.first)
        while before and self.residency.span(Run(page - before, before), State.MISSING) < before:
            before -= 1
        for run in (self._claim(behind), self._claim(Run(page - before, before))):
            if run.count:
                self._wanted.append((Class.PREFETCH, run))

    def _prefetch_more(self) -> None:
        """Ask for what the window wants, a little at a time: everything in flight delays the next
        page that a thread waits for."""
        while self._prefetching < PREFETCHING and (
            found := self.window.next(self.residency.shared, PREFETCHING - self._prefetching)
        ):
            run = Run(*found)
            self._prefetching += self.region.size_of(run)
            self._wanted.append((Class.PREFETCH, run))

    def _claim(self, run: Run) -> Run:
        return Run(run.first, self.residency.claim(run, State.MISSING, State.REQUESTED))

    def _drain_or_yield(self) -> None:
        """The owner's memory is changing: read the events that tell why, and let the owner go
        on."""
        self._drain()
        os.sched_yield()

    # ---- pages ----

    def claim(self, run: Run) -> Iterator[Run]:
        """Make the MISSING pages of ``run`` COMING. Yields them as runs, which the caller is then
        to ask for in the background."""
        first = run.first
        while first < run.end:
            count = self.residency.claim(Run(first, run.end - first), State.MISSING, State.COMING)
            if count:
                yield Run(first, count)
            first += count or 1

    def arrived(
        self,
        class_: Class,
        run: Run,
        pages: memoryview | None,
        wire_bytes: int,
        was_packed: bool = False,
    ) -> None:
        """Put in place what is still wanted of ``run``, which has come, and wake the threads that
        wait for it.

        ``pages``: its bytes, or None for zeros. ``wire_bytes``: what it took on the wire, headers
        included. ``was_packed``: it came compressed.
        """
        if was_packed:
            self._count_packed(class_, self.region.size_of(run), wire_bytes)
        residency = self.residency
        page_size = self.region.page_size_at(run.first)
        for state in (State.REQUESTED, State.COMING):
            residency.replace(run, state, State.PLACING)
        first, done = run.first, 0
        while first < run.end:
            part = Run(first, residency.span(Run(first, run.end - first), State.PLACING))
            if not part.count:
                if residency.state(first) is State.REMOVING:
                    self._leave_removed(first)
                first += 1
                continue
            before = (
                _native.before_sampled(part.first, part.count)
                if class_ is Class.PREFETCH
                else part.count
            )
            part = Run(first, before or 1)
            skip, size = (first - run.first) * page_size, part.count * page_size
            data = None if pages is None else pages[skip : skip + size]
            outcome = self._place(part, data) if before else self._hold(part, data)
            first += outcome.done
            done += outcome.done
            residency.add(class_, "existed", outcome.existed)
            self._note_latency(Run(part.first, outcome.done))
            if outcome.again:
                residency.add(class_, "deferred")
                self._drain_or_yield()
        self._count(class_, run, done, pages is None, wire_bytes)
        if class_ is Class.PREFETCH and self._prefetching:
            self._prefetching = max(0, self._prefetching - self.region.size_of(run))
            self._prefetch_more()
        if self._faults:
            self.read_events()
        self.check_complete()

    def _place(self, part: Run, data: memoryview | None) -> Outcome:
        """Put pages that are PLACING into place, as many as the target takes.

        If this process is killed, the destination that takes the map over has to know what became
        of them. Pages are READY once their last byte is in shared memory: that tells half a page
        from a page that its owner may have written to.
        """
        residency, state = self.residency, State.PLACING
        if self._withholds and self._two_steps is not None and self._two_steps.write(part, data):
            residency.replace(part, State.PLACING, State.COPIED)
            return Outcome(part.count)
        if self._two_steps is not None and self._two_steps.write(part, data):
            state = State.READY
            residency.replace(part, State.PLACING, State.READY)
            outcome = self._two_steps.publish(part)
        else:
            outcome = self.target.place(part, data)
        residency.replace(Run(part.first, outcome.done), state, State.RESIDENT)
        residency.replace(part, State.READY, State.PLACING)
        return outcome

    def _hold(self, part: Run, data: memoryview | None) -> Outcome:
        """The same for a page of the sample. In shared memory, and if no thread waits for it, it
        stays invisible until it is touched."""
        two_steps = self._two_steps
        if part.first in self._faulted_at or len(self._held) == _MOST_HELD:
            return self._place(part, data)
        if two_steps is None or not two_steps.write(part, data):
            return self._place(part, data)
        self.residency.replace(part, State.PLACING, State.RESIDENT)
        self.residency.add(Class.PREFETCH, "sampled")
        self._held.add(part.first)
        return Outcome(1)

    def _release(self) -> None:
        """Let the owner see pages of the sample that it has not touched.

        Not needed once the transfer is complete: the memory is not watched any more then.
        """
        while self._held and not self.completed.is_set():
            assert self._two_steps is not None
            with suppress(PagenetError):  # the owner may be gone
                self._two_steps.publish(Run(self._held.pop(), 1), again=True)

    def _leave_removed(self, page: int) -> None:
        """Discard what was written of ``page``, which its owner gave up while it was being
        placed."""
        self.target.discard(Run(page, 1))
        self.residency.set(Run(page, 1), State.REMOVED)

    def _note_latency(self, run: Run) -> None:
        now = time.monotonic_ns()
        pages = range(run.first, run.end)
        for page in (
            [p for p in self._faulted_at if p in pages]
            if len(self._faulted_at) < run.count
            else pages
        ):
            since = self._faulted_at.pop(page, None)
            if since is not None:
                self.residency.add_latency(Class.DEMAND, now - since)

    def _count(self, class_: Class, run: Run, done: int, zero: bool, wire_bytes: int) -> None:
        add = self.residency.add
        add(class_, "runs")
        add(class_, "pages", done)
        add(class_, "dropped", run.count - done)
        add(class_, "wire_bytes", wire_bytes)
        if zero:
            add(class_, "zero_pages", done)

    def _count_packed(self, class_: Class, size: int, wire_bytes: int) -> None:
        self.residency.add(class_, "lz4_runs")
        self.residency.add(class_, "lz4_bytes", size)
        self.residency.add(class_, "lz4_wire_bytes", wire_bytes)

    def check_complete(self) -> None:
        """Set :attr:`completed` if every page is in place.

        :exc:`~pagenet.errors.HandshakeError` if the map only claims that, because the owner has
        written to it.
        """
        if self._seconds is None and self.residency.complete and not self._is_endless:
            self.residency.check_complete()
            self._seconds = time.monotonic() - self._started
            self.completed.set()

    @property
    def received(self) -> int:
        """Changes with what comes from the source."""
        statistics = self.statistics()
        return statistics.done + statistics.wire_bytes

    @property
    def waiting_faults(self) -> int:
        return len(self._faulted_at)

    def statistics(self) -> TransferStatistics:
        if self._last_words is not None:
            return self._last_words
        residency = self.residency
        return TransferStatistics(
            pages=residency.scope,
            done=residency.done,
            size=sum(self.region.size_of(run) for run in self.target.scope()),
            seconds=time.monotonic() - self._started if self._seconds is None else self._seconds,
            placement=self.target.placement,
            demand=residency.statistics(Class.DEMAND),
            prefetch=residency.statistics(Class.PREFETCH),
            background=residency.statistics(Class.BACKGROUND),
            copied=self._copied(),
        )

    def _copied(self) -> int:
        if not self._withholds:
            return 0
        return sum(self.residency.statistics(class_).pages for class_ in Class)
