"""Both sides of RDMA: the destination's queue pairs with their loop, and the source's memory with
the keys to it."""

from __future__ import annotations

from collections.abc import Sequence

from ._declarations import (
    pn_end,
    pn_keys,
    pn_keys_config,
    pn_rdma,
    pn_rdma_block,
    pn_rdma_config,
    pn_rdma_peer,
    pn_reader,
)
from ._library import check, ffi, lib, new_array, new_struct, opened
from .destination import Destination, Ring
from .ends import End, end_of
from .source import SourceBlock, source_blocks
from .tls import Tls, tls_struct


class RdmaLoop:
    """``struct pn_rdma``: both queue pairs of a destination and the loop that drives them. Borrows
    ``dest``, the ring and the descriptors. ``blocks``: (first page, pages, page size, first chunk)
    of each block, as on the wire.

    Raises :exc:`OSError`: ENOENT without libibverbs, ENODEV without the device, otherwise the
    device's errno.
    """

    def __init__(
        self,
        dest: Destination,
        stop_fd: int,
        ring: Ring,
        window: tuple[int, int, int],
        chunk: int,
        *,
        device: str,
        port: int,
        gid_index: int,
        blocks: Sequence[tuple[int, int, int, int]],
        chunks: int,
        chunk_size: int,
    ) -> None:
        config = new_struct(pn_rdma_config)
        table, name = new_array(pn_rdma_block, list(blocks)), ffi.new("char[]", device.encode())
        self._kept = (dest, ring, table, name)
        lane = config.lane
        lane.dest, lane.sock, lane.stop_fd, lane.ring = dest.dest, -1, stop_fd, ring.ring
        lane.work_fd, lane.room_fd = ring.work_fd, ring.room_fd
        (lane.window_least, lane.window_min, lane.window_max), lane.chunk = window, chunk
        config.blocks, config.device = table, name
        config.block_count, config.chunk_count, config.chunk_size = len(blocks), chunks, chunk_size
        config.port, config.gid_index = port, gid_index
        error = ffi.new("int *")
        self._loop: pn_rdma | None = lib.pn_rdma_new(config, error)
        check(error[0])

    def number(self, queue_pair: int) -> int:
        return lib.pn_rdma_number(opened(self._loop), queue_pair)

    def connect(
        self,
        queue_pair: int,
        psn: int,
        *,
        gid: bytes,
        number: int,
        peer_psn: int,
        lid: int,
        mtu: int,
        reads: int,
    ) -> None:
        peer = rdma_peer(gid, number, peer_psn, lid, mtu, reads)
        check(lib.pn_rdma_connect(opened(self._loop), queue_pair, psn, peer))

    def run(self, sock: int, tls: Tls | None = None) -> End:
        """Run the loop until it ends. Call it in a thread."""
        end = new_struct(pn_end)
        lib.pn_rdma_run(opened(self._loop), sock, tls_struct(tls), end)
        return end_of(end)

    def give_back(self, give_back: bool) -> None:
        """Have the loop give every key back and ask for none, or ask for keys again. Call it while
        no page is in flight, and wake the loop by its ring."""
        lib.pn_rdma_give_back(opened(self._loop), give_back)

    @property
    def is_keyless(self) -> bool:
        """Whether it has given back every key."""
        return bool(lib.pn_rdma_is_keyless(opened(self._loop)))

    @property
    def spun(self) -> int:
        """How often the loop has looked for the end of a READ before it slept. Not to be read while
        it runs, nor after :meth:`close`."""
        return lib.pn_rdma_spun(opened(self._loop))

    def close(self) -> None:
        """Not to be called while the loop runs. Idempotent."""
        if self._loop is not None:
            lib.pn_rdma_free(self._loop)
            self._loop = None


def rdma_peer(gid: bytes, number: int, psn: int, lid: int, mtu: int, reads: int) -> pn_rdma_peer:
    numbers = {"number": number, "psn": psn, "lid": lid, "mtu": mtu, "reads": reads}
    return new_struct(pn_rdma_peer, {"gid": list(gid), **numbers})


class Keys:
    """``struct pn_keys``: a source's memory on one RDMA device, registered as destinations ask for
    keys. ``blocks``: a file's has the address at which it is mapped. Raises :exc:`OSError` as
    :class:`RdmaLoop` does."""

    def __init__(
        self,
        blocks: Sequence[SourceBlock],
        *,
        device: str,
        port: int,
        gid_index: int,
        chunks: int,
        chunk_size: int,
        pin_limit: int,
        in_any_case: int,
    ) -> None:
        config, name = new_struct(pn_keys_config), ffi.new("char[]", device.encode())
        table, names = source_blocks(blocks)
        self._kept = (name, table, names)
        config.device, config.blocks, config.block_count = name, table, len(blocks)
        config.chunk_count, config.chunk_size, config.pin_limit, config.in_any_case = (
            chunks,
            chunk_size,
            pin_limit,
            in_any_case,
        )
        config.port, config.gid_index = port, gid_index
        error = ffi.new("int *")
        self.keys: pn_keys | None = lib.pn_keys_new(config, error)
        check(error[0])

    @property
    def pinned(self) -> int:
        """Bytes that are registered now."""
        return 0 if self.keys is None else lib.pn_keys_pinned(self.keys)

    @property
    def granted(self) -> int:
        """Pages whose keys were granted until now."""
        return 0 if self.keys is None else lib.pn_keys_granted(self.keys)

    def close(self) -> None:
        """To be called after its readers are closed. Idempotent."""
        if self.keys is not None:
            lib.pn_keys_free(self.keys)
            self.keys = None


class KeyReader:
    """``struct pn_reader``: one connection that is given keys. Raises :exc:`OSError` with the
    device's errno."""

    def __init__(self, keys: Keys) -> None:
        error = ffi.new("int *")
        self._keys = keys
        self._reader: pn_reader | None = lib.pn_reader_new(opened(keys.keys), error)
        check(error[0])

    @property
    def number(self) -> int:
        """The number of its queue pair."""
        return lib.pn_reader_number(opened(self._reader))

    def connect(
        self, psn: int, *, gid: bytes, number: int, peer_psn: int, lid: int, mtu: int, reads: int
    ) -> None:
        check(
            lib.pn_reader_connect(
                opened(self._reader), psn, rdma_peer(gid, number, peer_psn, lid, mtu, reads)
            )
        )

    def run(self, sock: int, stop_fd: int, unread: bytes, tls: Tls | None = None) -> End:
        """Hand out keys until the connection ends, or ``stop_fd`` is readable. Call it in a
        thread."""
        end = new_struct(pn_end)
        reader, under = opened(self._reader), tls_struct(tls)
        lib.pn_reader_run(reader, sock, under, stop_fd, unread, len(unread), end)
        return end_of(end)

    def close(self) -> None:
        """Give its keys back. Not to be called while it runs. Idempotent."""
        if self._reader is not None:
            lib.pn_reader_free(self._reader)
            self._reader = None
