"""The destination's lanes over RDMA, in Trio and pyverbs: ask for a key, read, place. Slow, and
obviously right.

They are the oracle for the loop in C, and they fill files.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import trio

from .. import _native
from ..background.pacing import Background
from ..destination.filling import Filling
from ..destination.trio_lanes import WINDOW_CHUNKS, act_on_faults, read_events_forever
from ..errors import ConnectionBroken, SourceDisconnected, SourceLost, Unsupported
from ..nurseries import open_failing_nursery
from ..protocol import Class
from ..region import Region, Run
from ..session import receive_exactly
from ..transport import Connection
from ._lanes import exchange
from ._memory import join, make_queue_pair
from ._path import Path
from ._pyverbs import load, registering, translated
from ._wire import (
    KEY_HEADER,
    Answer,
    Asking,
    Endpoint,
    Key,
    Kind,
    check_key,
    chunk_run,
    decode_answer,
    read_key,
)

__all__ = ["ReadLanes"]

#: keys that a lane keeps at most: before it gets another one, the oldest is given back
MAX_KEYS = 16
#: seconds to wait before asking again, when the source may pin no more
REFUSED = 0.01


class ReadLanes:
    """A demand lane and a background lane, with a queue pair and a connection each. Borrows the
    connections."""

    def __init__(
        self,
        filling: Filling,
        wire: Region,
        connections: Sequence[Connection],
        path: Path,
        background: Background,
    ) -> None:
        self._filling = filling
        self._wire = wire
        self._background = background
        self._path = path
        self.resume(connections)

    def resume(self, connections: Sequence[Connection]) -> None:
        self._demand, *self._pushers = [
            _ReadLane(connection, self._filling, self._wire, self._path, self._act)
            for connection in connections
        ]

    async def idle(self) -> None:
        await read_events_forever(self._filling, lambda: None)

    @property
    def name(self) -> str:
        return f"trio, rdma by {self._path}"

    def withhold(self, withhold: bool) -> None:
        """Do nothing: the filling, which was told, places the pages."""

    async def give_back(self) -> None:
        for lane in [self._demand, *self._pushers]:
            await lane.give_back()

    def close(self) -> None:
        """Nothing to do: :meth:`run` releases what the lanes own."""

    async def run(self) -> None:
        self._act()  # what threads wait for since before these connections
        async with open_failing_nursery() as nursery:
            nursery.start_soon(self._demand.run)
            for lane in self._pushers:
                nursery.start_soon(lane.run)
                nursery.start_soon(self._feed, lane)
            await read_events_forever(self._filling, self._act)

    def _act(self) -> None:
        act_on_faults(self._filling, self._demand.request_nowait, self._background)

    async def _feed(self, lane: _ReadLane) -> None:
        while True:
            await lane.wait_idle(WINDOW_CHUNKS)
            await self._background.wait_turn()
            run = await self._background.next_run(self._background.turn_bytes)
            parts = list(self._filling.claim(run))
            if not parts:  # this may repeat without end if the owner writes to the map
                await trio.lowlevel.checkpoint()
            for part in parts:
                lane.request_nowait(Class.BACKGROUND, part)
                self._background.pay(self._filling.region.size_of(part))


class _ReadLane:
    """One queue pair. Runs are read one after another, into memory from which they are placed."""

    def __init__(
        self,
        connection: Connection,
        filling: Filling,
        wire: Region,
        path: Path,
        act: Callable[[], None],
    ) -> None:
        self._act = act  # called when pages came
        self._connection = connection
        self._filling = filling
        self._wire = wire
        self._path = path
        self._keys: dict[Run, Key] = {}
        self._asked_in, self._asked = trio.open_memory_channel[tuple[Class, Run]](1 << 20)
        self._progress = trio.Event()
        self._buffer: _Buffer | None = None

    def request_nowait(self, class_: Class, run: Run) -> None:
        """Queue ``run``, which the caller has claimed, to be read."""
        self._asked_in.send_nowait((class_, run))
        self._filling.residency.add(class_, "requests")

    async def wait_idle(self, most: int) -> None:
        """Return when fewer than ``most`` runs are queued."""
        while self._asked.statistics().current_buffer_used >= most:
            self._progress = trio.Event()
            await self._progress.wait()

    async def run(self) -> None:
        """Read what is queued, until cancelled.

        Raises :exc:`SourceLost` if the source cannot go on, or the connection is gone;
        :exc:`Unsupported` if the device refuses something.
        """
        with ExitStack() as stack:
            try:
                self._device = _Device(self._path, stack)
                theirs = await exchange(self._connection, self._device.ours)
                self._device.join(theirs)
                stack.callback(self._release_buffer)
                async for class_, run in self._asked:
                    await self._read(class_, run)
                    self._progress.set()
            except ConnectionBroken as error:
                raise SourceDisconnected(f"the source is gone: {error}") from None
            except OSError as error:
                raise Unsupported(f"cannot use {self._path} for RDMA: {error.strerror}") from None

    def _release_buffer(self) -> None:
        if self._buffer is not None:
            self._buffer.close()

    # ---- one run ----

    async def _read(self, class_: Class, run: Run) -> None:
        """Read ``run`` in pieces, each of which lies in one chunk, or is one page of ours."""
        region = self._filling.region
        unit = 1 << region.unit_shift(region.block_index(run.first), self._wire)
        for part in self._parts(region.in_pages_of(self._wire, run), unit):
            pages = await self._fetch(part)
            mine = self._wire.in_pages_of(region, part)
            self._filling.arrived(class_, mine, pages, 0 if pages is None else len(pages))
            self._act()

    def _parts(self, run: Run, unit: int) -> Iterator[Run]:
        first = run.first
        while first < run.end:
            chunk = chunk_run(self._wire, first)
            count = min(run.end, chunk.end) - first if chunk.count >= unit else unit
            yield Run(first, count)
            first += count

    async def _fetch(self, run: Run) -> memoryview | None:
        """The pages, or None if all are known to be zero."""
        size = self._wire.size_of(run)
        buffer = self._room(size)
        any_read, first = False, run.first
        while first < run.end:
            key = await self._key(chunk_run(self._wire, first))
            zero, past = key.is_zero(first), first + 1
            while past < min(run.end, key.run.end) and key.is_zero(past) == zero:
                past += 1
            part = Run(first, past - first)
            offset, length = (
                self._wire.size_of(Run(run.first, first - run.first)),
                self._wire.size_of(part),
            )
            if zero:
                buffer.view(offset, length)[:] = bytes(length)
            else:
                start = key.address + self._wire.size_of(Run(key.run.first, first - key.run.first))
                await self._device.read(buffer.mr, buffer.address + offset, start, key.key, length)
                any_read = True
            first = past
        return buffer.view(0, size) if any_read else None

    def _room(self, size: int) -> _Buffer:
        if self._buffer is None or self._buffer.size < size:
            self._release_buffer()
            self._buffer = _Buffer(self._device.domain, max(size, 1 << 20))
        return self._buffer

    # ---- keys ----

    async def _key(self, chunk: Run) -> Key:
        if (key := self._keys.pop(chunk, None)) is not None:
            self._keys[chunk] = key  # the newest is last
            return key
        if len(self._keys) >= MAX_KEYS:
            await self._give_back_oldest()
        while (key := await self._ask(chunk)).answer is Answer.REFUSED:
            if self._keys:
                await self._give_back_oldest()
            else:
                await trio.sleep(REFUSED)
        self._keys[chunk] = key
        return key

    async def give_back(self) -> None:
        """Give back all keys. To be called while nothing is queued or being read."""
        while self._keys:
            await self._give_back_oldest()

    async def _give_back_oldest(self) -> None:
        chunk = next(iter(self._keys))
        if self._keys.pop(chunk).answer is Answer.HERE:
            await self._connection.send(Asking(Kind.RETURN, chunk).encode())

    async def _ask(self, chunk: Run) -> Key:
        await self._connection.send(Asking(Kind.ASK, chunk).encode())
        header = bytearray(KEY_HEADER.size)
        await receive_exactly(self._connection, memoryview(header))
        answer, run, length = decode_answer(bytes(header))
        body = bytearray(length)
        await receive_exactly(self._connection, memoryview(body))
        key = check_key(read_key(answer, run, bytes(body)), chunk, self._wire)
        if answer is Answer.FAILED:
            raise SourceLost(f"the source cannot go on: {key.reason}")
        return key


class _Buffer:
    """Registered memory that pages are read into."""

    def __init__(self, domain: Any, size: int) -> None:
        self.size = size
        self._memory = _native.Mapped(size)
        self.address = self._memory.address
        with registering():
            self.mr = load("mr").MR(
                domain, size, load("enums").IBV_ACCESS_LOCAL_WRITE, address=self.address
            )

    def view(self, offset: int, length: int) -> memoryview:
        return self._memory.buffer(offset, length)

    def close(self) -> None:
        self.mr.close()
        self._memory.close()


class _Device:
    """A queue pair of ours, and what is needed to wait for its completions."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path = path
        with translated(f"use RDMA device {path.device}"):
            context = load("device").Context(name=path.device)
            stack.callback(context.close)
            self.domain = load("pd").PD(context)
            stack.callback(self.domain.close)
            before = _event_fds()
            self._channel = load("cq").CompChannel(context)
            stack.callback(self._channel.close)
            # pyverbs before 57 does not tell the descriptor, and keeps the GIL while it waits for
            # an event.
            [self._fd] = _event_fds() - before
            os.set_blocking(self._fd, False)
            self._pair, self._queue = make_queue_pair(
                context, self.domain, path, stack, room=16, channel=self._channel
            )
        self._psn = secrets.randbelow(1 << 24)
        self.ours = Endpoint(path.gid, path.lid, self._pair.qp_num, self._psn, path.mtu, path.reads)

    def join(self, theirs: Endpoint) -> None:
        mtu, reads = min(self._path.mtu, theirs.mtu), min(self._path.reads, theirs.reads)
        with translated(f"join the peer's queue pair from {self._path}"):
            join(self._pair, self._path, theirs, self._psn, mtu, reads)

    async def read(self, region: Any, to: int, from_: int, key: int, length: int) -> None:
        """READ ``length`` bytes of the peer's memory. :exc:`SourceLost` if the peer refuses or is
        gone."""
        enums, wr = load("enums"), load("wr")
        with translated("read the source's memory"):
            self._queue.req_notify()
            part = wr.SGE(to, length, region.lkey)
            request = wr.SendWR(
                opcode=enums.IBV_WR_RDMA_READ,
                num_sge=1,
                sg=[part],
                send_flags=enums.IBV_SEND_SIGNALED,
            )
            request.set_wr_rdma(key, from_)
            self._pair.post_send(request)
            request.close()  # by hand, because pyverbs 44 leaks both otherwise
            part.close()
            status = await self._completion()
        if status == enums.IBV_WC_RETRY_EXC_ERR:
            raise SourceDisconnected("the source is gone: it does not answer READs")
        if status != enums.IBV_WC_SUCCESS:
            # a source that is killed loses its keys before its queue pairs
            raise SourceDisconnected(
                f"the source is gone: a READ of its memory failed (status {status})"
            )

    async def _completion(self) -> int:
        while True:
            count, completions = self._queue.poll(1)
            if count:
                await trio.lowlevel.checkpoint()
                return int(completions[0].status)
            await trio.lowlevel.wait_readable(self._fd)
            self._channel.get_cq_event(self._queue)
            self._queue.ack_events(1)
            self._queue.req_notify()


def _event_fds() -> set[int]:
    """This process's descriptors for events of RDMA devices."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if "infinibandevent" in os.readlink(f"/proc/self/fd/{number}"):
                found.add(int(number))
    return found
