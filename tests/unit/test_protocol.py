"""pagenet/protocol.py, whole and in pieces, and docs/protocol.md compared with it."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import pagenet
from pagenet import Block, LocalProtocolError, Region, RemoteProtocolError, Run, protocol, transport
from pagenet.destination.sources import accepted_sources
from pagenet.protocol import (
    FRAME_HEADER,
    LANE_HEADER_SIZE,
    LZ4,
    MAX_LZ4_BYTES,
    MAX_MESSAGE,
    MAX_REASON_BYTES,
    MAX_REQUEST_BYTES,
    MAX_STALE_BYTES,
    REPLY_HEADER,
    REQUEST_HEADER,
    TRACKED,
    Alive,
    Bye,
    Channel,
    Class,
    Compress,
    Encoding,
    Failure,
    Hello,
    Message,
    MessageDecoder,
    OutstandingRequests,
    Pause,
    Paused,
    Reply,
    Request,
    RequestDecoder,
    Role,
    Stale,
    encode_message,
    encodings_for,
    negotiate,
    printable,
)
from pagenet.session import receive_exactly
from pagenet.testing import MemoryConnection, MemoryTransport

SESSION = bytes(range(16))
REGION = Region([Block("ram", 8 << 20), Block("rom", 12 << 10), Block("huge", 6 << 20, 2 << 20)])
ROM, HUGE = REGION.first_pages[1], REGION.first_pages[2]

HELLO = {
    "type": "hello",
    "version": 1,
    "oldest": 1,
    "role": "source",
    "channel": "control",
    "session": SESSION,
    "features": [],
}
MESSAGES: list[Message] = [
    Hello(Role.DESTINATION, Channel.CONTROL),
    Hello(Role.SOURCE, Channel.CONTROL, SESSION, b"identity" * 8, REGION),
    Hello(Role.DESTINATION, Channel.CONTROL, SESSION, lanes=(Channel.DEMAND, Channel.BACKGROUND)),
    Hello(Role.SOURCE, Channel.DEMAND, SESSION, features=frozenset({"lz4", "later"})),
    Failure("protocol", "the peer does not speak pagenet"),
    Bye(True),
    Bye(False),
    Hello(Role.DESTINATION, Channel.CONTROL, features=frozenset({TRACKED})),
    Alive(),
    Pause(),
    Paused(1, 0),
    Paused(2**64 - 1, 2**64 - 1),
    Stale(1, 0, b"\x01", more=False, frozen=False),
    Stale(2, 2**64 - 1, b"\0\xff" * 40, more=True, frozen=True),
]


def frame(
    body: bytes, *, magic: bytes = b"PGNT", framing: int = 1, length: int | None = None
) -> bytes:
    return FRAME_HEADER.pack(magic, framing, 0, len(body) if length is None else length) + body


def packed(**changes: Any) -> bytes:
    """A hello with ``changes``; a field that changes to ``...`` is left out."""
    return frame(
        msgpack.packb(
            {name: value for name, value in {**HELLO, **changes}.items() if value is not ...}
        )
    )


def decode(*pieces: bytes) -> list[Message]:
    """All messages in ``pieces``, which are fed one by one."""
    decoder = MessageDecoder()
    messages = []
    for piece in pieces:
        decoder.feed(piece)
        while (message := decoder.next()) is not None:
            messages.append(message)
    return messages


def one_byte_each(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def readable(parameter: object) -> str | None:
    """In the name of a test, bytes are hexadecimal and not too many."""
    return parameter[:LANE_HEADER_SIZE].hex() if isinstance(parameter, bytes) else None


def check_refused(reason: str, decode: Callable[[], object]) -> None:
    """``decode`` blames the peer, in one line of printable text."""
    with pytest.raises(RemoteProtocolError, match=reason) as caught:
        decode()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


# ---- messages ----


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_message_whole_in_bytes_and_with_another_behind_it(message: Message) -> None:
    data = encode_message(message)
    assert decode(data) == [message]
    assert decode(*one_byte_each(data)) == [message]
    assert decode(data + encode_message(Bye(False))) == [message, Bye(False)]


@pytest.mark.parametrize("message", MESSAGES, ids=repr)
def test_message_cut_anywhere(message: Message) -> None:
    data = encode_message(message)
    for end in range(1, len(data)):
        decoder = MessageDecoder()
        decoder.feed(data[:end])
        assert decoder.next() is None
        check_refused(rf"closed in the middle of a message \({end} bytes", decoder.check_eof)


def test_eof_between_messages() -> None:
    decoder = MessageDecoder()
    decoder.check_eof()
    decoder.feed(encode_message(Bye(True)))
    assert decoder.next() == Bye(True)
    decoder.check_eof()


def test_what_follows_a_message_is_left_alone() -> None:
    decoder = MessageDecoder()
    decoder.feed(encode_message(MESSAGES[0]) + b"lane headers")
    assert decoder.next() == MESSAGES[0]
    assert decoder.unread == b"lane headers"
    check_refused("does not speak pagenet: it begins with b'lane headers'", decoder.next)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b"\0", b"PGNt", b"\n" * 100]
)
def test_garbage_is_known_by_its_first_wrong_byte(garbage: bytes) -> None:
    for end in range(4 if garbage.startswith(b"PGN") else 1, len(garbage)):
        check_refused("does not speak pagenet", partial(decode, garbage[:end]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (frame(b"", framing=2), "frames its messages in version 2"),
        # refused before any of it is kept
        (frame(b"", length=MAX_MESSAGE + 1), "a message of 2097153 bytes"),
        (frame(b"", length=2**32 - 1), "a message of 4294967295 bytes"),
    ],
    ids=readable,
)
def test_frame_header(data: bytes, reason: str) -> None:
    check_refused(reason, lambda: decode(data))


def test_longest_message() -> None:
    text = "x" * (MAX_MESSAGE - len(msgpack.packb({"type": "failure", "code": "", "text": ""})) - 4)
    data = encode_message(Failure("", text))
    assert len(data) == FRAME_HEADER.size + MAX_MESSAGE
    assert decode(data) == [Failure("", "x" * MAX_REASON_BYTES)]
    with pytest.raises(LocalProtocolError, match=r"a message of 2097153 bytes \(limit 2097152\)"):
        encode_message(Failure("", text + "x"))


def nested(opening: bytes, depth: int) -> bytes:
    return b"\x81\xa4type" + opening * depth + b"\xc0"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",  # never used in msgpack
        b"\x80\x80",
        b"\x81\xa4type",
        b"\x81\xa4type\xa2\xff\xfe",
        b"\x81\x01\x01",  # a number for a key
        b"\x81\x90\x01",
        b"\xdc\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x05",
        b"\xd8\xff" + b"x" * 16,
        msgpack.packb({"type": "\ud800"}, unicode_errors="surrogatepass"),
        nested(b"\x91", MAX_MESSAGE - 7),
        nested(b"\x81\xa1a", 600_000),
        b"\x91" * MAX_MESSAGE,
    ],
    ids=readable,
)
def test_no_msgpack(body: bytes) -> None:
    check_refused("is not msgpack: .", lambda: decode(frame(body)))


@pytest.mark.parametrize("depth", [1, 100, 500, 900, 990, 1000, 1010, 1020, 1030])
@pytest.mark.parametrize(
    "field", ["type", "version", "role", "session", "identity", "features", "lanes", "blocks"]
)
def test_nested_deeply(field: str, depth: int) -> None:
    """Around 1000 levels msgpack still accepts what Python no longer prints."""
    mark = b"\xa6insert"
    body = msgpack.packb({**HELLO, field: "insert"})
    check_refused("the peer", lambda: decode(frame(body.replace(mark, b"\x91" * depth + b"\xc0"))))


@pytest.mark.parametrize(
    "body", [0, None, True, 1.5, "hello", b"hello", [], [HELLO], msgpack.Timestamp(0)]
)
def test_no_map(body: Any) -> None:
    check_refused("is not a map", lambda: decode(frame(msgpack.packb(body))))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "of type NoneType, which is unknown"),
        ({"type": "helo"}, "of type 'helo', which is unknown"),
        ({"type": "\x1b[2J" + "x" * 1000}, r"of type '\\x1b\[2Jx+', which"),
        ({"type": b"hello"}, "of type bytes"),
        ({"type": 1}, "of type int"),
        ({"type": "failure", "code": "x"}, "failure has no proper 'text'"),
        ({"type": "failure", "code": 1, "text": ""}, "failure has no proper 'code'"),
        ({"type": "bye"}, "bye has no proper 'complete'"),
        ({"type": "bye", "complete": 1}, "bye has no proper 'complete'"),
        ({"type": "bye", "complete": None}, "bye has no proper 'complete'"),
    ],
)
def test_no_such_message(body: dict[str, Any], reason: str) -> None:
    check_refused(reason, lambda: decode(frame(msgpack.packb(body))))


def test_longest_stale() -> None:
    stale = Stale(1, 0, b"\xff" * MAX_STALE_BYTES, more=False, frozen=True)
    data = encode_message(stale)
    assert decode(data) == [stale]
    assert decode(data[:100], data[100:]) == [stale]
    longer = encode_message(Stale(1, 0, stale.bits + b"\0", more=False, frozen=True))
    check_refused(r"stale pages take 1048577 bytes \(limit 1048576\)", lambda: decode(longer))


ROUNDS: dict[str, dict[str, Any]] = {
    "pause": {"type": "pause"},
    "paused": {"type": "paused", "round": 1, "missing": 0},
    "stale": {
        "type": "stale",
        "round": 1,
        "first": 0,
        "bits": b"\x01",
        "more": False,
        "frozen": False,
    },
}
WRONG_COUNTS: list[Any] = [None, "1", 1.0, True, -1, -(2**63), [1], b"1"]
WRONG_BOOLEANS: list[Any] = [None, 0, 1, "true", b"", []]
WRONG_BITS: list[Any] = [None, b"", "\x01", 1, True, [1]]


def of_rounds(kind: str, **changes: Any) -> bytes:
    """A message about rounds with ``changes``; a field that changes to ``...`` is left out."""
    fields = {**ROUNDS[kind], **changes}
    return frame(msgpack.packb({name: value for name, value in fields.items() if value != ...}))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (kind, field, value)
        for kind, field, wrong in (
            ("paused", "round", WRONG_COUNTS),
            ("paused", "missing", WRONG_COUNTS),
            ("stale", "round", WRONG_COUNTS),
            ("stale", "first", WRONG_COUNTS),
            ("stale", "bits", WRONG_BITS),
            ("stale", "more", WRONG_BOOLEANS),
            ("stale", "frozen", WRONG_BOOLEANS),
        )
        for value in [*wrong, ...]
    ],
)
def test_field_of_a_message_about_rounds(kind: str, field: str, value: object) -> None:
    check_refused(
        f"the peer's {kind}|stale pages", lambda: decode(of_rounds(kind, **{field: value}))
    )


@pytest.mark.parametrize("kind", ROUNDS)
def test_unknown_fields_of_a_message_about_rounds(kind: str) -> None:
    assert decode(of_rounds(kind, later={"a": [1]})) == decode(of_rounds(kind))


def test_a_strangers_text_fits_one_line() -> None:
    body = msgpack.packb(
        {"type": "failure", "code": "a\nb" + "c" * 100, "text": "x\r\n\x1b[31m\u202e" + "y" * 2000}
    )
    (failure,) = decode(frame(body))
    assert isinstance(failure, Failure)
    assert failure.code == "a?b" + "c" * 61
    assert failure.text.startswith("x???[31m?yyy")
    assert len(failure.text) == MAX_REASON_BYTES
    assert printable("grüße, 世界") == "grüße, 世界"


# ---- hellos ----

WRONG_TYPES: dict[str, list[Any]] = {
    "version": [None, "1", 1.0, True, [1]],
    "oldest": [None, "1", 1.0, True],
    "role": [None, "owner", "", b"source", 1, True, ["source"]],
    "channel": [None, "prefetch", b"control", 0],
    "session": [None, "x" * 16, 0, list(SESSION)],
    "identity": [None, "identity", 16],
    "features": [None, "lz4", {"lz4": True}, [1], [b"lz4"], [None], ["x"] * 65],
    "lanes": [
        None,
        "demand",
        ["demand", "x"],
        [b"demand"],
        [True],
        [["demand"]],
        ["control"],
        ["demand"] * 65,
    ],
    "blocks": [None, "ram", {"ram": 4096}, 1],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG_TYPES.items() for value in values],
)
def test_hello_field_of_the_wrong_kind(field: str, value: object) -> None:
    check_refused("the peer", lambda: decode(packed(**{field: value})))


@pytest.mark.parametrize("field", ["version", "oldest", "role", "channel", "session"])
def test_hello_field_missing(field: str) -> None:
    check_refused(f"no proper '{field}'", lambda: decode(packed(**{field: ...})))


def test_hello_fields_that_may_be_missing_or_unknown() -> None:
    assert decode(packed(features=..., later={"a": [1]})) == [
        Hello(Role.SOURCE, Channel.CONTROL, SESSION)
    ]
    (hello,) = decode(packed(identity=b"i" * 100))
    assert isinstance(hello, Hello)
    assert hello.identity == b"i" * 64


@pytest.mark.parametrize("length", [1, 15, 17, 32])
def test_session_of_another_length(length: int) -> None:
    check_refused(
        f"session is {length} bytes long, not 16", lambda: decode(packed(session=b"s" * length))
    )


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([], "1 to 4096 blocks, not 0"),
        ([["", 4096, 4096]] * 4097, r"4097 blocks \(limit 4096\)"),
        ([["", 4096, 4096]] * 200_000, r"200000 blocks \(limit 4096\)"),
        ([["a", 4096, 4096]] * 2, "same name"),
        ([["a", 0, 4096]], "whole number of 4096-byte pages"),
        ([["a", -4096, 4096]], "whole number of 4096-byte pages"),
        ([["a", 2**64 - 1, 4096]], "whole number of 4096-byte pages"),
        ([["a", True, 4096]], "whole number of 4096-byte pages"),
        ([["a", 4096, True]], "power of two"),
        ([["a", 4096, 0]], "power of two"),
        ([["a", 4096, 2048]], "power of two"),
        ([["a", 2**63, 2**63]], "power of two"),
        ([["a", 2**64 - 4096, 4096]], "limit 17179869184"),
        ([["x" * 256, 4096, 4096]], "name of 256 characters"),
        ([["\x01" * 1_500_000, 1, 1]], "name of 1500000 characters"),
        ([["a", 4096]], r"not \[name, size, page size\]"),
        ([["a", 4096, 4096, 0]], r"not \[name, size, page size\]"),
        ([[b"a", 4096, 4096]], r"not \[name, size, page size\]"),
        ([["a", "4096", 4096]], r"not \[name, size, page size\]"),
        ([["a", 4096.0, 4096]], r"not \[name, size, page size\]"),
        ([None], r"not \[name, size, page size\]"),
        (["abc"], r"not \[name, size, page size\]"),
    ],
)
def test_absurd_block_table(blocks: list[Any], reason: str) -> None:
    check_refused(reason, lambda: decode(packed(blocks=blocks)))


@pytest.mark.parametrize(
    ("ours", "theirs", "common"),
    [
        ((1, 1), (1, 1), 1),
        ((1, 2), (1, 1), 1),  # this side is newer
        ((1, 1), (1, 2), 1),  # the peer is
        ((2, 3), (1, 2), 2),
        ((2, 3), (2, 3), 3),
        ((2, 3), (3, 4), 3),
        ((2, 3), (1, 9), 3),
        ((2, 3), (1, 1), None),
        ((2, 3), (4, 5), None),
        ((1, 1), (2, 2), None),
        ((1, 1), (2, 2**64 - 1), None),
    ],
)
def test_versions(
    monkeypatch: pytest.MonkeyPatch,
    ours: tuple[int, int],
    theirs: tuple[int, int],
    common: int | None,
) -> None:
    monkeypatch.setattr(protocol, "OLDEST_VERSION", ours[0])
    monkeypatch.setattr(protocol, "VERSION", ours[1])
    oldest, version = theirs
    hello = Hello(Role.SOURCE, Channel.CONTROL, version=version, oldest=oldest)
    if common is not None:
        assert decode(packed(oldest=oldest, version=version, session=b"")) == [hello]
        assert negotiate(hello) == common
    else:
        reason = (
            f"speaks protocol versions {oldest} to {version}, this pagenet {ours[0]} to {ours[1]}:"
            " bring both"
        )
        # the rest of such a hello may be anything
        check_refused(
            reason, lambda: decode(packed(oldest=oldest, version=version, role="?", session=None))
        )
        check_refused(reason, lambda: negotiate(hello))


@pytest.mark.parametrize(("oldest", "version"), [(0, 1), (2, 1), (-1, 1), (0, 0), (-5, -5)])
def test_impossible_versions(oldest: int, version: int) -> None:
    check_refused("claims to speak", lambda: decode(packed(oldest=oldest, version=version)))


# ---- requests ----


def request(
    first: int = 0,
    count: int = 1,
    *,
    class_: int = 0,
    encodings: int = 3,
    unit: int = 0,
    pad: int = 0,
    pad2: int = 0,
) -> bytes:
    return REQUEST_HEADER.pack(7, class_, encodings, unit, pad, first, count, pad2)


def requests(*pieces: bytes) -> list[Request]:
    decoder = RequestDecoder(REGION)
    found = []
    for piece in pieces:
        decoder.feed(piece)
        found += list(decoder.requests())
    return found


GOOD_REQUESTS = [
    Request(0, Class.DEMAND, Run(0, 1)),
    Request(2**32 - 1, Class.PREFETCH, Run(2047, 1)),
    Request(1, Class.BACKGROUND, Run(0, 1024)),  # the largest request
    Request(2, Class.DEMAND, Run(512, 512), unit_shift=9),
    Request(3, Class.BACKGROUND, Run(0, 2048), unit_shift=11),  # 8 MiB, but a single unit
    Request(4, Class.DEMAND, Run(ROM, 3)),
    Request(5, Class.DEMAND, Run(ROM, 2), unit_shift=1),  # units count from where the block begins
    Request(6, Class.DEMAND, Run(HUGE, 2)),
    Request(7, Class.DEMAND, Run(HUGE, 2), unit_shift=1),
    Request(8, Class.DEMAND, Run(1, 1), encodings=0b11111111),
]


def test_requests_whole_and_in_bytes() -> None:
    assert ROM % 2 == 0
    assert HUGE % 2 == 1  # so that units of the region would not be those of the block
    data = b"".join(request.encode() for request in GOOD_REQUESTS)
    assert requests(data) == GOOD_REQUESTS
    assert requests(*one_byte_each(data)) == GOOD_REQUESTS
    assert [requests(request.encode()) for request in GOOD_REQUESTS] == [
        [request] for request in GOOD_REQUESTS
    ]


def test_request_cut_anywhere() -> None:
    data = GOOD_REQUESTS[0].encode()
    for end in range(len(data)):
        decoder = RequestDecoder(REGION)
        decoder.feed(data + data[:end])
        assert list(decoder.requests()) == GOOD_REQUESTS[:1]
        if end:
            check_refused("in the middle of a request", decoder.check_eof)
        else:
            decoder.check_eof()


@pytest.mark.parametrize(
    ("encodings", "may_pack", "must_pack"),
    [
        (0, False, False),
        (0b011, False, False),
        (0b111, True, False),
        (0b110, True, True),
        (0b100, True, True),
    ],
)
def test_what_a_request_takes(encodings: int, may_pack: bool, must_pack: bool) -> None:
    (found,) = requests(request(encodings=encodings))
    assert (found.may_pack, found.must_pack) == (may_pack, must_pack)


@pytest.mark.parametrize(
    ("compress", "features", "encodings"),
    [
        ("auto", {LZ4}, 0b111),
        ("lz4", {LZ4, "x"}, 0b110),
        ("none", {LZ4}, 0b011),
        ("auto", set(), 0b011),
        ("lz4", {"x"}, 0b011),
    ],
)
def test_what_is_asked_of_a_source(compress: Compress, features: set[str], encodings: int) -> None:
    assert encodings_for(compress, frozenset(features)) == encodings


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (request(count=0), "0 pages from page 0 on: not within one block"),
        (request(2048, 0), "not within one block"),
        (request(2047, 2), "2 pages from page 2047 on: not within one block"),
        (request(0, 2**32 - 1), "not within one block"),
        (request(REGION.pages, 1), "not within one block"),
        (request(REGION.pages - 1, 2), "not within one block"),
        (request(2**64 - 1, 1), "not within one block"),
        (request(2**64 - 1, 2), "not within one block"),  # 2**64 + 1, which wraps to 1
        (request(2**64 - 4096, 2**32 - 1), "not within one block"),
        (request(2**63, 1), "not within one block"),
        (request(0, 1025), r"4198400 bytes at once \(limit 4194304\)"),
        (request(0, 2048), "8388608 bytes at once"),
        (request(0, 2048, unit=10), "8388608 bytes at once"),
        (request(HUGE, 3), "6291456 bytes at once"),
        (request(1, 2, unit=1), r"whole units of 2\*\*1 pages"),
        (request(0, 3, unit=1), r"whole units of 2\*\*1 pages"),
        (request(ROM + 1, 2, unit=1), "whole units"),
        (request(HUGE + 1, 2, unit=1), "whole units"),
        (request(0, 512, unit=10), "whole units"),
        (request(0, 1, unit=19), r"whole units of 2\*\*19"),
        (request(0, 1, unit=255), r"whole units of 2\*\*255"),
        (request(class_=3), "transfer class 3"),
        (request(class_=255), "transfer class 255"),
        (request(pad=1), "reserved bits"),
        (request(pad2=1), "reserved bits"),
        (request(pad2=2**31), "reserved bits"),
        (b"\xff" * LANE_HEADER_SIZE, "reserved bits"),
        (b"GET / HTTP/1.1\r\nHost: example\r\n\r\n"[:24], "reserved bits"),
    ],
    ids=readable,
)
def test_request_refused(data: bytes, reason: str) -> None:
    check_refused(reason, lambda: requests(data))
    check_refused(reason, lambda: requests(*one_byte_each(data)))


def test_a_unit_is_a_gigabyte_at_most() -> None:
    """The largest page an owner may have. A reply's length has room for 4 GiB, and a source must
    keep one unit in memory."""
    decoder = RequestDecoder(Region([Block("ram", 1 << 40), Block("huge", 1 << 40, 2 << 20)]))
    huge = 1 << 28
    decoder.feed(request(0, 1 << 18, unit=18) + request(huge, 512, unit=9))
    assert [request.run for request in decoder.requests()] == [Run(0, 1 << 18), Run(huge, 512)]
    for too_large in (request(0, 1 << 19, unit=19), request(huge, 1024, unit=10)):
        decoder.feed(too_large)
        check_refused("whole units", lambda: list(decoder.requests()))


def test_requests_before_a_bad_one_are_heard() -> None:
    decoder = RequestDecoder(REGION)
    decoder.feed(request(5) + request(6) + request(count=0) + request(7))
    heard = decoder.requests()
    assert [next(heard).run.first, next(heard).run.first] == [5, 6]
    check_refused("not within one block", lambda: next(heard))


# ---- replies ----


def reply(
    first: int = 0,
    count: int = 4,
    *,
    request_id: int = 0,
    class_: int = Class.BACKGROUND,
    encoding: int = Encoding.ZERO,
    pad: int = 0,
    length: int = 0,
) -> bytes:
    return REPLY_HEADER.pack(request_id, class_, encoding, pad, first, count, length)


ASKED = Run(0, 4)


def asked(run: Run = ASKED, unit_shift: int = 0) -> OutstandingRequests:
    outstanding = OutstandingRequests(REGION)
    outstanding.open(Class.BACKGROUND, run, unit_shift)
    return outstanding


def test_replies_cover_a_request_from_first_to_last() -> None:
    outstanding = asked()
    replies = [
        Reply(0, Class.BACKGROUND, Encoding.RAW, Run(0, 1), 4096),
        Reply(0, Class.BACKGROUND, Encoding.ZERO, Run(1, 2), 0),
        Reply(0, Class.BACKGROUND, Encoding.RAW, Run(3, 1), 4096),
    ]
    for expected in replies:
        assert outstanding.is_open(0)
        assert outstanding.reply(expected.encode()) == expected
    assert not outstanding.is_open(0)
    assert len(outstanding) == 0
    check_refused(
        "answers request 0, which is not open", lambda: outstanding.reply(replies[-1].encode())
    )


def test_requests_are_answered_in_any_order() -> None:
    outstanding = OutstandingRequests(REGION)
    opened = [outstanding.open(Class.DEMAND, Run(page, 2)) for page in (8, 4, 6)]
    assert [request.request_id for request in opened] == [0, 1, 2]
    for request_id, first in ((2, 6), (0, 8), (0, 9), (1, 4), (2, 7), (1, 5)):
        data = reply(first, 1, request_id=request_id, class_=Class.DEMAND)
        assert outstanding.reply(bytearray(data)).run == Run(first, 1)
    assert len(outstanding) == 0


def test_a_run_is_absent_as_a_whole_where_it_may_be() -> None:
    outstanding = OutstandingRequests(REGION, may_be_absent=True)
    for _ in range(3):
        outstanding.open(Class.BACKGROUND, Run(0, 4))
    assert outstanding.reply(reply(encoding=Encoding.ABSENT)).run == Run(0, 4)
    assert not outstanding.is_open(0)
    text = "a part of what was asked for is absent"
    outstanding.reply(reply(0, 1, request_id=1))
    for wrong in (
        reply(1, 3, request_id=1, encoding=Encoding.ABSENT),
        reply(0, 3, request_id=2, encoding=Encoding.ABSENT),
        reply(request_id=2, encoding=Encoding.ABSENT, length=1),
    ):
        check_refused(text, partial(outstanding.reply, wrong))


def test_request_ids_begin_again_after_the_last() -> None:
    outstanding = OutstandingRequests(REGION)
    outstanding._next_id = 2**32 - 1
    ids = [outstanding.open(Class.DEMAND, Run(0, 1)).request_id for _ in range(2)]
    assert ids == [2**32 - 1, 0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (reply(request_id=1), "answers request 1, which is not open"),
        (reply(request_id=2**32 - 1), "which is not open"),
        (reply(class_=Class.DEMAND), "another class"),
        (reply(class_=9), "another class"),
        (reply(pad=1), "another class"),
        (reply(count=0), "out of turn: with 0 pages from page 0 on"),
        (reply(1, 1), "out of turn"),
        (reply(1, 4), "out of turn"),
        (reply(0, 5), "out of turn"),
        (reply(0, 2**32 - 1), "out of turn"),
        (reply(2**64 - 1, 2), "out of turn"),
        (reply(encoding=Encoding.RAW), "0 bytes for 4 pages of 16384"),
        (reply(encoding=Encoding.RAW, length=16383), "16383 bytes for 4 pages"),
        (reply(encoding=Encoding.RAW, length=16385), "16385 bytes for 4 pages"),
        (reply(encoding=Encoding.RAW, length=2**32 - 1), "4294967295 bytes for 4 pages"),
        (reply(encoding=Encoding.ZERO, length=1), "1 bytes for 4 pages of 0 bytes"),
        (reply(encoding=Encoding.LZ4, length=100), "lz4, which was not asked for"),
        (reply(encoding=3), "encoding 3, which is unknown"),
        (reply(encoding=254), "encoding 254, which is unknown"),
        (reply(encoding=Encoding.FAILED, length=MAX_REASON_BYTES + 1), "a reason of 1025 bytes"),
        (reply(encoding=Encoding.FAILED, length=2**32 - 1), "a reason of 4294967295 bytes"),
        (b"\xff" * LANE_HEADER_SIZE, "not open"),
    ],
    ids=readable,
)
def test_reply_refused(data: bytes, reason: str) -> None:
    outstanding = asked()
    check_refused(reason, lambda: outstanding.reply(data))
    assert outstanding.reply(reply()).run == Run(0, 4)  # the refused reply has changed nothing


@pytest.mark.parametrize("length", [0, 4 * 4096, 4 * 4096 + 1, 2**32 - 1])
def test_compressed_reply_that_is_not_shorter(length: int) -> None:
    outstanding = OutstandingRequests(REGION, 0b110)
    outstanding.open(Class.BACKGROUND, Run(0, 4))
    check_refused(
        f"{length} bytes for 4 pages of 16384 bytes",
        lambda: outstanding.reply(reply(encoding=Encoding.LZ4, length=length)),
    )
    assert (
        outstanding.reply(reply(encoding=Encoding.LZ4, length=4 * 4096 - 1)).length == 4 * 4096 - 1
    )


def test_compressed_reply_of_too_much() -> None:
    outstanding = OutstandingRequests(REGION, 0b111)
    outstanding.open(Class.BACKGROUND, Run(0, 1024))
    most = MAX_LZ4_BYTES // 4096
    bomb = reply(0, most + 1, encoding=Encoding.LZ4, length=9000)
    check_refused("compresses 2101248 bytes at once", lambda: outstanding.reply(bomb))
    assert outstanding.reply(reply(0, most, encoding=Encoding.LZ4, length=9000)).run == Run(0, most)


def test_reply_that_comes_twice_or_goes_back() -> None:
    outstanding = asked()
    outstanding.reply(reply(0, 2))
    for again in (reply(0, 2), reply(1, 1), reply(3, 1), reply(2, 3)):
        check_refused("out of turn", partial(outstanding.reply, again))
    assert outstanding.reply(reply(2, 2)).run == Run(2, 2)


@pytest.mark.parametrize(
    ("run", "parts"),
    # HUGE is odd; in its block it is page 0
    [(Run(4, 8), [2, 1, 4]), (Run(ROM, 2), [1]), (Run(HUGE, 2), [1])],
)
def test_replies_do_not_split_a_unit(run: Run, parts: list[int]) -> None:
    outstanding = asked(run, unit_shift=1)
    first = run.first
    for count in parts:
        if count % 2:
            check_refused("out of turn", partial(outstanding.reply, reply(first, count)))
        else:
            outstanding.reply(reply(first, count))
            first += count
    outstanding.reply(reply(first, run.end - first))
    assert len(outstanding) == 0


def test_raw_length_counts_in_the_blocks_pages() -> None:
    outstanding = asked(Run(HUGE, 2))
    assert (
        outstanding.reply(reply(HUGE, 1, encoding=Encoding.RAW, length=2 << 20)).length == 2 << 20
    )
    check_refused(
        "4096 bytes",
        lambda: outstanding.reply(reply(HUGE + 1, 1, encoding=Encoding.RAW, length=4096)),
    )


@pytest.mark.parametrize("length", [0, 1, MAX_REASON_BYTES])
def test_failed_ends_the_request(length: int) -> None:
    outstanding = asked()
    outstanding.reply(reply(0, 2))
    failed = outstanding.reply(reply(0, 0, encoding=Encoding.FAILED, length=length))
    assert (failed.encoding, failed.length) == (Encoding.FAILED, length)
    assert not outstanding.is_open(0)


@pytest.mark.parametrize(
    "run", [Run(0, 0), Run(-1, 1), Run(2047, 2), Run(REGION.pages, 1), Run(0, 2**63)]
)
def test_asking_for_what_is_no_run_is_our_own_mistake(run: Run) -> None:
    with pytest.raises(LocalProtocolError, match="is not a run of the region"):
        OutstandingRequests(REGION).open(Class.DEMAND, run)


# ---- whatever comes ----

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
block_tables = st.lists(
    st.tuples(names, st.integers(1, 2**20)), min_size=1, max_size=5, unique_by=lambda pair: pair[0]
)
hellos = st.builds(
    Hello,
    role=st.sampled_from(Role),
    channel=st.sampled_from(Channel),
    session=st.just(b"") | st.binary(min_size=16, max_size=16),
    region=st.none()
    | block_tables.map(lambda table: Region(Block(name, pages * 4096) for name, pages in table)),
    lanes=st.lists(st.sampled_from([Channel.DEMAND, Channel.BACKGROUND]), max_size=4).map(tuple),
    features=st.frozensets(names, max_size=5),
    version=st.integers(1, 2**64 - 1),
)
line = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs"]), max_size=64
)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


counts = st.integers(0, 2**64 - 1)
messages_in_between = (
    st.just(Alive())
    | st.just(Pause())
    | st.builds(Paused, counts, counts)
    | st.builds(
        Stale, counts, counts, st.binary(min_size=1, max_size=300), st.booleans(), st.booleans()
    )
)


@given(
    st.lists(
        hellos
        | st.builds(Failure, line, line)
        | st.builds(Bye, st.booleans())
        | messages_in_between,
        max_size=4,
    ),
    st.data(),
)
def test_messages_in_any_pieces(messages: list[Message], data: st.DataObject) -> None:
    whole = b"".join(map(encode_message, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    assert (
        decode(*(whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)))
        == messages
    )


def survives(decode: Callable[[], object]) -> None:
    """Raises nothing but a RemoteProtocolError of one line."""
    try:
        decode()
    except RemoteProtocolError as error:
        line = str(error)
    else:
        return
    assert line.isprintable()


@settings(max_examples=300)
@given(st.binary(max_size=100))
def test_random_bytes(data: bytes) -> None:
    survives(lambda: decode(data))
    survives(lambda: decode(frame(data)))
    survives(lambda: requests(data))
    survives(lambda: asked().reply(data[:LANE_HEADER_SIZE].ljust(LANE_HEADER_SIZE, b"\0")))


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from([*HELLO, "identity", "blocks", "lanes"]), anything, max_size=3)
)
def test_random_fields(changes: dict[str, Any]) -> None:
    survives(lambda: decode(packed(**changes)))


@settings(max_examples=300)
@given(
    st.sampled_from(sorted(ROUNDS)),
    st.dictionaries(
        st.sampled_from(["type", "round", "missing", "first", "bits", "more", "frozen"]),
        anything,
        max_size=3,
    ),
)
def test_random_fields_of_a_message_about_rounds(kind: str, changes: dict[str, Any]) -> None:
    survives(lambda: decode(of_rounds(kind, **changes)))


@given(
    st.sampled_from(MESSAGES).map(encode_message),
    st.integers(0, 2**32),
    st.integers(0, 255),
    st.binary(max_size=3),
)
def test_one_byte_changed(data: bytes, at: int, value: int, behind: bytes) -> None:
    changed = bytearray(data)
    changed[at % len(data)] = value
    survives(lambda: decode(bytes(changed) + behind))


fields = st.sampled_from([0, 1, 2, 3, 9, 255])
wide = st.sampled_from([0, 1, 2, 511, 512, 1024, 2047, 2048, ROM, HUGE, 2**32 - 1]) | st.integers(
    0, 2**32 - 1
)
first = wide | st.sampled_from([2**63, 2**64 - 1])


@settings(max_examples=300)
@given(fields, fields, fields, st.sampled_from([0, 0, 1]), first, wide)
def test_any_request_is_refused_or_safe(
    class_: int, encodings: int, unit: int, pad: int, first: int, count: int
) -> None:
    data = request(first, count, class_=class_, encodings=encodings, unit=unit, pad=pad)
    try:
        (heard,) = requests(data)
    except RemoteProtocolError:
        return
    pages = range(heard.run.first, heard.run.end)
    assert len(pages) > 0
    assert REGION.block_index(pages[0]) == REGION.block_index(pages[-1])
    unit = 1 << heard.unit_shift
    assert REGION.size_of(heard.run) <= MAX_REQUEST_BYTES or len(pages) == unit
    assert not len(pages) % unit


@settings(max_examples=300)
@given(st.integers(0, 1), fields, fields, st.sampled_from([0, 0, 1]), first, wide, wide)
def test_any_reply_is_refused_or_fits(
    request_id: int, class_: int, encoding: int, pad: int, first: int, count: int, length: int
) -> None:
    data = reply(
        first,
        count,
        request_id=request_id,
        class_=class_,
        encoding=encoding,
        pad=pad,
        length=length,
    )
    try:
        fits = asked(Run(0, 1024)).reply(data)
    except RemoteProtocolError:
        return
    if fits.encoding is Encoding.FAILED:
        assert fits.length <= MAX_REASON_BYTES
    else:
        assert (fits.run.first, fits.class_) == (0, Class.BACKGROUND)
        assert fits.run.count <= 1024
        assert fits.length == (4096 * fits.run.count if fits.encoding is Encoding.RAW else 0)


# ---- docs/protocol.md ----

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()

Flows = dict[str, bytes]  # "control, destination to source" -> all that was sent that way


class Recording:
    """What travels over every connection that is made while it is registered."""

    def __init__(self) -> None:
        self._connections: list[tuple[bytearray, bytearray]] = []

    def tap(self, dialled: MemoryConnection, accepted: MemoryConnection) -> None:
        self._connections.append((_tapped(dialled), _tapped(accepted)))

    def flows(self) -> Flows:
        flows = {}
        for there, back in self._connections:
            decoder = MessageDecoder()
            decoder.feed(there)
            hello = decoder.next()
            assert isinstance(hello, Hello)
            ours, theirs = (
                ("source", "destination")
                if hello.role is Role.SOURCE
                else ("destination", "source")
            )
            flows[f"{hello.channel.value}, {ours} to {theirs}"] = bytes(there)
            flows[f"{hello.channel.value}, {theirs} to {ours}"] = bytes(back)
        return flows


def _tapped(connection: MemoryConnection) -> bytearray:
    record = bytearray()
    send = connection.send

    async def recording_send(*buffers: transport.Buffer) -> None:
        for buffer in buffers:
            record.extend(buffer)
        await send(*buffers)

    connection.send = recording_send  # type: ignore[method-assign]
    return record


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recording:
    """Records over ``memory:``, with random values that are the same each time, and files with
    short names."""
    recording = Recording()
    monkeypatch.setitem(transport._transports, "memory", MemoryTransport(on_connect=recording.tap))
    monkeypatch.setattr(os, "urandom", lambda size: bytes(range(size)))
    monkeypatch.chdir(tmp_path)
    return recording


def documented(section: str) -> Flows:
    """The flows that the document shows in hexadecimal. ``61 x 4096`` is 4096 bytes 0x61; the rest
    of a line is comment."""
    flows: dict[str, bytes] = {}
    text = DOCUMENT.split(f"### {section}")[1].split("\n### ")[0].split("\n## ")[0]
    for block in re.findall(r"^```wire\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        title = ""
        for line in block.splitlines():
            if match := re.fullmatch(r"(\w+, \w+ to \w+)(?:: .*)?", line):
                title = match[1]
            elif match := re.fullmatch(
                r"  ((?:[0-9a-f]{2})+(?: (?:[0-9a-f]{2})+)*)(?: x (\d+))?(?:  .*)?", line
            ):
                flows[title] = flows.get(title, b"") + bytes.fromhex(match[1]) * int(match[2] or 1)
            else:
                assert not line, f"neither a title nor bytes: {line!r}"
    return flows


def check_documented(section: str, spoken: Flows) -> None:
    shown = documented(section)
    assert set(shown) == set(spoken)
    for title, data in spoken.items():
        assert shown[title].hex(" ", 4) == data.hex(" ", 4), f"{section}: {title}"


@contextmanager
def guest_memory(content: bytes) -> Iterator[pagenet.Source]:
    """A file ``ram``, whose identity is not that of this machine's file."""
    Path("ram").write_bytes(content)
    with pagenet.open_source("ram") as source:
        source.identity = bytes(range(0xF0, 0x100))
        yield source


