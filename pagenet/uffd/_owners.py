"""Owners of the memory that is filled, and how pagenet receives their userfaultfd."""

from __future__ import annotations

import array
import errno
import json
import mmap
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import trio

from .. import _native
from ..errors import HandshakeError, OwnerLeft, Unsupported, UsageError
from ..region import Region, Run
from ..unix_socket import UnixSocketFile
from ._handshake import (
    MAX_HANDSHAKE_BYTES,
    Mapping,
    Note,
    check_request,
    first_object,
    parse_handshake,
)
from ._process import OtherProcess, is_memory_file, is_watched, is_writable
from ._target import UffdTarget
from ._userfaultfd import Feature, Mode, Userfaultfd, probe

__all__ = [
    "HUGE_PAGE",
    "MAP_LINK",
    "ConnectedOwner",
    "Keeper",
    "Naming",
    "OwnMemory",
    "Peer",
    "SharedFile",
    "UffdListener",
    "UffdSocket",
    "close_all",
    "kept_map",
    "note_in",
    "wait_memory_gone",
]

HUGE_PAGE = 2 << 20
#: the owner's memfd for the map of pages, in /proc/PID/fd
MAP_LINK = f"/memfd:{_native.MAP_NAME} (deleted)"
# An owner sends its handshake in one go, right after it has connected. A stranger may never send
# anything.
HANDSHAKE_TIMEOUT = 5.0
# Seconds that a process takes to end, after its memory has gone.
LEAVING = 0.1
# Owners that may wait for accept(): one, and perhaps a few that are turned away.
_BACKLOG = 8
# Of <asm/socket.h>; Python does not name it. Reads that only peek go on behind the last one.
SO_PEEK_OFF = 42
SO_PEERPIDFD = 77
_PEEK_SECONDS = 0.001
# Seconds between two checks whether the memory still exists, where no descriptor reports its end.
_ALIVE_PERIOD = 0.5
# Bytes allocated between two checks for cancellation: a fraction of a second.
_ALLOCATION_STEP = 256 << 20


