"""What kind of machine a QEMU runs, where its RAM is, and whether it can move."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import Unsupported, UsageError
from ..protocol import printable
from ..uffd import Mapped, Mapping, OtherProcess
from .qmp import Qmp, QmpError

__all__ = ["CAPABILITIES", "Machine", "Ram", "check_leaving", "describe", "ram_of", "ram_source"]

#: What a migration by pagenet needs of QEMU: its own stream leaves shared RAM out, tells what it does, has the destination
#: confirm that the devices' state was loaded, and waits for us with the guest stopped. The destination takes its disks (and
#: their locks) no sooner than it runs: until then the source may go on, and needs them.
CAPABILITIES = ("x-ignore-shared", "events", "return-path", "pause-before-switchover", "late-block-activate")
# x-ignore-shared came with 4.0, and 8.1 narrowed it to RAM that has a name.
_OLDEST = (5, 0, 0)
# Of QEMU's other ways to migrate, those that make another stream, or none at all, of what pagenet has it send.
_IN_THE_WAY = (
    "postcopy-ram", "postcopy-preempt", "multifd", "compress", "block", "x-colo", "background-snapshot", "rdma-pin-all",
    "mapped-ram", "zero-copy-send",
)  # fmt: skip
_HINT = "-object memory-backend-file,id=ram0,size=SIZE,mem-path=PATH,share=on -machine ...,memory-backend=ram0"
_NOT_MIGRATING = (None, "none", "completed", "failed", "cancelled")
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
        return self._is_older(source.get("version"))

    def _is_older(self, theirs: object) -> str | None:
        """A newer QEMU loads what an older one has saved, by the machine type's version; not the other way round."""
        if not isinstance(theirs, list) or not all(isinstance(number, int) for number in theirs):
            return "the source does not say which QEMU it is"
        if self.version[:2] >= tuple(theirs[:2]):
            return None
        versions = f"{_dotted(tuple(theirs))} at the source, {_dotted(self.version)} at the destination"
        return f"the destination's QEMU is older: {versions}; it must be the source's or a newer one"


async def describe(qmp: Qmp) -> Machine:
    """Ask a QEMU what it is. :exc:`~pagenet.errors.UsageError` for one that pagenet cannot move, whatever it does."""
    version = (await qmp.command("query-version"))["qemu"]
    number = (version["major"], version["minor"], version["micro"])
    if number < _OLDEST:
        raise UsageError(f"this is QEMU {_dotted(number)}: pagenet moves guests of QEMU {_dotted(_OLDEST)} or newer")
    backend = await _backend(qmp)
    capabilities = await qmp.command("query-migrate-capabilities")
    known = {capability["capability"]: capability["state"] for capability in capabilities}
    if missing := [name for name in CAPABILITIES if name not in known]:
        raise UsageError(f"this QEMU ({_dotted(number)}) has no migration capability {missing[0]}")
    if wrong := [name for name in _IN_THE_WAY if known.get(name)]:
        raise UsageError(f"switch off QEMU's migration capability {wrong[0]} (migrate-set-capabilities): pagenet needs its own")
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


async def check_leaving(qmp: Qmp, machine: Machine) -> None:
    """:exc:`~pagenet.errors.UsageError` if the guest of that QEMU cannot leave it now."""
    if machine.status != "running":
        raise UsageError(f"the guest is not running but {machine.status}: there is nothing to move while it runs")
    migration = await qmp.command("query-migrate")
    if migration.get("status") not in _NOT_MIGRATING:
        raise UsageError(f"QEMU is migrating already ({migration['status']}): wait for it, or say migrate_cancel")
    if reasons := migration.get("blocked-reasons"):  # QEMU 6.0; before, it says so when it is to begin
        raise UsageError(f"QEMU cannot migrate this guest: {reasons[0].rstrip('.')}; take that out of it")


async def _backend(qmp: Qmp) -> dict[str, Any]:
    try:
        path = await qmp.command("qom-get", path="/machine", property="memory-backend")
    except QmpError:
        path = ""
    backends = await qmp.command("query-memdev")
    named = [backend for backend in backends if path and backend.get("id") == path.rpartition("/")[2]]
    if not named:
        raise UsageError(f"the machine's RAM has no memory backend of its own: start it with {_HINT}")
    if len(backends) > 1:
        raise UsageError(f"the machine has {len(backends)} memory backends: pagenet moves guests with one")
    return dict(named[0])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@dataclass(frozen=True, slots=True)
class Ram:
    """A machine's RAM in a QEMU that runs: where it is mapped, and the ``file`` behind it, a descriptor
    taken from QEMU (it may have no name any more, or one that means another file here; None: it holds
    none). ``name``: for people."""

    mapping: Mapping
    file: int | None
    name: str

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)


def ram_of(pid: int, machine: Machine) -> Ram:
    """:exc:`~pagenet.errors.UsageError` if it is not shared, :exc:`~pagenet.errors.Unsupported` if we may not look."""
    if not machine.shared:
        is_named = not machine.backend.endswith(".ram")  # else QEMU's own, of a machine that was given none
        hint = f"start it with share=on for {machine.backend}" if is_named else f"start it with {_HINT}"
        raise UsageError(f"QEMU would send private RAM itself, which takes as long as a precopy: {hint}")
    try:
        with closing(OtherProcess(pid)) as qemu:
            found = next((start for start, size in _shared(qemu.maps()) if size == machine.ram), None)
            if found is None:
                raise UsageError(f"found no shared mapping of {machine.ram} bytes in QEMU (pid {pid})")
            file = qemu.take_file([Mapping(found, machine.ram, 0, mmap.PAGESIZE)])
        name = f"pid {pid}" if file is None else printable(os.readlink(f"/proc/self/fd/{file}"))
        page_size = mmap.PAGESIZE if file is None else max(os.fstatvfs(file).f_bsize, mmap.PAGESIZE)
    except OSError as error:
        hint = "run as root, or as its user with ptrace access (kernel.yama.ptrace_scope=0)"
        raise Unsupported(f"may not look into QEMU (pid {pid}): {error.strerror}; {hint}") from None
    return Ram(Mapping(found, machine.ram, 0, page_size), file, name)


def _shared(mapped: Sequence[Mapped]) -> Iterator[tuple[int, int]]:
    """Where files are mapped shared from their beginning on, and how much: what lies side by side is one, in however many parts
    the kernel has it."""
    parts = [part for part in mapped if part.mode == "rw-s"]
    for at, first in enumerate(parts):
        end = first.end
        for part in parts[at + 1 :]:
            same = (part.device, part.inode) == (first.device, first.inode)
            if not same or part.start != end or part.offset != part.start - first.start:
                break
            end = part.end
        if first.offset == 0:
            yield first.start, end - first.start


@contextmanager
def ram_source(pid: int, machine: Machine) -> Iterator[str]:
    """What :func:`pagenet.open_source` is to be given, while the block runs, for the RAM of a QEMU that
    runs as ``pid``: the file that it holds open, or its addresses. Raises what :func:`ram_of` does."""
    with closing(ram_of(pid, machine)) as ram:
        here = f"pid:{pid}:{ram.mapping.address:#x}+{ram.mapping.size:#x}"
        yield here if ram.file is None else f"/proc/self/fd/{ram.file}"