async def test_conversation_in_which_the_destination_dials(recording: Recording) -> None:
    with guest_memory(b"a" * 4096 + bytes(8192) + b"b" * 4096) as source:
        async with (
            pagenet.serve(source, listen="memory://source"),
            pagenet.pull("memory://source", pagenet.IntoFile("copy")) as transfer,
        ):
            await transfer.wait_complete()
    assert Path("copy").read_bytes() == Path("ram").read_bytes()
    check_documented("The destination dials", recording.flows())


async def test_conversation_in_which_the_source_dials(recording: Recording) -> None:
    listening = trio.Event()

    async def destination() -> None:
        lanes = (Channel.DEMAND, Channel.BACKGROUND)
        async with accepted_sources(
            "memory://destination", False, None, lanes, None, lambda *_, **__: listening.set()
        ) as sources:
            session = await sources.meet()
            lane, requests = (
                await session.open_lane(Channel.DEMAND),
                OutstandingRequests(session.region),
            )
            await session.open_lane(Channel.BACKGROUND)
            await lane.send(requests.open(Class.DEMAND, Run(512, 512), unit_shift=9).encode())
            assert await receive_reply(lane, requests) == b"c" * (2 << 20)
            os.truncate("ram", 0)
            await lane.send(requests.open(Class.DEMAND, Run(0, 512), unit_shift=9).encode())
            assert b"cannot be read any more" in await receive_reply(lane, requests)
            with pytest.raises(pagenet.SourceLost, match="cannot be read any more"):
                await session.watch()

    with guest_memory(b"c" * (4 << 20)) as source:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(destination)
            await listening.wait()
            with pytest.raises(pagenet.SourceLost):
                async with pagenet.serve(source, connect="memory://destination") as server:
                    await server.wait_complete()
    check_documented("The source dials", recording.flows())


