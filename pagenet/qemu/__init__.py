"""Live migration of stock QEMU guests: the guest moves at once, and its pages follow.

::

    _preload.py      where the library is that hands over a QEMU's RAM (native/preload.c)
    command_line.py  what a QEMU needs that is to receive a guest
    qmp.py           its monitor
    machine.py       what machine it is, and where its RAM is
    _talk.py         what the two sides say to each other
    devices.py       how the devices' state leaves a QEMU
    _stream.py       QEMU's stream around it, where QEMU does not make one itself
    migration.py     the source: migrate()
    arrival.py       the destination: receive()
"""

from __future__ import annotations

from ._talk import MigrationRefused
from .arrival import Arrival, receive, receive_attached
from .command_line import Incoming, prepare_incoming
from .machine import Backend, Machine, describe, ram_sources
from .migration import migrate
from .qmp import Qmp, QmpError, QmpEvent, connect_qmp, monitor_pid

__all__ = [
    "Arrival",
    "Backend",
    "Incoming",
    "Machine",
    "MigrationRefused",
    "Qmp",
    "QmpError",
    "QmpEvent",
    "connect_qmp",
    "describe",
    "migrate",
    "monitor_pid",
    "prepare_incoming",
    "ram_sources",
    "receive",
    "receive_attached",
]
