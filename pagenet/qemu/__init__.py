"""Live migration of stock QEMU guests: the guest moves at once, and its pages follow.

::

    _preload.py      where the library is that hands over a QEMU's RAM (native/preload.c)
    command_line.py  what a QEMU needs that is to receive a guest
    qmp.py           its monitor
    machine.py       what machine it is, and where its RAM is
    _talk.py         what the two sides say to each other
    migration.py     the source: migrate()
    arrival.py       the destination: receive()
"""

from __future__ import annotations

from ._talk import MigrationRefused
from .arrival import Arrival, receive, receive_attached
from .command_line import Incoming, prepare_incoming
from .machine import Machine, describe, ram_source
from .migration import migrate
from .qmp import Qmp, QmpError, QmpEvent, connect_qmp, monitor_pid

__all__ = [
    "Arrival",
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
    "ram_source",
    "receive",
    "receive_attached",
]
