"""Post-copy memory migration: touched pages are fetched at once, the rest in the background."""

from .destination.hosting import Guest, Host, host
from .destination.into_file import IntoFile
from .destination.pulling import Transfer, pull
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
from .rdma import RdmaTransport
from .region import Block, Region, Run
from .source.memory import Source, open_source
from .source.serving import Server, serve
from .statistics import ClassStatistics, Histogram, ServingStatistics, TransferStatistics
from .tcp import TcpTransport, UnixTransport
from .tls import Tls
from .transport import register
from .uffd import AbandonedOwner, Mapping, OwnMemory, UffdSocket, WriteTracker

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
    "Run",
    "Server",
    "ServingStatistics",
    "Source",
    "SourceDisconnected",
    "SourceLost",
    "SourceUnreachable",
    "Tls",
    "Transfer",
    "TransferStatistics",
    "UffdSocket",
    "Unsupported",
    "Untrusted",
    "UsageError",
    "WriteTracker",
    "host",
    "open_source",
    "pull",
    "register",
    "serve",
]

register("tcp", TcpTransport())
register("unix", UnixTransport())
register("rdma", RdmaTransport(TcpTransport()))
