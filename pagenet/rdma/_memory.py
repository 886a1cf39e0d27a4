"""The source in Trio. Its memory is registered chunk by chunk, when a key is asked for, and for as
long as a destination has the key."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import trio

from .. import _native
from ..errors import (
    ConnectionBroken,
    ConnectionClosed,
    RemoteProtocolError,
    SourceLost,
    Unsupported,
)
from ..region import Run
from ..session import LAST_WORDS_TIMEOUT
from ..source.memory import Source
from ..transport import Connection
from ._constants import KEYS_IN_ANY_CASE, RETRIES, TIMEOUT
from ._path import Path
from ._pyverbs import load, registering, translated
from ._wire import ENDPOINT, Answer, Endpoint, Kind, decode_askings, encode_key, encode_word

__all__ = ["RegisteredMemory", "serve_reads"]

_RECEIVE_SIZE = 4096


@dataclass(eq=False, slots=True)
class _Chunk:
    """A chunk that is registered, or known to be zero (``region`` None)."""

    answer: bytes
    size: int = 0
    region: Any = None
    #: the copy that is registered instead of the memory itself
    copy: _native.Mapped | None = None
    #: the number of connections that have the key
    holders: int = field(default=0)

    def close(self) -> None:
        if self.region is not None:
            self.region.close()
        if self.copy is not None:
            self.copy.close()


class RegisteredMemory:
    """``source`` on one device, in Trio and pyverbs: slow and obvious; the same in C is
    :class:`~._keys.NativeMemory`.

    At most ``pin_limit`` bytes are registered, except that each connection may have four chunks in
    any case. Files and memfds are registered themselves, a file on a disk in the page cache.
    Another process's memory cannot be registered from here: a copy of each chunk is.
    """

    def __init__(self, source: Source, path: Path, pin_limit: int) -> None:
        self.source = source
        self._pin_limit = pin_limit
        self._pinned = self._granted = 0
        self._chunks: dict[Run, _Chunk] = {}
        self._blocks = source.native_blocks()
        self._files: dict[int, _native.MappedFile] = {}
        self._turn = trio.Lock()
        self._pages = bytearray()
        with ExitStack() as stack, translated(f"use RDMA device {path.device}"):
            stack.callback(self._close_memory)
            self.context = load("device").Context(name=path.device)
            stack.callback(self.context.close)
            self.domain = load("pd").PD(self.context)
            stack.callback(self.domain.close)
            self._close = stack.pop_all()

    @property
    def pinned(self) -> int:
        """Bytes that are registered now."""
        return self._pinned

    @property
    def granted(self) -> int:
        """Pages whose keys were granted until now."""
        return self._granted

    def close(self) -> None:
        """Call after the last connection that it serves has ended. Idempotent."""
        for chunk in self._chunks.values():
            chunk.close()
        self._chunks.clear()
        self._close.close()

    def _close_memory(self) -> None:
        for mapped in self._files.values():
            mapped.close()

    async def take(self, run: Run, held: int) -> tuple[bytes, bool]:
        """The encoded answer to an asking of a peer that has ``held`` keys, and whether it is a
        key. A key must be given back with :meth:`give_back`.

        Raises :exc:`SourceLost` if the memory cannot be read; :exc:`Unsupported` if this process
        may lock no more, and the peer has fewer keys than it may have in any case; :exc:`OSError`
        if the memory cannot be registered for another reason.
        """
        async with self._turn:
            size = self.source.region.size_of(run)
            more = 0 if run in self._chunks else size
            # A chunk that another connection has counts too: once that one gives it back, it is
            # pinned for this one alone.
            if held >= KEYS_IN_ANY_CASE and self._pinned + more > self._pin_limit:
                return encode_word(Answer.REFUSED, run), False
            if run not in self._chunks:
                try:
                    chunk = await self._make_chunk(run, size)
                except Unsupported:
                    if held < KEYS_IN_ANY_CASE:
                        raise
                    return encode_word(Answer.REFUSED, run), False
                if chunk.region is None:
                    return chunk.answer, False
                self._chunks[run] = chunk
                self._pinned += size
            self._chunks[run].holders += 1
            self._granted += run.count
            return self._chunks[run].answer, True

    def give_back(self, run: Run) -> None:
        chunk = self._chunks[run]
        chunk.holders -= 1
        if not chunk.holders:
            del self._chunks[run]
            self._pinned -= chunk.size
            chunk.close()

    async def _make_chunk(self, run: Run, size: int) -> _Chunk:
        """Register ``run``, unless it is zero.

        Zero pages are looked for by reading the file, not through its mapping: a read of a file
        that has become shorter fails with an error.
        """
        index = self.source.region.block_index(run.first)
        block = self._blocks[index]
        if (known := self.source.zero_map(run)) is not None:
            zero_map, zeros = known
            if zeros == run.count:
                return _Chunk(encode_word(Answer.ZERO, run))
            address = self._address_in_file(index, run)
            if (region := self._register(address, size)) is not None:
                return _Chunk(encode_key(run, address, region.rkey, zero_map), size, region)
        with ExitStack() as stack:
            copy = None if block.fd >= 0 else _native.Mapped(size)
            if copy is not None:
                stack.callback(copy.close)
            pages = self._room(size) if copy is None else copy.buffer(0, size)
            if not await self.source.read_into(run, pages):
                return _Chunk(encode_word(Answer.ZERO, run))
            zero_map, is_zero = _zero_map(pages, block.page_size)
            if is_zero:
                return _Chunk(encode_word(Answer.ZERO, run))
            address = self._address_in_file(index, run) if copy is None else copy.address
            region = self._register(address, size)
            if region is None and copy is None:
                copy = _native.Mapped(size)
                stack.callback(copy.close)
                copy.buffer(0, size)[:] = pages
                address, region = copy.address, self._register(copy.address, size)
            if region is None:
                raise OSError(errno.EFAULT, "cannot register memory for RDMA")
            stack.pop_all()
            return _Chunk(encode_key(run, address, region.rkey, zero_map), size, region, copy)

    def _room(self, size: int) -> memoryview:
        """A buffer in which pages are searched for zeros. It is kept, because new memory costs more
        than reading into it."""
        if len(self._pages) < size:
            self._pages = bytearray(size)
        return memoryview(self._pages)[:size]

    def _address_in_file(self, index: int, run: Run) -> int:
        """The address at which ``run`` of a file is mapped, so that it can be registered."""
        block = self._blocks[index]
        if index not in self._files:
            self._files[index] = map_file(block.fd, block.pages * block.page_size)
        mapped = self._files[index]
        offset = (run.first - block.first) * block.page_size
        mapped.map_ahead(offset, run.count * block.page_size)
        return mapped.address + offset

    def _register(self, address: int, size: int) -> Any:
        """Register memory. None: memory of this kind cannot be registered."""
        access = load("enums").IBV_ACCESS_REMOTE_READ
        try:
            with registering():
                return load("mr").MR(self.domain, size, access, address=address)
        except OSError as error:
            if error.errno == errno.EFAULT:
                return None
            raise


def map_file(fd: int, size: int) -> _native.MappedFile:
    """Map the file, writable if it is on no disk and that is permitted.

    Kernels before 6.2 register shared mappings only if they are writable. A file on a disk is not
    mapped so, because all its pages would become dirty. What cannot be registered is copied.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return _native.MappedFile(size, fd, writable=False)  # it is on a disk
    try:
        writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # it belongs to another user
        return _native.MappedFile(size, fd, writable=False)
    try:
        return _native.MappedFile(size, writable, writable=True)
    except OSError:  # it is sealed
        return _native.MappedFile(size, fd, writable=False)
    finally:
        os.close(writable)


