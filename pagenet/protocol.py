"""The protocol between source and destination, with no I/O in it. ``docs/protocol.md`` is the
specification.

A connection has two phases. It begins with **messages**: a 12-byte frame header and a msgpack map;
a hello from the side that dialled, and a hello in answer. The control connection carries messages
to its end. A lane connection then changes to **lane headers**: fixed, little-endian, 24 bytes;
requests from destination to source, replies from source to destination, a reply's header followed
by its payload. Payload never passes through this module.

Everything decoded here comes from a stranger: each field is checked before it is used, ranges by
subtraction.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum
from typing import Any, ClassVar, Literal, TypeVar

import msgpack

from .errors import LocalProtocolError, RemoteProtocolError, UsageError
from .region import MAX_BLOCKS, MAX_PAGE_SIZE, Block, Region, Run

__all__ = [
    "ALIVE",
    "LZ4",
    "MAX_STALE_BYTES",
    "TRACKED",
    "Alive",
    "Bye",
    "Channel",
    "Class",
    "Compress",
    "Encoding",
    "Failure",
    "Hello",
    "Message",
    "MessageDecoder",
    "OutstandingRequests",
    "Pause",
    "Paused",
    "Reply",
    "Request",
    "RequestDecoder",
    "Role",
    "Stale",
    "encode_message",
    "encodings_for",
    "negotiate",
    "printable",
]

E = TypeVar("E", bound=Enum)

# ---- fixed on the wire ----

VERSION = 1
OLDEST_VERSION = 1
MAGIC = b"PGNT"
FRAME_HEADER = struct.Struct("<4sHHI")  # magic, version of the framing, reserved (0), body length
# 4096 blocks with names of 255 four-byte characters would be 4.2 MB; real tables are a few
# kilobytes.
MAX_MESSAGE = 2 << 20
#: Limit of a destination's message, which has no block table. A source keeps no more than this of a
#: peer that it knows nothing about.
MAX_DESTINATION_MESSAGE = 64 << 10
# id, class, encodings, unit shift, reserved, first, count, reserved
REQUEST_HEADER = struct.Struct("<IBBBBQII")
REPLY_HEADER = struct.Struct("<IBBHQII")  # id, class, encoding, reserved, first, count, length
LANE_HEADER_SIZE = 24
#: Limit of one request, in bytes, unless a single page is larger.
MAX_REQUEST_BYTES = 4 << 20
#: Limit of the lanes that a destination may ask for, of a source that dials.
MAX_LANES = 64
#: Limit of the text of a FAILED reply.
MAX_REASON_BYTES = 1024
#: Limit of the uncompressed size of one compressed reply.
MAX_LZ4_BYTES = 2 << 20
#: The feature of a source that compresses on request.
LZ4 = "lz4"
#: The feature of a source whose memory changes while it is served, until it says otherwise; and of
#: a destination that can be told of it.
TRACKED = "tracked"
#: The feature of a side that says :class:`Alive` to a peer that has it too.
ALIVE = "alive"
#: The feature of a destination that takes streams which the source that dials it opens unasked.
STREAMS = "streams"
#: The feature of a source that can be asked for what it has itself, and of a lane on which it is.
HELD = "held"
#: Limit of the bits of one message about stale pages.
MAX_STALE_BYTES = 1 << 20

assert REQUEST_HEADER.size == REPLY_HEADER.size == LANE_HEADER_SIZE


class Role(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"


class Channel(StrEnum):
    """What a connection is for."""

    CONTROL = "control"
    DEMAND = "demand"
    BACKGROUND = "background"
    STREAM = "stream"  # the application's own bytes, in both directions


class Class(IntEnum):
    """Why a run travels. Counters, limits and latencies are kept per class."""

    DEMAND = 0
    PREFETCH = 1
    BACKGROUND = 2


class Encoding(IntEnum):
    RAW = 0
    ZERO = 1
    LZ4 = 2
    ABSENT = 254
    FAILED = 255


#: ``auto``: where the link and the processor make it faster; ``lz4``: all data that becomes
#: smaller; ``none``
Compress = Literal["auto", "lz4", "none"]


def content_identity(text: str) -> bytes:
    """The identity (16 bytes) of the content that ``text`` describes."""
    return hashlib.sha256(text.encode()).digest()[:16]


def encodings_for(compress: Compress, features: frozenset[str]) -> int:
    """The encodings, a bit each, that a destination asks for of a source with ``features``."""
    if compress == "none" or LZ4 not in features:
        return 1 << Encoding.RAW | 1 << Encoding.ZERO
    return 1 << Encoding.ZERO | 1 << Encoding.LZ4 | (compress == "auto") << Encoding.RAW


# ---- messages ----


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message in each direction of every connection.

    A source's hello on the control channel carries the region; a destination's carries the lanes
    that the source is to dial. The hello of a lane names the session that the source's control
    hello gave out (16 bytes).
    """

    TYPE: ClassVar[str] = "hello"
    role: Role
    channel: Channel
    session: bytes = b""
    identity: bytes = b""
    region: Region | None = None
    lanes: tuple[Channel, ...] = ()
    features: frozenset[str] = frozenset()
    version: int = VERSION
    oldest: int = OLDEST_VERSION


