"""Records in which order a program first touches the pages of its data, and how long it works
between: ``native/testing/trace.c``, preloaded, sees the touches.

The program works on a copy of its data in a memfd, and all bytes of it are there from the
beginning: only the page tables fill as it goes.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple, Self

import trio

from ...destination.native_lanes import owned
from ...errors import PagenetError, UsageError
from ...events import EventHandler
from ...nurseries import running_beside
from ...preload import loadable
from ...uffd import Feature, Userfaultfd
from ...whole_file import WholeFile
from .._environment import available_memory
from ._touches import Touches, touches_file

__all__ = ["DATA", "trace_program"]

#: what stands for the copy of the data in the program's arguments
DATA = "{}"
# struct trace, and struct touch
_HEADER = struct.Struct("<QQQQQq")
_TOUCH = struct.Struct("<QQ")
_UNIT = 4096
# Bytes copied between two checks for a cancellation.
_STEP = 64 << 20
_PROGRESS_SECONDS = 1.0
# Seconds that a program has after it was told to end, before it is killed.
_END_SECONDS = 5.0


class _Header(NamedTuple):
    device: int
    inode: int
    pages: int
    touched: int
    unwatched: int
    reason: int


class _Data:
    """A copy of a file, in memory. It has a name for as long as this process lives, and leaves
    nothing behind."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """:exc:`UsageError` if it cannot be made."""
        self._path = os.fspath(path)
        with ExitStack() as stack:
            try:
                self._file = owned(stack, os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
                status = os.fstat(self._file)
                self.size = status.st_size
                self.fd = owned(stack, os.memfd_create("pagenet-trace-data", os.MFD_CLOEXEC))
            except OSError as error:
                raise self._failed(error) from None
            if not stat.S_ISREG(status.st_mode) or not self.size:
                raise UsageError(f"{self._path} is empty, or no file that could be mapped")
            if self.size > available_memory():
                available = available_memory() >> 20
                raise UsageError(
                    f"{self._path} has {self.size >> 20} MiB, and {available} MiB of memory are"
                    " available"
                )
            self._cleanup = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _failed(self, error: OSError) -> UsageError:
        return UsageError(f"cannot copy {self._path} into memory: {error.strerror}")

    async def copy(self) -> None:
        """Copy the file's bytes. :exc:`UsageError` if that fails."""
        try:
            while await trio.to_thread.run_sync(os.sendfile, self.fd, self._file, None, _STEP):
                pass
        except OSError as error:
            raise self._failed(error) from None

    @property
    def name(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.fd}"


class _Log:
    """Where the library records touches: of ``pages`` pages of this system's page size."""

    def __init__(self, data: int, pages: int) -> None:
        status = os.fstat(data)
        self._pages = pages
        self._fd = os.memfd_create("pagenet-trace", os.MFD_CLOEXEC)
        os.truncate(self._fd, _HEADER.size + pages * (_TOUCH.size + 1))
        os.pwrite(self._fd, _HEADER.pack(status.st_dev, status.st_ino, pages, 0, 0, 0), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def name(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def header(self) -> _Header:
        return _Header(*_HEADER.unpack(os.pread(self._fd, _HEADER.size, 0)))

    def touches(self) -> Touches:
        """The touches so far, of pages of 4 KiB: of a larger page, its first 4 KiB."""
        count = min(self.header().touched, self._pages)
        body = os.pread(self._fd, count * _TOUCH.size, _HEADER.size)
        times = mmap.PAGESIZE // _UNIT
        # A page of 0 is an entry that a killed program was about to write.
        found = tuple(((page - 1) * times, work) for page, work in _TOUCH.iter_unpack(body) if page)
        return Touches(self._pages * times, found)


async def trace_program(
    command: Sequence[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    on_event: EventHandler,
) -> int:
    """Run a program with a copy of ``data``, whose name replaces ``{}`` in its arguments, and write
    its first touches to ``output``. A cancellation ends the program; its touches until then are
    written. Returns its exit status, or 128 plus the number of the signal that ended it.

    :exc:`UsageError` if data or program cannot be used; :exc:`~pagenet.errors.Unsupported` where
    mappings cannot be watched; :exc:`PagenetError` if it has not mapped the data. Events:
    ``progress``, ``unwatched``, ``traced``.
    """
    if not any(DATA in argument for argument in command):
        raise UsageError(f"no argument of the program has {DATA} in it, which stands for its data")
    Userfaultfd.open(Feature.MINOR_SHMEM).close()  # as the program will: this shows whether it can
    # The trace's file is opened first: a program that has run for an hour has then not run in vain.
    with (
        touches_file(output) as file,
        _Data(data) as copy,
        _Log(copy.fd, -(-copy.size // mmap.PAGESIZE)) as log,
    ):
        variables = _variables(log)
        await copy.copy()
        words = [argument.replace(DATA, copy.name) for argument in command]
        try:
            async with _running(words, variables) as process, running_beside(_tell, log, on_event):
                status = await process.wait()
        finally:
            _save(log, file, on_event)
        if not log.header().touched:
            raise PagenetError(
                f"{command[0]} ended with status {status}, and has touched no page of a mapping of"
                " its data"
            )
    return status if status >= 0 else 128 - status


def _variables(log: _Log) -> dict[str, str]:
    library = loadable(Path(__file__).resolve().with_name("pagenet.trace.so"))
    preloaded = ":".join(filter(None, [str(library), os.environ.get("LD_PRELOAD", "")]))
    return {"PAGENET_TRACE": log.name, "LD_PRELOAD": preloaded}


@asynccontextmanager
async def _running(
    command: Sequence[str], variables: dict[str, str]
) -> AsyncIterator[trio.Process]:
    """Run it with this process's standard streams. When the block ends, it is told to end, and
    killed if it does not."""
    try:
        process = await trio.lowlevel.open_process(list(command), env=os.environ | variables)
    except OSError as error:
        raise UsageError(f"cannot run {command[0]}: {error.strerror}") from None
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.terminate()
                with trio.move_on_after(_END_SECONDS):
                    await process.wait()
                process.kill()
                await process.wait()


async def _tell(log: _Log, on_event: EventHandler) -> None:
    while True:
        await trio.sleep(_PROGRESS_SECONDS)
        now = log.header()
        on_event("progress", touched=now.touched, pages=now.pages)


def _save(log: _Log, file: WholeFile, on_event: EventHandler) -> None:
    ended = log.header()
    if ended.unwatched:
        on_event("unwatched", mappings=ended.unwatched, reason=os.strerror(ended.reason))
    if ended.touched:
        touches = log.touches()
        touches.write(file)
        seconds = round(sum(work for _, work in touches.touches) / 1e9, 6)
        on_event(
            "traced",
            touched=len(touches.touches),
            pages=touches.pages,
            work_seconds=seconds,
            file=file.path,
        )
