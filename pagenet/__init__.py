"""Post-copy memory migration: touched pages are fetched at once, the rest in the background."""

from typing import TYPE_CHECKING, Any

from .background.schedule import Schedule
from .destination.hosting import Guest, Host, host
from .destination.into_file import IntoFile
from .destination.pulling import Transfer, pull
from .direct import direct_source
from .errors import (
    ConnectionBroken,
    ConnectionBusy,
    ConnectionClosed,
    GuestReclaimed,
    HandshakeError,
    LocalProtocolError,
    OwnerGone,
    PagenetError,
    ProtocolError,
    RemoteProtocolError,
    SourceDisconnected,
    SourceLost,
    SourceUnreachable,
    Unsupported,
    Untrusted,
    UsageError,
)
from .events import EventHandler
from .region import Block, Region, Run
from .residency import Residency, State
from .source.memory import Source, open_source
from .source.serving import Server, serve
from .statistics import ClassStatistics, Histogram, ServingStatistics, TransferStatistics
from .tcp import TcpTransport, UnixTransport
from .tls import Tls
from .transport import Transport, register
from .uffd import AbandonedOwner, Mapping, OwnMemory, UffdSocket, WriteTracker

if TYPE_CHECKING:
    from .rdma import RdmaTransport

__version__ = "0.1.0"

__all__ = [
    "AbandonedOwner",
    "Block",
    "ClassStatistics",
    "ConnectionBroken",
    "ConnectionBusy",
    "ConnectionClosed",
    "EventHandler",
    "Guest",
    "GuestReclaimed",
    "HandshakeError",
    "Histogram",
    "Host",
    "IntoFile",
    "LocalProtocolError",
    "Mapping",
    "OwnMemory",
    "OwnerGone",
    "PagenetError",
    "ProtocolError",
    "RdmaTransport",
    "Region",
    "RemoteProtocolError",
    "Residency",
    "Run",
    "Schedule",
    "Server",
    "ServingStatistics",
    "Source",
    "SourceDisconnected",
    "SourceLost",
    "SourceUnreachable",
    "State",
    "Tls",
    "Transfer",
    "TransferStatistics",
    "UffdSocket",
    "Unsupported",
    "Untrusted",
    "UsageError",
    "WriteTracker",
    "direct_source",
    "host",
    "open_source",
    "pull",
    "register",
    "serve",
]


def _rdma() -> Transport:
    from .rdma import RdmaTransport  # later: most programs do without

    return RdmaTransport(TcpTransport())


def __getattr__(name: str) -> Any:
    if name == "RdmaTransport":
        from .rdma import RdmaTransport

        return RdmaTransport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register("tcp", TcpTransport())
register("unix", UnixTransport())
register("rdma", _rdma)
