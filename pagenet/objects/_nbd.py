"""Exports of NBD servers, by libnbd: ``nbd://HOST/EXPORT``, ``nbd+unix:///EXPORT?socket=PATH``,
and with TLS ``nbds://`` and ``nbds+unix://``."""

from __future__ import annotations

import asyncio
import errno
import importlib
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import Unsupported
from ..protocol import printable
from ..system_packages import make_importable
from ._constants import PART, STALL
from ._origin import ObjectStat, Refused, Transient

__all__ = ["NbdExport", "is_export"]

_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")
# Errors of a command after which it would fail again. (ESHUTDOWN, ENOMEM and EIO may pass.)
_FINAL = (errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.EOVERFLOW, errno.ERANGE, errno.ENOSPC)


def is_export(uri: str) -> bool:
    scheme, found, _ = uri.partition("://")
    return bool(found) and scheme in _SCHEMES


def _load() -> Any:
    try:
        for name in ("libnbdmod", "nbd"):
            make_importable(name)
        nbd = importlib.import_module("nbd")
        if not hasattr(nbd, "NBD"):
            raise ImportError("the package nbd is another one")
    except ImportError as error:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise Unsupported(
            f"nbd:// takes libnbd's bindings for this Python {version}, and they cannot be imported"
            f" ({error}): install them (Debian: apt install python3-libnbd)"
        ) from None
    return nbd


class NbdExport:
    """An :class:`~._origin.Origin`. Its content has no name: it has to be read-only, and is taken
    to be the same in each connection, if its size is. :exc:`Unsupported` without libnbd."""

    kind = "server"
    names_content = False

    def __init__(self, uri: str) -> None:
        self.name = uri
        nbd = _load()
        # of their own, so that nothing queues in front of what a thread waits for
        self._urgent, self._other = _Connection(nbd, uri), _Connection(nbd, uri)

    def close(self) -> None:
        self._urgent.close()
        self._other.close()

    async def stat(self) -> ObjectStat:
        size = await self._urgent.connect()
        return ObjectStat(size, f"of {size} bytes")

    async def read(
        self, start: int, end: int, stat: ObjectStat, is_urgent: bool
    ) -> AsyncGenerator[bytes, None]:
        connection = self._urgent if is_urgent else self._other
        if await connection.connect() != stat.size:
            raise Refused(f"{printable(self.name)} is another export than before", is_changed=True)
        pieces = [(at, min(PART, end - at)) for at in range(start, end, PART)]
        for answer in [connection.ask(at, length) for at, length in pieces]:
            yield await answer()


class _Connection:
    """A connection to a server, made when it is needed, and made anew after it has broken. For the
    thread of an asyncio loop, but for :meth:`close`."""

    def __init__(self, nbd: Any, uri: str) -> None:
        self._nbd, self._uri = nbd, uri
        self._handle: Any = None
        self._fd = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connecting = asyncio.Lock()
        self._happened = asyncio.Event()  # something, on the connection
        self._error: Exception | None = None  # that has ended it
        #: commands that end with an errno, or 0
        self._commands: set[asyncio.Future[int]] = set()

    def close(self) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._drop)

    async def connect(self) -> int:
        """Its size in bytes."""
        async with self._connecting:
            if self._handle is None or not self._handle.aio_is_ready():
                self._drop()
                try:
                    with self._dropping_at_errors():
                        async with asyncio.timeout(STALL):
                            await self._connect()
                except BaseException:
                    self._drop()
                    raise
            return int(self._handle.get_size())

    async def _connect(self) -> None:
        self._loop = asyncio.get_running_loop()
        handle, self._error = self._nbd.NBD(), None
        self._handle = handle
        handle.aio_connect_uri(self._uri)
        while handle.aio_is_connecting():
            self._happened.clear()
            self._follow()
            await self._happened.wait()
        if self._error is not None:
            raise self._error
        if not handle.aio_is_ready():
            raise Transient("the server has closed the connection")
        if not handle.is_read_only():
            raise Refused(
                f"{printable(self._uri)} can be written to, and a change would not be noticed:"
                " export it read-only"
            )

    def ask(self, offset: int, length: int) -> Callable[[], Awaitable[bytes]]:
        """Ask for bytes. What it returns waits for them."""
        buffer, done = self._nbd.Buffer(length), asyncio.get_running_loop().create_future()

        def completed(error: Any) -> int:
            if not done.done():
                done.set_result(error.value)
            return 1  # the command may be forgotten

        async def answer() -> bytes:
            with self._dropping_at_errors():
                async with asyncio.timeout(STALL):
                    number = await done
            if number in _FINAL:
                raise Refused(f"{printable(self._uri)}: the server answers: {os.strerror(number)}")
            if number == errno.ENOTCONN:
                raise Transient("the connection to the server has broken")
            if number:
                raise Transient(f"the server answers: {os.strerror(number)}")
            return bytes(buffer.to_bytearray())

        self._commands.add(done)
        done.add_done_callback(self._commands.discard)
        with self._dropping_at_errors():
            if self._handle is None:
                raise Transient("the connection has broken")
            self._handle.aio_pread(buffer, offset, completed)
            self._follow()
        return answer

    @contextmanager
    def _dropping_at_errors(self) -> Iterator[None]:
        """Errors of libnbd, and time-outs, as those of an origin."""
        try:
            yield
        except TimeoutError:
            self._drop()
            raise Transient(f"the server has sent nothing for {STALL:g} s") from None
        except self._nbd.Error as error:
            self._drop()
            text = printable(error.string.rpartition("nbd_")[2].partition(": ")[2])
            if error.errnum in _FINAL or "getaddrinfo" in text:
                raise Refused(f"{printable(self._uri)}: {text}") from None
            raise Transient(text) from None

    # ---- what drives it ----

    def _follow(self) -> None:
        """Watch its socket for what libnbd waits for."""
        assert self._loop is not None
        handle, fd = self._handle, self._handle.aio_get_fd()
        if fd != self._fd:
            self._leave()
            self._fd = fd
        direction = handle.aio_get_direction()
        for way, add, remove, notify in (
            (
                self._nbd.AIO_DIRECTION_READ,
                self._loop.add_reader,
                self._loop.remove_reader,
                handle.aio_notify_read,
            ),
            (
                self._nbd.AIO_DIRECTION_WRITE,
                self._loop.add_writer,
                self._loop.remove_writer,
                handle.aio_notify_write,
            ),
        ):
            if direction & way:
                add(fd, self._notify, notify)
            else:
                remove(fd)

    def _notify(self, notify: Callable[[], None]) -> None:
        try:
            notify()
            self._follow()
        except self._nbd.Error as error:
            self._error = error
            self._drop()
        self._happened.set()

    def _leave(self) -> None:
        if self._fd >= 0 and self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            self._fd = -1

    def _drop(self) -> None:
        """Close it. Commands that are in flight fail."""
        self._leave()
        self._handle = None
        for command in list(self._commands):
            if not command.done():
                command.set_result(errno.ENOTCONN)
        self._happened.set()
