"""What kind of machine a QEMU runs, where its RAM is, and whether it can move."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .qmp import Qmp, QmpError

__all__ = ["CAPABILITIES", "Machine", "describe", "ram_source"]

#: What a migration by pagenet needs of QEMU: its own stream leaves shared RAM out, tells what it does, has the destination
#: confirm that the devices' state was loaded, and waits for us with the guest stopped.
CAPABILITIES = ("x-ignore-shared", "events", "return-path", "pause-before-switchover")
# x-ignore-shared came with 4.0, and 8.1 narrowed it to RAM that has a name.
_OLDEST = (5, 0, 0)
#: what must be the same on both sides
_SAME = {"arch": "architecture", "kind": "machine type", "ram": "RAM size", "cpus": "number of CPUs"}


@dataclass(frozen=True, slots=True)
class Machine:
    """``backend``: the id of the memory backend; ``ram``: bytes of it."""

    version: tuple[int, int, int]
    kind: str
    ram: int
    cpus: int
    arch: str
    kvm: bool
    status: str
    backend: str
    shared: bool

    def as_message(self) -> dict[str, Any]:
        return {**asdict(self), "version": list(self.version)}

    def difference(self, source: dict[str, Any]) -> str | None:
        """Why this machine cannot take over from that one (its :meth:`as_message`); None: nothing is known against it."""
        for name, words in _SAME.items():
            theirs, ours = source.get(name), getattr(self, name)
            if theirs != ours:
                return f"the {words} differs: {theirs} at the source, {ours} at the destination; start it with the source's"
        if source.get("kvm") != self.kvm:
            here, there = ("KVM", "TCG") if self.kvm else ("TCG", "KVM")
            return f"the accelerator differs: {there} at the source, {here} at the destination"
        return None


async def describe(qmp: Qmp) -> Machine:
    """Ask a QEMU what it is. :exc:`~pagenet.errors.UsageError` for one that pagenet cannot move, whatever it does."""
    version = (await qmp.command("query-version"))["qemu"]
    number = (version["major"], version["minor"], version["micro"])
    if number < _OLDEST:
        raise UsageError(f"this is QEMU {_dotted(number)}: pagenet moves guests of QEMU {_dotted(_OLDEST)} or newer")
    backend = await _backend(qmp)
    known = {capability["capability"] for capability in await qmp.command("query-migrate-capabilities")}
    if missing := [name for name in CAPABILITIES if name not in known]:
        raise UsageError(f"this QEMU ({_dotted(number)}) has no migration capability {missing[0]}")
    return Machine(
        version=number,
        kind=await qmp.command("qom-get", path="/machine", property="type"),
        ram=backend["size"],
        cpus=len(await qmp.command("query-cpus-fast")),
        arch=(await qmp.command("query-target"))["arch"],
        kvm=(await qmp.command("query-kvm"))["enabled"],
        status=(await qmp.command("query-status"))["status"],
        backend=backend["id"],
        shared=backend["share"],
    )


async def _backend(qmp: Qmp) -> dict[str, Any]:
    try:
        path = await qmp.command("qom-get", path="/machine", property="memory-backend")
    except QmpError:
        path = ""
    backends = await qmp.command("query-memdev")
    named = [backend for backend in backends if path and backend.get("id") == path.rpartition("/")[2]]
    if not named:
        hint = "-object memory-backend-file,id=ram0,size=SIZE,mem-path=PATH,share=on -machine ...,memory-backend=ram0"
        raise UsageError(f"the machine's RAM has no memory backend of its own: start QEMU with {hint}")
    if len(backends) > 1:
        raise UsageError(f"the machine has {len(backends)} memory backends: pagenet moves guests with one")
    return dict(named[0])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def ram_source(pid: int, machine: Machine) -> str:
    """What :func:`pagenet.serve` is to be given for the RAM of a QEMU that runs as ``pid``: the file that it holds open, or its
    addresses. :exc:`~pagenet.errors.UsageError` if it is neither."""
    if not machine.shared:
        hint = f"start the source with share=on for {machine.backend}"
        raise UsageError(f"QEMU would send private RAM itself, which takes as long as a precopy: {hint}")
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError as error:
        raise UsageError(f"cannot look into QEMU (pid {pid}): {error.strerror}; run as its user or as root") from None
    for line in lines:
        span, mode, offset, device, inode, *_ = line.split()
        start, end = (int(number, 16) for number in span.split("-"))
        if mode == "rw-s" and end - start == machine.ram and int(offset, 16) == 0:
            return _descriptor(pid, device, int(inode)) or f"pid:{pid}:{start:#x}+{machine.ram:#x}"
    raise UsageError(f"found no shared mapping of {machine.ram} bytes in QEMU (pid {pid})")


def _descriptor(pid: int, device: str, inode: int) -> str | None:
    """The file as the process holds it: it may have no name any more, or one that means another file here."""
    major, minor = (int(number, 16) for number in device.split(":"))
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                status = entry.stat()
                if (status.st_dev, status.st_ino) == (os.makedev(major, minor), inode):
                    return str(entry)
    return None
