"""The command line of the QEMU that receives a guest: what it must have, and what is added to
it."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..errors import UsageError
from ._preload import preload_library

__all__ = ["Incoming", "prepare_incoming"]

_WAITS = "it would wait for all of the RAM, which is yet to come"
_UNWANTED = {
    "-incoming": "pagenet-qemu adds its own",
    "-daemonize": "pagenet-qemu stays with it until it ends",
    "-mem-prealloc": _WAITS,
    "mem-lock=on": _WAITS,
}
# Looked for anywhere in an option's value.
_UNWANTED_DEVICES = {
    "vfio-": _WAITS,
    "vhost-user": (
        "its process would read zeros where pages are yet to come: QEMU's alone waits for them"
    ),
}
_ON = ("on", "yes", "true", "y")
_HINT = (
    "-object memory-backend-file,id=ram0,size=SIZE,mem-path=PATH,share=on -machine"
    " ...,memory-backend=ram0"
)


@dataclass(frozen=True, slots=True)
class _RamFile:
    """A file for QEMU's RAM. If ``is_new``, it was made here; if not, it was there, and empty."""

    path: Path
    device: int
    inode: int
    is_new: bool

    @classmethod
    def make(cls, path: Path, size: int) -> _RamFile:
        """Make the file at ``path``, of ``size`` bytes, or take an empty one that is there.
        :exc:`UsageError` if the name has anything else: every user may write in /dev/shm, and no
        other user may read a guest's RAM."""
        try:
            fd, is_new = _open_ram(path)
            try:
                status = os.fstat(fd)
                _check_ram(path, status, size)
                if not status.st_size:
                    os.ftruncate(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            is_link = error.errno == errno.ELOOP
            why = "it is a symbolic link: name the file itself" if is_link else error.strerror
            raise UsageError(f"cannot make the destination's RAM {path}: {why}") from None
        return cls(path, status.st_dev, status.st_ino, is_new)

    def undo(self) -> None:
        """Empty the file, and remove it if it was made here. Do nothing if the name has another
        file by now."""
        with suppress(OSError):
            fd = os.open(self.path, _RAM_FLAGS)
            try:
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) == (self.device, self.inode):
                    os.ftruncate(fd, 0)
                    if self.is_new:
                        self.path.unlink()
            finally:
                os.close(fd)


# A link or a FIFO that another user has put under the name is neither followed nor waited for.
_RAM_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _open_ram(path: Path) -> tuple[int, bool]:
    try:
        return os.open(path, _RAM_FLAGS | os.O_CREAT | os.O_EXCL, 0o600), True
    except FileExistsError:
        return os.open(path, _RAM_FLAGS), False


