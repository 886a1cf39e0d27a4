"""The daemon's side of the guard."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from ..errors import PagenetError, UsageError
from ..nurseries import running_beside
from . import _service

__all__ = ["Guard", "dismiss", "follow", "guarding"]

#: names, in the environment of a daemon that a guard has started, the descriptor of its socket
_VARIABLE = "PAGENET_GUARD"
_PROGRAM = Path(__file__).with_name("pagenet-guard")
# Seconds: the guard answers at once, unless it is dead or stopped.
_ANSWER_TIMEOUT = 5.0
_MAX_FDS = 4
_RETRY_SECONDS = 1.0
# As in native/guard.c.
_MAX_COMMAND, _MAX_WORDS, _MAX_ANSWER = 60 << 10, 1024, 64 << 10
# What systemd keeps of ours; a service may get other descriptors.
_COMMAND = "command"
_KEPT = (_COMMAND, "listener", "owner", "map")


class Guard:
    """A guard process, and a second one if that is killed. Made by :func:`guarding`."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
        self._socket, self._process = sock, process
        #: this process was started because another one was killed
        self.has_restarted = process is None
        self._held: dict[str, list[int]] = {}
        self._command: Sequence[str] = ()
        self._accepting = ""  # the name for the connection that is waited for
        self._accepted: tuple[socket.socket, str] | None = None
        # the number of the next of many connections, and how many it may still accept
        self._next, self._many = 1, 0
        # names with smaller numbers are those of connections that a killed one has accepted
        self._certain = 0
        self._news = trio.Event()
        #: is called with the process of a guard that has taken the place of one that was killed,
        #: and holds all that the killed one held
        self.on_replaced: Callable[[int], object] = lambda pid: None

    # ---- what it holds ----

    def hold(self, name: str, *fds: int) -> None:
        """Have it hold these descriptors under ``name``, instead of those before. When this
        returns, they outlive this process."""
        self._keep(name, [os.dup(fd) for fd in fds])
        self._ask(b"H" + name.encode(), fds)

    def forget(self, name: str) -> None:
        """Have it let go of what it holds under ``name``."""
        self._keep(name, None)
        self._ask(b"F" + name.encode())

    def get(self, name: str) -> list[int]:
        """The descriptors that it holds under ``name``, for the caller to close; none: it holds
        nothing there."""
        _, fds = self._ask(b"G" + name.encode())
        self._keep(name, [os.dup(fd) for fd in fds] or None)
        return fds

    def names(self) -> list[str]:
        """The names of all that it holds."""
        answer, _ = self._ask(b"L")
        return [os.fsdecode(name) for name in answer[1:].split(b"\0") if name]

    def share(self) -> None:
        """Hold here, too, all that it holds: it may be killed before this process gets to that."""
        for name in self.names():
            for fd in self.get(name):
                os.close(fd)

    def _keep(self, name: str, fds: list[int] | None) -> None:
        for fd in self._held.pop(name, []):
            os.close(fd)
        if fds is not None:
            self._held[name] = fds

    def restart_with(self, command: Sequence[str]) -> None:
        """Start ``command`` if this process is killed from now on; nothing if it is empty."""
        if len(_encoded(command)) > _MAX_COMMAND or len(command) > _MAX_WORDS:
            raise UsageError("this command line is too long for the guard to repeat: --no-guard")
        self._command = tuple(command)
        self._tell_command()

    def _tell_command(self) -> None:
        self._ask(b"C" + _encoded(self._command))

    async def accept(self, name: str = "owner") -> tuple[socket.socket, str]:
        """Accept a connection on what it holds as ``listener``, or as ``listener`` and more. It
        holds it under ``name``, and that more, from then on: the name is returned too."""
        self._accepting = name
        self._begin_accepting()
        try:
            while self._accepted is None:
                self._news = trio.Event()
                await self._news.wait()
        finally:
            self._accepting = ""
        accepted, self._accepted = self._accepted, None
        return accepted

    def _begin_accepting(self) -> None:
        with suppress(OSError):  # its end is noticed by watch()
            self._socket.send(b"A%s\0001" % self._accepting.encode())

    def accept_many(self, first: int, count: int) -> None:
        """Have it accept ``count`` connections on what it holds as ``listener`` and more, and tell
        of them over what it holds as ``arrivals``. It holds them as ``owner.`` and a number, from
        ``first`` on, and that more."""
        self._next, self._many = first, count
        with suppress(OSError):  # its end is noticed by watch()
            self._socket.send(b"Aowner.%d\0%d" % (first, count))

    def note_accepted(self, name: str, fd: int) -> None:
        """Note that it has told of this connection."""
        number = int(name.split(".")[1])
        if number < self._certain:
            self.hold(name, fd)
        else:
            self._keep(name, [os.dup(fd)])
        self._next, self._many = max(self._next, number + 1), max(0, self._many - 1)

    # ---- messages ----

    def _ask(self, request: bytes, fds: Sequence[int] = ()) -> tuple[bytes, list[int]]:
        """Its answer, and the descriptors with it. If it was killed, another guard answers."""
        for _ in range(2):
            try:
                socket.send_fds(self._socket, [request], list(fds))
                while (answer := self._receive())[0][1:] and answer[0][:1] == b"D":
                    self._note_accepted(*answer)
            except (OSError, EOFError):
                if not self._replace():
                    break
                continue
            if self._accepting:
                self._begin_accepting()
            return answer
        return b"N", []  # there is none, now: watch() goes on trying

    def _receive(self, timeout: float = _ANSWER_TIMEOUT) -> tuple[bytes, list[int]]:
        """:exc:`BlockingIOError` if ``timeout`` is 0 and nothing is there."""
        self._socket.settimeout(timeout)  # Python would wait for it in spite of MSG_DONTWAIT
        try:
            data, fds, _, _ = socket.recv_fds(
                self._socket, _MAX_ANSWER, _MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
        finally:
            self._socket.settimeout(_ANSWER_TIMEOUT)
        if not data:
            raise EOFError
        return data, fds

    def _note_accepted(self, answer: bytes, fds: list[int]) -> None:
        """``answer``: that it has accepted a connection, and under which name it holds it."""
        name = os.fsdecode(answer[1:])
        self._accepted = socket.socket(fileno=fds[0]), name
        self._keep(name, [os.dup(fds[0])])
        self._accepting = ""
        self._news.set()

    async def watch(self) -> None:
        """Hear of accepted connections, and replace the guard if it is killed, until cancelled."""
        while True:
            with suppress(trio.ClosedResourceError):  # it was replaced just now
                await trio.lowlevel.wait_readable(self._socket)
            try:
                answer, fds = self._receive(timeout=0)
            except BlockingIOError:
                continue  # _ask() has received it
            except (OSError, EOFError):
                if not self._replace():
                    await trio.sleep(_RETRY_SECONDS)
                continue
            if answer[:1] == b"D":
                self._note_accepted(answer, fds)

    # ---- life ----

    def _replace(self) -> bool:
        """Start another guard in the place of one that is dead, and tell it all. False: that is not
        possible now, and the transfer goes on without."""
        try:
            sock, process, _ = _spawn()
        except PagenetError:
            return False
        trio.lowlevel.notify_closing(self._socket)
        self._end_former()
        self._close_socket()
        self._socket, self._process = sock, process
        for name, fds in list(self._held.items()):
            self._ask(b"H" + name.encode(), fds)
        self._tell_command()
        if self._many:
            # The dead one may have accepted all of them, and told of them: their names are taken.
            self._certain = self._next + self._many
            self.accept_many(self._certain, self._many)
        self.on_replaced(process.pid)
        return True

    def _end_former(self) -> None:
        """It may be stopped, or slow, and not dead: it must not start another process."""
        if self._process is not None:
            self._process.kill()
        else:
            with suppress(OSError):
                self._socket.send(b"Q")

    def _close_socket(self) -> None:
        self._socket.close()
        if self._process is not None:
            self._process.wait()

    def close(self) -> None:
        """End the guard: this process ends in good order."""
        with suppress(OSError):
            self._socket.send(b"Q")
        self._close_socket()
        for name in list(self._held):
            self._keep(name, None)


class _StoringGuard(Guard):
    """The guard of a service that systemd starts again, which keeps what the guard holds. The
    command is kept, too: what systemd starts becomes it (:func:`follow`)."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes]) -> None:
        super().__init__(sock, process)
        kept = _service.take_descriptors()
        self.has_restarted = _COMMAND in kept
        for name, fds in kept.items():
            if name.split(".")[0] in _KEPT:
                self.hold(name, *fds)
            for fd in fds:
                os.close(fd)

    def _tell_command(self) -> None:
        if not self._command:
            return  # and what is held as the command stays
        made = os.memfd_create("pagenet-command", os.MFD_CLOEXEC)
        try:
            os.write(made, _encoded(self._command))
            self.hold(_COMMAND, made)
        finally:
            os.close(made)


def _encoded(command: Sequence[str]) -> bytes:
    return b"".join(os.fsencode(word) + b"\0" for word in command)


def follow(command: Sequence[str]) -> None:
    """Become the command that a killed process of this service of systemd has left, if it is
    another one than ``command``, by which this process was started."""
    for fd in _service.descriptors().get(_COMMAND, []):
        words = [os.fsdecode(word) for word in os.pread(fd, _MAX_COMMAND, 0).split(b"\0")[:-1]]
        if words and words != list(command):
            os.execv(words[0], words)


def _spawn() -> tuple[socket.socket, subprocess.Popen[bytes], bool]:
    """The socket to a new guard, its process, and whether systemd keeps what it holds."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(_ANSWER_TIMEOUT)
    with theirs:
        try:
            process = subprocess.Popen(
                [str(_PROGRAM), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # it must not get a Ctrl-C
                env=_service.environment(),
            )
        except OSError as error:
            ours.close()
            raise PagenetError(f"cannot start {_PROGRAM}: {error.strerror}") from None
    try:
        answer = ours.recv(1)
    except OSError as error:
        ours.close()
        raise PagenetError(f"{_PROGRAM} does not answer: {error}") from None
    if not answer:
        raise PagenetError(f"{_PROGRAM} ended at once")
    return ours, process, answer == b"S"


def _take_over() -> tuple[socket.socket, None]:
    """The socket to the guard that has started this process."""
    sock = socket.socket(fileno=int(os.environ.pop(_VARIABLE)))
    sock.settimeout(_ANSWER_TIMEOUT)
    sock.set_inheritable(False)
    return sock, None


def dismiss() -> None:
    """End the guard that has started this process, if there is one, in a process that does not use
    it: this process ends in good order."""
    if _VARIABLE in os.environ:
        sock, _ = _take_over()
        with sock, suppress(OSError):
            sock.send(b"Q")


def _begin() -> Guard:
    if _VARIABLE in os.environ:
        guard = Guard(*_take_over())
        guard.share()
        return guard
    sock, process, is_stored = _spawn()
    return _StoringGuard(sock, process) if is_stored else Guard(sock, process)


@asynccontextmanager
async def guarding() -> AsyncIterator[Guard]:
    """A guard over this process, for as long as the block runs: the one that has started it, or
    else another. :exc:`~pagenet.errors.PagenetError` if it does not start."""
    guard = _begin()
    try:
        async with running_beside(guard.watch):
            yield guard
    finally:
        guard.close()
