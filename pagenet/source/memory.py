"""Where the pages are: files, memfds, other processes' memory, snapshots, objects in stores.

A :class:`Source` is a region and a way to read it. It is checked when it is opened: readable, whole
pages, known size.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import re
import select
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import trio

from .. import _native
from ..errors import SourceLost, UsageError
from ..events import EventHandler, ignore_events
from ..protocol import Class, content_identity, printable
from ..region import Block, Region, Run
from ..sizes import MAX_ADDRESS, split_range

if TYPE_CHECKING:
    from ..objects import Origin, RemoteObject
    from ..peers import Peers
    from ..snapshot.remote import RemoteFrames
    from ..tls import Tls

__all__ = [
    "STORE_TIMEOUT",
    "Source",
    "is_object",
    "named_identity",
    "open_source",
    "open_source_in_thread",
]

#: Seconds for which a store that does not give what is waited for is asked again.
STORE_TIMEOUT = 60.0

# Seconds between two checks whether a file was changed. A check is one fstat() of each file.
_WATCH_SECONDS = 0.1


class _Piece(Protocol):
    """One block's memory."""

    size: int
    #: distinguishes this memory from any other, for as long as it lives
    identity: str
    #: the process that has it, and the address there, or device and inode of the file that it has
    #: open; None: a stored file
    owner: tuple[int, int | tuple[int, int]] | None
    #: whether :meth:`native` has an answer
    is_native: bool
    #: whether pages come into its file as they are asked for, so that no device can read them
    is_filled: bool

    @property
    def remote(self) -> RemoteObject | RemoteFrames | None:
        """What its bytes have to be fetched by before they are read; None: they are here."""
        ...

    def read_nowait(self, offset: int, into: memoryview) -> bool:
        """Fill ``into``, from byte ``offset`` of the block on, if that does not wait for a disk.

        False: it would; ``into`` may be overwritten. :exc:`SourceLost` if those bytes are gone.
        """
        ...

    def read(self, offset: int, into: memoryview) -> None:
        """Fill ``into``, even if that waits for a disk. :exc:`SourceLost` if the bytes are gone."""
        ...

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether these bytes are known to be zero without reading them."""
        ...

    def zero_map(self, offset: int, pages: int, page_size: int) -> tuple[bytes, int] | None:
        """A bitmap of the pages that are zero, and their number; None if that takes reading all of
        them. :exc:`SourceLost` if they are gone."""
        ...

    def native(self, first: int, page_size: int) -> _native.SourceBlock:
        """The block as lanes in C see it: pages of ``page_size`` bytes, numbered from ``first``
        on. :exc:`Unsupported` if only :meth:`read` has the bytes."""
        ...

    def check_unchanged(self) -> None:
        """:exc:`SourceLost` if it is known that the content has changed since it was opened."""
        ...

    def close(self) -> None: ...


class Source:
    """A region and a way to read it. Made by :func:`open_source`; close it, or use it as a context
    manager."""

    def __init__(self, pieces: Sequence[tuple[str, _Piece]]) -> None:
        self._pieces = [piece for _, piece in pieces]
        self.region = Region(Block(name, piece.size, mmap.PAGESIZE) for name, piece in pieces)
        #: of each block: see ``owner`` of the piece
        self.owners = [piece.owner for piece in self._pieces]
        identity = "\n".join(piece.identity for piece in self._pieces)
        #: 16 bytes: the same each time the same memory is opened, and different for other memory
        #: and for a stored file that was written to since. :func:`named_identity` makes them from a
        #: name that an operator gives the content.
        self.identity = content_identity(identity)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        for piece in self._pieces:
            piece.close()

    def check_unchanged(self) -> None:
        """Raise :exc:`SourceLost` if a stored file was written to since it was opened, as its size
        and mtime tell, or an object could not be fetched."""
        for piece in self._pieces:
            piece.check_unchanged()

    async def watch(self) -> None:
        """Call :meth:`check_unchanged` ten times a second, until it raises or this is cancelled."""
        while True:
            self.check_unchanged()
            await trio.sleep(_WATCH_SECONDS)

    def is_native(self) -> bool:
        """Whether lanes in C can read it."""
        return all(piece.is_native for piece in self._pieces)

    @property
    def is_filled(self) -> bool:
        """Whether pages come into a file as they are asked for, so that no device can read them."""
        return any(piece.is_filled for piece in self._pieces)

    def native_blocks(self) -> list[_native.SourceBlock]:
        """The blocks as lanes in C see them. :exc:`Unsupported` if these cannot read them."""
        firsts = self.region.first_pages[:-1]
        blocks = zip(firsts, self.region.blocks, self._pieces, strict=True)
        return [piece.native(first, block.page_size) for first, block, piece in blocks]

    @property
    def is_remote(self) -> bool:
        """Whether pages have to be fetched from a store before they can be read."""
        return any(piece.remote is not None for piece in self._pieces)

    def is_here(self, run: Run) -> bool:
        """Whether the pages can be read without fetching them from a store."""
        piece, offset = self._place(run)
        return piece.remote is None or piece.remote.is_here(offset, self.region.size_of(run))

    def holds(self, run: Run) -> bool:
        """As :meth:`is_here`, where a look into the cache of the host may be worth it."""
        piece, offset = self._place(run)
        return piece.remote is None or piece.remote.holds(offset, self.region.size_of(run))

    def want(self, run: Run, class_: Class) -> None:
        """Have the pages fetched, if they are not here. Who listens hears of it."""
        piece, offset = self._place(run)
        if piece.remote is not None:
            piece.remote.want(offset, self.region.size_of(run), class_)

    def listen(self, heard: Callable[[], None]) -> None:
        """Call ``heard``, in another thread, whenever pages that were fetched are here, or cannot
        be fetched, until :meth:`hush` returns."""
        for piece in self._pieces:
            if piece.remote is not None:
                piece.remote.listen(heard)

    def hush(self, heard: Callable[[], None]) -> None:
        for piece in self._pieces:
            if piece.remote is not None:
                piece.remote.hush(heard)

    async def fetch(self, run: Run, class_: Class) -> None:
        """Return when the pages are here. :exc:`SourceLost` if they cannot be fetched."""
        piece, offset = self._place(run)
        if piece.remote is not None:
            await piece.remote.fetch(offset, self.region.size_of(run), class_)

    def _place(self, run: Run) -> tuple[_Piece, int]:
        """The piece that has the run, and the offset of the run in it."""
        index = self.region.block_index(run.first)
        return self._pieces[index], self.region.offset_of_page(run.first) - self.region.offsets[
            index
        ]

    async def read_into(self, run: Run, into: memoryview) -> bool:
        """Fill ``into`` with the pages of ``run``. If they are known to be zero, leave it alone and
        return False.

        :exc:`SourceLost` if the memory is gone or has become shorter.
        """
        await self.fetch(run, Class.DEMAND)
        piece, offset = self._place(run)
        if piece.is_hole(offset, len(into)):
            return False
        if not piece.read_nowait(offset, into):
            await trio.to_thread.run_sync(piece.read, offset, into)
        return True

    def is_hole(self, run: Run) -> bool:
        """Whether the pages of ``run`` are known to be zero without reading them."""
        index = self.region.block_index(run.first)
        offset = self.region.offset_of_page(run.first) - self.region.offsets[index]
        return self._pieces[index].is_hole(offset, self.region.size_of(run))

    def zero_map(self, run: Run) -> tuple[bytes, int] | None:
        """A bitmap of the pages of ``run`` that are zero, and their number. None: that takes
        reading them, maybe from a disk.

        :exc:`SourceLost` if the memory is gone or has become shorter.
        """
        piece, offset = self._place(run)
        return piece.zero_map(offset, run.count, self.region.size_of(run) // run.count)


def named_identity(text: str) -> bytes:
    """The identity (16 bytes) of content that its operator calls ``text``.

    32 hexadecimal digits are the identity itself. Anything else is a name, which gives the same
    identity on every host.
    """
    if re.fullmatch(r"[0-9A-Fa-f]{32}", text):
        return bytes.fromhex(text)
    return hashlib.sha256(b"named\n" + os.fsencode(text)).digest()[:16]


_DESCRIPTOR = re.compile(r"/proc/(\d+)(?:/task/\d+)?/fd/(\d+)")


def _descriptor_named(path: str) -> tuple[int, int] | None:
    """The process and the number, if ``path`` names a process's descriptor: /proc/PID/fd/N, however
    it is spelt."""
    directory, name = os.path.split(os.path.abspath(path))
    match = _DESCRIPTOR.fullmatch(os.path.join(os.path.realpath(directory), name))
    return (int(match[1]), int(match[2])) if match else None


def _open_file(path: str) -> int:
    """Open ``path`` for reading. Raises :exc:`OSError`."""
    # Non-blocking: opening a FIFO would wait for its writer, instead of being refused.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = _descriptor_named(path)
    if descriptor is None or descriptor[0] == os.getpid():
        return os.open(path, flags)
    try:
        taken = _take_descriptor(*descriptor)
    except PermissionError:
        if not _is_ours(descriptor[0]):
            raise
        return os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(taken).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file, nor a memfd")
        if fcntl.fcntl(taken, fcntl.F_GETFL) & (os.O_WRONLY | os.O_PATH):
            raise OSError(errno.EBADF, "that process may not read it either")
        # Opened again for a file offset of our own: the search for holes moves the offset, and that
        # of the process must not move.
        return os.open(f"/proc/self/fd/{taken}", flags)
    finally:
        os.close(taken)


def _is_ours(pid: int) -> bool:
    """Whether the process belongs to this user, who is not root, and so has no more rights than the
    process.

    Taking a descriptor from it may still be forbidden (kernel.yama.ptrace_scope).
    """
    return os.geteuid() != 0 and os.stat(f"/proc/{pid}").st_uid == os.geteuid()


def _take_descriptor(pid: int, number: int) -> int:
    """A duplicate of another process's descriptor, with the same rights.

    Opened by its name, the file would be accessible with this user's rights: root would read what
    an unprivileged process only has a handle for.
    """
    try:
        pidfd = os.pidfd_open(pid)
        try:
            return _native.take_descriptor(pidfd, number)
        finally:
            os.close(pidfd)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EBADF):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        if error.errno == errno.EPERM:
            hint = "run as root, or as its user with ptrace access (kernel.yama.ptrace_scope=0)"
            raise PermissionError(errno.EPERM, f"{error.strerror}; {hint}") from None
        raise


def _is_of_a_process(path: str, status: os.stat_result) -> bool:
    """Memory rather than a stored file: named as a process has it (/proc/PID/fd/N), or without a
    name (a memfd).

    Such memory is not watched: the kernel sets its mtime at a write fault, even where nothing is
    written then (KVM and virtual devices pin pages so), and a false alarm costs a guest.
    """
    return status.st_nlink == 0 or _descriptor_named(path) is not None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class _FilePiece:
    """A regular or tmpfs file, or a memfd by way of /proc/PID/fd/N."""

    is_native = True
    is_filled = False
    remote: RemoteObject | None = None

    def __init__(self, path: str) -> None:
        try:
            self._fd = _open_file(path)
        except OSError as error:
            raise UsageError(f"cannot open source {path}: {error.strerror}") from None
        self._path = path
        status = os.fstat(self._fd)
        self._is_in_memory = _has_seals(self._fd)
        self.size = status.st_size
        process = _descriptor_named(path)
        self.owner: tuple[int, int | tuple[int, int]] | None
        self.owner = None if process is None else (process[0], (status.st_dev, status.st_ino))
        self._changed_at = None if _is_of_a_process(path, status) else status.st_mtime_ns
        self.identity = self._identify(status)
        try:
            self._check(status)
        except BaseException:
            self.close()
            raise

    def _identify(self, status: os.stat_result) -> str:
        content = "" if self._changed_at is None else f" {status.st_size} {status.st_mtime_ns}"
        if self._is_in_memory:
            return f"file {_boot_id()} {status.st_dev} {status.st_ino}{content}"
        # The file is the same after a reboot, and the number of its device need not be.
        return f"stored {os.statvfs(self._fd).f_fsid} {status.st_ino}{content}"

    def _check(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"source {self._path} is not a regular file, nor a memfd")
        _check_size(self._path, status.st_size)
        try:
            os.pread(self._fd, 1, 0)
        except OSError as error:
            raise UsageError(f"cannot read source {self._path}: {error.strerror}") from None

    def read_nowait(self, offset: int, into: memoryview) -> bool:
        try:
            return self._read(offset, into, os.RWF_NOWAIT) == len(into)
        except BlockingIOError:
            return False
        except OSError as error:
            # hugetlbfs and old tmpfs fail with EOPNOTSUPP: they are memory, never a disk
            if error.errno != errno.EOPNOTSUPP:
                raise self._lost(error.strerror) from None
        self.read(offset, into)
        return True

    def read(self, offset: int, into: memoryview) -> None:
        while into:
            try:
                count = self._read(offset, into, 0)
            except OSError as error:
                raise self._lost(error.strerror) from None
            if not count:
                raise self._lost(f"it ends at byte {offset} of {self.size}")
            into, offset = into[count:], offset + count

    def _read(self, offset: int, into: memoryview, flags: int) -> int:
        return os.preadv(self._fd, [into], offset, flags)

    def _lost(self, why: str | None) -> SourceLost:
        return SourceLost(f"source {self._path} cannot be read any more: {why}")

    def is_hole(self, offset: int, length: int) -> bool:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:
            # ENXIO: there is no data from offset on. A file that has become shorter fails with it
            # too, and its pages are not zero.
            return error.errno == errno.ENXIO and os.fstat(self._fd).st_size >= offset + length

    def zero_map(self, offset: int, pages: int, page_size: int) -> tuple[bytes, int] | None:
        if not self._is_in_memory:
            return None
        if self.is_hole(offset, pages * page_size):
            return ((1 << pages) - 1).to_bytes(-(-pages // 8), "little"), pages
        try:
            return _native.zero_map(self._fd, offset, pages, page_size)
        except OSError as error:
            is_short = error.errno == errno.ENODATA
            raise self._lost(
                f"it ends before byte {offset + pages * page_size}" if is_short else error.strerror
            ) from None

    def check_unchanged(self) -> None:
        status = os.fstat(self._fd)
        if self._changed_at is None:
            return
        if status.st_size < self.size:
            return  # a read of what is gone fails with an error that tells more
        if (status.st_size, status.st_mtime_ns) != (self.size, self._changed_at):
            raise SourceLost(
                f"source {self._path} was changed while it was served: serve what it holds now as"
                " another source, to destinations that begin anew"
            )

    def native(self, first: int, page_size: int) -> _native.SourceBlock:
        name = printable(str(self._path))
        return _native.SourceBlock(
            first, self.size // page_size, page_size, 0, name, fd=self._fd, pid=0, pidfd=-1
        )

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _ObjectPiece(_FilePiece):
    """An object in a store, or a block of another source, which is fetched into a file as its bytes
    are asked for."""

    is_filled = True

    def __init__(self, remote: RemoteObject) -> None:
        self.remote: RemoteObject = remote
        self._fd, self._path, self.size = remote.fd, printable(remote.uri), remote.size
        self._is_in_memory, self.owner = False, None
        self.identity = remote.identity
        _check_size(self._path, self.size)

    def check_unchanged(self) -> None:
        # Every read is of the content that was there when it was opened, or it fails.
        self.remote.check()

    def native(self, first: int, page_size: int) -> _native.SourceBlock:
        return replace(super().native(first, page_size), here=self.remote.here)

    def close(self) -> None:
        self.remote.close()
        self._fd = -1


def _check_size(name: str, size: int) -> None:
    if size == 0 or size % mmap.PAGESIZE:
        raise UsageError(
            f"source {name} is {size} bytes long: not a whole number of {mmap.PAGESIZE}-byte"
            " pages, or none"
        )


class _ProcessPiece:
    """An address range of another process, which is expected to stand still."""

    is_native = True
    is_filled = False
    remote: RemoteObject | None = None

    def __init__(self, pid: int, start: int, size: int) -> None:
        if size <= 0 or start % mmap.PAGESIZE or size % mmap.PAGESIZE:
            raise UsageError(
                f"source pid:{pid}: {start:#x}+{size:#x} is not a range of whole"
                f" {mmap.PAGESIZE}-byte pages"
            )
        if start >= MAX_ADDRESS or size > MAX_ADDRESS - start:
            raise UsageError(f"source pid:{pid}: no process has {size:#x} bytes at {start:#x}")
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, OverflowError) as error:
            raise UsageError(f"source pid:{pid}: {getattr(error, 'strerror', error)}") from None
        self._pid, self._start, self.size = pid, start, size
        self.owner: tuple[int, int | tuple[int, int]] | None = (pid, start)
        try:
            self.identity = f"process {_boot_id()} {pid} {_start_time(pid)} {start:#x}"
            for offset in (0, size - mmap.PAGESIZE):
                self.read(offset, memoryview(bytearray(mmap.PAGESIZE)))
        except (SourceLost, OSError) as error:
            self.close()
            raise UsageError(str(error)) from None

    def read_nowait(self, offset: int, into: memoryview) -> bool:
        self.read(offset, into)
        return True

    def read(self, offset: int, into: memoryview) -> None:
        try:
            _native.read_process(self._pid, self._start + offset, into)
        except OSError as error:
            refused = error.errno == errno.EPERM
            hint = (
                " (it takes the same user and ptrace access, or CAP_SYS_PTRACE)" if refused else ""
            )
            raise SourceLost(
                f"cannot read process {self._pid} at {self._start + offset:#x}:"
                f" {error.strerror}{hint}"
            ) from None
        # The pid may belong to another process by now. It did not during the read if our process
        # is still there after it.
        if select.select([self._pidfd], [], [], 0)[0]:
            raise SourceLost(f"process {self._pid} has ended")

    def is_hole(self, offset: int, length: int) -> bool:
        return False

    def zero_map(self, offset: int, pages: int, page_size: int) -> None:
        return None

    def check_unchanged(self) -> None:
        pass  # it is expected to stand still, and a change would not be visible

    def native(self, first: int, page_size: int) -> _native.SourceBlock:
        pages = self.size // page_size
        return _native.SourceBlock(
            first, pages, page_size, self._start, "", fd=-1, pid=self._pid, pidfd=self._pidfd
        )

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _has_seals(fd: int) -> bool:
    """Whether the file can have seals. Files that are on no disk can, even if no seal is set."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def _start_time(pid: int) -> str:
    # field 22; counted from behind the command, which may contain spaces and brackets
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