def _check_ram(path: Path, status: os.stat_result, size: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(
            f"{path} is not a regular file: name another one for the destination's RAM"
        )
    if status.st_uid not in (0, os.geteuid()) or status.st_nlink != 1:
        raise UsageError(
            f"{path} is another user's file, or has another name too: remove it, or name"
            " another one"
        )
    if status.st_blocks:
        raise UsageError(
            f"{path} holds bytes already: remove it, if no other machine uses it, or name another"
            " file"
        )
    if status.st_size not in (0, size):
        raise UsageError(
            f"{path} is {status.st_size} bytes long, and the destination's RAM {size}: remove it"
        )


@dataclass(slots=True)
class Incoming:
    """``command`` and ``environment`` of the QEMU to start; ``added``: the arguments that were
    added. ``rams``: the files behind its RAM, in the order of the backends' ids."""

    command: list[str]
    environment: dict[str, str]
    files: list[_RamFile]
    added: list[str]

    @property
    def rams(self) -> list[Path]:
        return [file.path for file in self.files]

    def undo(self) -> None:
        """The guest did not come: leave the RAM's files as they were, either empty or not there."""
        for file in self.files:
            file.undo()


def prepare_incoming(command: Sequence[str], monitor: Path, uffd_socket: Path) -> Incoming:
    """Prepare the QEMU of ``command`` to wait for a guest whose pages pagenet brings: with a
    monitor at ``monitor``, and its RAM handed over at ``uffd_socket``.

    A file of its RAM is made if it is not there. One that is there must hold no bytes, and gets the
    RAM's size. :exc:`~pagenet.errors.UsageError` for a command line that cannot receive a guest.
    """
    _check_wanted(command)
    backends = [_parse_backend(options) for options in _ram_options(command)]
    _check_room(backends)
    made: list[_RamFile] = []
    try:
        made.extend(_RamFile.make(ram, size) for ram, size in backends)
    except UsageError:
        for file in made:
            file.undo()
        raise
    added = ["-incoming", "defer", "-S", "-qmp", f"unix:{monitor},server=on,wait=off"]
    variables = {
        "LD_PRELOAD": ":".join(
            filter(None, [str(preload_library()), os.environ.get("LD_PRELOAD", "")])
        ),
        "PAGENET_UFFD_SOCKET": str(uffd_socket),
        "PAGENET_UFFD_FILES": ",".join(f"{file.device}:{file.inode}" for file in made),
    }
    return Incoming([*command, *added], {**os.environ, **variables}, made, added)


def _check_wanted(command: Sequence[str]) -> None:
    words = [_one_dash(word) for word in command]
    for word, why in _UNWANTED.items():
        if any(word in text.split(",") for text in words):
            raise UsageError(f"leave {word} out of QEMU's arguments: {why}")
    for flag, value in pairwise(words):
        for part, why in _UNWANTED_DEVICES.items():
            if flag in ("-device", "-netdev", "-chardev") and part in value:
                raise UsageError(f"leave {value} out of QEMU's arguments: {why}")


def _one_dash(word: str) -> str:
    """``word`` with one dash: QEMU takes options with one or two."""
    return word[1:] if word.startswith("--") else word


def _ram_options(command: Sequence[str]) -> list[dict[str, str]]:
    """The options of the memory backends that the machine and its NUMA nodes name, in the order of
    their ids, which is the order of the source's pages."""
    words = [_one_dash(word) for word in command]
    pairs = [
        (flag, _parse_options(value))
        for flag, value in pairwise(words)
        if flag in ("-object", "-machine", "-M", "-numa")
    ]
    machines = [
        options
        for flag, options in pairs
        if flag in ("-machine", "-M") and "memory-backend" in options
    ]
    nodes = {
        options["memdev"] for flag, options in pairs if flag == "-numa" and "memdev" in options
    }
    names = nodes or {options["memory-backend"] for options in machines[-1:]}
    backends = {
        options["id"]: options
        for flag, options in pairs
        if flag == "-object" and options.get("id") in names
    }
    if not backends or backends.keys() < names:
        raise UsageError(f"the destination's RAM must be a file: start QEMU with {_HINT}")
    return [backends[name] for name in sorted(backends)]


def _parse_backend(options: dict[str, str]) -> tuple[Path, int]:
    """The file and size in bytes of a memory backend. :exc:`UsageError` if it cannot be filled."""
    kind, name = options.get("") or options.get("qom-type"), options["id"]
    if kind != "memory-backend-file" or not {"mem-path", "size"} <= options.keys():
        attach = (
            "; or start it with -incoming defer, and attach: pagenet-qemu incoming --qmp"
            if "memfd" in str(kind)
            else ""
        )
        raise UsageError(
            f"the destination's RAM {name} must be a file, not {kind}: start QEMU with"
            f" {_HINT}{attach}"
        )
    ram = Path(options["mem-path"])
    if options.get("share") not in _ON:
        raise UsageError(
            f"the destination's RAM {ram} must be shared: add share=on to its memory-backend-file"
        )
    if options.get("prealloc") in _ON:
        raise UsageError(
            f"the destination's RAM {ram} must not be there before its pages come: leave out"
            " prealloc=on"
        )
    return ram, _parse_size(options["size"])


def _parse_options(value: str) -> dict[str, str]:
    """Parse ``first,name=value,...``, or JSON. The first value may lack a name, and is then under
    "". A comma in a value is written twice."""
    if value.startswith("{"):
        return _parse_json(value)
    parts = [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]
    options = {}
    for index, part in enumerate(parts):
        name, equals, text = part.partition("=")
        if index == 0 and not equals:
            options[""] = name
        else:
            options[name] = text if equals else "on"
    return options


def _parse_json(value: str) -> dict[str, str]:
    """The options of a JSON object, with the values that the other form would have."""
    try:
        words = json.loads(value)
    except (ValueError, RecursionError):
        return {}  # for QEMU to refuse
    spoken = {True: "on", False: "off"}
    return {
        str(name): spoken[word] if isinstance(word, bool) else str(word)
        for name, word in words.items()
    }


def _parse_size(text: str) -> int:
    units = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40}
    number, unit = (
        (text[:-1], text[-1].upper()) if text and not text[-1].isdecimal() else (text, "")
    )
    try:
        size = float(number)
    except ValueError:
        size = 0
    if unit not in units or size <= 0:
        raise UsageError(f"{text!r} is not a size that QEMU would take for its RAM")
    return int(size * (1 << units[unit]))


def _check_room(backends: Sequence[tuple[Path, int]]) -> None:
    """:exc:`UsageError` if a file system has no room for the RAM. A page that finds no room once
    the guest is here is lost, and the guest with it."""
    wanted: dict[int, int] = {}
    for ram, size in backends:
        try:
            device, system = os.stat(ram.parent).st_dev, os.statvfs(ram.parent)
        except OSError as error:
            raise UsageError(f"cannot make the destination's RAM {ram}: {error.strerror}") from None
        wanted[device] = wanted.get(device, 0) + size
        room = system.f_bavail * system.f_frsize
        if room < wanted[device]:
            hint = (
                "make it larger (mount -o remount,size=...; hugetlbfs: sysctl vm.nr_hugepages), or"
                " take another"
            )
            raise UsageError(
                f"the destination's RAM is {wanted[device]} bytes, and {ram.parent} has room for"
                f" {room}: {hint}"
            )
