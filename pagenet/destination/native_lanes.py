"""The destination's lanes, in C: threads that Trio starts, stops and joins.

Nothing that a faulting thread waits for runs in Python. What runs here: the schedule, which fills a
ring; the end of the transfer; and the translation of why a loop ended into an error.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial

import trio

from .. import _native
from ..background.pacing import Background
from ..errors import (
    HandshakeError,
    OwnerGone,
    PagenetError,
    RemoteProtocolError,
    SourceDisconnected,
    SourceLost,
)
from ..nurseries import open_failing_nursery
from ..protocol import printable
from ..region import Region, Run
from ..target import Target
from ..transport import Connection, Detachable, DetachedSocket
from ..uffd import UffdTarget
from .filling import Filling

__all__ = ["LoopLanes", "NativeLanes", "can_run_natively", "lane_error", "owned", "taken"]

# What is in the ring is asked for before anything that the schedule chooses later. So the ring is
# kept short: half of it lasts the lane RING_SECONDS (min, max). Its size grows when half of it
# was used up sooner, or all of it before Python refilled it, and shrinks when half of it lasted
# longer. Each refill costs Python about 100 us, and 10 us for each run.
RING_BYTES = (512 << 10, 16 << 20)
RING_SECONDS = (0.004, 0.02)
# A run has at most 1 / RUNS_IN_RING of the ring's bytes. The lane asks for it in smaller pieces.
RUNS_IN_RING = 4
# Faults reach the schedule in batches, at intervals of FAULT_SECONDS: waking Trio costs more than a
# fault does. Without a schedule or observer, faults are only remembered for the next schedule, and
# the log has room for those of the longer interval.
FAULT_SECONDS = 0.002
UNHEEDED_FAULT_SECONDS = 0.05


def can_run_natively(target: Target, connections: Sequence[Connection]) -> bool:
    """Whether the memory has a userfaultfd, and every connection has a socket."""
    return isinstance(target, UffdTarget) and all(
        isinstance(connection, Detachable) for connection in connections
    )


class LoopLanes:
    """What all lanes in C have: eventfds to stop them and to tell the end, rings that the schedule
    fills, and the memory that pages go to."""

    name = ""

    def __init__(
        self,
        filling: Filling,
        wire: Region,
        background: Background,
        rings: int,
    ) -> None:
        assert isinstance(filling.target, UffdTarget)
        self._filling = filling
        self._background = background
        with ExitStack() as stack:
            self._stop_fd = owned(stack, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._done_fd = owned(stack, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._rings = [_native.Ring() for _ in range(rings)]
            self._in_rings = [(ring, deque[int]()) for ring in self._rings]
            for ring in self._rings:
                stack.callback(ring.close)
            self._faults = _native.FaultLog()
            stack.callback(self._faults.close)
            memory = filling.target.native(wire)
            self._dest = _native.Destination(
                filling.residency.shared,
                memory.pieces,
                uffd=memory.uffd,
                how=memory.how,
                file=memory.file,
                sealed=memory.sealed,
                outside_is_zero=memory.outside_is_zero,
                removes=memory.removes,
                done_fd=self._done_fd,
                window=filling.window,
                faults=self._faults,
                encodings=filling.encodings,
                fills=memory.fills,
                shares=memory.shares,
            )
            stack.callback(self._dest.close)
            stack.enter_context(background.telling(self._limit))
            self._limit()
            self._cleanup = stack.pop_all()

    def close(self) -> None:
        self._cleanup.close()

    def withhold(self, withhold: bool) -> None:
        self._dest.withhold(withhold)

    async def give_back(self) -> None:
        """Do nothing: over a stream no keys are granted."""

    def _limit(self) -> None:
        self._dest.limit_background(self._background.max_bandwidth if self._background.runs else 0)
        for ring in self._rings:
            ring.wake()

    async def run(self) -> None:
        async with self._looping(self._start_loops) as nursery:
            for ring, sizes in self._in_rings:
                nursery.start_soon(self._feed, ring, sizes)

    async def idle(self) -> None:
        async with self._looping(lambda nursery: nursery.start_soon(self._run_idle_loop)):
            pass

    async def _run_idle_loop(self) -> None:
        await self._drive("", -1)

    async def _drive(
        self,
        peer: str,
        sock: int,
        ring: _native.Ring | None = None,
        window: tuple[int, int, int] = (0, 0, 0),
        chunk: int = 0,
        tls: _native.Tls | None = None,
        limiter: trio.CapacityLimiter | None = None,
    ) -> None:
        """Drive a connection with ``peer`` until the loop is stopped. Raises the error with which
        it ends otherwise."""
        drive = partial(self._dest.run_lane, sock, self._stop_fd, ring, window, chunk, tls)
        end = await trio.to_thread.run_sync(drive, limiter=limiter, abandon_on_cancel=False)
        if end.kind != _native.END_STOPPED:
            raise lane_error(end, peer)

    @asynccontextmanager
    async def _looping(
        self, start_loops: Callable[[trio.Nursery], None]
    ) -> AsyncIterator[trio.Nursery]:
        """Run the loops that ``start_loops`` starts in a nursery, beside those that the block
        starts there, until they fail or are cancelled."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._stop_fd)  # former loops were told to stop
        try:
            async with open_failing_nursery() as nursery:
                nursery.start_soon(self._stop_when_cancelled)
                start_loops(nursery)
                yield nursery
                nursery.start_soon(self._read_faults)
                # another process that writes to the map may cause this event too early
                while not self._filling.completed.is_set():
                    await trio.lowlevel.wait_readable(self._done_fd)
                    os.eventfd_read(self._done_fd)
                    self._filling.check_complete()
        finally:
            if not self._filling.completed.is_set():  # complete memory is not watched any more
                self._dest.release()

    async def _stop_when_cancelled(self) -> None:
        """Threads cannot be cancelled; the loops in them end when this descriptor becomes
        readable."""
        try:
            await trio.sleep_forever()
        finally:
            os.eventfd_write(self._stop_fd, 1)

    def _start_loops(self, nursery: trio.Nursery) -> None:
        """Start a task for each loop, which lasts until the loop has been stopped, or fails.

        The tasks must run in ``nursery``: its cancellation stops the loops, and so also those that
        are left when one fails.
        """
        raise NotImplementedError

    async def _read_faults(self) -> None:
        """Tell the schedule, and a recording, which pages threads waited for."""
        try:
            while True:
                while pages := self._faults.read():
                    self._background.note_faults(pages)
                    await trio.sleep(
                        FAULT_SECONDS if self._background.heeds_faults else UNHEEDED_FAULT_SECONDS
                    )
                await trio.lowlevel.wait_readable(self._faults.fd)
                os.eventfd_read(self._faults.fd)
        finally:
            self._background.note_faults(self._faults.read())  # the last of a complete transfer

    async def _feed(self, ring: _native.Ring, sizes: deque[int]) -> None:
        """Keep the ring filled with what the schedule names: fill it up each time that half of it
        is used up. ``sizes``: bytes of each run in it."""
        room, filled = RING_BYTES[0], trio.current_time()
        if sizes:  # what former loops left in it, which nobody has told this one of
            ring.wake()
            await self._half_empty(ring, sizes)
        while True:
            run: Run | None = await self._background.next_run(room // RUNS_IN_RING)
            used = sum(sizes)
            while run is not None:
                ring.push(run.first, run.count, wake=False)
                sizes.append(self._filling.region.size_of(run))
                used += sizes[-1]
                full = used >= room or len(sizes) == ring.ROOM
                run = None if full else self._background.next_run_nowait(room // RUNS_IN_RING)
            ring.wake()
            await self._half_empty(ring, sizes)
            took, filled = trio.current_time() - filled, trio.current_time()
            if took < RING_SECONDS[0] or not len(ring):
                room = min(room * 2, RING_BYTES[1])
            elif took > RING_SECONDS[1]:
                room = max(room // 2, RING_BYTES[0])
            await trio.lowlevel.checkpoint()

    async def _half_empty(self, ring: _native.Ring, sizes: deque[int]) -> None:
        """Return when half of the bytes in the ring are left. ``sizes``: bytes of each run in it;
        runs that were taken are removed."""
        whole, left, runs = sum(sizes), 0, 0
        while runs < len(sizes) and left + sizes[-1 - runs] <= whole // 2:
            left += sizes[-1 - runs]
            runs += 1
        ring.wake_me_at(max(runs, 1))
        while len(ring) > max(runs, 1):
            await trio.lowlevel.wait_readable(ring.room_fd)
            os.eventfd_read(ring.room_fd)
        while len(sizes) > len(ring):
            sizes.popleft()


class NativeLanes(LoopLanes):
    """A demand lane and background lanes over detached sockets.

    The first of ``connections`` is for demand. Owns the sockets.
    """

    name = "native"

    def __init__(
        self,
        filling: Filling,
        wire: Region,
        connections: Sequence[Connection],
        background: Background,
    ) -> None:
        with ExitStack() as stack:
            self._connected = stack.enter_context(ExitStack())
            self._take(connections)
            super().__init__(filling, wire, background, len(connections) - 1)
            self._cleanup.push(stack.pop_all())

    def _take(self, connections: Sequence[Connection]) -> None:
        self._peer = connections[0].peer
        self._sockets = [taken(self._connected, connection) for connection in connections]

    def resume(self, connections: Sequence[Connection]) -> None:
        self._connected.close()
        self._take(connections)

    def _start_loops(self, nursery: trio.Nursery) -> None:
        limiter = trio.CapacityLimiter(len(self._sockets))
        for sock, ring in zip(self._sockets, [None, *self._rings], strict=True):
            nursery.start_soon(self._run_lane, limiter, sock, ring)

    async def _run_lane(
        self, limiter: trio.CapacityLimiter, sock: DetachedSocket, ring: _native.Ring | None
    ) -> None:
        window = _native.window_bytes(self._background.window)
        chunk = self._background.chunk
        await self._drive(self._peer, sock.fd, ring, window, chunk, sock.tls, limiter)


def lane_error(end: _native.End, peer: str) -> PagenetError:
    """The error for a loop in C that has ended without being told to."""
    match end.kind:
        case _native.END_CLOSED:
            return SourceDisconnected(f"the source is gone: {peer} closed the connection")
        case _native.END_BROKEN:
            reason = os.strerror(end.error) if end.error else printable(end.text)
            return SourceDisconnected(f"the source is gone: {peer}: {reason}")
        case _native.END_FAILED:
            return SourceLost(f"the source cannot go on: {printable(end.text)}")
        case _native.END_PROTOCOL:
            return RemoteProtocolError(end.text)
        case _native.END_OWNER_GONE:
            return OwnerGone("the owner of the memory is gone")
        case _native.END_OWNER_WRONG:
            return HandshakeError(end.text)
    return PagenetError(f"cannot go on placing pages: {os.strerror(end.error or errno.EIO)}")


def owned(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def taken(stack: ExitStack, connection: Connection) -> DetachedSocket:
    """The connection's socket, and TLS on it, which ``stack`` closes."""
    assert isinstance(connection, Detachable)
    detached = connection.detach()
    owned(stack, detached.fd)
    if detached.tls is not None:
        stack.callback(detached.tls.close)
    return detached
