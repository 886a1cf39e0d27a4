"""RDMA, where the destination reads pages out of the source's memory:
``rdma://HOST:PORT[?device=NAME&gid=INDEX]``.

::

    _constants.py   the constants, and the reasons for them
    _pyverbs.py     where pyverbs is, and its errors in one line
    _path.py        which device, port and GID
    _wire.py        the messages between the two sides, without I/O
    _transport.py   RdmaTransport: a TCP connection carries the messages
    _keys.py        the source: its threads in C, started and stopped
    _memory.py      the same in Trio and pyverbs: memory registered in chunks, and the keys to them
    _lanes.py       the destination: the loop in C, started and stopped
    _read_lanes.py  the same in Trio and pyverbs, slow and obvious
"""

from __future__ import annotations

from ._path import default_path
from ._transport import RdmaTransport
from ._wire import CHUNK_SIZE

__all__ = ["CHUNK_SIZE", "RdmaTransport", "default_path"]
