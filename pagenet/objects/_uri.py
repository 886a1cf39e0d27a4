"""What names an object, or a store."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import unquote

from ..errors import UsageError
from ..protocol import printable

__all__ = ["Uri"]

_URI = re.compile(r"(s3|gs|az|https?)://([^/]*)/?(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Uri:
    scheme: str
    #: bucket, container, or host and port
    place: str
    #: name of the object in it, or what all names in a store begin with; as the store has it, not
    #: percent-encoded
    key: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises :exc:`UsageError`."""
        shown = printable(text)
        match = _URI.fullmatch(text)
        if match is None or not match[2]:
            raise UsageError(f"{shown}: not a URI like s3://BUCKET/KEY or https://HOST/PATH")
        scheme, place, key = match.groups()
        if "@" in place:  # and not shown: it may be a password
            raise UsageError(f"{scheme}://...: a user or password in a URI is not supported")
        if scheme in ("http", "https"):
            if "?" in key or "#" in key:
                path = printable(re.split("[?#]", text)[0])
                raise UsageError(
                    f"{path}: a query (?...) in a URI, such as that of a presigned URL, is not"
                    " supported: its object is not read by this name alone"
                )
            key = unquote(key, errors="strict")
        if scheme == "http" and not _is_loopback(place):
            raise UsageError(f"{shown}: http:// is for this host alone: use https://")
        return cls(scheme, place, key)

    @property
    def store(self) -> str:
        return f"{self.scheme}://{self.place}"

    def __str__(self) -> str:
        return f"{self.store}/{self.key}"


def _is_loopback(place: str) -> bool:
    host = re.sub(r":\d*$", "", place).strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
