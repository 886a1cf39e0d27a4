"""What kind of machine a QEMU runs, where its RAM is, and whether it can move."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields
from typing import Any

from ..errors import Unsupported, UsageError
from ..protocol import printable
from ..uffd import Mapped, Mapping, OtherProcess
from .qmp import Qmp

__all__ = [
    "CAPABILITIES",
    "Backend",
    "Machine",
    "Ram",
    "check_leaving",
    "describe",
    "files_of",
    "host_address",
    "ram_of",
    "ram_sources",
    "source_specs",
]

#: The capabilities of QEMU that a migration by pagenet needs. QEMU's own stream leaves out shared
#: RAM; QEMU reports what it does; the destination confirms that the devices' state was loaded; QEMU
#: waits for us with the guest stopped. The destination takes its disks (and their locks) only when
#: its guest runs: until then the source may go on, and needs them.
CAPABILITIES = (
    "x-ignore-shared",
    "events",
    "return-path",
    "pause-before-switchover",
    "late-block-activate",
)
_OLDEST = (5, 0, 0)
# From this version on x-ignore-shared leaves out only RAM that is a named file.
_NAMED_ONLY = (8, 1, 0)
# Capabilities with which QEMU sends another stream than pagenet needs, or none at all.
_IN_THE_WAY = (
    "postcopy-ram", "postcopy-preempt", "multifd", "compress", "block", "x-colo",
    "background-snapshot", "rdma-pin-all", "mapped-ram", "zero-copy-send",
)  # fmt: skip
_HINT = (
    "-object memory-backend-file,id=ram0,size=SIZE,mem-path=PATH,share=on -machine"
    " ...,memory-backend=ram0"
)
_NOT_MIGRATING = (None, "none", "completed", "failed", "cancelled")
#: what must be the same on both sides
_SAME = {
    "arch": "architecture",
    "kind": "machine type",
    "ram": "RAM size",
    "cpus": "number of CPUs",
}


@dataclass(frozen=True, slots=True)
class Backend:
    """A memory backend: its id, QOM type, bytes, whether it is shared, and its address in QEMU."""

    name: str
    kind: str
    size: int
    shared: bool
    address: int

    def source(self, pid: int) -> str:
        """Its addresses in the QEMU that runs as ``pid``, for :func:`pagenet.open_source`."""
        return f"pid:{pid}:{self.address:#x}+{self.size:#x}"


@dataclass(frozen=True, slots=True)
class Machine:
    """``ram``: bytes of all its ``backends``. They are in the order of their ids, which is the same
    on both sides, while QEMU's own order is that of a hash table."""

    version: tuple[int, int, int]
    kind: str
    ram: int
    cpus: int
    arch: str
    kvm: bool
    status: str
    backends: tuple[Backend, ...]

    @property
    def leaves_out_ram(self) -> bool:
        """Whether QEMU's own stream can leave out this RAM (``x-ignore-shared``)."""
        return self.version < _NAMED_ONLY or all(
            backend.kind == "memory-backend-file" for backend in self.backends
        )

    @property
    def blocks(self) -> list[list[Any]]:
        """Id and bytes of each backend: the same on both sides where there are several backends."""
        return [[backend.name, backend.size] for backend in self.backends]

    def as_message(self) -> dict[str, Any]:
        told = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "backends"
        }
        return {**told, "version": list(self.version), "blocks": self.blocks}

    def difference(self, source: dict[str, Any]) -> str | None:
        """Why this machine cannot take over from ``source`` (that one's :meth:`as_message`); None
        if there is no known reason."""
        for name, words in _SAME.items():
            theirs, ours = source.get(name), getattr(self, name)
            if theirs != ours:
                return (
                    f"the {words} differs: {theirs} at the source, {ours} at the destination; start"
                    " it with the source's"
                )
        if source.get("kvm") != self.kvm:
            here, there = ("KVM", "TCG") if self.kvm else ("TCG", "KVM")
            return f"the accelerator differs: {there} at the source, {here} at the destination"
        return self._has_other_blocks(source.get("blocks")) or self._is_older(source.get("version"))

    def _has_other_blocks(self, theirs: object) -> str | None:
        """Why the backends do not fit, or None. A single backend may have any id; several are told
        apart by their ids."""
        count = len(theirs) if isinstance(theirs, list) else 1  # an older pagenet sends none
        if theirs == self.blocks or count == len(self.backends) == 1:
            return None
        ours = ", ".join(f"{name} of {size} bytes" for name, size in self.blocks)
        return (
            f"the memory backends differ: {ours} at the destination; give them the source's ids and"
            " sizes"
        )

    def _is_older(self, theirs: object) -> str | None:
        """Why this QEMU is too old, or None. A newer QEMU loads what an older one has saved, by the
        machine type's version, but not the other way round."""
        if not isinstance(theirs, list) or not all(isinstance(number, int) for number in theirs):
            return "the source does not say which QEMU it is"
        if self.version[:2] >= tuple(theirs[:2]):
            return None
        versions = (
            f"{_dotted(tuple(theirs))} at the source, {_dotted(self.version)} at the destination"
        )
        return (
            f"the destination's QEMU is older: {versions}; it must be the source's or a newer one"
        )


