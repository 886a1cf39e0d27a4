"""From URIs to the addresses that sockets take, and back. A URI that makes no sense raises a
UsageError of one line."""

from __future__ import annotations

import os
from typing import NamedTuple
from urllib.parse import SplitResult, quote, unquote_to_bytes

from ..errors import UsageError
from ..unix_socket import check_path_length

# Path characters that a URI may have unescaped. Those that are missing here would end the path
# ('?', '#') or be taken for an escape ('%').
_PLAIN = "/:@!$&'()*+,;=~ "


class HostPort(NamedTuple):
    host: str  # "" means every address of this host
    port: int


def parse_tcp(uri: SplitResult) -> HostPort:
    _refuse_decorations(uri, "tcp://HOST:PORT")
    if uri.path not in ("", "/"):
        raise _senseless(uri, f"what is {uri.path!r} for? Say tcp://HOST:PORT")
    try:
        port = uri.port
    except ValueError:
        raise _senseless(
            uri, "the port is no number from 0 to 65535 (IPv6 goes in brackets: tcp://[::1]:7000)"
        ) from None
    if port is None:
        raise _senseless(uri, "the port is missing: say tcp://HOST:PORT")
    # A zone's percent sign may be written as itself or, as RFC 6874 wants it, as %25.
    return HostPort((uri.hostname or "").replace("%25", "%", 1), port)


def tcp_uri(address: HostPort) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"tcp://{host}:{address.port}"


def parse_unix(uri: SplitResult) -> str:
    _refuse_decorations(uri, "unix:PATH, with '?' and '#' in PATH written as %3F and %23")
    if uri.netloc:
        raise _senseless(
            uri, f"two slashes make {uri.netloc!r} a host: say unix:PATH or unix:///PATH"
        )
    path = unquote_to_bytes(uri.path)
    if not path:
        raise _senseless(uri, "the path is missing: say unix:PATH")
    if b"\0" in path:
        raise _senseless(
            uri, "a path has no zero bytes, and abstract sockets no owner: say unix:PATH"
        )
    check_path_length(path, uri.geturl())
    return os.fsdecode(path)


def unix_uri(path: str) -> str:
    return "unix:" + quote(os.fsencode(path), safe=_PLAIN)


def _refuse_decorations(uri: SplitResult, shape: str) -> None:
    if uri.query or uri.fragment:
        raise _senseless(uri, f"a query or a fragment has no meaning here: say {shape}")
    if "@" in uri.netloc:
        raise _senseless(uri, f"a user name has no meaning here: say {shape}")


def _senseless(uri: SplitResult, reason: str) -> UsageError:
    return UsageError(f"{uri.geturl()}: {reason}")
