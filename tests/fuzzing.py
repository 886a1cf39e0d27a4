"""What the fuzzers share: rounds with a seed each, mutations of bytes, and decoders of LZ4 and
XXH64 that are independent of those under test.

A test takes the fixture ``fuzz`` and does one thing for each of ``fuzz.rounds(count)``. Round ``n``
draws from the seed of the session plus ``n``, which is printed if the round fails: ``--fuzz-seed``
with that number makes it the first round. With ``--soak`` the rounds continue until the test's
share of an hour is over.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack

SOAK_SECONDS = 3600.0
STRIPE = 32
MASK = 2**64 - 1
PRIMES = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
#: whether a sanitizer is loaded: a round then takes ten times as long
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "") or "libtsan" in os.environ.get(
    "LD_PRELOAD", ""
)


@dataclass
class Fuzz:
    """``seconds``: for how long rounds continue, whatever their count; None: no soaking."""

    seed: int
    seconds: float | None
    done: int = 0
    #: the option that begins with the round that was begun last
    said: str = "none was begun"

    def rounds(self, count: int) -> Iterator[random.Random]:
        """``count`` rounds, fewer under a sanitizer. A failure is reported with the last round that
        was begun."""
        began, most = time.monotonic(), max(count // 3, 1) if SANITIZED else count
        while self.done < most if self.seconds is None else time.monotonic() - began < self.seconds:
            self.said = f"round {self.done}: --fuzz-seed {self.seed + self.done}"
            yield random.Random(self.seed + self.done)
            self.done += 1


# ---- bytes ----

Mutation = Callable[[random.Random, bytearray], None]


def _flip(pick: random.Random, data: bytearray) -> None:
    data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)


def _set(pick: random.Random, data: bytearray) -> None:
    data[pick.randrange(len(data))] = pick.choice([0, 1, 127, 128, 254, 255, pick.randrange(256)])


def _cut(pick: random.Random, data: bytearray) -> None:
    del data[pick.randrange(len(data)) :]


def _remove(pick: random.Random, data: bytearray) -> None:
    at = pick.randrange(len(data))
    del data[at : at + pick.choice([1, 2, 4, 8, 24])]


def _insert(pick: random.Random, data: bytearray) -> None:
    at = pick.randrange(len(data) + 1)
    data[at:at] = pick.randbytes(pick.choice([1, 2, 4, 8, 24]))


def _repeat(pick: random.Random, data: bytearray) -> None:
    at = pick.randrange(len(data))
    data[at:at] = data[at : at + pick.choice([1, 8, 24, 64])]


def _number(pick: random.Random, data: bytearray) -> None:
    """Puts an integer that lies at a limit where there may be an integer."""
    size = pick.choice([1, 2, 4, 8])
    at = pick.randrange(len(data))
    value = pick.choice(
        [0, 1, 2**7, 2**15, 2**31, 2**63, 2**64 - 1, 2**32 - 1, 2**20, 2**20 + 1]
    ) + pick.choice([-1, 0, 1])
    data[at : at + size] = (value & 2 ** (8 * size) - 1).to_bytes(
        size, pick.choice(["little", "big"])
    )


MUTATIONS: list[Mutation] = [_flip, _set, _cut, _remove, _insert, _repeat, _number]


def mutated(pick: random.Random, data: bytes) -> bytes:
    """``data`` with one or a few errors in it; or, by chance, none."""
    result = bytearray(data)
    for _ in range(pick.choice([1, 1, 1, 2, 4])):
        if result:
            pick.choice(MUTATIONS)(pick, result)
    return bytes(result)


def fragments(pick: random.Random, data: bytes) -> Iterator[bytes]:
    """``data`` in pieces, as a stream may bring it."""
    most = pick.choice([1, 7, 24, 100, 4096, 1 << 20])
    if len(data) // most > 200:
        most = 1 << 16
    at = 0
    while at < len(data):
        size = pick.randint(1, most)
        yield data[at : at + size]
        at += size


def is_one_line(text: str) -> bool:
    """Fit for a terminal, and no longer than a reason may be."""
    return text.isprintable() and 0 < len(text) < 1300


# ---- XXH64, seed 0, of any bytes ----


def _rotate(value: int, by: int) -> int:
    return (value << by | value >> 64 - by) & MASK


def _round(sum_: int, word: int) -> int:
    return _rotate((sum_ + word * PRIMES[1]) & MASK, 31) * PRIMES[0] & MASK


def xxh64(data: bytes) -> bytes:
    """The checksum, little-endian, by the algorithm's description."""
    whole = len(data) // STRIPE * STRIPE
    if whole:
        sums = [(PRIMES[0] + PRIMES[1]) & MASK, PRIMES[1], 0, -PRIMES[0] & MASK]
        words = memoryview(data[:whole]).cast("Q")
        for lane in range(4):
            sum_ = sums[lane]
            for word in words[lane::4]:
                sum_ = _round(sum_, word)
            sums[lane] = sum_
        result = (
            sum(_rotate(sum_, by) for sum_, by in zip(sums, (1, 7, 12, 18), strict=True)) & MASK
        )
        for sum_ in sums:
            result = ((result ^ _round(0, sum_)) * PRIMES[0] + PRIMES[3]) & MASK
    else:
        result = PRIMES[4]
    return _finish((result + len(data)) & MASK, data[whole:])