@dataclass(frozen=True, slots=True)
class Failure:
    """The sender gives up on this connection. The reason: a code for machines, a line for
    people."""

    TYPE: ClassVar[str] = "failure"
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Bye:
    """The sender is done. From a destination: whether every page is in place."""

    TYPE: ClassVar[str] = "bye"
    complete: bool


@dataclass(frozen=True, slots=True)
class Alive:
    """The sender still runs: twice a second, in both directions."""

    TYPE: ClassVar[str] = "alive"


@dataclass(frozen=True, slots=True)
class Pause:
    """From a tracked source: ask for nothing more, and say when nothing is in flight."""

    TYPE: ClassVar[str] = "pause"


@dataclass(frozen=True, slots=True)
class Paused:
    """From a destination: nothing is in flight, because no page is missing, or because it was
    paused. ``round``: 1 until the first stale pages are named, then one more each time."""

    TYPE: ClassVar[str] = "paused"
    round: int
    missing: int


@dataclass(frozen=True, slots=True)
class Stale:
    """From a tracked source, in answer to :class:`Paused`: pages that have changed since they were
    sent. ``bits``: a bit for each page from ``first`` on, the lowest of a byte first; bits behind
    the region's last page mean nothing. ``more``: another message of this round follows.
    ``frozen``: the memory does not change any more."""

    TYPE: ClassVar[str] = "stale"
    round: int
    first: int
    bits: bytes
    more: bool
    frozen: bool


Message = Hello | Failure | Bye | Alive | Pause | Paused | Stale


def encode_message(message: Message) -> bytes:
    body = msgpack.packb({"type": message.TYPE, **_fields_of(message)})
    if len(body) > MAX_MESSAGE:
        raise LocalProtocolError(f"a message of {len(body)} bytes (limit {MAX_MESSAGE})")
    return FRAME_HEADER.pack(MAGIC, 1, 0, len(body)) + body


def _fields_of(message: Message) -> dict[str, Any]:
    match message:
        case Hello():
            fields: dict[str, Any] = {
                "version": message.version,
                "oldest": message.oldest,
                "role": message.role.value,
                "channel": message.channel.value,
                "session": message.session,
                "features": sorted(message.features),
            }
            if message.region is not None:
                fields["identity"] = message.identity
                fields["blocks"] = [[b.name, b.size, b.page_size] for b in message.region.blocks]
            if message.lanes:
                fields["lanes"] = [lane.value for lane in message.lanes]
            return fields
        case Failure():
            return {"code": message.code, "text": message.text}
        case Bye():
            return {"complete": message.complete}
        case Alive() | Pause():
            return {}
        case Paused():
            return {"round": message.round, "missing": message.missing}
        case Stale():
            return {
                "round": message.round,
                "first": message.first,
                "bits": message.bits,
                "more": message.more,
                "frozen": message.frozen,
            }


