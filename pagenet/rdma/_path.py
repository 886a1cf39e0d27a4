"""The device, port and GID that pages go by: those that the URI names, otherwise those that fit the
address of the connection that carries messages."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import Unsupported, UsageError
from ._constants import MAX_READS
from ._pyverbs import load, translated

__all__ = ["Path", "Wanted", "check_device", "choose_path", "default_path"]

_ACTIVE = 4  # IBV_PORT_ACTIVE
_ROCE_V1 = 1  # of enum ibv_gid_type: cannot be routed, and rdma_rxe does not speak it


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the URI names: a device, and the index of a GID. None: any."""

    device: str | None = None
    gid: int | None = None


@dataclass(frozen=True, slots=True)
class Path:
    device: str
    port: int
    gid_index: int
    gid: bytes
    lid: int
    #: as the verbs number it: 1 is 256 bytes, and each further step doubles it
    mtu: int
    #: READs in flight that the device allows on a queue pair, at most ``MAX_READS``
    reads: int

    def __str__(self) -> str:
        return f"{self.device} port {self.port}, gid {self.gid_index} ({_address(self.gid)})"


def _address(gid: bytes) -> str:
    address = ipaddress.IPv6Address(gid)
    return str(address.ipv4_mapped or address)


def default_path() -> Path:
    """The path that is taken when the URI names none. :exc:`Unsupported` if there is none."""
    return choose_path(Wanted(), "")


def check_device(wanted: Wanted) -> None:
    """Raise :exc:`Unsupported`, with one line that says what to do, if no device can be used;
    :exc:`UsageError` if the URI names a device or GID that does not exist."""
    choose_path(wanted, "")
    # imported now, and not while a thread waits for a page
    for name in ("addr", "cq", "enums", "mr", "pd", "qp", "wr"):
        load(name)


def choose_path(wanted: Wanted, local_host: str) -> Path:
    """The path whose GID is ``local_host``, an address of this host. If there is none: a path whose
    GID is an IPv4 address; otherwise any other, link-local addresses last."""
    paths = list(_paths(wanted))
    if not paths:
        raise _nothing_found(wanted)
    return min(paths, key=lambda path: _rank(path, local_host))


def _rank(path: Path, local_host: str) -> int:
    address = ipaddress.IPv6Address(path.gid)
    if local_host in (str(address), str(address.ipv4_mapped)):
        return 0
    return 1 if address.ipv4_mapped else 3 if address.is_link_local else 2


def _nothing_found(wanted: Wanted) -> Unsupported | UsageError:
    names = _device_names()
    if not names:
        return Unsupported(
            "there is no RDMA device on this host: load its driver, or make one in software "
            "(modprobe rdma_rxe; rdma link add rxe0 type rxe netdev INTERFACE)"
        )
    if wanted.device is not None and wanted.device not in names:
        return UsageError(
            f"there is no RDMA device {wanted.device!r} (there are {', '.join(names)})"
        )
    if wanted.gid is not None:
        return UsageError(
            f"no port that is up has a GID of index {wanted.gid} (`ibv_devinfo -v` lists them)"
        )
    return Unsupported(
        f"no port of {wanted.device or ', '.join(names)} is up and has an address (`rdma link`"
        " tells more)"
    )


def _device_names() -> list[str]:
    device = load("device")
    try:
        with translated("list RDMA devices"):
            return [found.name.decode() for found in device.get_device_list()]
    except OSError:  # the kernel has no RDMA at all
        return []


def _paths(wanted: Wanted) -> Iterator[Path]:
    for name in _device_names():
        if wanted.device in (None, name):
            try:
                with (
                    translated(f"open RDMA device {name}"),
                    load("device").Context(name=name) as context,
                ):
                    yield from list(_paths_of(context, name, wanted.gid))
            except OSError as error:
                raise Unsupported(
                    f"{error.strerror} (its user needs access to /dev/infiniband)"
                ) from None


def _paths_of(context: Any, name: str, gid_index: int | None) -> Iterator[Path]:
    attributes = context.query_device()
    ports = [
        (number, context.query_port(number)) for number in range(1, attributes.phys_port_cnt + 1)
    ]
    entries = context.query_gid_table(sum(port.gid_tbl_len for _, port in ports))
    for number, port in ports:
        for entry in entries:
            is_wanted = (
                entry.gid_type != _ROCE_V1 if gid_index is None else entry.gid_index == gid_index
            )
            if port.state == _ACTIVE and entry.port_num == number and is_wanted:
                gid = ipaddress.IPv6Address(entry.gid_str()).packed
                reads = min(MAX_READS, attributes.max_qp_rd_atom)
                yield Path(name, number, entry.gid_index, gid, port.lid, port.active_mtu, reads)
