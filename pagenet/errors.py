"""What can go wrong, named by what the caller can do about it.

::

    PagenetError                 anything pagenet raises on purpose
    ├── UsageError               the arguments contradict each other or the facts: change them     (exit 2)
    ├── SourceUnreachable        nothing answers where the peer should be: start it, check the URI (exit 3)
    ├── SourceLost               the source was there and is gone: pages are missing               (exit 4)
    ├── OwnerGone                the process that faults is gone: nothing is left to do            (exit 5)
    ├── ProtocolError            bytes that make no sense
    │   ├── LocalProtocolError   pagenet was about to send them: a bug of the caller or of pagenet
    │   └── RemoteProtocolError  the peer sent them: it is broken, hostile, or too new             (exit 6)
    ├── HandshakeError           an owner's handshake makes no sense: that owner is turned away
    ├── Unsupported              this kernel or this process may not do it: the text says what to change (exit 7)
    ├── ConnectionBroken         the connection died under us, or its peer left early               (exit 4)
    ├── ConnectionClosed         we closed it ourselves
    └── ConnectionBusy           two tasks use one direction of a connection at once: a bug of the caller

``exit_code`` is what the daemons exit with when the error ends them; 1 means that pagenet has no better word.
"""

from __future__ import annotations

__all__ = [
    "ConnectionBroken",
    "ConnectionBusy",
    "ConnectionClosed",
    "HandshakeError",
    "LocalProtocolError",
    "OwnerGone",
    "PagenetError",
    "ProtocolError",
    "RemoteProtocolError",
    "SourceLost",
    "SourceUnreachable",
    "Unsupported",
    "UsageError",
]


class PagenetError(Exception):
    exit_code = 1


class UsageError(PagenetError):
    exit_code = 2


class SourceUnreachable(PagenetError):
    exit_code = 3


class SourceLost(PagenetError):
    exit_code = 4


class OwnerGone(PagenetError):
    exit_code = 5


class ProtocolError(PagenetError):
    exit_code = 6


class LocalProtocolError(ProtocolError):
    pass


class RemoteProtocolError(ProtocolError):
    pass


class HandshakeError(PagenetError):
    exit_code = 6


class Unsupported(PagenetError):
    exit_code = 7


class ConnectionBroken(PagenetError):
    exit_code = 4


class ConnectionClosed(PagenetError):
    pass


class ConnectionBusy(PagenetError):
    pass