def _zero_map(pages: memoryview, page_size: int) -> tuple[bytes, bool]:
    """A bitmap of the pages that are zero, and whether all are."""
    bits, first, count = 0, 0, len(pages) // page_size
    while first < count:
        alike, zero = _native.leading_alike(pages[first * page_size :], count - first, page_size)
        if zero:
            bits |= (1 << alike) - 1 << first
        first += alike
    return bits.to_bytes(-(-count // 8), "little"), bits == (1 << count) - 1


# ---- one connection ----


async def serve_reads(
    connection: Connection, path: Path, memory: RegisteredMemory, unread: bytes
) -> None:
    """As :meth:`pagenet.source.lanes.OneSided.serve_reads`."""
    stream = bytearray(unread)
    theirs = await receive_endpoint(connection, stream)
    held: set[Run] = set()
    try:
        with _queue_pair(memory, path, theirs) as ours:
            await connection.send(ours.encode())
            while True:
                for asking in decode_askings(stream, memory.source.region):
                    if asking.kind is Kind.ASK:
                        await _answer(connection, memory, asking.run, held)
                    elif asking.run in held:
                        held.remove(asking.run)
                        memory.give_back(asking.run)
                    else:
                        raise RemoteProtocolError("the peer gives back a key that it does not have")
                if not await _receive_more(connection, stream):
                    return
    except OSError as error:
        raise ConnectionBroken(error.strerror or str(error)) from None
    finally:
        for run in held:
            memory.give_back(run)


async def _answer(
    connection: Connection, memory: RegisteredMemory, run: Run, held: set[Run]
) -> None:
    if run in held:
        raise RemoteProtocolError("the peer asks for a key that it has")
    try:
        answer, has_key = await memory.take(run, len(held))
    except (SourceLost, Unsupported, OSError) as error:
        reason = error.strerror or "" if isinstance(error, OSError) else str(error)
        # The source cannot go on, whether the peer is told or not. Shielded, because a peer that
        # leaves at once would hide the cause.
        with (
            trio.move_on_after(LAST_WORDS_TIMEOUT, shield=True),
            suppress(ConnectionBroken, ConnectionClosed),
        ):
            await connection.send(encode_word(Answer.FAILED, run, reason))
        raise
    if has_key:
        held.add(run)
    await connection.send(answer)


async def _receive_more(connection: Connection, stream: bytearray) -> bool:
    buffer = memoryview(bytearray(_RECEIVE_SIZE))
    count = await connection.receive_into(buffer)
    stream += buffer[:count]
    return bool(count)


async def receive_endpoint(connection: Connection, stream: bytearray) -> Endpoint:
    """Receive the peer's first message. ``stream`` holds what the peer has sent already, and
    afterwards what it has sent behind that message."""
    while len(stream) < ENDPOINT.size:
        if not await _receive_more(connection, stream):
            raise ConnectionBroken("the peer closed instead of saying where its queue pair is")
    endpoint = Endpoint.decode(bytes(stream[: ENDPOINT.size]))
    del stream[: ENDPOINT.size]
    return endpoint


@contextmanager
def _queue_pair(memory: RegisteredMemory, path: Path, theirs: Endpoint) -> Iterator[Endpoint]:
    """A queue pair of ours, joined to the peer's, which may read through it."""
    with ExitStack() as stack:
        with translated(f"open a queue pair on {path}"):
            pair, _ = make_queue_pair(memory.context, memory.domain, path, stack)
        mtu, reads = min(path.mtu, theirs.mtu), min(path.reads, theirs.reads)
        psn = secrets.randbelow(1 << 24)
        with translated(f"join the peer's queue pair from {path}"):
            join(pair, path, theirs, psn, mtu, reads)
        yield Endpoint(path.gid, path.lid, pair.qp_num, psn, mtu, reads)


def make_queue_pair(
    context: Any, domain: Any, path: Path, stack: ExitStack, room: int = 1, channel: Any = None
) -> tuple[Any, Any]:
    """A queue pair that is not joined to another one yet, with room for ``room`` work requests, and
    its completion queue."""
    enums, qp = load("enums"), load("qp")
    queue = load("cq").CQ(context, room, None, channel)
    stack.callback(queue.close)
    room_for = qp.QPCap(max_send_wr=room, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
    init = qp.QPInitAttr(qp_type=enums.IBV_QPT_RC, scq=queue, rcq=queue, cap=room_for, sq_sig_all=0)
    # With these attributes the queue pair is in INIT at once. The peer's access rights must be set
    # here: later is too late.
    attributes = qp.QPAttr(port_num=path.port)
    attributes.qp_access_flags = enums.IBV_ACCESS_REMOTE_READ
    pair = qp.QP(domain, init, attributes)
    stack.callback(pair.close)
    return pair, queue


def join(pair: Any, path: Path, theirs: Endpoint, psn: int, mtu: int, reads: int) -> None:
    enums, qp, addr = load("enums"), load("qp"), load("addr")
    attributes = qp.QPAttr(port_num=path.port)
    attributes.qp_access_flags = enums.IBV_ACCESS_REMOTE_READ
    attributes.path_mtu = mtu
    attributes.dest_qp_num = theirs.number
    attributes.rq_psn, attributes.sq_psn = theirs.psn, psn
    attributes.max_rd_atomic = attributes.max_dest_rd_atomic = reads
    attributes.min_rnr_timer = 12
    attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = TIMEOUT, RETRIES, RETRIES
    gid = addr.GID(_colons(theirs.gid))
    route = addr.GlobalRoute(dgid=gid, sgid_index=path.gid_index, hop_limit=64)
    attributes.ah_attr = addr.AHAttr(port_num=path.port, is_global=1, gr=route, dlid=theirs.lid)
    pair.to_rts(attributes)


def _colons(gid: bytes) -> str:
    """``gid`` as pyverbs wants it."""
    return ":".join(gid[at : at + 2].hex() for at in range(0, 16, 2))
