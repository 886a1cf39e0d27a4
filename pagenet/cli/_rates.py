"""Rates as people write them. They are in bytes a second everywhere, as in QEMU and rsync; a rate
in bits, as in tc, ends in ``bit``."""

from __future__ import annotations

import re

from ..errors import UsageError

__all__ = ["parse_rate", "rate_words"]

_RATE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)(k|K|M|G)?(i)?(B|bit)?")
_POWERS = {None: 0, "k": 1, "K": 1, "M": 2, "G": 3}
# A petabyte a second: anything above that is a typing error.
_MOST = 10**15


def parse_rate(text: str) -> int:
    """Bytes a second: ``60M`` and ``1.5G`` are 60 and 1500 million, ``64Mi`` is 64 * 2**20,
    ``800Mbit`` is 100 million.

    :exc:`UsageError` for anything else, and for less than a byte a second.
    """
    found = _RATE.fullmatch(text)
    if not found or (found[3] and not found[2]):
        raise UsageError(
            f"{text[:40]!r} is no rate in bytes a second: write 60M, 1.5G, 64Mi or 800Mbit"
        )
    number, prefix, binary, unit = found.groups()
    rate = (
        float(number) * (1024 if binary else 1000) ** _POWERS[prefix] / (8 if unit == "bit" else 1)
    )
    if not 1 <= rate <= _MOST:
        raise UsageError(
            f"{text[:40]!r} is no rate that can be used: give at least 1 byte and at most a million"
            " gigabytes a second"
        )
    return int(rate)


def rate_words(rate: float) -> str:
    """``rate`` bytes a second in words, such as ``60.0 MB/s``. (:func:`parse_rate` takes
    ``60M``.)"""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if rate >= size:
            return f"{rate / size:.1f} {unit}/s"
    return f"{rate:.0f} B/s"