class OwnMemory:
    """Memory of this process, for library users.

    Attach it once, then touch it from C, at :attr:`address` and up.

    **Never touch it from Python before the transfer is complete**: a thread that faults holds the
    GIL, and the process hangs for good. :meth:`read` copies from C without the GIL.

    ``kind``: ``anonymous`` (private), ``memfd`` (shared, 4 KiB pages) or ``hugetlb`` (shared, 2 MiB
    pages). The memory lives until :meth:`close`; a page that was missing when a transfer failed
    raises SIGBUS. ``allocate``: allocate shared memory before the first page comes. ``move``: where
    the kernel can (6.8), move pages into anonymous memory instead of copying them. It costs more
    than it saves (``pagenet-bench stream``): every page that is moved away must be replaced by a
    new one.
    """

    def __init__(
        self,
        kind: Literal["anonymous", "memfd", "hugetlb"] = "anonymous",
        *,
        allocate: bool = False,
        move: bool = False,
    ) -> None:
        self._kind = kind
        self._allocate = allocate
        self._move = move
        self._mapped: _native.Mapped | None = None
        self._fd = -1

    async def attach(self, region: Region) -> UffdTarget:
        if self._mapped is not None:
            raise UsageError(
                "this memory was attached before: each transfer fills memory of its own"
            )
        page_size = HUGE_PAGE if self._kind == "hugetlb" else mmap.PAGESIZE
        if region.size % page_size:
            raise UsageError(
                f"{region.size} bytes is not a whole number of {page_size}-byte huge pages"
            )
        uffd = Userfaultfd.open(self._features())
        shared_fd = None
        try:
            self._map(region.size, page_size)
            uffd.register(self.address, region.size, Mode.MISSING)
            shared_fd = None if self._fd < 0 else os.dup(self._fd)
            target = UffdTarget(
                uffd,
                [Mapping(self.address, region.size, 0, page_size)],
                region,
                shared_fd=shared_fd,
                own=True,
                keeps_uffd=lambda: False,
                wait_gone=trio.sleep_forever,
            )
        except BaseException:
            close_all([fd for fd in (uffd.fd, shared_fd) if fd is not None])
            self.close()
            raise
        if self._allocate:
            try:
                await _allocate(target)
            except BaseException:
                target.close([])
                self.close()
                raise
        return target

    def _features(self) -> Feature:
        wanted = (
            Feature.MOVE | Feature.EVENT_REMOVE
            if self._kind == "anonymous" and self._move
            else Feature.EVENT_REMOVE
        )
        return wanted & probe()

    def _map(self, size: int, page_size: int) -> None:
        if self._kind != "anonymous":
            flags = os.MFD_HUGETLB if self._kind == "hugetlb" else 0
            self._fd = os.memfd_create("pagenet-own", os.MFD_CLOEXEC | flags)
            os.ftruncate(self._fd, size)
        try:
            self._mapped = _native.Mapped(size, self._fd, alignment=page_size)
        except OSError as error:
            raise Unsupported(
                f"cannot map {size} bytes of {self._kind} memory: {error.strerror}"
                + (
                    " (reserve huge pages: sysctl vm.nr_hugepages)"
                    if self._kind == "hugetlb"
                    else ""
                )
            ) from None

    @property
    def address(self) -> int:
        """Where the memory begins in this process; flat byte offsets of the region count from
        here."""
        assert self._mapped is not None, "not attached yet"
        return self._mapped.address

    async def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from flat offset ``offset`` on; wait for missing pages.

        If it is cancelled, its thread goes on waiting until the page comes, or until the transfer
        fails, which raises SIGBUS.
        """
        into = bytearray(length)
        # The thread is abandoned on cancellation, because it waits for a transfer that may itself
        # wait for the caller to leave.
        await trio.to_thread.run_sync(
            _native.copy_out, self.address + offset, memoryview(into), abandon_on_cancel=True
        )
        return bytes(into)

    def close(self) -> None:
        """Give the memory back. Idempotent. Do not call it while a transfer into it runs."""
        if self._mapped is not None:
            self._mapped.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of the owner's socket. ``pid`` is 0 and ``pidfd`` -1 if it lives
    in a pid namespace that we do not see."""

    pid: int
    pidfd: int

    @classmethod
    def of(cls, sock: trio.socket.SocketType) -> Peer:
        pid = _pid_of(sock)
        try:
            return cls(pid, _pidfd_of(sock, pid) if pid > 0 else -1)
        except ProcessLookupError:
            raise OwnerLeft(f"the owner (pid {pid}) ended right after it had connected") from None

    def keeps(self, uffd_fd: int) -> bool:
        """Whether the process has a descriptor of its own for the userfaultfd. False if we may not
        look."""
        try:
            for entry in Path(f"/proc/{self.pid}/fd").iterdir():
                with suppress(OSError):
                    if "userfaultfd" in entry.readlink().name and _native.same_file(
                        uffd_fd, self.pid, int(entry.name)
                    ):
                        return True
        except OSError:
            pass
        return False

    def check_kill(self, address: int) -> None:
        if self.pidfd < 0:
            raise Unsupported(
                "cannot kill this owner: it is in a pid namespace that this process does not see"
            )
        try:
            watched = is_watched(self.pid, address)
            signal.pidfd_send_signal(self.pidfd, 0)  # the process has not ended: the pid is its own
        except OSError as error:
            what = f"may not kill the owner, process {self.pid}"
            raise Unsupported(f"{what}: {error.strerror}; run as root, or as its user") from None
        if not watched:
            raise Unsupported(
                f"cannot kill this owner: the memory is not that of process {self.pid}, which has"
                " handed it over"
            )

    def kill(self) -> bool:
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)


def _pid_of(sock: trio.socket.SocketType) -> int:
    """The process that has connected; 0 if it is in a pid namespace that we do not see."""
    pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def _pidfd_of(sock: trio.socket.SocketType, pid: int) -> int:
    """A pidfd of the process ``pid`` that has connected. Before Linux 6.5 another process may have
    got that pid meanwhile. :exc:`ProcessLookupError` if it has ended."""
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, 0)  # Linux 6.16 has a pidfd even of one that has ended
    except ProcessLookupError:
        os.close(pidfd)
        raise
    except PermissionError:
        pass  # another user's, and there
    return pidfd


@contextmanager
def taking_from(process: OtherProcess) -> Iterator[tuple[Peer, list[int]]]:
    """The process as a new :class:`Peer`, and a list for the descriptors taken from it.

    If the block fails, all of them are closed. Memory that does not fit the source is the caller's
    mistake, not the process's: :exc:`~pagenet.errors.UsageError`.
    """
    peer, fds = Peer(process.pid, os.dup(process.pidfd)), list[int]()
    try:
        yield peer, fds
    except BaseException as error:
        peer.close()
        close_all(fds)
        if isinstance(error, HandshakeError):
            raise UsageError(
                f"the memory of process {process.pid} cannot be filled from this source: {error}"
            ) from None
        raise


