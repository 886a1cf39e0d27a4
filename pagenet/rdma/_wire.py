"""The messages of the two sides on a lane, after its hello, without I/O. They are specified in
``docs/protocol.md``.

First each side tells where its queue pair is, the destination first: an :class:`Endpoint`. From
then on the destination asks for keys to chunks of the region (an :class:`Asking`), and gives keys
back. The source answers what is asked for, in order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from ..errors import RemoteProtocolError
from ..protocol import MAX_REASON_BYTES, printable
from ..region import Region, Run

__all__ = [
    "CHUNK_SIZE",
    "Answer",
    "Asking",
    "Endpoint",
    "Key",
    "Kind",
    "check_key",
    "chunk_pages",
    "chunk_run",
    "decode_answer",
    "decode_askings",
    "encode_key",
    "encode_word",
    "read_key",
]

MAGIC = b"PGRD"
VERSION = 1
# magic, version, mtu, reads, reserved, gid, lid, reserved, number, psn
ENDPOINT = struct.Struct("<4sBBBB16sHHII")
KEY_HEADER = struct.Struct("<IB3xQII")  # reserved, kind, first page, pages, length of what follows
KEY = struct.Struct("<QII")  # address, key, reserved; then a bit for each page that is zero
ZERO_MAP_BYTES = 32
# Bytes that one key is for. Registering costs a system call and the pinning of each page, so a
# chunk should have many pages; but all of it is registered when its first page is wanted, so it
# should have few. 1 MiB was Yabusame's choice; other sizes were not measured.
CHUNK_SIZE = 1 << 20
SMALLEST_MTU, LARGEST_MTU = 1, 5


class Kind(IntEnum):
    # destination to source
    ASK = 1
    RETURN = 2


class Answer(IntEnum):
    # source to destination
    HERE = 1
    ZERO = 2
    REFUSED = 3
    FAILED = 255


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One side's queue pair. ``mtu``: the largest packet, as the verbs number it; ``reads``: READs
    that it does at a time."""

    gid: bytes
    lid: int
    number: int
    psn: int
    mtu: int
    reads: int

    def encode(self) -> bytes:
        return ENDPOINT.pack(
            MAGIC, VERSION, self.mtu, self.reads, 0, self.gid, self.lid, 0, self.number, self.psn
        )

    @classmethod
    def decode(cls, data: bytes) -> Endpoint:
        magic, version, mtu, reads, _, gid, lid, _, number, psn = ENDPOINT.unpack(data)
        if magic != MAGIC:
            raise RemoteProtocolError(
                "the peer does not speak of RDMA: say rdma:// on both sides, or on none"
            )
        if version != VERSION:
            raise RemoteProtocolError(
                f"the peer speaks of RDMA in version {version}; this pagenet knows version"
                f" {VERSION}"
            )
        if (
            not SMALLEST_MTU <= mtu <= LARGEST_MTU
            or not reads
            or number >= 1 << 24
            or psn >= 1 << 24
        ):
            raise RemoteProtocolError("the peer's queue pair makes no sense")
        return cls(gid, lid, number, psn, mtu, reads)


# ---- chunks ----


