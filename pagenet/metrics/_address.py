"""Where metrics are served."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ..errors import UsageError

__all__ = ["MetricsAddress", "parse_address"]


@dataclass(frozen=True, slots=True)
class MetricsAddress:
    """``path``: of a unix socket. Otherwise ``host``, an IP address, and ``port``."""

    path: str | None = None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/metrics"


def parse_address(text: str, *, is_open: bool = False) -> MetricsAddress:
    """``HOST:PORT`` or ``unix:PATH``. ``is_open``: others than this host may look, too.
    :exc:`UsageError` for anything else, and for an address of which others know otherwise."""
    if text.startswith("unix:"):
        if len(text) == len("unix:"):
            raise UsageError(f"--metrics {text}: there is no path behind unix:")
        return MetricsAddress(text.removeprefix("unix:"))
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise UsageError(f"--metrics {text}: that is neither HOST:PORT nor unix:PATH")
    try:
        address = ipaddress.ip_address(
            "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
        )
    except ValueError:
        raise UsageError(
            f"--metrics {text}: {host!r} is no IP address, nor localhost; to listen on all"
            " addresses, use 0.0.0.0"
        ) from None
    if not address.is_loopback and not is_open:
        raise UsageError(
            f"--metrics {text}: other hosts could read what this daemon does; add --metrics-open if"
            " they may"
        )
    return MetricsAddress(None, str(address), int(port))
