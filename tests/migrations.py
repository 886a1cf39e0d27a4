"""Both ends of a guest's migration, for tests: a destination in this process, and the two
commands."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from processes import Process, run, wait_in_faults
from vm import Serial, bare_command, rams_of

from pagenet import PagenetError
from pagenet.control import connect_control
from pagenet.qemu import Arrival, connect_qmp, receive

PATIENCE = 60.0


# ---- a destination in this process ----


@dataclass
class Events:
    """``ended``: no more events will come, because of ``error`` if it is set."""

    said: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    news: trio.Event = field(default_factory=trio.Event)
    ended: bool = False
    error: BaseException | None = None

    def __call__(self, event: str, /, **fields: Any) -> None:
        self.said.append((event, fields))
        self._tell()

    def end(self, error: BaseException | None) -> None:
        self.ended, self.error = True, error
        self._tell()

    def _tell(self) -> None:
        self.news.set()
        self.news = trio.Event()

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.said]

    async def wait(self, name: str) -> dict[str, Any]:
        with trio.fail_after(PATIENCE):
            while name not in self.names and not self.ended:
                await self.news.wait()
        assert name in self.names, f"ended before {name!r}, after {self.names}: {self.error!r}"
        return dict(self.said)[name]


@dataclass
class Destination:
    """``arrival``: set once the guest runs there. ``error``: what :func:`receive` raised
    instead."""

    serial: Serial
    qmp: Path
    rams: list[Path]
    uri: str
    events: Events = field(default_factory=Events)
    arrival: Arrival | None = None
    error: PagenetError | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    leave: trio.Event = field(default_factory=trio.Event)

    @property
    def ram(self) -> Path:
        (ram,) = self.rams
        return ram

    async def take(self, command: Sequence[str], options: dict[str, Any]) -> None:
        try:
            async with receive(
                command, listen=self.uri, on_event=self.events, **options
            ) as self.arrival:
                await self.arrival.wait_complete()
        except PagenetError as error:
            self.error = error
        self.events.end(self.error)
        self.ended.set()
        await self.leave.wait()
        if self.arrival is not None:
            assert self.arrival.process is not None
            self.arrival.process.kill()
            await self.arrival.process.wait()


@asynccontextmanager
async def destination(
    directory: Path,
    name: str = "b",
    *,
    command: Sequence[str] = (),
    listen: str = "",
    **options: Any,
) -> AsyncIterator[Destination]:
    """A QEMU that waits for a guest, and keeps it until the block ends: for the guest without a
    kernel, or that of ``command``."""
    command = command or bare_command(directory, name)
    listen = listen or f"unix:{directory / name}.sock"
    there = Destination(Serial(name), directory / f"{name}.qmp", rams_of(command), listen)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.take, command, options)
            there.uri = (await there.events.wait("listening"))["uri"]
            nursery.start_soon(
                there.serial.read, await trio.open_unix_socket(directory / f"{name}.serial")
            )
            yield there
            there.leave.set()
            if not there.ended.is_set() and there.arrival is None:
                nursery.cancel_scope.cancel()  # no guest came
    finally:
        for ram in rams_of(command):
            ram.unlink(missing_ok=True)


async def status_of(monitor: Path) -> str:
    """The status of the machine behind ``monitor``: "gone" if there is none, "silent" if even its
    monitor waits for a page."""
    with trio.move_on_after(2):
        try:
            async with connect_qmp(monitor) as qmp:
                return str((await qmp.command("query-status"))["status"])
        except PagenetError:
            return "gone"
    return "silent"


async def check_goes_on(serial: Serial) -> None:
    """The guest is well: it works, and has verified all of its memory once more."""
    await serial.wait_beats(len(serial.beats) + 1)
    await serial.wait_sweeps(serial.beats[-1].sweeps + 2)


async def stand_still(pid: int) -> None:
    """Wait until the guest waits for a page. On a slow machine, a guest whose pages have all come
    never will: that does no harm."""
    with trio.move_on_after(5):
        await wait_in_faults(pid, 1)


async def run_out(control: Path) -> None:
    """Have the rest of the pages come."""
    with trio.fail_after(20):
        while True:
            with suppress(PagenetError):
                async with connect_control(control) as client:
                    await client.command("schedule", name="linear")
                    return
            await trio.sleep(0.05)


# ---- the commands ----


#: what is killed is not started again by itself
ALONE = ("--no-guard",)


def alone(guard: bool) -> tuple[str, ...]:
    return () if guard else ALONE


def pagenet_qemu(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pagenet.cli.qemu", *arguments]


def attach_command(monitor: Path, *options: str) -> list[str]:
    listen = ("--listen", "tcp://127.0.0.1:0")
    return pagenet_qemu("incoming", "--json", *ALONE, "--qmp", str(monitor), *listen, *options)


def incoming_command(
    uri: str, *options: str, command: Sequence[str], guard: bool = False
) -> list[str]:
    listen = (*alone(guard), "--listen", uri, *options)
    return pagenet_qemu("incoming", "--json", *listen, "--", *command)


def migrate_command(monitor: Path, uri: str, *options: str, guard: bool = False) -> list[str]:
    return pagenet_qemu("migrate", "--json", *alone(guard), "--qmp", str(monitor), uri, *options)


def resume_command(uri: str, *options: str) -> list[str]:
    return pagenet_qemu("incoming", "--json", *ALONE, "--resume", "--listen", uri, *options)


@asynccontextmanager
async def run_incoming(
    directory: Path,
    name: str = "b",
    *,
    command: Sequence[str] = (),
    listen: Sequence[str] = (),
    within: Sequence[str] = (),
    guard: bool = False,
) -> AsyncIterator[tuple[Process, Serial, str]]:
    """``pagenet-qemu incoming``, its guest's output, and where it listens. At the end its QEMU is
    killed, whichever process is its parent. ``within``: the prefix of a command that runs it
    somewhere else. ``guard``: it is started again if it is killed."""
    command = command or bare_command(directory, name)
    listen = listen or ["tcp://127.0.0.1:0"]
    serial = Serial(name)
    pid = 0
    try:
        async with (
            run([*within, *incoming_command(*listen, command=command, guard=guard)]) as process,
            trio.open_nursery() as nursery,
        ):
            pid = (await process.event("qemu"))["pid"]
            uri = (await process.event("listening"))["uri"]
            nursery.start_soon(
                serial.read, await trio.open_unix_socket(directory / f"{name}.serial")
            )
            try:
                yield process, serial, uri
            finally:
                await kill_machine(pid)
    finally:
        for ram in rams_of(command):
            ram.unlink(missing_ok=True)


async def kill_machine(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with trio.CancelScope(shield=True):
        while command_of(pid):  # noqa: ASYNC110
            await trio.sleep(0.01)


def command_of(pid: int) -> bytes:
    """The process's command line; empty if it has ended by now."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


