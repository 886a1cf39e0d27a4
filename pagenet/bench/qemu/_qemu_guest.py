"""The guest that is moved: its machine, its output, and what that output tells."""

from __future__ import annotations

import bisect
import itertools
import json
import re
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import trio

from ...errors import PagenetError, UsageError
from ...qemu import Qmp, connect_qmp
from .._kvm import QEMU, find_kvm_cpu
from .._site import Line, Site, Words, killing

__all__ = [
    "BEAT_MS",
    "QEMU",
    "Beat",
    "Guest",
    "GuestFiles",
    "Machine",
    "Serial",
    "Story",
    "find_guest",
    "meet_machine",
    "qemu_command",
    "start_machine",
]

#: ms between two heartbeats, if nothing keeps the guest from working
BEAT_MS = 10
# An emulated guest on a busy host boots slowly.
_PATIENCE = 120.0
# Seconds. A guest that was moved and says nothing for that long is dead.
_SILENCE = 30.0


class GuestFiles(NamedTuple):
    """``initrd``: None for a kernel that needs none."""

    kernel: Path
    initrd: Path | None


@dataclass(frozen=True, slots=True)
class Guest:
    """``ram``: bytes. ``work``, ``hot``: percent of it that the guest works on, and that it writes
    to."""

    files: GuestFiles
    ram: int
    work: int
    hot: int
    cpus: int
    accel: Literal["tcg", "kvm"]


def qemu_command(site: Site, guest: Guest, name: str, *, shared: bool) -> list[str]:
    """QEMU's command line for a machine with that guest. Its RAM is a shared file, or private as is
    QEMU's default. Its sockets are in the site's directory: two monitors, one of which is the
    bench's own, and the serial port."""
    mib = guest.ram >> 20
    # the kernel is silent but for its death: its words would mix with the guest's
    kernel = "console=ttyS0 loglevel=1 panic=-1 nokaslr"
    work = (
        f"wl_mb={mib * guest.work // 100} wl_wss={max(1, mib * guest.hot // 100)} wl_hb={BEAT_MS}"
        f" wl_threads={guest.cpus}"
    )
    if guest.accel == "kvm":
        # for bare.c: enough words of a page to recognise it, where the processor is emulated even
        # under KVM
        work += " wl_words=16"
    size = f"id=ram0,size={guest.ram}"
    options = {
        "-name": name,
        "-accel": guest.accel,
        "-cpu": find_kvm_cpu() if guest.accel == "kvm" else "max",
        "-smp": str(guest.cpus),
        "-m": f"{mib}M",
        "-machine": "pc,memory-backend=ram0",
        "-object": (
            f"memory-backend-file,{size},mem-path={site.directory / name}.ram,share=on"
            if shared
            else f"memory-backend-ram,{size}"
        ),
        "-display": "none",
        "-chardev": f"socket,id=ours,path={site.directory / name}.ours,server=on,wait=off",
        "-mon": "chardev=ours,mode=control",
        # Behind the monitors: QEMU makes sockets in this order, so when the last one is there, the
        # others are.
        "-qmp": f"unix:{site.directory / name}.qmp,server=on,wait=off",
        "-serial": f"unix:{site.directory / name}.serial,server=on,wait=off",
        "-kernel": str(guest.files.kernel),
        **({"-initrd": str(guest.files.initrd)} if guest.files.initrd else {}),
        "-append": f"{kernel} {work}",
    }
    return [QEMU, "-nodefaults", "-no-reboot", *itertools.chain(*options.items())]


def find_guest(kernel: Path | None, initrd: Path | None, accel: str) -> GuestFiles:
    """What QEMU is to boot: those files, or what tools/guest/build.py makes if this is a checkout.
    :exc:`UsageError` if there is neither."""
    if kernel is None:
        if initrd is not None:
            raise UsageError("--initrd goes with --kernel")
        return _built(accel)
    for path in filter(None, (kernel, initrd)):
        if not path.is_file():
            raise UsageError(f"{path} is not there")
    return GuestFiles(kernel, initrd)


