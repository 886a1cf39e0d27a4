"""The control protocol, with no I/O in it: frames of msgpack maps, and the requests that they may
hold.

Everything decoded here comes from a stranger: each field is checked before it is used.
"""

from __future__ import annotations

import reprlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import msgpack

from ..errors import RemoteProtocolError
from ..protocol import printable
from ..source.precopy import MAX_ROUNDS

__all__ = [
    "COMMANDS",
    "OLDEST_VERSION",
    "VERSION",
    "Decoder",
    "Request",
    "check_hello",
    "decode_request",
    "encode",
    "shown",
]

VERSION = 1
OLDEST_VERSION = 1
MAGIC = b"PGNC"
FRAME_HEADER = struct.Struct("<4sHHI")  # magic, version of the framing, reserved (0), body length
# A status takes 2 KiB.
MAX_MESSAGE = 64 << 10
MAX_TEXT = 4096
# A window is clipped to 1 MiB of bytes on either side anyway.
MAX_WINDOW = 256

Fields = dict[str, Any]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 64


def encode(fields: Mapping[str, object]) -> bytes:
    body = msgpack.packb(fields)
    return FRAME_HEADER.pack(MAGIC, 1, 0, len(body)) + body


class Decoder:
    """Bytes in, maps out: :meth:`feed`, then :meth:`next` until it returns None.

    :exc:`~pagenet.errors.RemoteProtocolError` for anything that is not a message; nothing can be
    decoded after that.
    """

    def __init__(self) -> None:
        self.unread = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        self.unread += data

    def next(self) -> Fields | None:
        """The next whole map, or None until more bytes are fed."""
        if self.unread[:4] != MAGIC[: len(self.unread)]:
            raise RemoteProtocolError(
                f"this is no control message: it begins with {bytes(self.unread[:16])!r}"
            )
        if len(self.unread) < FRAME_HEADER.size:
            return None
        _, framing, _, length = FRAME_HEADER.unpack_from(self.unread)
        if framing != 1:
            raise RemoteProtocolError(
                f"messages are framed in version {framing}; this pagenet knows version 1"
            )
        if length > MAX_MESSAGE:
            raise RemoteProtocolError(
                f"a message of {length} bytes is announced (limit {MAX_MESSAGE})"
            )
        end = FRAME_HEADER.size + length
        if len(self.unread) < end:
            return None
        body = bytes(self.unread[FRAME_HEADER.size : end])
        del self.unread[:end]
        return _decode(body)

    def check_eof(self) -> None:
        """Call when the peer has closed. :exc:`~pagenet.errors.RemoteProtocolError` if that was in
        the middle of a message."""
        if self.unread:
            raise RemoteProtocolError(
                f"the connection ended in the middle of a message ({len(self.unread)} bytes of it"
                " came)"
            )


def _decode(body: bytes) -> Fields:
    try:
        fields = msgpack.unpackb(body, strict_map_key=True)
    except Exception as error:
        # msgpack raises ValueError, its own, and UnicodeDecodeError; all mean the same here
        raise RemoteProtocolError(
            f"a message is not msgpack: {str(error) or type(error).__name__}"
        ) from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise RemoteProtocolError("a message is not a map of names")
    return fields


# ---- requests ----


@dataclass(frozen=True, slots=True)
class Request:
    """``number``: the peer's own number of the request, which the reply repeats."""

    command: str
    number: int
    arguments: Fields = field(default_factory=dict)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and "\0" not in value


def _is_rate(value: object) -> bool:
    return value is None or (_is_integer(value) and 0 < value <= 10**15)


def _is_window(value: object) -> bool:
    return value is None or (
        isinstance(value, list) and len(value) == 2 and all(map(_is_side, value))
    )


def _is_side(value: object) -> bool:
    return _is_integer(value) and 0 <= value <= MAX_WINDOW


def _is_round_count(value: object) -> bool:
    return value == "auto" or (_is_integer(value) and 0 <= value <= MAX_ROUNDS)


def _is_guest(value: object) -> bool:
    return _is_integer(value) and 0 < value < 2**63


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


#: the commands that there are, and the check of each argument
COMMANDS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "status": {},
    "pause": {},
    "resume": {},
    "schedule": {"name": _is_name},
    "bandwidth": {"rate": _is_rate},
    "prefetch": {"window": _is_window},
    "give-up": {},
    "switch": {},
    "rounds": {"count": _is_round_count},
    "reclaim": {},
    "add": {"name": _is_name, "uri": _is_name, "uffd_socket": _is_name},
    "remove": {"name": _is_name},
    "stop": {},
}
#: commands that may be about one guest of many, by its number
_OF_A_GUEST = frozenset(
    {"status", "pause", "resume", "schedule", "bandwidth", "prefetch", "give-up"}
)


def decode_request(fields: Fields) -> Request:
    """The request in a message. :exc:`~pagenet.errors.RemoteProtocolError` for what no version of
    the protocol allows, or this one does not know."""
    command, number = fields.get("command"), fields.get("id")
    if not _is_integer(number) or not 0 <= number < 2**63:
        raise RemoteProtocolError(f"a request has no proper 'id': {shown(number)}")
    if not isinstance(command, str) or command not in COMMANDS:
        raise RemoteProtocolError(f"no command {shown(command)}: there are {', '.join(COMMANDS)}")
    wanted, given = (
        COMMANDS[command],
        {name: value for name, value in fields.items() if name not in ("command", "id")},
    )
    if command in _OF_A_GUEST and "guest" in given:
        if not _is_guest(given["guest"]):
            raise RemoteProtocolError(f"{command} has no proper 'guest': {shown(given['guest'])}")
        wanted = {**wanted, "guest": _is_guest}
    if unknown := given.keys() - wanted.keys():
        raise RemoteProtocolError(f"{command} takes no {shown(min(unknown))}")
    for name, fits in wanted.items():
        if name not in given or not fits(given[name]):
            raise RemoteProtocolError(f"{command} has no proper {name!r}: {shown(given.get(name))}")
    return Request(command, number, given)


def check_hello(fields: Fields) -> Fields:
    """A daemon's first message. :exc:`~pagenet.errors.RemoteProtocolError` if it is not a hello, or
    if the two sides have no version in common."""
    version, oldest = fields.get("version"), fields.get("oldest")
    if fields.get("type") != "hello" or not _is_integer(version) or not _is_integer(oldest):
        raise RemoteProtocolError("the daemon's first message is not a hello")
    if oldest > VERSION or version < OLDEST_VERSION:
        raise RemoteProtocolError(
            f"the daemon speaks control versions {oldest} to {version}; this pagenet knows"
            f" {VERSION}"
        )
    return fields


def shown(value: object) -> str:
    """A stranger's value, in at most 64 characters for the line of an error. The depth is limited,
    because the repr of a deep structure recurses too far."""
    return printable(_SHORT.repr(value))[:64]