_PROCESS = re.compile(r"pid:(\d+):(.+)")
_SNAPSHOT = "snapshot:"
_OBJECTS = ("s3", "gs", "az", "https", "http", "nbd", "nbds", "nbd+unix", "nbds+unix")
_NAMED = re.compile(r"([A-Za-z0-9_.-]+)=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Fetching:
    """Where what is fetched is kept, how long it is waited for, and how sources are dialled."""

    directory: str | os.PathLike[str] | None
    size: int | None
    timeout: float
    tls: Tls | None
    peers: Sequence[str]
    on_event: EventHandler

    def find_peers(self, identity: str, size: int) -> Peers:
        from ..peers import Peers  # it takes a while, and few have any

        return Peers(self.peers, self.tls, content_identity(identity), size, self.on_event)


def open_source(
    *specs: str | os.PathLike[str],
    cache: str | os.PathLike[str] | None = None,
    cache_size: int | None = None,
    store_timeout: float = STORE_TIMEOUT,
    tls: Tls | None = None,
    peers: Sequence[str] = (),
    on_event: EventHandler = ignore_events,
) -> Source:
    """Open the memory that ``specs`` name: one block for each, in that order.

    A spec is ``PATH`` (a file, a tmpfs file, ``/proc/PID/fd/N``), ``pid:PID:START-END`` or
    ``pid:PID:START+SIZE`` (addresses of another process), ``snapshot:DIR/NAME``, the URI of an
    object (``s3://``, ``gs://``, ``az://``, ``https://``, ``nbd://``),
    ``snapshot:s3://BUCKET/PREFIX/NAME``, or the URI of another source: ``tcp://``, ``unix:``.
    ``NAME=`` in front gives the block a name. Another source has one block or several, and if it is
    the only spec, this source has its identity.

    Opening an object waits for its store, ``store_timeout`` seconds at most; so does each read; and
    so it is with another source, which is dialled with ``tls``. ``cache``: a directory in which
    what was fetched is kept, chunk by chunk, ``cache_size`` bytes at most, for all processes of the
    host. None: in a file without a name, as long as the source is open.

    ``peers``: URIs of sources that may have the same object or snapshot, which are asked for what
    they hold before the store or the directory is read. Frames of a snapshot are compared with
    their digests; for an object they must be authenticated (``tls``). Event, in another thread:
    ``peer`` (its ``uri``, and the ``reason`` why it is not asked any more).

    Raises :exc:`UsageError` if a spec cannot be used; for objects also :exc:`SourceUnreachable`,
    and :exc:`Unsupported` if obstore is not installed; for another source what dialling it raises.
    """
    if not specs:
        raise UsageError("no source given")
    fetching = _Fetching(cache, cache_size, store_timeout, tls, tuple(peers), on_event)
    with ExitStack() as undo:
        pieces: list[tuple[str, _Piece]] = []
        identity = None
        for spec in [os.fspath(spec) for spec in specs]:
            if _is_elsewhere(_split_name(spec)[1]):
                identity, opened = _open_elsewhere(spec, fetching)
            else:
                name, what = _split_name(spec)
                opened = [(name, _open_piece(what, fetching))]
            for _, piece in opened:
                undo.callback(piece.close)
            pieces += opened
        source = Source(list(_distinct(pieces)))
        if identity is not None and len(specs) == 1:
            source.identity = identity
        undo.pop_all()
        return source


async def open_source_in_thread(
    *specs: str | os.PathLike[str],
    cache: str | os.PathLike[str] | None = None,
    cache_size: int | None = None,
    store_timeout: float = STORE_TIMEOUT,
    tls: Tls | None = None,
    peers: Sequence[str] = (),
    on_event: EventHandler = ignore_events,
) -> Source:
    """:func:`open_source`, which may be cancelled while it waits for a store or a source."""
    names = [_split_name(os.fspath(spec))[1] for spec in specs]
    if not any(_is_in_store(name) or _is_elsewhere(name) for name in names):
        return open_source(*specs, tls=tls, peers=peers, on_event=on_event)
    is_cancelled = threading.Event()

    def opened() -> Source:
        source = open_source(
            *specs,
            cache=cache,
            cache_size=cache_size,
            store_timeout=store_timeout,
            tls=tls,
            peers=peers,
            on_event=on_event,
        )
        if is_cancelled.is_set():
            source.close()
        return source

    try:
        return await trio.to_thread.run_sync(opened, abandon_on_cancel=True)
    except trio.Cancelled:
        is_cancelled.set()
        raise


def _split_name(spec: str) -> tuple[str, str]:
    if (match := _NAMED.fullmatch(spec)) and not Path(spec).exists():
        return match[1], match[2]
    return os.fsencode(Path(spec).name).decode(errors="replace")[:200] or "block", spec


def is_object(what: str) -> bool:
    """Whether it is the URI of an object in a store."""
    scheme, found, _ = what.partition("://")
    return bool(found) and scheme in _OBJECTS


def _is_in_store(what: str) -> bool:
    return is_object(what.removeprefix(_SNAPSHOT))


def _is_elsewhere(what: str) -> bool:
    """Whether it is the URI of another source."""
    return what.startswith(("tcp://", "rdma://", "unix:"))


def _open_elsewhere(spec: str, fetching: _Fetching) -> tuple[bytes, list[tuple[str, _Piece]]]:
    """The identity of another source, and its blocks."""
    from ..peers import PeerSource  # it takes a while, and few need it

    name, uri = _split_name(spec)
    if uri.startswith("rdma://"):
        raise UsageError(f"{printable(uri)}: another source is read over tcp:// or unix:")
    if fetching.peers:
        raise UsageError(f"source {printable(uri)}: peers are asked for objects and snapshots")
    pieces: list[tuple[str, _Piece]] = []
    with (
        closing(PeerSource(uri, fetching.tls if uri.startswith("tcp://") else None)) as peer,
        ExitStack() as undo,
    ):
        identity, region = peer.open(fetching.timeout)
        for index, block in enumerate(region.blocks):
            if block.page_size != mmap.PAGESIZE:
                raise UsageError(
                    f"{printable(uri)} has pages of {block.page_size} bytes, and what is served to"
                    f" others has pages of {mmap.PAGESIZE}"
                )
            piece = _open_object(peer.block(index), fetching)
            undo.callback(piece.close)
            pieces.append((block.name if uri == spec else name, piece))
        undo.pop_all()
    return identity, pieces


def _origin_of(uri: str, fetching: _Fetching) -> str | Origin:
    if not fetching.peers:
        return uri
    from ..objects import origin_of
    from ..peers import PeeredObject

    return PeeredObject(origin_of(uri), fetching.peers, fetching.tls, fetching.on_event)


def _open_object(what: str | Origin, fetching: _Fetching) -> _Piece:
    from ..objects import open_object  # not where no object is served: it takes a while

    remote = open_object(
        what, cache=fetching.directory, cache_size=fetching.size, deadline=fetching.timeout
    )
    try:
        return _ObjectPiece(remote)
    except BaseException:
        remote.close()
        raise


def _open_piece(what: str, fetching: _Fetching) -> _Piece:
    if is_object(what):
        return _open_object(_origin_of(what, fetching), fetching)
    if what.startswith(_SNAPSHOT):
        from ..snapshot.memory import SnapshotMemory  # it takes a while, and few serve one
        from ..snapshot.remote import Cache

        cache = Cache(fetching.directory, fetching.size, fetching.timeout)
        find_peers = fetching.find_peers if fetching.peers else None
        return SnapshotMemory.open(what.removeprefix(_SNAPSHOT), cache, find_peers)
    if fetching.peers:
        raise UsageError(f"source {what}: peers are asked for objects and snapshots")
    if not what.startswith("pid:"):
        return _FilePiece(what)
    match = _PROCESS.fullmatch(what)
    found = split_range(match[2]) if match else None
    if match is None or found is None:
        raise UsageError(
            f"source {what!r} is not pid:PID:START-END or pid:PID:START+SIZE"
            " (pid:42:0x7f0000000000+0x40000000)"
        )
    return _ProcessPiece(int(match[1]), *found)


def _distinct(pieces: Sequence[tuple[str, _Piece]]) -> Iterator[tuple[str, _Piece]]:
    """Number equal names, so that two files of the same name are two blocks."""
    seen: dict[str, int] = {}
    for name, piece in pieces:
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), piece