def _finish(result: int, tail: bytes) -> bytes:
    while len(tail) >= 8:
        result = (
            _rotate(result ^ _round(0, int.from_bytes(tail[:8], "little")), 27) * PRIMES[0]
            + PRIMES[3]
        ) & MASK
        tail = tail[8:]
    if len(tail) >= 4:
        word = int.from_bytes(tail[:4], "little")
        result = (_rotate(result ^ word * PRIMES[0] & MASK, 23) * PRIMES[1] + PRIMES[2]) & MASK
        tail = tail[4:]
    for byte in tail:
        result = _rotate(result ^ byte * PRIMES[4] & MASK, 11) * PRIMES[0] & MASK
    result = (result ^ result >> 33) * PRIMES[1] & MASK
    result = (result ^ result >> 29) * PRIMES[2] & MASK
    return (result ^ result >> 32).to_bytes(8, "little")


# ---- LZ4 blocks ----

# an encoder ends a block with at least LAST_LITERALS literals, and begins no match within
# LAST_MATCH bytes of the end
LAST_LITERALS, LAST_MATCH = 5, 12


class BadBlock(Exception):
    """The bytes are no LZ4 block."""


class NoDistance(BadBlock):
    """A match at distance 0. liblz4 leaves what is in its place, and the checksum must tell whether
    that is right."""


@dataclass(frozen=True)
class Unpacked:
    """``proper``: the block's end keeps the rules for encoders, which a decoder may enforce or
    not."""

    data: bytes
    proper: bool