class Keeper(Protocol):
    """Keeps descriptors for this process, beyond its end. It accepts owners by itself, so that none
    is lost between two instructions of this process."""

    def hold(self, name: str, *fds: int) -> None: ...
    def forget(self, name: str) -> None: ...
    def get(self, name: str) -> list[int]: ...
    def names(self) -> list[str]: ...
    async def accept(self, name: str = ...) -> tuple[socket.socket, str]:
        """A connection on what it holds as ``listener``, or as ``listener`` and more, which it
        holds under ``name``, and that more, now; and the whole name."""
        ...

    def accept_many(self, first: int, count: int) -> None:
        """Accept so many connections on what it holds as ``listener`` and more. Of each it tells
        over the socket that it holds as ``arrivals``, a SOCK_SEQPACKET: with a byte, the name under
        which it holds the connection, and the connection. The name is ``owner.``, a number, from
        ``first`` on, and that more."""

    def note_accepted(self, name: str, fd: int) -> None:
        """Note that it has told of this connection."""


class Naming:
    """A keeper's names for one of many owners: each ends in ``suffix``."""

    def __init__(self, keeper: Keeper, suffix: str) -> None:
        self._keeper, self._suffix = keeper, suffix

    def hold(self, name: str, *fds: int) -> None:
        self._keeper.hold(name + self._suffix, *fds)

    def forget(self, name: str) -> None:
        self._keeper.forget(name + self._suffix)

    def get(self, name: str) -> list[int]:
        return self._keeper.get(name + self._suffix)

    def names(self) -> list[str]:
        raise NotImplementedError

    async def accept(self, name: str = "owner") -> tuple[socket.socket, str]:
        raise NotImplementedError

    def accept_many(self, first: int, count: int) -> None:
        raise NotImplementedError

    def note_accepted(self, name: str, fd: int) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class SharedFile:
    """A file of pages that owners may map, privately: ``size`` bytes in pages of ``page_size``. Its
    descriptor ``fd`` cannot be written by."""

    fd: int
    size: int
    page_size: int

    @property
    def offer(self) -> bytes:
        """What an owner is told that asks for it."""
        return json.dumps({"size": self.size, "page_size": self.page_size}).encode() + b"\n"


class ConnectedOwner:
    """An owner that has connected to a :class:`UffdListener`. Attach it once. ``keeper``: has its
    connection, and keeps its map. ``resumes``: a process that was killed may have begun to fill its
    memory."""

    def __init__(
        self,
        sock: trio.socket.SocketType,
        allocate: bool,
        keeper: Keeper | None = None,
        resumes: bool = False,
    ) -> None:
        self._socket: trio.socket.SocketType | None = sock
        self._allocate = allocate
        self._keeper = keeper
        self._resumes = resumes
        #: the process that has connected; 0 if it is in a pid namespace that we do not see
        self.pid = _pid_of(sock)

    async def wait_handshake(self) -> None:
        """Return once it has sent something. :exc:`HandshakeError` if it does not within 5 s."""
        assert self._socket is not None
        with trio.move_on_after(HANDSHAKE_TIMEOUT):
            await trio.lowlevel.wait_readable(self._socket)
            return
        raise _silent()

    async def attach(self, region: Region, shared: SharedFile | None = None) -> UffdTarget:
        """``shared``: the file that it may map."""
        if self._socket is None:
            raise UsageError("this owner was attached before")
        sock, self._socket = self._socket, None
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                target = await _handshake(sock, region, self._keeper, self._resumes, shared)
        except trio.TooSlowError:
            _turn_away(sock, self._keeper)
            raise _silent() from None
        except HandshakeError:
            has_left = await _leaves(sock, self.pid)
            _turn_away(sock, self._keeper)
            if has_left:
                raise OwnerLeft(f"the owner (pid {self.pid}) has ended") from None
            raise
        except BaseException:
            sock.close()
            raise
        if self._allocate:
            await _allocate_all(target)
        return target

    def close(self) -> None:
        """Turn it away, if it was not attached. Idempotent."""
        if self._socket is not None:
            _turn_away(self._socket, self._keeper)
            self._socket = None