class MessageDecoder:
    """Bytes in, messages out.

    :meth:`feed` bytes as they come, then call :meth:`next` until it returns None. Bytes behind the
    last message are in :attr:`unread`. :exc:`~pagenet.errors.RemoteProtocolError` for anything that
    is not a message; nothing can be decoded after that. ``limit``: bytes of a message's body.
    """

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self.unread = bytearray()
        self._limit = limit

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self.unread += data

    def next(self) -> Message | None:
        """The next whole message, or None until more bytes are fed."""
        _check_magic(self.unread)
        if len(self.unread) < FRAME_HEADER.size:
            return None
        _, framing, _, length = FRAME_HEADER.unpack_from(self.unread)
        if framing != 1:
            raise RemoteProtocolError(
                f"the peer frames its messages in version {framing}; this pagenet knows version 1"
            )
        if length > self._limit:
            raise RemoteProtocolError(
                f"the peer announces a message of {length} bytes (limit {self._limit})"
            )
        end = FRAME_HEADER.size + length
        if len(self.unread) < end:
            return None
        body = bytes(self.unread[FRAME_HEADER.size : end])
        del self.unread[:end]
        return _decode_body(body)

    def check_eof(self) -> None:
        """Call when the peer has closed. :exc:`~pagenet.errors.RemoteProtocolError` if that was in
        the middle of a message."""
        if self.unread:
            raise RemoteProtocolError(
                f"the peer closed in the middle of a message ({len(self.unread)} bytes of it came)"
            )


def _check_magic(data: bytearray) -> None:
    if data[:4] != MAGIC[: len(data)]:
        raise RemoteProtocolError(
            f"the peer does not speak pagenet: it begins with {bytes(data[:16])!r}"
        )


def _decode_body(body: bytes) -> Message:
    try:
        fields = msgpack.unpackb(body, strict_map_key=True)
    except Exception as error:
        # msgpack raises ValueError, its own, and UnicodeDecodeError; all mean the same here
        raise RemoteProtocolError(
            f"the peer's message is not msgpack: {str(error) or type(error).__name__}"
        ) from None
    if not isinstance(fields, dict):
        raise RemoteProtocolError("the peer's message is not a map")
    match fields.get("type"):
        case "hello":
            return _decode_hello(fields)
        case "failure":
            return Failure(
                printable(_field(fields, "code", str)[:64]), printable(_field(fields, "text", str))
            )
        case "bye":
            return Bye(_field(fields, "complete", bool))
        case "alive":
            return Alive()
        case "pause":
            return Pause()
        case "paused":
            return Paused(_count(fields, "round"), _count(fields, "missing"))
        case "stale":
            return _decode_stale(fields)
        case other:
            raise RemoteProtocolError(
                f"the peer's message is of type {_shown(other)}, which is unknown"
            )


def _decode_hello(fields: dict[str, Any]) -> Hello:
    version, oldest = _field(fields, "version", int), _field(fields, "oldest", int)
    if not 0 < oldest <= version:
        raise RemoteProtocolError(f"the peer claims to speak versions {oldest} to {version}")
    if oldest > VERSION or version < OLDEST_VERSION:
        # The other fields have no meaning in a version that we do not know.
        raise RemoteProtocolError(_no_common_version(oldest, version))
    session = _field(fields, "session", bytes)
    if len(session) not in (0, 16):
        raise RemoteProtocolError(f"the peer's session is {len(session)} bytes long, not 16")
    return Hello(
        role=_choice(Role, fields, "role"),
        channel=_choice(Channel, fields, "channel"),
        session=session,
        identity=_field(fields, "identity", bytes)[:64] if "identity" in fields else b"",
        region=(
            _decode_region(_list(fields, "blocks", limit=MAX_BLOCKS))
            if "blocks" in fields
            else None
        ),
        lanes=tuple(_decode_lane(lane) for lane in _list(fields, "lanes", limit=MAX_LANES)),
        features=frozenset(_strings(fields, "features")),
        version=version,
        oldest=oldest,
    )