def unpack(block: bytes, limit: int) -> Unpacked:
    """Unpacks by the format's description. :exc:`BadBlock` if that fails, or for more than
    ``limit`` bytes."""
    out, at, last_match, literals = bytearray(), 0, -1, 0

    def length(nibble: int) -> int:
        nonlocal at
        value, more = nibble, nibble == 15
        while more:
            if at >= len(block):
                raise BadBlock
            value, more, at = value + block[at], block[at] == 255, at + 1
        return value

    while at < len(block):
        token, at = block[at], at + 1
        literals = length(token >> 4)
        if literals > len(block) - at or len(out) + literals > limit:
            raise BadBlock
        out += block[at : at + literals]
        at += literals
        if at == len(block):
            ends_well = last_match < 0 or (
                literals >= LAST_LITERALS and last_match <= len(out) - LAST_MATCH
            )
            return Unpacked(bytes(out), ends_well and not token & 15)
        if at + 2 > len(block):
            raise BadBlock
        distance, at = int.from_bytes(block[at : at + 2], "little"), at + 2
        size = length(token & 15) + 4
        if not distance:
            raise NoDistance
        if distance > len(out) or len(out) + size > limit:
            raise BadBlock
        last_match = len(out)
        pattern = bytes(out[-distance:])
        out += (pattern * (size // distance + 1))[:size]
    raise BadBlock  # it ends with a match, or is empty


def encode_sequence(literals: bytes, distance: int = 0, size: int = 0) -> bytes:
    """Literals and, if ``size`` is not 0, a match of ``size`` bytes (at least 4)."""
    match = size - 4 if size else 0
    token = min(len(literals), 15) << 4 | min(match, 15)
    result = bytes([token]) + _more(len(literals)) + literals
    return result + distance.to_bytes(2, "little") + _more(match) if size else result


def _more(length: int) -> bytes:
    if length < 15:
        return b""
    whole, rest = divmod(length - 15, 255)
    return b"\xff" * whole + bytes([rest])


def make_block(pick: random.Random, size: int) -> bytes:
    """A proper block of ``size`` bytes, with matches near and far, some of which overlap
    themselves, and runs of zeros."""
    parts: list[bytes] = []
    made = 0
    while size - made > LAST_MATCH + 64 and len(parts) < 40:
        literals = pick.choice(
            [bytes(8), pick.randbytes(pick.randint(1, 40)), b"ab" * pick.randint(1, 20), b""]
        )
        if not made + len(literals):
            literals = b"\0"
        made += len(literals)
        room = size - made - LAST_MATCH
        match = min(pick.choice([4, 18, 19, 20, 273, 274, 1000, 5000, room]), room)
        if match < 4:
            parts.append(encode_sequence(literals + bytes(size - made)))
            return b"".join(parts)
        distance = min(pick.choice([1, 1, 2, 3, 7, 8, 16, 64, 4096, 65535]), made)
        if len(parts) == 39:
            match = room
        parts.append(encode_sequence(literals, distance, match))
        made += match
    return b"".join(parts) + encode_sequence(pick.randbytes(size - made))


# ---- structures ----


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def odd_value(pick: random.Random) -> Any:
    return pick.choice([
        None, True, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1,
        0.5, float("nan"), float("inf"), 1e300,
        "", "\x1b[2J\n", "\ud800", "x" * 5000,
        [], {}, [None], {"a": {}}, nested(300), nested(900), [0] * 300,
        "demand", "source", "4096",
    ])  # fmt: skip


def odd(pick: random.Random, value: Any) -> Any:
    """``value`` with something unexpected in it."""
    if isinstance(value, dict) and value and pick.random() < 0.9:
        changed, key = dict(value), pick.choice(list(value))
        if pick.random() < 0.2:
            del changed[key]
        elif pick.random() < 0.1:
            changed[pick.choice(["", "x", "\x1b"])] = odd_value(pick)
        else:
            changed[key] = odd(pick, changed[key])
        return changed
    if isinstance(value, list) and value and pick.random() < 0.8:
        items, at = list(value), pick.randrange(len(value))
        items[at] = odd(pick, items[at])
        return pick.choice([items, items, items[:at], items * 2])
    if isinstance(value, int) and pick.random() < 0.5:
        return value + pick.choice([-1, 1, 4096, 2**32, 2**62, 2**64])
    return odd_value(pick)


def as_msgpack(pick: random.Random, value: Any) -> bytes:
    try:
        if isinstance(value, dict) and pick.random() < 0.05:  # deeper than the packer goes
            key = pick.choice([*value, "text"])
            rest = {name: value[name] for name in value if name != key}
            inside = msgpack.packb(key) + b"\x91" * pick.choice([600, 900, 990, 1020]) + b"\0"
            return bytes([0x81 + len(rest)]) + bytes(msgpack.packb(rest))[1:] + inside
        return bytes(msgpack.packb(value, unicode_errors="surrogatepass"))
    except (ValueError, OverflowError):  # too deep, or too large a number
        return b"\xc1"