class UffdListener:
    """A unix socket on which any number of owners hand over their memory, as on a
    :class:`UffdSocket`. Others accept them there. ``keeper``: keeps the socket."""

    def __init__(self, path: str | os.PathLike[str], *, keeper: Keeper | None = None) -> None:
        self._keeper = keeper
        kept = [] if keeper is None else keeper.get("listener")
        self._file = UnixSocketFile(str(path), f"owners' socket {path}", socket.SOMAXCONN, *kept)
        if keeper is not None:
            keeper.hold("listener", self._file.socket.fileno())

    def fileno(self) -> int:
        return self._file.socket.fileno()

    def close(self) -> None:
        """Idempotent. Owners that have connected stay."""
        self._file.close()
        if self._keeper is not None:
            self._keeper.forget("listener")
            self._keeper = None


async def _leaves(sock: trio.socket.SocketType, pid: int) -> bool:
    """Whether the process has ended, or does so now: its memory is what goes first."""
    if pid <= 0:
        return False
    try:
        pidfd = _pidfd_of(sock, pid)
    except OSError:
        return True
    try:
        with trio.move_on_after(LEAVING):
            await trio.lowlevel.wait_readable(pidfd)
            return True
    finally:
        os.close(pidfd)
    return False


def _turn_away(sock: trio.socket.SocketType, keeper: Keeper | None) -> None:
    sock.close()
    if keeper is not None:
        keeper.forget("owner")
        keeper.forget("map")


def _silent() -> HandshakeError:
    return HandshakeError(f"an owner connected and sent no handshake for {HANDSHAKE_TIMEOUT:g} s")


