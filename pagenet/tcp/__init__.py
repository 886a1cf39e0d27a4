"""Connections over the host's sockets: ``tcp://HOST:PORT`` and ``unix:PATH``.

::

    _constants.py    the constants, and the reasons for them
    _uri.py          URIs in: (host, port) or a path out, or a UsageError
    _connection.py   SocketConnection, for both kinds of socket; translates errno
    _listener.py     SocketListener: accept, whatever else happens
    _tcp.py          TcpTransport: names, addresses, the options of a TCP socket
    _unix.py         UnixTransport: socket files, their modes and their leftovers
    _pair.py         PairTransport: connections within this process
"""

from __future__ import annotations

from ._connection import SocketConnection
from ._pair import PairTransport
from ._tcp import TcpTransport, assume_near, tune
from ._unix import UnixTransport
from ._uri import unix_uri

__all__ = [
    "PairTransport",
    "SocketConnection",
    "TcpTransport",
    "UnixTransport",
    "assume_near",
    "tune",
    "unix_uri",
]