# ---- commands that get no further ----


#: pagenet-qemu, which at one moment gets no further, and waits for a second only until the other
#: side takes a guest, or runs it.
UNTIL = """
import os, signal, sys
from pagenet.cli import _command, qemu
from pagenet.qemu import _offer, _talk, returning

number, *moment = sys.argv.pop(1).split()
_offer._TAKE_TIMEOUT = returning._RUN_TIMEOUT = 1.0
say, make, report = _talk.Talk.say, _offer.Offer.make, _command.Report.__call__

def reach(*here):
    if list(here) == moment:
        os.kill(os.getpid(), signal.Signals[number])

async def say_until(talk, what, **fields):
    reach("before", what)
    await say(talk, what, **fields)
    reach("after", what)

async def make_until(offer, talk, guard):
    await make(offer, talk, guard)
    reach("after", "offer")

def report_until(self, event, /, **fields):
    report(self, event, **fields)
    reach("at", event)

_talk.Talk.say, _offer.Offer.make, _command.Report.__call__ = say_until, make_until, report_until
sys.exit(qemu.main(sys.argv[1:]))
"""


def until(moment: str, *words: str) -> list[str]:
    return [sys.executable, "-c", UNTIL, moment, *words]


@contextmanager
def limited(command: str, moment: str) -> Iterator[None]:
    """In this block that command of pagenet-qemu gets no further than ``moment``: a signal, and
    "before" or "after" a message to the other side, "after offer", or "at" an event."""

    def pagenet_qemu(*words: str) -> list[str]:
        return until(moment if words[0] == command else "none", *words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "pagenet_qemu", pagenet_qemu)
        yield
