"""Firecracker's UFFD handshake: how an owner hands over its memory.

The owner connects to a unix socket and sends one message: a JSON array with an object for each
mapping, and the userfaultfd as SCM_RIGHTS. Pagenet's extensions are two more descriptors, both
optional and in any order. One is the memfd, or file of tmpfs or hugetlbfs, that is mapped (shared):
flat byte ``offset`` of the region is at file offset ``offset``. The other is an empty memfd of the
name ``pagenet-residency``, of which the owner keeps a descriptor: the map of pages is in there, and
outlives the destination.

Where a host cache fills the memory, an owner may share the cache's pages. It first sends the JSON
object ``{"want": "file"}`` and gets one, on a line, with the ``size`` of a file and its
``page_size``, in bytes, and the file as SCM_RIGHTS. It maps the file privately (flat byte
``offset`` of the region is at file offset ``offset``), lets its userfaultfd watch that (MISSING),
and goes on with its handshake, on the same connection.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import HandshakeError, UsageError
from ..region import Region, Run
from ..sizes import MAX_ADDRESS

__all__ = [
    "MAX_HANDSHAKE_BYTES",
    "Mapping",
    "Note",
    "check_mappings",
    "check_request",
    "first_object",
    "mapping_pieces",
    "parse_handshake",
    "parse_mappings",
]

# Firecracker sends one or two mappings of about 100 bytes each; for QEMU there are tens.
MAX_HANDSHAKE_BYTES = 64 << 10


#: what an owner sends that wants the file of a host cache
_REQUEST = {"want": "file"}


def first_object(message: bytes | bytearray) -> bytes | None:
    """The JSON object that the message begins with, and what is before it; None: it does not begin
    with one, or not all of it is there."""
    text = message.decode("latin-1")  # a byte stays a character
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "{":
        return None
    try:
        return bytes(message[: json.JSONDecoder().raw_decode(text, start)[1]])
    except (ValueError, RecursionError):
        return None


def check_request(request: bytes) -> None:
    """:exc:`HandshakeError` if this object, which an owner has sent, is not a request for the file
    of a host cache."""
    if json.loads(request) != _REQUEST:
        raise HandshakeError("the owner's handshake begins with an object that asks for no file")


@dataclass(frozen=True, slots=True)
class Mapping:
    """``size`` bytes at ``address`` in the owner are the region's flat bytes from ``offset`` on, in
    pages of ``page_size`` bytes."""

    address: int
    size: int
    offset: int
    page_size: int


def parse_mappings(message: bytes) -> list[Mapping]:
    """The mappings of :func:`parse_handshake`."""
    return parse_handshake(message)[0]


def parse_handshake(message: bytes) -> tuple[list[Mapping], bool]:
    """Parse the handshake's text. Return the mappings, and whether what the owner's userfaultfd
    watches outside of them reads as zero.

    Raises :exc:`HandshakeError`, in one line, if the text makes no sense.
    """
    try:
        entries = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise HandshakeError(f"the owner's handshake is not JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise HandshakeError("the owner's handshake is not a JSON array of mappings")
    return [_mapping(entry, index) for index, entry in enumerate(entries)], _outside_is_zero(
        entries
    )


def _outside_is_zero(entries: list[dict[str, Any]]) -> bool:
    words = [entry.get("outside", "poison") for entry in entries]
    if any(word not in ("poison", "zero") for word in words) or words.count(words[0]) < len(words):
        raise HandshakeError(
            "the owner's handshake says 'outside' otherwise than 'zero', or 'poison', in all"
            " mappings"
        )
    return bool(words[0] == "zero")


def _mapping(entry: Any, index: int) -> Mapping:
    if not isinstance(entry, dict):
        raise HandshakeError(f"mapping {index} of the owner's handshake is not a JSON object")
    # Both names mean bytes, and always have; the older one is a misnomer.
    page_size_key = "page_size" if "page_size" in entry else "page_size_kib"
    if page_size_key not in entry:
        # handshakes from before Firecracker 1.7 have neither
        entry = {**entry, "page_size_kib": 4096}
    numbers = [
        _number(entry, key, index)
        for key in ("base_host_virt_addr", "size", "offset", page_size_key)
    ]
    return _checked(Mapping(*numbers), index)


def _number(entry: dict[str, Any], key: str, index: int) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise HandshakeError(f"mapping {index} of the owner's handshake has no proper {key!r}")
    return value


def _checked(mapping: Mapping, index: int) -> Mapping:
    page = mapping.page_size
    if page < 4096 or page & (page - 1) or page > 1 << 30:
        raise HandshakeError(
            f"mapping {index}: page size {page} is not a power of two from 4 KiB to 1 GiB"
        )
    if mapping.size == 0 or any(n % page for n in (mapping.address, mapping.size, mapping.offset)):
        raise HandshakeError(
            f"mapping {index}: address, size and offset are not whole pages of {page} bytes"
        )
    if mapping.address >= MAX_ADDRESS or mapping.size > MAX_ADDRESS - mapping.address:
        raise HandshakeError(
            f"mapping {index}: {mapping.size:#x} bytes at {mapping.address:#x} is no address range"
        )
    return mapping


@dataclass(frozen=True, slots=True)
class Note:
    """What a destination leaves beside the map of pages, for another destination that takes it
    over: the identity of the ``source``, whether pages come through the file behind the memory
    (``shared``), the mappings, and whether what is outside of them reads as zero.
    """

    source: bytes
    shared: bool
    mappings: tuple[Mapping, ...]
    outside_is_zero: bool = False

    def encode(self) -> bytes:
        outside = {"outside": "zero"} if self.outside_is_zero else {}
        entries = [
            {
                "base_host_virt_addr": m.address,
                "size": m.size,
                "offset": m.offset,
                "page_size": m.page_size,
                **outside,
            }
            for m in self.mappings
        ]
        return json.dumps(
            {"source": self.source.hex(), "shared": self.shared, "mappings": entries}
        ).encode()

    @classmethod
    def decode(cls, data: bytes) -> Note:
        """Raises :exc:`HandshakeError` if ``data`` is no note."""
        try:
            words = json.loads(data)
            source, shared, mappings = (
                bytes.fromhex(words["source"]),
                bool(words["shared"]),
                json.dumps(words["mappings"]),
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            raise HandshakeError("the note beside the map of pages makes no sense") from None
        found, outside_is_zero = parse_handshake(mappings.encode())
        return cls(source, shared, tuple(found), outside_is_zero)


def check_mappings(mappings: Sequence[Mapping], region: Region) -> Region:
    """Check ``mappings`` against the region and return the region in the owner's page sizes.

    Raises :exc:`HandshakeError` if mappings overlap or reach past the region's end, or if they give
    a block two page sizes, or one that does not divide it.
    """
    for mapping in mappings:
        if mapping.offset >= region.size or mapping.size > region.size - mapping.offset:
            raise HandshakeError(
                f"the owner maps {mapping.size:#x} bytes at offset {mapping.offset:#x}: past the"
                f" end of the region ({region.size:#x} bytes); does it have the source's memory"
                " size?"
            )
    _check_apart(sorted((m.address, m.size) for m in mappings), "in the owner's address space")
    _check_apart(sorted((m.offset, m.size) for m in mappings), "in the region")
    page_sizes = [_page_size_of_block(mappings, region, i) for i in range(len(region.blocks))]
    try:
        return region.with_page_sizes(page_sizes)
    except UsageError as error:
        raise HandshakeError(
            f"the owner's page size does not fit the source's memory: {error}"
        ) from None


def _check_apart(ranges: Sequence[tuple[int, int]], where: str) -> None:
    for (start, size), (next_start, _) in pairwise(ranges):
        if next_start - start < size:
            raise HandshakeError(f"the owner's mappings overlap {where}, at {next_start:#x}")


def _page_size_of_block(mappings: Sequence[Mapping], region: Region, index: int) -> int:
    start, end = region.offsets[index], region.offsets[index + 1]
    sizes = {m.page_size for m in mappings if m.offset < end and start < m.offset + m.size}
    block = region.blocks[index]
    if len(sizes) > 1:
        raise HandshakeError(
            f"the owner maps block {block.name!r} in pages of {sorted(sizes)} bytes: one size a"
            " block"
        )
    return sizes.pop() if sizes else block.page_size


def mapping_pieces(mapping: Mapping, region: Region) -> list[tuple[Run, int]]:
    """``mapping`` cut at block ends: runs, and the address of each run's first page.

    Raises :exc:`HandshakeError` if it is not made of whole pages of the blocks that it covers.
    """
    pieces = []
    at = 0
    while at < mapping.size:
        offset = mapping.offset + at
        index = region.block_index(region.page_at_offset(offset))
        page_size = region.blocks[index].page_size
        size = min(mapping.size - at, region.offsets[index + 1] - offset)
        if (offset - region.offsets[index]) % page_size or size % page_size:
            raise HandshakeError(
                f"block {region.blocks[index].name!r} is not mapped in whole pages of {page_size}"
                " bytes"
            )
        pieces.append((Run(region.page_at_offset(offset), size // page_size), mapping.address + at))
        at += size
    return pieces