async def describe(qmp: Qmp) -> Machine:
    """Ask a QEMU which machine it runs. :exc:`~pagenet.errors.UsageError` if pagenet cannot move
    the guest of that QEMU in any state."""
    version = (await qmp.command("query-version"))["qemu"]
    number = (version["major"], version["minor"], version["micro"])
    if number < _OLDEST:
        raise UsageError(
            f"this is QEMU {_dotted(number)}: pagenet moves guests of QEMU {_dotted(_OLDEST)} or"
            " newer"
        )
    backends = await _backends(qmp)
    capabilities = await qmp.command("query-migrate-capabilities")
    known = {capability["capability"]: capability["state"] for capability in capabilities}
    if missing := [name for name in CAPABILITIES if name not in known]:
        raise UsageError(f"this QEMU ({_dotted(number)}) has no migration capability {missing[0]}")
    if wrong := [name for name in _IN_THE_WAY if known.get(name)]:
        raise UsageError(
            f"switch off QEMU's migration capability {wrong[0]} (migrate-set-capabilities): pagenet"
            " needs its own"
        )
    return Machine(
        version=number,
        kind=await qmp.command("qom-get", path="/machine", property="type"),
        ram=sum(backend.size for backend in backends),
        cpus=len(await qmp.command("query-cpus-fast")),
        arch=(await qmp.command("query-target"))["arch"],
        kvm=(await qmp.command("query-kvm"))["enabled"],
        status=(await qmp.command("query-status"))["status"],
        backends=backends,
    )


async def check_leaving(qmp: Qmp, machine: Machine) -> None:
    """:exc:`~pagenet.errors.UsageError` if the guest of that QEMU cannot leave it now."""
    if machine.status != "running":
        raise UsageError(
            f"the guest is not running but {machine.status}: there is nothing to move while it runs"
        )
    migration = await qmp.command("query-migrate")
    if migration.get("status") not in _NOT_MIGRATING:
        raise UsageError(
            f"QEMU is migrating already ({migration['status']}): wait for it, or say migrate_cancel"
        )
    # Since QEMU 6.0. An older QEMU gives the reason when it is told to migrate.
    if reasons := migration.get("blocked-reasons"):
        raise UsageError(
            f"QEMU cannot migrate this guest: {reasons[0].rstrip('.')}; take that out of it"
        )


async def _backends(qmp: Qmp) -> tuple[Backend, ...]:
    """All memory backends, which must be the machine's RAM: one, or one for each NUMA node."""
    found = await qmp.command("query-memdev")
    if not found:
        raise UsageError(
            f"the machine's RAM has no memory backend of its own: start it with {_HINT}"
        )
    summary = await qmp.command("query-memory-size-summary")
    if (
        summary.get("plugged-memory")
        or sum(backend["size"] for backend in found) != summary["base-memory"]
    ):
        raise UsageError(
            f"the machine has {len(found)} memory backends, and not all of them are its RAM or a"
            " NUMA node's: pagenet moves guests without the others (DIMMs, virtio-mem, ivshmem...)"
        )
    addresses = await _addresses(qmp, {str(backend["id"]) for backend in found})
    backends = []
    for backend in sorted(found, key=lambda backend: str(backend["id"])):
        name = str(backend["id"])
        if name not in addresses:
            raise UsageError(
                f"the memory backend {name} is not in the guest's memory: leave it out"
            )
        kind = await qmp.command("qom-get", path=f"/objects/{name}", property="type")
        backends.append(Backend(name, kind, backend["size"], backend["share"], addresses[name]))
    return tuple(backends)


# A range of the guest's memory that begins with the first byte of a memory region. QEMU adds
# @OFFSET to any other range.
_FIRST_BYTE = re.compile(
    r"([0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, ram\): (\S+)(?: KVM)?$", re.MULTILINE
)
_HOST_ADDRESS = re.compile(r"is 0x([0-9a-f]+)")