def _built(accel: str) -> GuestFiles:
    builder = Path(__file__).parents[3] / "tools" / "guest" / "build.py"
    if not builder.is_file():
        raise UsageError(
            "there is no guest to move: name one by --kernel and --initrd (pagenet's sources have"
            " tools/guest)"
        )
    done = subprocess.run([sys.executable, str(builder)], capture_output=True, text=True)
    if done.returncode:
        raise UsageError(
            f"there is no guest to move: {done.stderr.strip()}; or name one by --kernel and"
            " --initrd"
        )
    made = json.loads(done.stdout)
    # in a nested machine Debian's kernel may not get through its decompressor within any reasonable
    # time
    if accel == "kvm":
        return GuestFiles(Path(made["bare"]), None)
    return GuestFiles(Path(made["kernel"]), Path(made["initrd"]))


# ---- output ----


class Beat(NamedTuple):
    """A heartbeat. ``writes`` and ``bad`` count pages, and ``sweeps`` sweeps through the memory,
    since the guest has started."""

    time: float
    seq: int
    writes: int
    bad: int
    sweeps: int


_BEAT = re.compile(r"HB seq=(\d+) t=\d+ w=(\d+) dw=\d+ bad=(\d+) sweeps=(\d+) sw=\d+ gap_us=\d+")


# What a 16550 holds: a FIFO, and the character that is being sent.
_PORT_CHARACTERS = 16 + 1
# How what the guest's program says begins; a kernel's own words are not of interest.
_OURS = ("HB", "BAD")


def _beat(line: Line) -> Beat | None:
    found = _BEAT.fullmatch(line.text)
    return Beat(line.time, *map(int, found.groups())) if found else None


def _goes_on(beats: Sequence[Beat], text: str) -> bool:
    """Whether ``text`` is the heartbeat that follows the last of ``beats``."""
    beat = _beat(Line(0.0, text))
    return beat is not None and (not beats or beat.seq == beats[-1].seq + 1)


def joined_line(before: str, after: str, makes_sense: Callable[[str], bool]) -> str:
    """A line that begins on one machine and ends on another. A QEMU whose serial port was blocked
    may repeat the last character, on either machine, and more than once. The characters that waited
    in the port may come out of both machines. The reading that makes sense is returned.
    """
    last = before[-1:]
    head, tail = before.rstrip(last), after.lstrip(last)
    most = len(before) + len(after) - len(head) - len(tail)
    readings = itertools.chain(
        (head + last * count + tail for count in range(most, 0, -1)),
        (
            before + after[count:]
            for count in range(2, _PORT_CHARACTERS + 1)
            if before.endswith(f"{after}\r"[:count])
        ),
    )
    told = (reading.rstrip("\r") for reading in readings)
    return next(filter(makes_sense, told), (before + after).rstrip("\r"))


class Serial(Words):
    """What comes out of a machine's serial port."""

    def __init__(self, name: str, errors: Path) -> None:
        super().__init__(name)
        self._errors = errors
        self.beats: list[Beat] = []

    def take(self, line: Line) -> None:
        super().take(line)
        if beat := _beat(line):
            self.beats.append(beat)

    async def wait_beats(self, seconds: float) -> None:
        """Wait until the guest has worked for ``seconds`` since its first heartbeat."""

        def has_worked() -> bool:
            return bool(self.beats) and self.beats[-1].time - self.beats[0].time >= seconds

        await self.wait(has_worked, "heartbeat", _PATIENCE)

    async def wait_verified(self) -> None:
        """Wait until the guest has swept through all its memory from now on. A sweep is under way,
        so the one after it counts."""
        await self.wait(lambda: self.beats, "heartbeat", _SILENCE)
        enough, began = self.beats[-1].sweeps + 2, trio.current_time()
        while self.beats[-1].sweeps < enough:
            await self._wait_beat()
            if trio.current_time() > began + _PATIENCE:
                raise PagenetError(
                    f"{self.name}: no round through its memory for {_PATIENCE:.0f} s"
                )

    async def _wait_beat(self) -> None:
        known = len(self.beats)
        await self.wait(lambda: len(self.beats) > known, "heartbeat", _SILENCE)

    def complaint(self) -> str:
        told = [line.text for line in self.lines[-1:] if not line.text.startswith("HB")]
        told += (
            self._errors.read_text(errors="replace").splitlines()[-1:]
            if self._errors.exists()
            else []
        )
        return f": {told[-1]}" if told else ""


