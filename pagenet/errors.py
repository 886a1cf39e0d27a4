"""What can go wrong, named by what the caller can do about it.

::

    PagenetError                 whatever pagenet raises on purpose
    ├── UsageError               (2) arguments contradict each other or the facts: change them
    ├── SourceUnreachable        (3) nothing answers where the peer should be: check the URI
    ├── SourceLost               (4) the source was there and is gone: pages are missing
    │   └── SourceDisconnected       its connections broke: the same source may answer again
    ├── OwnerGone                (5) the process that faults is gone: nothing is left to do
    ├── ProtocolError            (6) bytes that break the protocol
    │   ├── LocalProtocolError       pagenet was about to send them: a bug here or of the caller
    │   └── RemoteProtocolError      the peer sent them: it is broken, hostile, or too new
    │       └── Untrusted        (8) TLS: one side does not trust the other's certificate or key
    ├── HandshakeError           (6) an owner's handshake makes no sense: that owner is refused
    │   └── OwnerLeft                or it has ended, and so is an OwnerGone too
    ├── Unsupported              (7) this kernel or process may not do it: the text says what to do
    ├── GuestReclaimed           (9) the guest has gone back to its source, and runs there
    ├── ConnectionBroken         (4) the connection died, or its peer left early
    ├── ConnectionClosed             this side closed the connection
    └── ConnectionBusy               two tasks use one direction of a connection: the caller's bug

``exit_code`` is the exit code of a daemon that the error ends; 1 means that the failure has no code
of its own.
"""

from __future__ import annotations

__all__ = [
    "ConnectionBroken",
    "ConnectionBusy",
    "ConnectionClosed",
    "GuestReclaimed",
    "HandshakeError",
    "LocalProtocolError",
    "OwnerGone",
    "OwnerLeft",
    "PagenetError",
    "ProtocolError",
    "RemoteProtocolError",
    "SourceDisconnected",
    "SourceLost",
    "SourceUnreachable",
    "Unsupported",
    "Untrusted",
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


class SourceDisconnected(SourceLost):
    pass


class OwnerGone(PagenetError):
    exit_code = 5


class ProtocolError(PagenetError):
    exit_code = 6


class LocalProtocolError(ProtocolError):
    pass


class RemoteProtocolError(ProtocolError):
    pass


class Untrusted(RemoteProtocolError):
    exit_code = 8


class HandshakeError(PagenetError):
    exit_code = 6


class OwnerLeft(HandshakeError, OwnerGone):
    pass


class Unsupported(PagenetError):
    exit_code = 7


class GuestReclaimed(PagenetError):
    exit_code = 9


class ConnectionBroken(PagenetError):
    exit_code = 4


class ConnectionClosed(PagenetError):
    pass


class ConnectionBusy(PagenetError):
    pass