class UffdSocket:
    """A unix socket on which an owner hands over its memory by Firecracker's UFFD handshake.

    ``on_waiting`` is called once owners may connect. An owner whose handshake makes no sense is
    turned away, ``on_refused`` is called with the error, and the next owner may try. ``allocate``:
    if the owner sent the file behind its shared memory, allocate that memory before the first page
    comes, while the owner waits; its pages are then received in place. ``keeper``: keeps the socket
    and the owner's connection, with the handshake in it. If it has an owner already, which a
    process that was killed had begun to fill, :meth:`attach` goes on with that one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        allocate: bool = False,
        keeper: Keeper | None = None,
        on_waiting: Callable[[], None] = lambda: None,
        on_refused: Callable[[HandshakeError], None] = lambda error: None,
    ) -> None:
        self.path = Path(path)
        self._allocate = allocate
        self._keeper = keeper
        self._on_waiting = on_waiting
        self._on_refused = on_refused
        self._file: UnixSocketFile | None = None

    async def listen(self) -> None:
        """Open the socket, so that owners may connect. :meth:`attach` does this if needed."""
        await trio.lowlevel.checkpoint()
        if self._file is not None:
            return
        kept = [] if self._keeper is None else self._keeper.get("listener")
        self._file = UnixSocketFile(str(self.path), f"owner's socket {self.path}", _BACKLOG, *kept)
        if self._keeper is not None:
            self._keeper.hold("listener", self._file.socket.fileno())

    async def wait_owner(self) -> None:
        """Return once an owner has connected. It stays in the queue until :meth:`attach`."""
        await self.listen()
        assert self._file is not None
        await trio.lowlevel.wait_readable(self._file.socket)

    async def attach(self, region: Region) -> UffdTarget:
        await self.listen()
        assert self._file is not None
        kept = [] if self._keeper is None else self._keeper.get("owner")
        if not kept:
            self._on_waiting()
        while True:
            resumes = bool(kept)
            sock = await self._accept(kept.pop() if kept else None)
            try:
                with trio.fail_after(HANDSHAKE_TIMEOUT):
                    target = await _handshake(sock, region, self._keeper, resumes)
                break
            except trio.TooSlowError:
                _turn_away(sock, self._keeper)
                self._on_refused(_silent())
            except HandshakeError as error:
                _turn_away(sock, self._keeper)
                self._on_refused(error)
            except BaseException:
                sock.close()
                raise
        if self._allocate:
            await _allocate_all(target)
        return target

    async def _accept(self, kept: int | None) -> trio.socket.SocketType:
        assert self._file is not None
        if self._keeper is None:
            return (await self._file.socket.accept())[0]
        sock = (await self._keeper.accept())[0] if kept is None else socket.socket(fileno=kept)
        sock.setblocking(False)
        return trio.socket.from_stdlib_socket(sock)

    def close(self) -> None:
        """Close the socket. Idempotent. An owner that is attached stays attached."""
        if self._file is not None:
            self._file.close()
            self._file = None
            if self._keeper is not None:
                self._keeper.forget("listener")


async def _allocate_all(target: UffdTarget) -> None:
    """As :func:`_allocate`, which closes the target if it fails."""
    try:
        await _allocate(target)
    except BaseException:
        target.close([Run(0, target.region.pages)])
        raise


async def _allocate(target: UffdTarget) -> None:
    """Allocate the memory in steps, so that it can be cancelled. :exc:`Unsupported` if memory runs
    out."""
    size = target.region.size
    for offset in range(0, size, _ALLOCATION_STEP):
        try:
            await trio.to_thread.run_sync(
                target.allocate, offset, min(_ALLOCATION_STEP, size - offset)
            )
        except OSError as error:
            raise Unsupported(
                f"cannot allocate {size} bytes of shared memory: {error.strerror}"
            ) from None


async def _handshake(
    sock: trio.socket.SocketType,
    region: Region,
    keeper: Keeper | None,
    resumes: bool,
    shared: SharedFile | None = None,
) -> UffdTarget:
    """``resumes``: a destination that was killed may have begun to fill this owner's memory.
    ``shared``: a file that it may ask for."""
    peek = None if keeper is None else _Peeking(sock)
    hands = _Hands(sock, peek or sock, shared)
    message, fds = await hands.receive()
    try:
        mappings, outside_is_zero = parse_handshake(message)
        uffd = _uffd_of(fds)
        shared_fd, map_fd = _more_of(fds)
        if hands.has_shared and shared_fd is not None:
            raise HandshakeError("the owner asked for a file, and its handshake carries another")
        if map_fd is None and keeper is not None:
            map_fd = kept_map(keeper)
            fds.append(map_fd)
        recover = note_in(map_fd, resumes) if map_fd is not None else None
        peer = Peer.of(sock)
    except BaseException:
        close_all(fds)
        raise

    def let_go() -> None:
        peer.close()
        _turn_away(sock, keeper)

    try:
        target = UffdTarget(
            uffd,
            mappings,
            region,
            shared_fd=shared_fd,
            map_fd=map_fd,
            recover=recover,
            outside_is_zero=outside_is_zero,
            shares=hands.has_shared,
            keeps_uffd=lambda: peer.keeps(uffd.fd),
            wait_gone=lambda: wait_memory_gone(target, peer),
            process=peer,
            on_close=let_go,
        )
    except BaseException:
        close_all(fds)
        peer.close()
        raise
    return target


def _uffd_of(fds: list[int]) -> Userfaultfd:
    if not fds:
        raise HandshakeError("the owner's handshake came without a userfaultfd")
    try:
        return Userfaultfd.received(fds[0])
    except ValueError as error:
        raise HandshakeError(f"the owner's handshake: {error}") from None


def _is_map(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}") == MAP_LINK


def _more_of(fds: list[int]) -> tuple[int | None, int | None]:
    """What follows the userfaultfd: the memory's file, and the memfd for the map of pages."""
    maps = [at for at in range(1, len(fds)) if _is_map(fds[at])]
    files = [at for at in range(1, len(fds)) if at not in maps]
    if len(maps) > 1:
        raise HandshakeError("the owner's handshake carries two maps of its pages")
    if any(not (is_memory_file(fds[at]) and is_writable(fds[at])) for at in files):
        what = "a memfd, or file of tmpfs or hugetlbfs, that is open to read and to write"
        raise HandshakeError(f"the owner's memory file is not {what}")
    for at in maps:
        try:
            mine = _native.lock_map(fds[at])
        except OSError as error:
            raise HandshakeError(
                f"the owner's map of pages is in use, or not to be had: {error.strerror}"
            ) from None
        os.close(fds[at])
        fds[at] = mine
    return fds[files[0]] if files else None, fds[maps[0]] if maps else None


def note_in(map_fd: int, resumes: bool) -> Note | None:
    """What a destination that was killed has noted in the map; None: the map is empty."""
    if not os.fstat(map_fd).st_size:
        return None
    if not resumes:
        raise HandshakeError(
            "the owner's map of pages is not empty: its transfer is to be resumed, not begun"
        )
    try:
        found = _native.find_map(map_fd)
    except ValueError:
        return None  # it was killed before the map was whole, and so before the first page
    return Note.decode(found.note)