async def _addresses(qmp: Qmp, names: set[str]) -> dict[str, int]:
    """The addresses in QEMU at which the backends with those ids begin. Sizes do not tell one
    node's backend from another's."""
    found: dict[str, int] = {}
    for start, path in _FIRST_BYTE.findall(await qmp.monitor("info mtree -f")):
        name = path.rpartition("/")[2]  # a path or a name, by the machine type
        if name in names - found.keys():
            address = await host_address(qmp, start)
            if address is not None:
                found[name] = address
    return found


async def host_address(qmp: Qmp, start: str) -> int | None:
    """The address in QEMU of the guest's memory at ``start``, in hexadecimal; None: QEMU does not
    say."""
    told = _HOST_ADDRESS.search(await qmp.monitor(f"gpa2hva 0x{start}"))
    return int(told[1], 16) if told else None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@dataclass(frozen=True, slots=True)
class Ram:
    """A backend's memory in a QEMU that runs. ``file``: the file behind it, as a descriptor taken
    from QEMU, because that file may have no name any more, or its name may mean another file here;
    None: QEMU has no descriptor of it. ``name``: for people to read.
    """

    mapping: Mapping
    file: int | None
    name: str

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)


def files_of(rams: Sequence[Ram]) -> list[int]:
    """The files behind ``rams``. :exc:`~pagenet.errors.UsageError` if QEMU holds none open."""
    files = [ram.file for ram in rams if ram.file is not None]
    if len(files) < len(rams):
        raise UsageError("QEMU holds no descriptor of the guest's RAM")
    return files


@contextmanager
def ram_of(pid: int, machine: Machine) -> Iterator[list[Ram]]:
    """The memory of each backend in process ``pid``, while the block runs.
    :exc:`~pagenet.errors.UsageError` for a backend that is not shared,
    :exc:`~pagenet.errors.Unsupported` if this user may not look into that process."""
    for backend in machine.backends:
        if not backend.shared:
            # QEMU's own backend, of a machine that was given none, ends in .ram
            is_named = not backend.name.endswith(".ram")
            hint = (
                f"start it with share=on for {backend.name}"
                if is_named
                else f"start it with {_HINT}"
            )
            raise UsageError(
                f"QEMU would send private RAM itself, which takes as long as a precopy: {hint}"
            )
    with ExitStack() as stack:
        try:
            found = _taken(pid, machine, stack)
        except OSError as error:
            hint = "run as root, or as its user with ptrace access (kernel.yama.ptrace_scope=0)"
            raise Unsupported(
                f"may not look into QEMU (pid {pid}): {error.strerror}; {hint}"
            ) from None
        yield found


def _taken(pid: int, machine: Machine, stack: ExitStack) -> list[Ram]:
    found, offset = list[Ram](), 0
    with closing(OtherProcess(pid)) as qemu:
        shared = set(_shared(qemu.maps()))
        for backend in machine.backends:
            if (backend.address, backend.size) not in shared:
                raise UsageError(
                    f"found no shared mapping of {backend.size} bytes in QEMU (pid {pid}) for"
                    f" {backend.name}"
                )
            found.append(_ram(qemu, backend, offset))
            stack.callback(found[-1].close)
            offset += backend.size
    return found


def _ram(qemu: OtherProcess, backend: Backend, offset: int) -> Ram:
    file = qemu.take_file([Mapping(backend.address, backend.size, 0, mmap.PAGESIZE)])
    name = f"pid {qemu.pid}" if file is None else printable(os.readlink(f"/proc/self/fd/{file}"))
    page_size = mmap.PAGESIZE if file is None else max(os.fstatvfs(file).f_bsize, mmap.PAGESIZE)
    return Ram(Mapping(backend.address, backend.size, offset, page_size), file, name)


def _shared(mapped: Sequence[Mapped]) -> Iterator[tuple[int, int]]:
    """Address and bytes of each shared mapping of a file from its first byte on. Adjacent parts of
    one file are one mapping, however many of them the kernel has."""
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


def source_specs(pid: int, machine: Machine, rams: Sequence[Ram]) -> list[str]:
    """What to give to :func:`pagenet.open_source` for the RAM of the QEMU that runs as ``pid``,
    which :func:`ram_of` has found, while that one's block runs: for each backend the file that QEMU
    holds open, or its addresses."""
    return [
        backend.source(pid) if ram.file is None else f"/proc/self/fd/{ram.file}"
        for ram, backend in zip(rams, machine.backends, strict=True)
    ]


@contextmanager
def ram_sources(pid: int, machine: Machine) -> Iterator[list[str]]:
    """What to give to :func:`pagenet.open_source`, while the block runs, for the RAM of the QEMU
    that runs as ``pid``. Raises what :func:`ram_of` does."""
    with ram_of(pid, machine) as rams:
        yield source_specs(pid, machine, rams)
