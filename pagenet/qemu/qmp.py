"""QMP: QEMU's monitor protocol, in Trio. JSON objects in both directions over a unix socket."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio

from ..errors import OwnerGone, PagenetError, UsageError
from ..nurseries import open_failing_nursery
from ..protocol import printable

__all__ = ["Qmp", "QmpError", "QmpEvent", "connect_qmp", "monitor_pid"]

T = TypeVar("T")

# In seconds. A command that QEMU has not answered by then will never be answered: QEMU's main loop,
# which answers, is stuck.
COMMAND_TIMEOUT = 30.0
_CONNECT_TIMEOUT = 10.0
_MAX_LINE = 4 << 20
_GREETING = -1  # its key among the answers


class QmpError(PagenetError):
    """QEMU refused a command. ``kind`` is its error class (``GenericError``,
    ``CommandNotFound``...)."""

    def __init__(self, command: str, kind: str, text: str) -> None:
        super().__init__(f"QEMU refuses {command}: {text}")
        self.kind = kind
        self.text = text


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """``time``: QEMU's own clock (s since 1970), which is the host's."""

    name: str
    data: dict[str, Any]
    time: float


class Qmp:
    """A connection to a QEMU's monitor. Made by :func:`connect_qmp`. Every event since the
    connection began is kept."""

    def __init__(self, stream: trio.SocketStream, path: str) -> None:
        self._stream = stream
        self._path = path
        self._answers: dict[int, dict[str, Any]] = {}
        self._news = trio.Event()
        self._next_id = 0
        self._gone = False
        self.events: list[QmpEvent] = []
        credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        #: the QEMU process; 0 if it is in a pid namespace that this process does not see
        self.pid: int = struct.unpack("3i", credentials)[0]

    async def command(self, name: str, /, **arguments: Any) -> Any:
        """Execute a command: QEMU's answer. An underscore in an argument's name becomes a dash.

        :exc:`QmpError` if QEMU refuses, :exc:`~pagenet.errors.OwnerGone` if it is gone,
        :exc:`~pagenet.errors.PagenetError` if it does not answer for 30 s.
        """
        return await self._ask(name, arguments)

    async def monitor(self, line: str) -> str:
        """The output of the human monitor for ``line``. Errors as of :meth:`command`."""
        return str(await self.command("human-monitor-command", command_line=line)).replace(
            "\r\n", "\n"
        )

    async def give(self, name: str, fd: int) -> None:
        """Give QEMU a duplicate of ``fd``, by the name ``name`` (``fd:NAME``). Errors as of
        :meth:`command`."""
        await self._ask("getfd", {"fdname": name}, fd)

    async def give_set(self, fd: int) -> int:
        """Give QEMU a duplicate of ``fd`` as a file, ``/dev/fdset/NUMBER``, until ``remove-fd``.
        Returns the number. Errors as of :meth:`command`."""
        return int((await self._ask("add-fd", {}, fd))["fdset-id"])

    async def _ask(self, name: str, arguments: dict[str, Any], fd: int | None = None) -> Any:
        number = self._next_id
        self._next_id += 1
        words: dict[str, Any] = {"execute": name, "id": number}
        if arguments:
            words["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        line = json.dumps(words).encode() + b"\n"
        try:
            if fd is not None:
                sent = await self._stream.socket.sendmsg(
                    [line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
                )
                line = line[sent:]
            await self._stream.send_all(line)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            self._hear_of_the_end()
        answer = await self._until(
            lambda: self._answers.pop(number, None), f"an answer to {name}", COMMAND_TIMEOUT
        )
        if "error" in answer:
            raise QmpError(
                name,
                answer["error"].get("class", ""),
                answer["error"].get("desc", "no reason given"),
            )
        return answer["return"]

    async def wait_event(
        self,
        name: str,
        *,
        since: int = 0,
        where: Callable[[dict[str, Any]], bool] = lambda data: True,
        patience: float,
    ) -> QmpEvent:
        """The first event ``name`` among ``events[since:]`` and later ones whose data ``where``
        accepts. :exc:`~pagenet.errors.PagenetError` if none comes for ``patience`` seconds,
        :exc:`~pagenet.errors.OwnerGone` if QEMU closes its monitor."""

        def find() -> QmpEvent | None:
            return next(
                (
                    event
                    for event in self.events[since:]
                    if event.name == name and where(event.data)
                ),
                None,
            )

        return await self._until(find, f"its {name} event", patience)

    async def _until(self, find: Callable[[], T | None], what: str, patience: float) -> T:
        with trio.move_on_after(patience):
            while (found := find()) is None:
                if self._gone:
                    raise OwnerGone(
                        f"QEMU has closed its monitor {self._path}: it has ended, or is ending"
                    )
                news = self._news
                await news.wait()
            return found
        raise PagenetError(f"QEMU did not send {what} for {patience:g} s on {self._path}")

    async def read_forever(self) -> None:
        """Read answers and events until QEMU closes the monitor.
        :exc:`~pagenet.errors.PagenetError` for what is not QMP."""
        buffer = bytearray()
        try:
            while data := await self._stream.receive_some(64 << 10):
                buffer += data
                *lines, rest = bytes(buffer).split(b"\n")
                buffer = bytearray(rest)
                for line in lines:
                    if line.strip():
                        self._take(line)
                if len(buffer) > _MAX_LINE:
                    raise PagenetError(
                        f"what answers on {self._path} is no QMP monitor: a line of {len(buffer)}"
                        " bytes"
                    )
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self._hear_of_the_end()

    def _hear_of_the_end(self) -> None:
        self._gone = True
        self._tell()

    def _take(self, line: bytes) -> None:
        try:
            self._note(json.loads(line))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise PagenetError(
                f"what answers on {self._path} is no QMP monitor: {line[:40]!r}"
            ) from None
        self._tell()

    def _note(self, words: Any) -> None:
        if not isinstance(words, dict):
            raise TypeError
        if "event" in words:
            stamp = words["timestamp"]
            time = stamp["seconds"] + stamp["microseconds"] / 1e6
            data = words.get("data", {})
            if not isinstance(words["event"], str) or not isinstance(data, dict):
                raise TypeError
            self.events.append(QmpEvent(words["event"], data, time))
        elif "id" in words:
            self._answers[words["id"]] = _checked_answer(words)
        elif "QMP" in words:
            self._answers[_GREETING] = words

    def _tell(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()

    async def greet(self) -> None:
        """Wait for QEMU's greeting, and leave its negotiation mode."""
        what = "its greeting (does another program hold the monitor?)"
        await self._until(lambda: self._answers.pop(_GREETING, None), what, COMMAND_TIMEOUT)
        await self.command("qmp_capabilities")