@dataclass(frozen=True, slots=True)
class Story:
    """A guest's heartbeats on all the machines that it was in. ``broken``: the first line that is a
    garbled heartbeat, or a heartbeat that does not follow the one before it."""

    beats: Sequence[Beat]
    broken: str | None

    @classmethod
    def of(cls, *serials: Serial) -> Story:
        """Of a guest that was in all of these machines, one after the other."""
        beats: list[Beat] = []
        broken: list[str] = []
        cut = ""
        for serial in serials:
            for line in serial.lines:
                said = Line(
                    line.time, joined_line(cut, line.text, lambda text: _goes_on(beats, text))
                )
                beat = _beat(said)
                if not _goes_on(beats, said.text) and (beat or said.text.startswith(_OURS)):
                    broken.append(said.text)
                if beat:
                    beats.append(beat)
                cut = ""
            cut += serial.rest.decode(errors="replace")
        return cls(beats, broken[0] if broken else None)

    @property
    def unbroken(self) -> bool:
        return self.broken is None

    @property
    def bad(self) -> int:
        """Pages whose content was wrong."""
        return self.beats[-1].bad

    def longest_gap(self, start: float, end: float) -> float:
        """Seconds between two heartbeats, of which the later came after ``start`` and the earlier
        before ``end``."""
        return max(
            later.time - earlier.time
            for earlier, later in itertools.pairwise(self.beats)
            if later.time > start and earlier.time < end
        )

    def writes_at(self, time: float) -> float:
        """Pages written until ``time``, interpolated between two heartbeats."""
        place = bisect.bisect_left(self.beats, time, key=lambda beat: beat.time)
        if place in (0, len(self.beats)):
            return self.beats[max(0, place - 1)].writes
        before, after = self.beats[place - 1], self.beats[place]
        share = (
            (time - before.time) / (after.time - before.time) if after.time > before.time else 1.0
        )
        return before.writes + share * (after.writes - before.writes)

    def rate(self, start: float, end: float) -> float:
        """Pages written per second."""
        return (self.writes_at(end) - self.writes_at(start)) / (end - start)


# ---- the machine ----


@dataclass(slots=True)
class Machine:
    """``qmp``: the bench's own monitor; ``monitor``: the socket of the other one; ``ram``: the file
    of its RAM, if it is shared."""

    pid: int
    qmp: Qmp
    monitor: Path
    serial: Serial
    ram: Path


@asynccontextmanager
async def start_machine(
    site: Site, guest: Guest, name: str, *options: str, at: int, shared: bool
) -> AsyncIterator[Machine]:
    """QEMU with that guest, until the block ends."""
    command = [*qemu_command(site, guest, name, shared=shared), *options]
    if shared:
        with (site.directory / f"{name}.ram").open("wb") as file:
            file.truncate(guest.ram)
    async with (
        site.running(command, name, at, subprocess.DEVNULL, end=9) as process,
        meet_machine(site, name, process.pid, name) as machine,
    ):
        yield machine


@asynccontextmanager
async def meet_machine(site: Site, name: str, pid: int, started_as: str) -> AsyncIterator[Machine]:
    """A QEMU that was started under the name ``started_as``, by the bench or for it. It is killed
    when the block ends."""
    serial = Serial(f"the guest ({name})", site.errors(started_as))
    async with killing(pid) as pidfd:
        site.listen_to(serial, await _connect(site.directory / f"{name}.serial", pidfd, serial))
        async with connect_qmp(site.directory / f"{name}.ours", wait=_PATIENCE) as qmp:
            yield Machine(
                pid, qmp, site.directory / f"{name}.qmp", serial, site.directory / f"{name}.ram"
            )


async def _connect(path: Path, pidfd: int, serial: Serial) -> trio.SocketStream:
    """Connect early enough for the guest's first words: QEMU drops output while no client is
    connected."""
    while not select.select([pidfd], [], [], 0)[0]:
        try:
            return await trio.open_unix_socket(path)
        except OSError:
            await trio.sleep(0.005)  # QEMU has not made it yet
    raise PagenetError(f"QEMU has ended at once{serial.complaint()}")
