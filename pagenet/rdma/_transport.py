"""``rdma://HOST:PORT``: messages go over a connection of another transport, to that host and
port."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self
from urllib.parse import SplitResult, parse_qsl

from ..background.pacing import Background
from ..destination.filling import Filling
from ..destination.lanes import Lanes
from ..errors import PagenetError, SourceUnreachable, UsageError
from ..protocol import Encoding
from ..region import Region
from ..source.memory import Source
from ..tls import Tls
from ..transport import (
    Buffer,
    Connection,
    LaneKind,
    Listener,
    TlsTransport,
    Transport,
    identity_of,
    is_near,
    resumes_at_once,
    security_of,
)
from ._keys import NativeMemory
from ._lanes import Carrier, RdmaLanes, can_run_in_c
from ._memory import RegisteredMemory, serve_reads
from ._path import Path, Wanted, check_device, choose_path
from ._read_lanes import ReadLanes

_SHAPE = "say rdma://HOST:PORT, with ?device=NAME and &gid=INDEX if need be"


class RdmaConnection:
    """A :class:`~pagenet.transport.Connection` that is ``OneSided``, for source and destination.
    Owns ``carrier``."""

    def __init__(self, carrier: Carrier, wanted: Wanted) -> None:
        self.carrier = carrier
        self._wanted = wanted
        self._path: Path | None = None
        #: owns the socket once it was taken from the carrier. The socket stays open until this
        #: connection is closed: closing a socket with unread bytes would discard our last message.
        self._socket = ExitStack()
        self.peer = _renamed(carrier.peer)

    def __repr__(self) -> str:
        return f"<RdmaConnection by way of {self.carrier!r}>"

    async def send(self, *buffers: Buffer) -> None:
        await self.carrier.send(*buffers)

    async def receive_into(self, buffer: memoryview) -> int:
        return await self.carrier.receive_into(buffer)

    def close(self) -> None:
        self._socket.close()
        self.carrier.close()

    @property
    def path(self) -> Path:
        if self._path is None:
            self._path = choose_path(self._wanted, self.carrier.local_host)
        return self._path

    @property
    def identity(self) -> tuple[str, ...]:
        return identity_of(self.carrier)

    @property
    def security(self) -> str:
        how = security_of(self.carrier)
        return f"pages in plain text, words {how}" if how else ""

    @property
    def resumes_at_once(self) -> bool:
        return resumes_at_once(self.carrier)

    @property
    def is_near(self) -> bool:
        return is_near(self.carrier)

    def find_path(self) -> str:
        return str(self.path)

    def open_memory(
        self, source: Source, pin_limit: int, lane: LaneKind
    ) -> NativeMemory | RegisteredMemory:
        return (RegisteredMemory if lane == "trio" else NativeMemory)(source, self.path, pin_limit)

    async def serve_reads(self, memory: Any, unread: bytes) -> None:
        if isinstance(memory, NativeMemory):
            await memory.serve(self.carrier, unread, self._socket)
        else:
            assert isinstance(memory, RegisteredMemory)
            await serve_reads(self, self.path, memory, unread)

    def make_lanes(
        self,
        filling: Filling,
        wire: Region,
        connections: Sequence[Any],
        background: Background,
        kind: LaneKind,
    ) -> Lanes:
        if len(connections) > 2:
            raise UsageError(
                "over RDMA the background has one queue pair, which fills the network: leave"
                " --background-lanes"
            )
        if not filling.encodings >> Encoding.RAW & 1:
            raise UsageError(
                "over RDMA pages are READ as they are in the source's memory: leave --compress"
                " lz4 out"
            )
        if kind != "trio" and can_run_in_c(filling.target):
            carriers = [connection.carrier for connection in connections]
            return RdmaLanes(filling, wire, carriers, self.path, background, self.peer)
        if kind == "native":
            raise UsageError("lanes in C need memory behind a userfaultfd: use lane trio")
        return ReadLanes(filling, wire, connections, self.path, background)


class RdmaListener:
    """A :class:`~pagenet.transport.Listener`. Owns ``carrier``."""

    def __init__(self, carrier: Listener, wanted: Wanted) -> None:
        self._carrier = carrier
        self._wanted = wanted
        self.uri = _renamed(carrier.uri)

    async def accept(self) -> RdmaConnection:
        carrier: Any = await self._carrier.accept()
        return RdmaConnection(carrier, self._wanted)

    def close(self) -> None:
        self._carrier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class RdmaTransport:
    """A :class:`~pagenet.transport.Transport`. ``carrier`` is the transport for ``tcp://``, which
    is given the same host and port.

    ``?device=`` and ``&gid=`` name a device of this side, and the index of one of its GIDs. The URI
    of a listener, which is for peers to dial, is without them.
    """

    def __init__(self, carrier: Transport) -> None:
        self._carrier = carrier

    async def dial(self, uri: SplitResult) -> RdmaConnection:
        """Dial ``uri``. Raises :exc:`~pagenet.errors.Unsupported` if this host has no RDMA."""
        return await self._dial(uri, self._carrier.dial)

    async def dial_tls(self, uri: SplitResult, tls: Tls) -> RdmaConnection:
        """As :meth:`dial`. The messages are encrypted, and the pages are not."""
        _check_pages(tls)
        return await self._dial(uri, lambda where: self._encrypting.dial_tls(where, tls))

    async def listen(self, uri: SplitResult) -> RdmaListener:
        """Listen on ``uri``. Raises :exc:`~pagenet.errors.Unsupported` if this host has no RDMA."""
        return await self._listen(uri, self._carrier.listen)

    async def listen_tls(self, uri: SplitResult, tls: Tls) -> RdmaListener:
        """As :meth:`listen`. The messages are encrypted, and the pages are not."""
        _check_pages(tls)
        return await self._listen(uri, lambda where: self._encrypting.listen_tls(where, tls))

    @property
    def _encrypting(self) -> TlsTransport:
        assert isinstance(self._carrier, TlsTransport)
        return self._carrier

    async def _dial(
        self, uri: SplitResult, dial: Callable[[SplitResult], Awaitable[Connection]]
    ) -> RdmaConnection:
        wanted = _wanted(uri)
        check_device(wanted)
        try:
            carrier: Any = await dial(_carriers(uri))
        except (UsageError, SourceUnreachable) as error:
            raise _reworded(error) from error
        return RdmaConnection(carrier, wanted)

    async def _listen(
        self, uri: SplitResult, listen: Callable[[SplitResult], Awaitable[Listener]]
    ) -> RdmaListener:
        wanted = _wanted(uri)
        check_device(wanted)
        try:
            carrier = await listen(_carriers(uri))
        except UsageError as error:
            raise _reworded(error) from error
        return RdmaListener(carrier, wanted)

    def is_private(self, uri: SplitResult) -> bool:
        _wanted(uri)
        try:
            return self._carrier.is_private(_carriers(uri))
        except UsageError as error:
            raise _reworded(error) from error


def _check_pages(tls: Tls) -> None:
    if not tls.plaintext_pages:
        raise UsageError(
            "over rdma:// the devices move the pages, and TLS does not encrypt them: say"
            " --plaintext-pages if the network is yours alone, or take tcp://"
        )


def _wanted(uri: SplitResult) -> Wanted:
    values: dict[str, str] = {}
    try:
        pairs = (
            parse_qsl(uri.query, keep_blank_values=True, strict_parsing=True) if uri.query else []
        )
    except ValueError:
        raise UsageError(f"{uri.geturl()}: what is {uri.query!r} for? {_SHAPE}") from None
    for name, value in pairs:
        if name not in ("device", "gid") or name in values or not value:
            raise UsageError(f"{uri.geturl()}: what is {f'{name}={value}'!r} for? {_SHAPE}")
        values[name] = value
    gid = values.get("gid")
    if gid is not None and not (gid.isascii() and gid.isdecimal() and int(gid) < 256):
        raise UsageError(f"{uri.geturl()}: {gid!r} is no index of a GID, a number from 0 to 255")
    return Wanted(values.get("device"), None if gid is None else int(gid))


def _carriers(uri: SplitResult) -> SplitResult:
    return uri._replace(scheme="tcp", query="")


def _renamed(uri: str) -> str:
    return uri.replace("tcp://", "rdma://", 1)


def _reworded(error: PagenetError) -> PagenetError:
    return type(error)(str(error).replace("tcp://", "rdma://"))