def _checked_answer(words: dict[str, Any]) -> dict[str, Any]:
    """An answer to a command, with the text of its error made printable on one line.
    :exc:`TypeError` if it is not an answer."""
    error = words.get("error", {})
    if (
        not isinstance(words["id"], int)
        or not isinstance(error, dict)
        or not ("error" in words or "return" in words)
    ):
        raise TypeError
    if "error" in words:
        words["error"] = {
            name: printable(str(error[name])) for name in ("class", "desc") if name in error
        }
    return words


async def monitor_pid(path: str | Path) -> int:
    """The process that listens on the unix socket ``path``, even if it is stopped.
    :exc:`~pagenet.errors.UsageError` if there is none, or if it is in another pid namespace."""
    try:
        with trio.fail_after(_CONNECT_TIMEOUT):
            async with await trio.open_unix_socket(str(path)) as stream:
                credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except (OSError, RuntimeError, trio.TooSlowError) as error:
        raise UsageError(
            f"no QMP monitor at {path}: {getattr(error, 'strerror', None) or 'no answer'}"
        ) from None
    pid: int = struct.unpack("3i", credentials)[0]
    if not pid:
        raise UsageError(
            f"the process that listens on {path} is in another pid namespace: run pagenet there"
        )
    return pid


@asynccontextmanager
async def connect_qmp(path: str | Path, *, wait: float = 0.0) -> AsyncIterator[Qmp]:
    """The monitor behind the unix socket ``path``, which may take ``wait`` seconds to appear.
    :exc:`~pagenet.errors.UsageError` if it does not appear."""
    deadline = trio.current_time() + wait
    while True:
        try:
            with trio.fail_after(_CONNECT_TIMEOUT):
                stream = await trio.open_unix_socket(str(path))
            break
        except (OSError, RuntimeError, trio.TooSlowError) as error:
            if trio.current_time() >= deadline:
                why = (
                    error.strerror if isinstance(error, OSError) and error.strerror else "no answer"
                )
                hint = "start QEMU with -qmp unix:PATH,server=on,wait=off"
                raise UsageError(f"no QMP monitor at {path}: {why}; {hint}") from None
            await trio.sleep(0.01)
    # Not `async with stream`: if the task is cancelled, closing the stream that way would lose the
    # error that the block ends with.
    with stream.socket:
        qmp = Qmp(stream, str(path))
        async with _reading(qmp):
            await qmp.greet()
            yield qmp


@asynccontextmanager
async def _reading(qmp: Qmp) -> AsyncIterator[None]:
    """Read until the block ends, even if it was cancelled: it may have a guest go on first."""
    reading = trio.CancelScope(shield=True)

    async def read() -> None:
        with reading:
            await qmp.read_forever()

    async with open_failing_nursery() as nursery:
        nursery.start_soon(read)
        try:
            yield
        finally:
            reading.cancel()
