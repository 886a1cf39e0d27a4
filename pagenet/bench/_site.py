"""Where guests move: network namespaces joined by a link, and processes in them.

Nothing has a name that could stay behind. A namespace lives as long as the process that has it,
which ends with the bench. If the bench itself is killed, one more process, the undertaker, kills
the machines and removes their RAM.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import trio

from ..children import module_command
from ..errors import PagenetError, Unsupported, UsageError
from ..nurseries import open_failing_nursery

__all__ = [
    "Daemon",
    "Line",
    "Link",
    "Site",
    "Words",
    "check_tools",
    "inside",
    "killing",
    "open_link",
    "open_site",
]

T = TypeVar("T")

_SOURCE, _DESTINATION = "10.0.0.1", "10.0.0.2"
# Bytes that may leave at once, and ms of queue behind them: as in a switch's port.
_BURST = 256 << 10
_QUEUE_MS = 8
# Seconds that a daemon has after it was told to end: it removes a socket and a directory.
_END_SECONDS = 5.0


# ---- the link ----


@dataclass(frozen=True, slots=True)
class Link:
    """``source``, ``destination``: pids of processes in the two network namespaces. ``address``:
    the destination's. ``rate``: Mbit/s in each direction; None: both are in one namespace, and its
    loopback is the link.
    """

    source: int
    destination: int
    address: str
    interface: str
    rate: int | None

    def wire_bytes(self) -> int:
        """Bytes that it has carried in both directions, headers included."""
        for line in Path(f"/proc/{self.source}/net/dev").read_text().splitlines():
            name, _, figures = line.partition(":")
            if name.strip() == self.interface:
                received, sent = int(figures.split()[0]), int(figures.split()[8])
                # over loopback, what is sent is what is received
                return sent if self.rate is None else received + sent
        raise PagenetError(f"the interface {self.interface} has gone")


def check_tools(*tools: str) -> None:
    """:exc:`UsageError` with the name of the first that is not installed."""
    for tool in tools:
        if not shutil.which(tool):
            raise UsageError(f"{tool} is not installed")


@asynccontextmanager
async def open_link(rate: int | None) -> AsyncIterator[Link]:
    """Two network namespaces joined by a link of ``rate`` Mbit/s, or (None) one with a loopback as
    fast as the host is.

    :exc:`Unsupported` without the right to make them, or in a kernel that cannot limit a link.
    """
    check_tools("unshare", "nsenter", "ip", "tc")
    if os.geteuid() != 0:
        raise Unsupported("network namespaces need root: run pagenet-bench as root")
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(_namespace())
        await _configure(source, "ip link set lo up")
        if rate is None:
            yield Link(source, source, "127.0.0.1", "lo", None)
            return
        destination = await stack.enter_async_context(_namespace())
        await _configure(source, f"ip link add link0 type veth peer name link0 netns {destination}")
        queue = max(_BURST, rate * 1000 * _QUEUE_MS // 8)
        for pid, address in ((source, _SOURCE), (destination, _DESTINATION)):
            await _configure(pid, f"ip address add {address}/24 dev link0")
            await _configure(pid, "ip link set link0 up")
            await _configure(
                pid, f"tc qdisc add dev link0 root tbf rate {rate}mbit burst {_BURST} limit {queue}"
            )
        yield Link(source, destination, _DESTINATION, "link0", rate)


@asynccontextmanager
async def _namespace() -> AsyncIterator[int]:
    """The pid of a process in a network namespace of its own, which ends when the bench does."""
    process = await trio.lowlevel.open_process(
        ["unshare", "--net", "sh", "-c", "echo; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is for us alone
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        if await process.stdout.receive_some(1) != b"\n":
            complaint = (await process.stderr.receive_some()).decode(errors="replace").strip()
            raise Unsupported(f"cannot make a network namespace: {complaint}")
        yield process.pid
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                await stream.aclose()


async def _configure(pid: int, words: str) -> None:
    command = [*inside(pid), *words.split()]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    if done.returncode:
        raise Unsupported(f"{words}: {' '.join(done.stderr.decode(errors='replace').split())}")


def inside(pid: int) -> list[str]:
    return ["nsenter", f"--net=/proc/{pid}/ns/net"]


# ---- output ----


class Line(NamedTuple):
    """``time``: when it was complete, on the clock of time.monotonic()."""

    time: float
    text: str


class Words:
    """The output of a process or a guest, line by line. ``rest``: the last line, if it is not yet
    complete."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: list[Line] = []
        self.rest = b""
        self.has_ended = False
        self._news = trio.Event()

    async def read(self, stream: trio.abc.ReceiveStream) -> None:
        """Read ``stream`` to its end."""
        try:
            async with stream:
                async for data in stream:
                    self.feed(bytes(data), time.monotonic())
        except trio.BrokenResourceError:
            pass  # killed in the middle of a word
        finally:
            self.has_ended = True
            self._tell()

    def feed(self, data: bytes, now: float) -> None:
        *whole, self.rest = (self.rest + data).split(b"\n")
        for text in whole:
            self.take(Line(now, text.decode(errors="replace").removesuffix("\r")))
        self._tell()

    def take(self, line: Line) -> None:
        self.lines.append(line)

    def _tell(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()

    async def wait(self, find: Callable[[], T], what: str, patience: float) -> T:
        """What ``find`` finds; it is called after each piece of output. :exc:`PagenetError`, about
        ``what``, if the output ends before, or if it takes more than ``patience`` seconds."""
        with trio.move_on_after(patience):
            while not (found := find()):
                if self.has_ended:
                    raise PagenetError(f"{self.name} has ended before {what}{self.complaint()}")
                await self._news.wait()
            return found
        raise PagenetError(f"{self.name}: no {what} for {patience:.0f} s{self.complaint()}")

    def complaint(self) -> str:
        """The end of an error message."""
        return ""


class Daemon(Words):
    """A process of pagenet's: the JSON objects on its stdout, and the file of its stderr."""

    def __init__(self, name: str, process: trio.Process, errors: Path) -> None:
        super().__init__(name)
        self.process = process
        self._errors = errors
        self._events: list[tuple[float, dict[str, Any]]] = []

    def take(self, line: Line) -> None:
        with suppress(ValueError):  # QEMU's own words come the same way
            self._events.append((line.time, json.loads(line.text)))

    async def event(self, name: str, patience: float) -> tuple[float, dict[str, Any]]:
        """When the first event of that name came, on the clock of time.monotonic(), and the
        event."""
        return (await self.wait(lambda: self.events(name), name, patience))[0]

    def events(self, name: str) -> list[tuple[float, dict[str, Any]]]:
        """The events of that name that have come so far."""
        return [event for event in self._events if event[1].get("event") == name]

    def complaint(self) -> str:
        told = [
            line for line in self._errors.read_text(errors="replace").splitlines() if line.strip()
        ]
        return f": {told[-1]}" if told else ""


# ---- processes ----


class Site:
    """A link, a directory in memory, and the processes that are started there. Made by
    :func:`open_site`."""

    def __init__(
        self, directory: Path, link: Link, nursery: trio.Nursery, undertaker: trio.Process
    ) -> None:
        self.directory = directory
        self.link = link
        self._nursery = nursery
        self._undertaker = undertaker

    def listen_to(self, words: Words, stream: trio.abc.ReceiveStream) -> None:
        self._nursery.start_soon(words.read, stream)

    async def ends_with_us(self, pid: int) -> None:
        """Have that process killed if the bench is."""
        assert self._undertaker.stdin is not None
        await self._undertaker.stdin.send_all(f"{pid}\n".encode())

    @asynccontextmanager
    async def running(
        self, command: Sequence[str], name: str, at: int, output: int, end: int = signal.SIGTERM
    ) -> AsyncIterator[trio.Process]:
        """``command`` in the network namespace of the process ``at``. When the block ends it gets
        the signal ``end``. Its stderr goes to :meth:`errors`."""
        with self.errors(name).open("ab") as errors:
            process = await trio.lowlevel.open_process(
                [*inside(at), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**os.environ, "TMPDIR": str(self.directory)},
                start_new_session=True,  # a Ctrl-C is for us alone
            )
        try:
            await self.ends_with_us(process.pid)
            yield process
        finally:
            with trio.CancelScope(shield=True):
                with suppress(ProcessLookupError):
                    process.send_signal(end)
                with trio.move_on_after(_END_SECONDS):
                    await process.wait()
                process.kill()
                await process.wait()

    @asynccontextmanager
    async def daemon(self, *arguments: str, at: int) -> AsyncIterator[Daemon]:
        """``pagenet-qemu --json`` with these arguments."""
        name = f"pagenet-qemu {arguments[0]}"
        command = module_command("pagenet.cli.qemu", arguments[0], "--json", *arguments[1:])
        async with self.running(command, name, at, subprocess.PIPE) as process:
            assert process.stdout is not None
            daemon = Daemon(name, process, self.errors(name))
            self.listen_to(daemon, process.stdout)
            yield daemon

    def errors(self, name: str) -> Path:
        return self.directory / f"{name}.stderr"


@asynccontextmanager
async def open_site(link: Link) -> AsyncIterator[Site]:
    with tempfile.TemporaryDirectory(
        prefix="pagenet-bench-", dir="/dev/shm", ignore_cleanup_errors=True
    ) as directory:
        async with _undertaker(directory) as undertaker, open_failing_nursery() as nursery:
            yield Site(Path(directory), link, nursery, undertaker)
            nursery.cancel_scope.cancel()


# Reads a pid from each line; at the end of its input it kills them all, and removes the directory.
_UNDERTAKER = (
    'while read -r pid; do set -- "$@" "$pid"; done; [ $# = 0 ] || kill -KILL "$@" 2>/dev/null; rm'
    ' -rf "$0"'
)


@asynccontextmanager
async def _undertaker(directory: str) -> AsyncIterator[trio.Process]:
    process = await trio.lowlevel.open_process(
        ["sh", "-c", _UNDERTAKER, directory], stdin=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            # before its input ends: the processes that it was told of have ended, and their pids
            # may be other processes' by now
            process.kill()
            await process.wait()
            await process.stdin.aclose()


@asynccontextmanager
async def killing(pid: int) -> AsyncIterator[int]:
    """Kill that process, which need not be a child, when the block ends, and wait until it has
    ended. Yields its pidfd."""
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(_END_SECONDS):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)