async def receive_reply(lane: transport.Connection, requests: OutstandingRequests) -> bytes:
    header = bytearray(LANE_HEADER_SIZE)
    await receive_exactly(lane, memoryview(header))
    payload = bytearray(requests.reply(header).length)
    await receive_exactly(lane, memoryview(payload))
    return bytes(payload)


def rows(heading: str) -> Iterator[list[str]]:
    """The cells of the first table below ``heading``, without its two header lines."""
    table = DOCUMENT.split(f"# {heading}\n")[1].split("\n|", 1)[1].split("\n\n")[0]
    for row in table.splitlines()[2:]:
        yield [cell.strip().strip("`") for cell in row.strip("|").split("|")]


@pytest.mark.parametrize(
    ("heading", "header"),
    [("Frame", FRAME_HEADER), ("Requests", REQUEST_HEADER), ("Replies", REPLY_HEADER)],
)
def test_header_tables_in_the_document(heading: str, header: struct.Struct) -> None:
    sizes = [struct.calcsize(f"<{code}") for code in re.findall(r"\d*[a-zA-Z]", header.format)]
    shown = [(int(offset), int(size)) for offset, size, *_ in rows(heading)]
    assert shown == [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def test_limits_in_the_document() -> None:
    shown = {name: int(value) for name, value, *_ in rows("Limits")}
    assert shown == {
        name: getattr(protocol, name, None) or getattr(pagenet.region, name) for name in shown
    }
    assert {
        "MAX_MESSAGE",
        "MAX_REQUEST_BYTES",
        "MAX_REASON_BYTES",
        "MAX_STALE_BYTES",
        "MAX_BLOCKS",
        "MAX_PAGES",
    } <= set(shown)


def test_every_field_and_number_is_in_the_document() -> None:
    for message in MESSAGES:
        for field in msgpack.unpackb(encode_message(message)[FRAME_HEADER.size :]):
            assert f"| `{field}` |" in DOCUMENT or field == "type"
    for kind in (Class, Encoding):
        for choice in kind:
            assert f"| {choice.value} | {choice.name} |" in DOCUMENT
