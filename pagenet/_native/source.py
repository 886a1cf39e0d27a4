"""The source's half of the native lanes: one loop for any number of connections."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ._declarations import pn_end, pn_lack, pn_links, pn_source, pn_source_block
from ._library import NULL, check, ffi, lib, new_array, new_struct, opened
from ._pointers import CData
from .ends import End, end_of
from .snapshot import Frames
from .tls import Tls, tls_struct

#: bytes of a file that is filled while it is served: it has come piece by piece
PIECE = lib.PN_PIECE_BYTES


class Here:
    """Which pieces of a file of ``size`` bytes are there; see ``here`` of ``struct
    pn_source_block``. Loops read it while it is written to."""

    def __init__(self, size: int) -> None:
        self.pieces = -(-size // PIECE)
        self.bytes = ffi.new("uint8_t[]", self.pieces)

    def __contains__(self, pieces: range) -> bool:
        """Whether all of ``pieces`` are there."""
        return b"\0" not in ffi.buffer(self.bytes)[pieces.start : pieces.stop]

    def lacking(self, pieces: range) -> list[range]:
        """Those of ``pieces`` that are not there, in stretches."""
        found, at = list[range](), pieces.start
        there: bytes = ffi.buffer(self.bytes)[:]
        while (first := there.find(b"\0", at, pieces.stop)) >= 0:
            at = there.find(b"\1", first, pieces.stop)
            at = pieces.stop if at < 0 else at
            found.append(range(first, at))
        return found

    def came(self, pieces: range) -> None:
        lib.pn_pieces_came(self.bytes, pieces.start, len(pieces))


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """``struct pn_source_block``: pages of a file (``fd``, ``name``), or of a process (``pid``,
    ``pidfd``, ``address``). ``here``: the file is filled while it is served; ``frames``: with the
    frames of a snapshot."""

    first: int
    pages: int
    page_size: int
    address: int
    name: str
    fd: int
    pid: int
    pidfd: int
    here: Here | None = None
    frames: Frames | None = None

    def fields(self, name: CData) -> dict[str, object]:
        """Its values in C."""
        here = NULL if self.here is None else self.here.bytes
        return {
            "first": self.first,
            "pages": self.pages,
            "page_size": self.page_size,
            "address": self.address,
            "name": name,
            "fd": self.fd,
            "pid": self.pid,
            "pidfd": self.pidfd,
            "here": here,
            "frames": NULL if self.frames is None else self.frames.struct,
        }


def source_blocks(blocks: Sequence[SourceBlock]) -> tuple[pn_source_block, list[CData]]:
    """The blocks as C has them, and the names that they point to, which the caller keeps alive."""
    names = [ffi.new("char[]", block.name.encode(errors="replace")) for block in blocks]
    named = zip(blocks, names, strict=True)
    return (
        new_array(pn_source_block, [block.fields(name) for block, name in named]),
        names,
    )


class Links:
    """``struct pn_links``: what the loops of one source tell each other about the links of
    destinations."""

    def __init__(self) -> None:
        self.links = new_struct(pn_links)


class SourceLoop:
    """``struct pn_source``: one loop that answers any number of connections. ``background``: no
    thread waits for its pages."""

    def __init__(
        self, blocks: Sequence[SourceBlock], background: bool, links: Links | None = None
    ) -> None:
        self._background = background
        self._links = links or Links()
        self.ended_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._last_asked = [0, 0, 0]
        self._blocks, self._names = source_blocks(blocks)
        self._filled = [(block.here, block.frames) for block in blocks]  # blocks in C point to it
        self._source: pn_source | None = lib.pn_source_new(
            self._blocks, len(blocks), self._links.links, self.ended_fd
        )
        if self._source == NULL:
            os.close(self.ended_fd)
            raise MemoryError("no memory, or no file descriptors, for a source's lanes")

    def close(self) -> None:
        """Close the loop and its connections. Not to be called while it runs. Idempotent."""
        if self._source is not None:
            self._last_asked = [self.asked(class_) for class_ in range(len(self._last_asked))]
            lib.pn_source_free(self._source)
            os.close(self.ended_fd)
            self._source = None

    def run(self) -> End:
        """Run until :meth:`stop`, or until the memory cannot be read. Call it in a thread."""
        end = new_struct(pn_end)
        lib.pn_source_run(opened(self._source), self._background, end)
        return end_of(end)

    def stop(self) -> None:
        lib.pn_source_stop(opened(self._source))

    def add(
        self, sock: int, number: int, unread: bytes, link: int = 0, tls: Tls | None = None
    ) -> None:
        """Serve the peer at ``sock``, with ``tls`` on it, both of which the loop then owns.
        ``unread``: what was received from it already; ``link``: a number that all connections of
        its destination share."""
        source, size = opened(self._source), len(unread)
        check(lib.pn_source_add(source, sock, tls_struct(tls), number, link % 256, unread, size))
        if tls is not None:
            tls.give()

    def remove(self, number: int) -> None:
        if self._source is not None:
            check(lib.pn_source_remove(self._source, number))

    def asked(self, class_: int) -> int:
        """The number of pages asked for in ``class_`` so far."""
        return (
            self._last_asked[class_]
            if self._source is None
            else lib.pn_source_asked(self._source, class_)
        )

    def zeros(self) -> int:
        """The number of pages that were answered as zeros so far."""
        return 0 if self._source is None else lib.pn_source_zeros(self._source)

    def kept(self) -> int:
        """Bytes that are kept now because sockets are full, for all connections together."""
        return 0 if self._source is None else lib.pn_source_kept(self._source)

    def ended(self) -> Iterator[tuple[int, End]]:
        """Connections that have ended since the last call, and why."""
        number, end = ffi.new("uint64_t *"), new_struct(pn_end)
        while lib.pn_source_ended(opened(self._source), number, end):
            yield int(number[0]), end_of(end)

    @property
    def lacks_fd(self) -> int:
        """An eventfd: :meth:`lacks` has something."""
        return lib.pn_source_lacks_fd(opened(self._source))

    def lacks(self) -> Iterator[tuple[int, int, int]]:
        """Pages that were asked for since the last call and that are not all there: the first one,
        their number, their class. Each answer waits for :meth:`look`."""
        lack = new_struct(pn_lack)
        while lib.pn_source_lacks(opened(self._source), lack):
            yield lack.first, lack.count, lack.class_

    def look(self) -> None:
        """Pages that are waited for may be there now. From any thread, but not after
        :meth:`close`."""
        lib.pn_source_look(opened(self._source))
