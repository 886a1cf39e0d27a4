"""Bytes from strangers: each decoder makes a valid message of them, or an error of pagenet's own in
one line. Session messages, keys for RDMA, control messages, owners' handshakes and notes, a
monitor's answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import msgpack
import trio
from fuzzing import Fuzz, as_msgpack, fragments, is_one_line, mutated, odd

from pagenet import Block, HandshakeError, PagenetError, Region, RemoteProtocolError, Run
from pagenet.control import _protocol as control
from pagenet.nurseries import open_failing_nursery
from pagenet.protocol import (
    LZ4,
    TRACKED,
    Alive,
    Bye,
    Channel,
    Failure,
    Hello,
    MessageDecoder,
    Pause,
    Paused,
    Role,
    Stale,
    encode_message,
)
from pagenet.qemu.qmp import Qmp
from pagenet.rdma._wire import (
    KEY_HEADER,
    Answer,
    Asking,
    Endpoint,
    Kind,
    check_key,
    chunk_run,
    decode_answer,
    decode_askings,
    encode_key,
    encode_word,
    read_key,
)
from pagenet.uffd._handshake import Note, check_mappings, mapping_pieces, parse_mappings

ROUNDS = 3000
REGION = Region([Block("a", (1 << 20) + 8192), Block("b", 6 << 20, 2 << 20)])


def check(decode: Callable[[], object], *errors: type[PagenetError]) -> None:
    reason = "none"
    try:
        decode()
    except errors as error:
        reason = str(error)
    assert is_one_line(reason), reason


# ---- sessions ----

MESSAGES = [
    encode_message(
        Hello(
            Role.SOURCE,
            Channel.CONTROL,
            bytes(16),
            b"identity",
            REGION,
            features=frozenset({LZ4, TRACKED}),
        )
    ),
    encode_message(
        Hello(
            Role.DESTINATION, Channel.CONTROL, bytes(16), lanes=(Channel.DEMAND, Channel.BACKGROUND)
        )
    ),
    encode_message(Failure("protocol", "a reason")),
    encode_message(Bye(True)),
    encode_message(Alive()),
    encode_message(Pause()),
    encode_message(Paused(1, 300)),
    encode_message(Stale(2, 8, b"\x01\x80" * 20, more=True, frozen=False)),
]


def decode_messages(pick: random.Random, stream: bytes) -> None:
    decoder = MessageDecoder()
    for piece in fragments(pick, stream):
        decoder.feed(piece)
        while decoder.next() is not None:
            pass
    decoder.check_eof()


def test_session_messages(fuzz: Fuzz) -> None:
    for pick in fuzz.rounds(ROUNDS):
        message = pick.choice(MESSAGES)
        if pick.random() < 0.6:
            body = as_msgpack(pick, odd(pick, msgpack.unpackb(message[12:])))
            message = message[:8] + len(body).to_bytes(4, "little") + body
        else:
            message = mutated(pick, message)
        check(lambda: decode_messages(pick, message), RemoteProtocolError)  # noqa: B023


# ---- RDMA ----

ENDPOINT = Endpoint(bytes(16), 0, 1, 2, 3, 4).encode()


def read_answers(stream: bytes, asked: Run) -> None:
    """Read answers as a lane does: whether each page is zero, and where it is."""
    answer, run, length = decode_answer(stream[: KEY_HEADER.size])
    body = stream[KEY_HEADER.size : KEY_HEADER.size + length]
    if len(body) < length:
        return
    key = check_key(read_key(answer, run, body), asked, REGION)
    if key.answer is Answer.FAILED:
        assert key.reason.isprintable()
        return
    for page in range(asked.first, asked.end):
        key.is_zero(page)
    assert 0 <= key.address <= 2**64 - REGION.size_of(asked)


def test_rdma_words(fuzz: Fuzz) -> None:
    for pick in fuzz.rounds(ROUNDS):
        asked = chunk_run(REGION, pick.randrange(REGION.pages))
        answers = [
            encode_key(
                asked,
                pick.choice([0, 4096, 2**64 - 4096, 2**64 - 1]),
                pick.getrandbits(32),
                pick.randbytes(32),
            ),
            encode_key(asked, pick.getrandbits(64), 1, b""),
            encode_key(chunk_run(REGION, pick.randrange(REGION.pages)), 4096, 1, b"\xff" * 32),
            encode_word(pick.choice(list(Answer)[1:]), asked),
            encode_word(Answer.FAILED, asked, "\x1b[2J\n" * pick.randint(0, 300)),
        ]
        answer = pick.choice(answers)
        if pick.random() < 0.8:
            answer = mutated(pick, answer)
        if len(answer) >= KEY_HEADER.size:
            check(lambda: read_answers(answer, asked), RemoteProtocolError)  # noqa: B023
        askings = b"".join(
            Asking(pick.choice(list(Kind)), chunk_run(REGION, 0)).encode() for _ in range(3)
        )
        unread = bytearray(mutated(pick, askings))
        check(lambda: list(decode_askings(unread, REGION)), RemoteProtocolError)  # noqa: B023
        endpoint = mutated(pick, ENDPOINT)[: len(ENDPOINT)].ljust(len(ENDPOINT), b"\0")
        check(lambda: Endpoint.decode(endpoint), RemoteProtocolError)  # noqa: B023


# ---- control ----

REQUESTS: list[dict[str, Any]] = [
    {"command": "status", "id": 1},
    {"command": "schedule", "id": 2, "name": "linear"},
    {"command": "bandwidth", "id": 3, "rate": 10**6},
    {"command": "prefetch", "id": 4, "window": [8, 2]},
    {"command": "rounds", "id": 5, "count": 3},
    {"command": "switch", "id": 6},
    {"type": "hello", "version": 1, "oldest": 1, "program": "pagenet-pull", "pid": 1},
]


def decode_control(
    pick: random.Random, stream: bytes, decode: Callable[[control.Fields], object]
) -> None:
    decoder = control.Decoder()
    for piece in fragments(pick, stream):
        decoder.feed(piece)
        while (fields := decoder.next()) is not None:
            decode(fields)
    decoder.check_eof()


def test_control_messages(fuzz: Fuzz) -> None:
    for pick in fuzz.rounds(ROUNDS):
        fields = pick.choice(REQUESTS)
        decode = control.check_hello if "type" in fields else control.decode_request
        body = (
            as_msgpack(pick, odd(pick, fields))
            if pick.random() < 0.6
            else mutated(pick, as_msgpack(pick, fields))
        )
        message = control.FRAME_HEADER.pack(control.MAGIC, 1, 0, len(body)) + body
        if pick.random() < 0.2:
            message = mutated(pick, message)
        check(lambda: decode_control(pick, message, decode), RemoteProtocolError)  # noqa: B023


# ---- owners ----

MAPPINGS: list[dict[str, Any]] = [
    {
        "base_host_virt_addr": 0x7F0000000000,
        "size": (1 << 20) + 8192,
        "offset": 0,
        "page_size": 4096,
    },
    {
        "base_host_virt_addr": 0x7F1000000000,
        "size": 6 << 20,
        "offset": (1 << 20) + 8192,
        "page_size_kib": 4096,
    },
]


def as_json(pick: random.Random, value: Any) -> bytes:
    text = json.dumps(value).encode()
    return mutated(pick, text) if pick.random() < 0.4 else text


def take_mappings(text: bytes) -> None:
    mappings = parse_mappings(text)
    region = check_mappings(mappings, REGION)
    for mapping in mappings:
        for run, address in mapping_pieces(mapping, region):
            assert region.contains(run)
            assert mapping.address <= address < mapping.address + mapping.size


def test_handshakes(fuzz: Fuzz) -> None:
    note = {"source": "00" * 16, "shared": True, "mappings": MAPPINGS}
    for pick in fuzz.rounds(ROUNDS):
        text = as_json(pick, odd(pick, MAPPINGS) if pick.random() < 0.8 else MAPPINGS)
        check(lambda: take_mappings(text), HandshakeError)  # noqa: B023
        words = as_json(pick, odd(pick, note))
        check(lambda: Note.decode(words), HandshakeError)  # noqa: B023


# ---- QEMU ----

GREETING = {"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}
WORDS: list[dict[str, Any]] = [
    {"return": {}, "id": 1},
    {"error": {"class": "GenericError", "desc": "no"}, "id": 1},
    {"event": "STOP", "data": {"ram": "x"}, "timestamp": {"seconds": 1, "microseconds": 2}},
]


async def talk(lines: list[bytes]) -> None:
    """Talk to a monitor that greets, takes two commands, and sends ``lines``."""
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        qmp = Qmp(trio.SocketStream(ours), "/monitor")
        await theirs.send(b"".join(line + b"\n" for line in lines))
        theirs.shutdown(trio.socket.SHUT_WR)
        async with open_failing_nursery() as nursery:
            nursery.start_soon(qmp.read_forever)
            await qmp.greet()
            await qmp.command("query-status")
            nursery.cancel_scope.cancel()


async def test_a_monitor(fuzz: Fuzz) -> None:
    for pick in fuzz.rounds(ROUNDS // 10):
        words = [GREETING, {"return": {}, "id": 0}, pick.choice(WORDS), pick.choice(WORDS)]
        at = pick.randrange(len(words))
        words[at] = odd(pick, words[at])
        lines = [
            as_json(pick, word) if number == at else json.dumps(word).encode()
            for number, word in enumerate(words)
        ]
        reason = "none"
        try:
            await talk(lines)
        except PagenetError as error:
            reason = str(error)
        assert is_one_line(reason), reason