def _decode_stale(fields: dict[str, Any]) -> Stale:
    bits = _field(fields, "bits", bytes)
    if not 0 < len(bits) <= MAX_STALE_BYTES:
        raise RemoteProtocolError(
            f"the peer's stale pages take {len(bits)} bytes (limit {MAX_STALE_BYTES})"
        )
    round_, first = _count(fields, "round"), _count(fields, "first")
    more, frozen = _field(fields, "more", bool), _field(fields, "frozen", bool)
    return Stale(round_, first, bits, more, frozen)


def _decode_lane(lane: object) -> Channel:
    channel = _choice(Channel, {"lanes": lane}, "lanes")
    if channel is Channel.CONTROL:
        raise RemoteProtocolError("the peer asks for its control channel as a lane")
    return channel


def _decode_region(blocks: list[Any]) -> Region:
    try:
        return Region(Block(*_block_fields(block)) for block in blocks)
    except UsageError as error:
        raise RemoteProtocolError(f"the peer's block table makes no sense: {error}") from None


def _block_fields(block: object) -> tuple[str, int, int]:
    match block:
        case [str() as name, int() as size, int() as page_size]:
            return name, size, page_size
    raise RemoteProtocolError(
        "the peer's block table has an entry that is not [name, size, page size]"
    )