def kept_map(keeper: Keeper) -> int:
    """A map of the keeper's, for an owner that has none."""
    kept = keeper.get("map")
    if not kept:
        made = os.memfd_create(_native.MAP_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        keeper.hold("map", made)
        kept = [made]
    try:
        return _native.lock_map(kept[0])
    finally:
        close_all(kept)


class _Peeking:
    """A connection whose bytes stay in it, so that another process can read them again."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)

    async def recvmsg(
        self, room: int, control: int, flags: int
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
        """The next bytes that were not peeked at yet."""
        await trio.lowlevel.wait_readable(self._socket)
        with socket.socket(fileno=os.dup(self._socket.fileno())) as plain:
            plain.setblocking(False)
            while True:
                with suppress(BlockingIOError):
                    return plain.recvmsg(room, control, flags | socket.MSG_PEEK)
                await trio.sleep(_PEEK_SECONDS)  # it is readable because of what was peeked at


class _Hands:
    """The handshake of an owner, as it comes out of ``source``: ``sock``, or what peeks at it."""

    def __init__(
        self,
        sock: trio.socket.SocketType,
        source: trio.socket.SocketType | _Peeking,
        shared: SharedFile | None,
    ) -> None:
        self._sock, self._source, self._shared = sock, source, shared
        self._message = bytearray()
        self._fds: list[int] = []
        #: the owner has asked for the shared file, and got it
        self.has_shared = False

    async def receive(self) -> tuple[bytes, list[int]]:
        """The message and its descriptors. A stream socket may split the message; the descriptors
        come with its first piece."""
        try:
            while not _is_whole(self._message):
                await self._receive_some()
                while (request := first_object(self._message)) is not None:
                    await self._share(request)
        except BaseException as error:
            close_all(self._fds)
            if isinstance(error, OSError):
                raise HandshakeError(f"the owner's socket: {error.strerror}") from None
            raise
        return bytes(self._message), self._fds

    async def _receive_some(self) -> None:
        room = MAX_HANDSHAKE_BYTES + 1 - len(self._message)
        data, control, flags, _ = await self._source.recvmsg(
            room, socket.CMSG_SPACE(8 * 4), socket.MSG_CMSG_CLOEXEC
        )
        self._fds += _descriptors(control)
        self._message += data
        if flags & socket.MSG_CTRUNC or len(self._fds) > 2 + any(map(_is_map, self._fds)):
            raise HandshakeError(
                "the owner's handshake carries more than two descriptors, and a map of its pages"
            )
        if not data:
            raise HandshakeError(
                f"the owner closed its socket after {len(self._message)} bytes of its handshake"
            )
        if len(self._message) > MAX_HANDSHAKE_BYTES:
            raise HandshakeError(
                f"the owner's handshake is longer than {MAX_HANDSHAKE_BYTES} bytes"
            )

    async def _share(self, request: bytes) -> None:
        """Give the owner the file that it asks for. A process that was killed may have done so
        already: an owner reads one answer."""
        check_request(request)
        if self._shared is None:
            raise HandshakeError("the owner asks for a file of pages, and here is none to share")
        if self.has_shared:
            raise HandshakeError("the owner asks for the file of pages a second time")
        del self._message[: len(request)]
        await _send_with(self._sock, self._shared.offer, self._shared.fd)
        self.has_shared = True


async def _send_with(sock: trio.socket.SocketType, message: bytes, fd: int) -> None:
    """Send a short message and a descriptor. An owner that does not read has room for both."""
    with socket.socket(fileno=os.dup(sock.fileno())) as plain:
        plain.setblocking(False)
        socket.send_fds(plain, [message], [fd])
    await trio.lowlevel.checkpoint()


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _is_whole(message: bytearray) -> bool:
    """Whether the JSON array is whole. Other text counts as whole, because the parser refuses it,
    but an object, which may be a request."""
    text = message.strip()
    return text[:1] != b"{" and bool(text) and (text[:1] != b"[" or text[-1:] == b"]")


def _descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


async def wait_memory_gone(target: UffdTarget, peer: Peer) -> None:
    """Return when the process that connected has ended and the memory is gone.

    A wrapper may hand over another process's memory and end, so the process's end alone does not
    count.
    """
    if peer.pidfd >= 0:
        await trio.lowlevel.wait_readable(peer.pidfd)
    while target.is_alive():  # noqa: ASYNC110 - there is nothing to wait on
        await trio.sleep(_ALIVE_PERIOD)
