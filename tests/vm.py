"""Virtual machines that tests move: unmodified QEMU, with a guest that verifies its own memory and
reports all the time.

The guest is tools/guest/init.c on Debian's kernel, or tools/guest/bare.c without a kernel, which is
up in milliseconds. The heartbeats of either come through the serial port and are read as they come.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from processes import run

from pagenet.bench._kvm import QEMU, find_kvm_cpu
from pagenet.bench.qemu._qemu_guest import joined_line

BUILDER = Path(__file__).parents[1] / "tools" / "guest" / "build.py"

MISSING = [tool for tool in (QEMU, "apt-get", "dpkg-deb", "gcc") if not shutil.which(tool)]
needs_guest = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
#: for a guest that moves
needs_migration = [needs_guest, pytest.mark.usefixtures("uffd_permitted")]

# Seconds. An emulated guest on a loaded machine is slow, but a guest that hangs should not use up
# the whole test's time.
PATIENCE = 60.0

# A guest without a kernel never idles. Tests wait for pagenet beside it: those processes go first,
# and the guest still has a tenth of a processor that others want.
PATIENTLY = ("nice", "-n", "10")


# ---- what is run ----


class GuestFiles(NamedTuple):
    kernel: Path
    initrd: Path
    bare: Path


@functools.cache
def guest_files() -> GuestFiles:
    """The files that QEMU boots. The first time they are downloaded and compiled, which takes
    seconds and needs the network."""
    built = subprocess.run([sys.executable, str(BUILDER)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    paths = json.loads(built.stdout)
    return GuestFiles(*(Path(paths[name]) for name in GuestFiles._fields))


def qemu_command(
    directory: Path,
    name: str,
    *,
    memory: int = 256 << 20,
    work: int = 96,
    hot: int = 24,
    beat_ms: int = 20,
    smp: int = 1,
    ram: Path | None = None,
    incoming: bool = False,
    options: str = "",
    extra: Sequence[str] = (),
) -> list[str]:
    """QEMU's command line for a machine that works on ``work`` MiB, of which ``hot`` are written.
    Its sockets are in ``directory``. ``options``: further options of init.c.

    Its RAM is the file ``ram``, or a file of its own in /dev/shm. The file is made here, and
    :func:`run_vm` removes it.
    """
    files = guest_files()
    # The kernel is silent but for its death: its words would get into the middle of the guest's
    # lines.
    kernel = "console=ttyS0 loglevel=1 panic=-1 nokaslr"
    workload = f"wl_mb={work} wl_wss={hot} wl_hb={beat_ms} wl_threads={smp}"
    boot = {
        "-kernel": str(files.kernel),
        "-initrd": str(files.initrd),
        "-append": f"{kernel} {workload} {options}".rstrip(),
    }
    return _command(
        directory, name, memory=memory, smp=smp, ram=ram, incoming=incoming, boot=boot, extra=extra
    )


def bare_command(
    directory: Path,
    name: str,
    *,
    memory: int = 64 << 20,
    work: int = 24,
    hot: int = 6,
    beat_ms: int = 20,
    words: int = 16,
    accel: str = "tcg",
    smp: int = 1,
    extra: Sequence[str] = (),
) -> list[str]:
    """The same for the guest without a kernel, which writes and verifies ``words`` words of every
    page, and uses one CPU."""
    workload = f"wl_mb={work} wl_wss={hot} wl_hb={beat_ms} wl_words={words}"
    boot = {"-kernel": str(guest_files().bare), "-append": workload}
    return _command(directory, name, memory=memory, smp=smp, accel=accel, boot=boot, extra=extra)


def _command(
    directory: Path,
    name: str,
    *,
    memory: int,
    smp: int,
    boot: Mapping[str, str],
    extra: Sequence[str],
    ram: Path | None = None,
    incoming: bool = False,
    accel: str = "tcg",
) -> list[str]:
    ram = make_ram(name, memory, ram)
    options = {
        "-name": name,
        "-accel": accel,
        "-cpu": find_kvm_cpu() if accel == "kvm" else "max",
        "-smp": str(smp),
        "-m": f"{memory >> 20}M",
        "-machine": "pc,memory-backend=ram0",
        "-object": f"memory-backend-file,id=ram0,size={memory},mem-path={ram},share=on",
        "-display": "none",
        # Before the serial port: QEMU makes sockets in this order, so when the serial port is
        # there, the monitor is.
        "-qmp": f"unix:{directory / name}.qmp,server=on,wait=off",
        "-serial": f"unix:{directory / name}.serial,server=on,wait=off",
        **boot,
        **({"-incoming": "defer"} if incoming else {}),
    }
    return [QEMU, "-nodefaults", "-no-reboot", *itertools.chain(*options.items()), *extra]


def make_ram(name: str, size: int, path: Path | None) -> Path:
    """A file of zeros that takes no memory yet. Guest RAM that there already is under that name
    stays as it is."""
    if path is None:
        number, unique = tempfile.mkstemp(prefix=f"pagenet-{name}-", dir="/dev/shm")
        os.close(number)
        path = Path(unique)
    with path.open("ab") as file:
        file.truncate(size)
    return path


def ram_of(command: Sequence[str]) -> Path:
    """The file behind guest RAM."""
    (ram,) = rams_of(command)
    return ram


def rams_of(command: Sequence[str]) -> list[Path]:
    """The files behind guest RAM: one, or one for each NUMA node, or none for a memfd."""
    return [Path(name) for name in re.findall(r"mem-path(?:=|\":\")([^,\s\"]+)", " ".join(command))]


def in_memfd(command: Sequence[str]) -> list[str]:
    """The same machine with its RAM in a memfd, as libvirt has it."""
    ram_of(command).unlink()
    return [
        re.sub(r"memory-backend-file,(.*)mem-path=[^,]+,", r"memory-backend-memfd,\1", word)
        for word in command
    ]


@functools.cache
def qemu_version() -> tuple[int, ...]:
    """The version of the QEMU that is installed; (0, 0) if none is."""
    if not shutil.which(QEMU):
        return 0, 0
    # A sanitizer's runtime is preloaded into every process that is started, and QEMU is not made
    # for that.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    told = subprocess.run(
        [QEMU, "--version"], capture_output=True, text=True, check=True, env=environment
    ).stdout
    found = re.search(r"version (\d+)\.(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2])


# ---- the guest's output ----


class Line(NamedTuple):
    """``time``: when it was complete, on the clock of time.monotonic()."""

    time: float
    text: str


@dataclass(frozen=True)
class Beat:
    """A heartbeat. ``writes`` and ``bad`` count pages, ``sweeps`` sweeps through the memory, and
    ``devices`` what was done with each device, since the guest has started."""

    time: float
    seq: int
    writes: int
    bad: int
    sweeps: int
    devices: Mapping[str, int]


_BEAT = re.compile(
    r"HB seq=(\d+) t=\d+ w=(\d+) dw=\d+ bad=(\d+) sweeps=(\d+) sw=\d+ gap_us=\d+((?: [a-z]+=\d+)*)"
)


def parse_beat(line: Line) -> Beat | None:
    found = _BEAT.fullmatch(line.text)
    if not found:
        return None
    seq, writes, bad, sweeps = map(int, found.groups()[:4])
    work = dict(word.split("=") for word in found[5].split())
    return Beat(
        line.time, seq, writes, bad, sweeps, {name: int(count) for name, count in work.items()}
    )


class Serial:
    """A guest's output. ``lines``, ``beats``: those so far; ``rest``: the last line, if it is not
    yet complete.

    ``errors``: QEMU's stderr, for the message when the guest falls silent.
    """

    def __init__(self, name: str = "guest", errors: Path | None = None) -> None:
        self.name = name
        self._errors = errors
        self._rest = b""
        self._has_ended = False
        self._changed = trio.Event()
        self.lines: list[Line] = []
        self.beats: list[Beat] = []

    @property
    def rest(self) -> str:
        return self._rest.decode(errors="replace")

    def feed(self, data: bytes | bytearray) -> None:
        now = time.monotonic()
        *whole, self._rest = (self._rest + data).split(b"\n")
        for text in whole:
            line = Line(now, text.decode(errors="replace").removesuffix("\r"))
            self.lines.append(line)
            if beat := parse_beat(line):
                self.beats.append(beat)
        self._tell()

    def end(self) -> None:
        """No more output will come."""
        self._has_ended = True
        self._tell()

    def take(self) -> Serial:
        """What it has said so far, which is no longer here: the guest is elsewhere meanwhile."""
        before = Serial(self.name, self._errors)
        before.lines, before.beats, before._rest = self.lines, self.beats, self._rest
        self.lines, self.beats, self._rest = [], [], b""
        return before

    async def read(self, stream: trio.abc.ReceiveStream) -> None:
        """Read until the end of the machine."""
        try:
            async with stream:
                async for data in stream:
                    self.feed(data)
        except trio.BrokenResourceError:
            pass  # killed in the middle of a word
        finally:
            self.end()

    async def wait(self, what: str, is_there: Callable[[], bool]) -> None:
        """Wait until ``is_there`` returns true; it is called after each piece of output. ``what``
        is for the message if that never happens."""
        with trio.move_on_after(PATIENCE):
            while not is_there() and not self._has_ended:
                await self._changed.wait()
        how = "ended" if self._has_ended else f"took more than {PATIENCE:.0f} s"
        assert is_there(), f"{self.name} {how} before {what}; {self.describe()}"

    async def wait_ready(self) -> Line:
        """Wait until its memory is filled."""
        await self.wait("READY", lambda: any(line.text.startswith("READY ") for line in self.lines))
        return next(line for line in self.lines if line.text.startswith("READY "))

    async def wait_beats(self, count: int) -> None:
        """Wait until ``count`` heartbeats have come in all."""
        await self.wait(f"{count} heartbeats", lambda: len(self.beats) >= count)

    async def wait_sweeps(self, count: int) -> None:
        """Wait until it has verified all its memory ``count`` times in all.

        To know that every page is right from now on, wait for two sweeps more than in the last
        beat: one is under way.
        """
        await self.wait(
            f"{count} sweeps", lambda: bool(self.beats) and self.beats[-1].sweeps >= count
        )

    def describe(self) -> str:
        """Its last output, for an error message."""
        told = [line.text for line in self.lines[-5:]] + [self.rest]
        errors = self._errors.read_text(errors="replace") if self._errors else ""
        return f"its last lines: {told}; QEMU's complaints: {errors!r}"

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def check_unbroken(*serials: Serial) -> None:
    """Check that the guest has gone from each machine to the next without missing a heartbeat or
    finding a wrong page."""
    for serial in serials:
        assert serial.lines, f"{serial.name} has said nothing; {serial.describe()}"
    beats: list[Beat] = []
    cut = ""
    for serial in serials:
        for line in serial.lines:
            text = joined_line(cut, line.text, lambda text: goes_on(beats, text))
            cut = ""
            if beat := parse_beat(Line(line.time, text)):
                assert beat.bad == 0, f"wrong pages: {text!r}"
                assert goes_on(beats, text), f"heartbeat {beat.seq} came after {beats[-1].seq}"
                beats.append(beat)
            else:
                assert not text.startswith("HB"), f"garbled: {text!r}"
        cut += serial.rest


def goes_on(beats: Sequence[Beat], text: str) -> bool:
    """Whether ``text`` is the heartbeat that follows the last of ``beats``."""
    beat = parse_beat(Line(0.0, text))
    return beat is not None and (not beats or beat.seq == beats[-1].seq + 1)


# ---- a machine ----


@dataclass(frozen=True)
class VM:
    """``qmp``: where its monitor listens; ``rams``: the files behind its memory."""

    name: str
    process: trio.Process
    serial: Serial
    qmp: Path
    rams: list[Path]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ram(self) -> Path:
        (ram,) = self.rams
        return ram


@asynccontextmanager
async def run_vm(
    command: Sequence[str], directory: Path, name: str, env: Mapping[str, str] | None = None
) -> AsyncIterator[VM]:
    """Runs what :func:`qemu_command` has made, with ``env`` on top of this environment, for as long
    as the block does."""
    rams = rams_of(command)
    errors = directory / f"{name}.stderr"
    serial = Serial(name, errors)
    try:
        async with (
            trio.open_nursery() as nursery,
            _run_qemu(command, errors, env) as process,
            _guard(process.pid, rams),
        ):
            nursery.start_soon(
                serial.read, await _connect(directory / f"{name}.serial", process, serial)
            )
            yield VM(name, process, serial, directory / f"{name}.qmp", rams)
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from group.exceptions[0].__cause__
        raise
    finally:
        for ram in rams:
            ram.unlink(missing_ok=True)


@asynccontextmanager
async def _run_qemu(
    command: Sequence[str], errors: Path, env: Mapping[str, str] | None
) -> AsyncIterator[trio.Process]:
    if str(guest_files().bare) in command:
        command = [*PATIENTLY, *command]
    errors.touch()
    number = os.open(errors, os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    try:
        environment = {**os.environ, **(env or {})}
        process = await trio.lowlevel.open_process(
            list(command), stdin=subprocess.DEVNULL, stdout=number, stderr=number, env=environment
        )
    finally:
        os.close(number)
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@asynccontextmanager
async def _guard(pid: int, rams: Sequence[Path]) -> AsyncIterator[None]:
    """If this process were killed, QEMU would run for ever, and its RAM would stay. The guard kills
    and removes them at the end of its input.

    The kernel's own means (a signal at the parent's end) goes by the end of the thread that started
    a process, and Trio's threads end early.
    """
    command = ["sh", "-c", 'read -r _; kill -KILL "$0"; rm -f "$@"', str(pid), *map(str, rams)]
    async with run(command, stdin=subprocess.PIPE):
        yield


async def _connect(path: Path, process: trio.Process, serial: Serial) -> trio.SocketStream:
    """Connect early enough for the guest's first words: QEMU drops output while no client is
    connected."""
    with trio.move_on_after(PATIENCE):
        while process.poll() is None:
            try:
                return await trio.open_unix_socket(path)
            except OSError:
                await trio.sleep(0.005)  # QEMU has not made it yet
    raise AssertionError(
        f"{serial.name}: QEMU does not answer, exit code {process.poll()}; {serial.describe()}"
    )