def _field(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RemoteProtocolError(
            f"the peer's {fields.get('type', 'message')} has no proper {name!r}"
        )
    return value


def _count(fields: dict[str, Any], name: str) -> int:
    value: int = _field(fields, name, int)
    if value < 0:
        raise RemoteProtocolError(f"the peer's {fields['type']} has a {name} of {value}")
    return value


def _list(fields: dict[str, Any], name: str, limit: int) -> list[Any]:
    value: list[Any] = _field(fields, name, list) if name in fields else []
    if len(value) > limit:
        raise RemoteProtocolError(f"the peer's hello has {len(value)} {name} (limit {limit})")
    return value


def _strings(fields: dict[str, Any], name: str) -> Iterator[str]:
    for value in _list(fields, name, limit=64):
        if not isinstance(value, str):
            raise RemoteProtocolError(f"the peer's hello has {name} that are not text")
        yield value


def _choice(kind: type[E], fields: dict[str, Any], name: str) -> E:
    value = fields.get(name)
    if not isinstance(value, str) or value not in {choice.value for choice in kind}:
        raise RemoteProtocolError(f"the peer's hello has no proper {name!r}: {_shown(value)}")
    return kind(value)


def _shown(value: object) -> str:
    """A stranger's value, for the line of an error. Only text is shown, of anything else the type:
    the repr of a deep structure recurses too far."""
    return repr(value[:40]) if isinstance(value, str) else type(value).__name__


def printable(text: str) -> str:
    """A stranger's text for one line of a terminal: at most 1024 characters, with ``?`` for those
    that cannot be printed."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_REASON_BYTES])


def negotiate(hello: Hello) -> int:
    """The version that both sides speak from here on: the newest that both know.
    :exc:`~pagenet.errors.RemoteProtocolError` if there is none."""
    common = min(VERSION, hello.version)
    if common < max(OLDEST_VERSION, hello.oldest):
        raise RemoteProtocolError(_no_common_version(hello.oldest, hello.version))
    return common


def _no_common_version(oldest: int, version: int) -> str:
    return (
        f"the peer speaks protocol versions {oldest} to {version}, this pagenet {OLDEST_VERSION} to"
        f" {VERSION}: bring both to releases that overlap"
    )


# ---- lane headers ----


@dataclass(frozen=True, slots=True)
class Request:
    """Destination to source: send me these pages.

    ``unit_shift``: pages belong together in aligned groups of ``2**unit_shift`` (a huge page of the
    destination's); replies do not split a group. ``encodings``: the encodings that the destination
    takes, a bit each. It takes RAW in any case; RAW's bit tells the source that it need not
    compress where that is slower.
    """

    request_id: int
    class_: Class
    run: Run
    unit_shift: int = 0
    encodings: int = 1 << Encoding.RAW | 1 << Encoding.ZERO

    @property
    def may_pack(self) -> bool:
        return bool(self.encodings & 1 << Encoding.LZ4)

    @property
    def must_pack(self) -> bool:
        """Whether all data that becomes smaller must come compressed."""
        return self.may_pack and not self.encodings & 1 << Encoding.RAW

    def encode(self) -> bytes:
        return REQUEST_HEADER.pack(
            self.request_id,
            self.class_,
            self.encodings,
            self.unit_shift,
            0,
            self.run.first,
            self.run.count,
            0,
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """Source to destination: the header of these pages. ``length`` bytes of payload follow it.

    The replies to a request cover its run from first page to last, in order. FAILED carries a
    reason as UTF-8 and ends the request.
    """

    request_id: int
    class_: Class
    encoding: Encoding
    run: Run
    length: int

    def encode(self) -> bytes:
        return REPLY_HEADER.pack(
            self.request_id,
            self.class_,
            self.encoding,
            0,
            self.run.first,
            self.run.count,
            self.length,
        )


class RequestDecoder:
    """The source's side of a lane: bytes in, requests out, each checked against the region."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._unread = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self._unread += data

    def requests(self) -> Iterator[Request]:
        """All whole requests that were fed and not yet returned.
        :exc:`~pagenet.errors.RemoteProtocolError` at the first that is not valid."""
        whole = len(self._unread) // LANE_HEADER_SIZE * LANE_HEADER_SIZE
        headers, self._unread = bytes(self._unread[:whole]), self._unread[whole:]
        for fields in REQUEST_HEADER.iter_unpack(headers):
            yield self._checked(fields)

    def check_eof(self) -> None:
        if self._unread:
            raise RemoteProtocolError("the peer closed in the middle of a request")

    def _checked(self, fields: Sequence[int]) -> Request:
        request_id, class_, encodings, unit_shift, reserved, first, count, reserved2 = fields
        if reserved or reserved2:
            raise RemoteProtocolError("the peer's request has reserved bits set")
        run = Run(first, count)
        if not self._region.contains(run):
            raise RemoteProtocolError(
                f"the peer asks for {count} pages from page {first} on: not within one block of the"
                f" {self._region.pages} pages"
            )
        if not self._aligned(run, unit_shift):
            raise RemoteProtocolError(
                f"the peer's request is not made of whole units of 2**{unit_shift} pages"
            )
        size = self._region.size_of(run)
        if size > MAX_REQUEST_BYTES and count > 1 << unit_shift:
            raise RemoteProtocolError(
                f"the peer asks for {size} bytes at once (limit {MAX_REQUEST_BYTES})"
            )
        return Request(request_id, _class_of(class_), run, unit_shift, encodings)

    def _aligned(self, run: Run, unit_shift: int) -> bool:
        unit = 1 << unit_shift  # counted from the block's first page, not the region's
        index = self._region.block_index(run.first)
        first = run.first - self._region.first_pages[index]
        fits = self._region.blocks[index].page_size << unit_shift <= MAX_PAGE_SIZE
        return fits and first % unit == 0 and run.count % unit == 0


def _class_of(value: int) -> Class:
    try:
        return Class(value)
    except ValueError:
        raise RemoteProtocolError(
            f"the peer names transfer class {value}, which is unknown"
        ) from None


@dataclass(slots=True)
class _Outstanding:
    class_: Class
    run: Run
    unit: int
    may_pack: bool
    next: int = field(init=False)

    def __post_init__(self) -> None:
        self.next = self.run.first


class OutstandingRequests:
    """The destination's side of a lane: which requests are open, and whether a reply fits one.

    Request ids are given out here; an id is used again only 2**32 requests later.
    ``may_be_absent``: on a lane where the source is asked for what it has itself.
    """

    def __init__(
        self,
        region: Region,
        encodings: int = 1 << Encoding.RAW | 1 << Encoding.ZERO,
        may_be_absent: bool = False,
    ) -> None:
        self._region = region
        self._encodings = encodings
        self._may_be_absent = may_be_absent
        self._open: dict[int, _Outstanding] = {}
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(self, class_: Class, run: Run, unit_shift: int = 0, packed: bool = False) -> Request:
        """Open a request for ``run``. ``packed``: the source must compress what becomes smaller,
        whatever that costs. :exc:`~pagenet.errors.LocalProtocolError` for a run outside the
        region."""
        if not self._region.contains(run):
            raise LocalProtocolError(f"{run} is not a run of the region")
        encodings = self._encodings & ~(1 << Encoding.RAW) if packed else self._encodings
        request = Request(self._next_id, class_, run, unit_shift, encodings)
        self._next_id = (self._next_id + 1) % 2**32
        self._open[request.request_id] = _Outstanding(
            class_, run, 1 << unit_shift, request.may_pack
        )
        return request

    def reply(self, header: bytes | bytearray | memoryview) -> Reply:
        """Decode a reply's header and check it against the open requests. The request closes with
        its last page, or a failure. :exc:`~pagenet.errors.RemoteProtocolError` if the reply fits no
        open request."""
        request_id, class_, encoding, reserved, first, count, length = REPLY_HEADER.unpack(header)
        outstanding = self._open.get(request_id)
        if outstanding is None:
            raise RemoteProtocolError(f"the peer answers request {request_id}, which is not open")
        if class_ != outstanding.class_ or reserved:
            raise RemoteProtocolError("the peer's reply is of another class than its request")
        reply = Reply(
            request_id, outstanding.class_, _encoding_of(encoding), Run(first, count), length
        )
        if reply.encoding is Encoding.LZ4 and not outstanding.may_pack:
            raise RemoteProtocolError("the peer compresses with lz4, which was not asked for")
        if reply.encoding is Encoding.FAILED:
            self._check_failure(reply)
        elif reply.encoding is Encoding.ABSENT:
            self._check_absence(reply, outstanding)
        else:
            self._check_pages(reply, outstanding)
            outstanding.next = reply.run.end
        is_last = reply.encoding in (Encoding.FAILED, Encoding.ABSENT)
        if is_last or outstanding.next == outstanding.run.end:
            del self._open[request_id]
        return reply

    def is_open(self, request_id: int) -> bool:
        return request_id in self._open

    @staticmethod
    def _check_failure(reply: Reply) -> None:
        if reply.length > MAX_REASON_BYTES:
            raise RemoteProtocolError(
                f"the peer announces a reason of {reply.length} bytes (limit {MAX_REASON_BYTES})"
            )

    def _check_absence(self, reply: Reply, outstanding: _Outstanding) -> None:
        if not self._may_be_absent:
            raise RemoteProtocolError(f"the peer names encoding {reply.encoding}, which is unknown")
        is_whole = reply.run == outstanding.run and outstanding.next == reply.run.first
        if not is_whole or reply.length:
            raise RemoteProtocolError("the peer says that a part of what was asked for is absent")

    def _check_pages(self, reply: Reply, outstanding: _Outstanding) -> None:
        first, count, unit = reply.run.first, reply.run.count, outstanding.unit
        if (
            first != outstanding.next
            or not 0 < count <= outstanding.run.end - first
            or count % unit
        ):
            raise RemoteProtocolError(
                f"the peer answers out of turn: with {count} pages from page {first} on"
            )
        size = self._region.size_of(reply.run) if reply.encoding is not Encoding.ZERO else 0
        packed = reply.encoding is Encoding.LZ4
        if not 0 < reply.length < size if packed else reply.length != size:
            raise RemoteProtocolError(
                f"the peer announces {reply.length} bytes for {count} pages of {size} bytes in all"
            )
        if packed and size > MAX_LZ4_BYTES:
            raise RemoteProtocolError(
                f"the peer compresses {size} bytes at once (limit {MAX_LZ4_BYTES})"
            )


def _encoding_of(value: int) -> Encoding:
    try:
        return Encoding(value)
    except ValueError:
        raise RemoteProtocolError(f"the peer names encoding {value}, which is unknown") from None