def chunk_pages(page_size: int) -> int:
    """The number of pages in a chunk. A page larger than ``CHUNK_SIZE`` is a chunk of its own."""
    return max(1, CHUNK_SIZE // page_size)


def chunk_run(region: Region, page: int) -> Run:
    """The chunk that ``page`` is in."""
    index = region.block_index(page)
    pages = chunk_pages(region.blocks[index].page_size)
    first = region.first_pages[index] + (page - region.first_pages[index]) // pages * pages
    return Run(first, min(pages, region.first_pages[index + 1] - first))


# ---- keys ----


@dataclass(frozen=True, slots=True)
class Asking:
    kind: Kind
    run: Run

    def encode(self) -> bytes:
        return KEY_HEADER.pack(0, self.kind, self.run.first, self.run.count, 0)


def decode_askings(unread: bytearray, region: Region) -> Iterator[Asking]:
    """All whole askings at the beginning of ``unread``, which are removed from it.

    Raises :exc:`RemoteProtocolError` if an asking makes no sense, or is not for a chunk of
    ``region``.
    """
    while len(unread) >= KEY_HEADER.size:
        _, kind, first, count, length = KEY_HEADER.unpack_from(unread)
        del unread[: KEY_HEADER.size]
        run = Run(first, count)
        if kind not in (Kind.ASK, Kind.RETURN) or length:
            raise RemoteProtocolError("the peer asks for no key, nor gives one back")
        if not region.contains(run) or chunk_run(region, first) != run:
            raise RemoteProtocolError(
                f"the peer asks for the key to {count} pages from page {first} on: that is no chunk"
            )
        yield Asking(Kind(kind), run)


def encode_key(run: Run, address: int, key: int, zero_map: bytes) -> bytes:
    """An answer with a key. ``zero_map``: a bitmap of the pages that are zero; empty: not known."""
    zeros = zero_map.ljust(ZERO_MAP_BYTES, b"\0") if zero_map else b""
    return (
        KEY_HEADER.pack(0, Answer.HERE, run.first, run.count, KEY.size + len(zeros))
        + KEY.pack(address, key, 0)
        + zeros
    )


def encode_word(answer: Answer, run: Run, reason: str = "") -> bytes:
    text = reason.encode(errors="replace")[:MAX_REASON_BYTES]
    return KEY_HEADER.pack(0, answer, run.first, run.count, len(text)) + text


@dataclass(frozen=True, slots=True)
class Key:
    """The answer to an asking, with ``address`` and ``key`` if ``answer`` is HERE, and a ``reason``
    if it is FAILED."""

    answer: Answer
    run: Run
    address: int = 0
    key: int = 0
    zero_map: bytes = b""
    reason: str = ""

    def is_zero(self, page: int) -> bool:
        """Whether ``page`` is known to be zero."""
        bit = page - self.run.first
        return self.answer is Answer.ZERO or bool(
            self.zero_map and self.zero_map[bit // 8] >> bit % 8 & 1
        )


def decode_answer(header: bytes) -> tuple[Answer, Run, int]:
    """The answer, its chunk, and the length of what follows, for :func:`read_key`.

    Raises :exc:`RemoteProtocolError` if the header makes no sense.
    """
    _, answer, first, count, length = KEY_HEADER.unpack(header)
    if answer not in set(Answer):
        raise RemoteProtocolError(
            f"the peer's answer about a key is of kind {answer}, which is unknown"
        )
    lengths: tuple[int, ...] | range = (0,)
    if answer == Answer.HERE:
        lengths = (KEY.size, KEY.size + ZERO_MAP_BYTES)
    elif answer == Answer.FAILED:
        lengths = range(MAX_REASON_BYTES + 1)
    if length not in lengths:
        raise RemoteProtocolError(f"the peer's answer about a key is {length} bytes long")
    return Answer(answer), Run(first, count), length


def read_key(answer: Answer, run: Run, body: bytes) -> Key:
    if answer is Answer.FAILED:
        return Key(answer, run, reason=printable(body.decode(errors="replace")))
    if answer is not Answer.HERE:
        return Key(answer, run)
    address, key, _ = KEY.unpack_from(body)
    return Key(answer, run, address, key, body[KEY.size :])


def check_key(key: Key, asked: Run, region: Region) -> Key:
    """Return ``key``. Raises :exc:`RemoteProtocolError` if it is for another chunk than ``asked``,
    or for addresses that do not exist."""
    if key.answer is not Answer.FAILED and key.run != asked:
        raise RemoteProtocolError("the peer's answer about a key was not asked for")
    if key.address > 2**64 - region.size_of(asked):
        raise RemoteProtocolError(
            f"the peer's key is for memory at {key.address:#x}, which reaches past the last address"
        )
    return key
