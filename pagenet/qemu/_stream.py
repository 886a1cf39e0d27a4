"""The parts of QEMU's migration stream that pagenet writes itself: those before and behind the
state of the devices.

::

    QEVM, version 3; the configuration: machine type, and the capabilities that both sides must have
    a command: open the return path
    RAM, in sections: start (names and sizes of blocks, pages), end (pages that have changed since)
    the devices, as QEMU has saved them
    end of the stream; a description that QEMU reads and ignores

All numbers are big-endian. QEMU defines them in ``migration/savevm.c`` and ``migration/ram.c``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConnectionBroken, PagenetError
from ..session import receive_exactly
from ..transport import Connection

__all__ = [
    "PAGE",
    "PIECE",
    "Memory",
    "RamBlock",
    "changed_pages",
    "devices_of",
    "every_page",
    "opening",
    "ram_end",
    "ram_start",
    "wait_confirmed",
]

#: bytes of a page in the stream: a page of the guest, whatever the page size of its memory here
PAGE = 4096

_MAGIC = b"QEVM" + struct.pack(">I", 3)
_EOF, _START, _END, _SUBSECTION, _DESCRIPTION, _CONFIGURATION, _COMMAND, _FOOTER = (
    0,
    1,
    3,
    5,
    6,
    7,
    8,
    0x7E,
)
_OPEN_RETURN_PATH = 1
_SHUT = 1  # on the return path
# Any number that no other section has: QEMU numbers its sections from zero.
_RAM_SECTION = 0x70616765
_RAM_VERSION = 4
_ZERO, _SIZES, _BYTES, _EOS, _SAME_BLOCK = 0x02, 0x04, 0x08, 0x10, 0x20
_ZEROS = bytes(PAGE)
#: bytes that are compared at once: nearly all of the memory has not changed
PIECE = 16 * PAGE

#: the contents of a block: pieces of ``PIECE`` bytes by their offsets. A piece that is absent is
#: zero.
Memory = Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class RamBlock:
    """``size`` bytes at ``address`` in QEMU, under the name that both QEMUs use for them."""

    name: str
    address: int
    size: int


def opening(machine_type: str, capabilities: Sequence[str], answered: bool) -> bytes:
    """The beginning of a stream, up to its first section. ``answered``: it asks the destination to
    report on the return path how loading went."""
    kind = machine_type.encode()
    names = b"".join(_named(name) for name in capabilities)
    enabled = (
        _named("configuration/capabilities") + struct.pack(">II", 1, len(capabilities)) + names
    )
    configuration = (
        struct.pack(">BI", _CONFIGURATION, len(kind))
        + kind
        + struct.pack(">B", _SUBSECTION)
        + enabled
    )
    command = struct.pack(">BHH", _COMMAND, _OPEN_RETURN_PATH, 0) if answered else b""
    return _MAGIC + configuration + command


def ram_start(blocks: Sequence[RamBlock], pages: Iterable[bytes]) -> list[bytes]:
    """The section that names ``blocks``, in parts. QEMU compares their sizes with its own. It reads
    an address only for RAM that the stream leaves out, and that RAM is not named here."""
    sizes = [_named(block.name) + struct.pack(">QQ", block.size, 0) for block in blocks]
    total = struct.pack(">Q", sum(block.size for block in blocks) | _SIZES)
    head = (
        struct.pack(">BI", _START, _RAM_SECTION)
        + _named("ram")
        + struct.pack(">II", 0, _RAM_VERSION)
    )
    return [head, total, *sizes, *pages, _section_end()]


def ram_end(pages: Iterable[bytes]) -> list[bytes]:
    return [struct.pack(">BI", _END, _RAM_SECTION), *pages, _section_end()]


def _section_end() -> bytes:
    return struct.pack(">QBI", _EOS, _FOOTER, _RAM_SECTION)


def every_page(block: RamBlock, memory: Memory) -> list[bytes]:
    return _records(block, memory, range(0, block.size, PAGE))


def changed_pages(block: RamBlock, before: Memory, now: Memory) -> list[bytes]:
    """Records of the pages of ``block`` that differ between ``before`` and ``now``."""
    offsets = [
        offset
        for piece in sorted(before.keys() | now.keys())
        if before.get(piece) != now.get(piece)
        for offset in range(piece, min(piece + PIECE, block.size), PAGE)
        if _page(before, offset) != _page(now, offset)
    ]
    return _records(block, now, offsets)


def _page(memory: Memory, offset: int) -> bytes:
    piece = memory.get(offset - offset % PIECE)
    return piece[offset % PIECE : offset % PIECE + PAGE] if piece is not None else _ZEROS


def _records(block: RamBlock, memory: Memory, offsets: Iterable[int]) -> list[bytes]:
    records, name, flags = [], _named(block.name), 0
    for offset in offsets:
        page = _page(memory, offset)
        is_zero = page == _ZEROS
        head = struct.pack(">Q", offset | flags | (_ZERO if is_zero else _BYTES))
        records.append(head + name + (b"\0" if is_zero else page))
        name, flags = b"", _SAME_BLOCK
    return records


def devices_of(saved: bytes) -> bytes:
    """The part of the stream behind the RAM, made from ``saved``, which QEMU's
    ``xen-save-devices-state`` has written. :exc:`~pagenet.errors.PagenetError` if it has another
    form."""
    if not saved.startswith(_MAGIC) or not saved.endswith(bytes([_EOF])):
        raise PagenetError("QEMU has saved its devices in a way that pagenet does not know")
    return saved[len(_MAGIC) :] + struct.pack(">BI", _DESCRIPTION, 2) + b"{}"


async def wait_confirmed(connection: Connection) -> None:
    """Return when the destination's QEMU confirms that it has loaded the whole stream.
    :exc:`~pagenet.errors.PagenetError` if it could not, or closes the connection."""
    head = bytearray(4)
    while True:
        try:
            await receive_exactly(connection, memoryview(head))
            kind, length = struct.unpack(">HH", head)
            body = bytearray(length)
            await receive_exactly(connection, memoryview(body))
        except ConnectionBroken as error:
            raise PagenetError(
                f"the destination's QEMU has not loaded the devices' state: {error}"
            ) from None
        if kind == _SHUT:
            if any(body):
                raise PagenetError("the destination's QEMU could not load the devices' state")
            return


def _named(name: str) -> bytes:
    encoded = name.encode()
    return struct.pack(">B", len(encoded)) + encoded
