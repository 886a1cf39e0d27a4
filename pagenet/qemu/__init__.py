"""Live migration of stock QEMU guests: the guest moves at once, and its pages follow.

::

    _preload.py      the path of the library that hands over a QEMU's RAM (native/preload.c)
    command_line.py  the command line of a QEMU that is to receive a guest
    qmp.py           a client of QEMU's monitor
    machine.py       the machine that a QEMU runs, and where its RAM is
    _guard.py        a process that acts if ours is killed during a switchover
    _talk.py         the messages between the two sides
    precopy.py       whether memory can be copied before the guest leaves
    devices.py       the two ways in which the devices' state leaves a QEMU
    _stream.py       QEMU's migration stream, where QEMU does not write it itself
    migration.py     the source: migrate()
    arrival.py       the destination: receive()
    _offer.py        the moment at which the guest changes sides
    reclaiming.py    the source takes the guest back: reclaim()
    returning.py     the destination gives it back
    _half.py         the pages that the destination has, on their way back
    halves.py        both halves of a guest's memory, joined without its hosts
    _qcow2.py        the devices' state, in a form that a QEMU which has run loads
"""

from __future__ import annotations

from ..source.precopy import Precopy
from ._talk import MigrationRefused
from .arrival import Arrival, receive, receive_attached
from .command_line import Incoming, prepare_incoming
from .halves import join_halves, save_half
from .machine import Backend, Machine, describe, ram_sources
from .migration import migrate
from .qmp import Qmp, QmpError, QmpEvent, connect_qmp, monitor_pid
from .reclaiming import reclaim, reclaim_from
from .returning import Returning, ending_when_reclaimed

__all__ = [
    "Arrival",
    "Backend",
    "Incoming",
    "Machine",
    "MigrationRefused",
    "Precopy",
    "Qmp",
    "QmpError",
    "QmpEvent",
    "Returning",
    "connect_qmp",
    "describe",
    "ending_when_reclaimed",
    "join_halves",
    "migrate",
    "monitor_pid",
    "prepare_incoming",
    "ram_sources",
    "receive",
    "receive_attached",
    "reclaim",
    "reclaim_from",
    "save_half",
]
