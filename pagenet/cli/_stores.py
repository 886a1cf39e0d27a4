"""The options of sources whose bytes are fetched: stores, and the cache of what came from them."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UsageError
from ..sizes import parse_size
from ..source.memory import STORE_TIMEOUT
from ._command import MAX_SECONDS, Parser

__all__ = ["PEER_WORDS", "add_store_options", "store_options"]


def add_store_options(parser: Parser) -> None:
    group = parser.add_argument_group("sources in stores")
    group.add_argument(
        "--cache",
        metavar="DIR",
        help=(
            "keep what was fetched in that directory, for all processes of this host (default: in a"
            " temporary file of this process)"
        ),
    )
    group.add_argument(
        "--cache-size",
        type=parse_size,
        metavar="SIZE",
        help="limit of what --cache keeps; objects not in use are removed for that (default: none)",
    )
    group.add_argument(
        "--store-timeout",
        type=_seconds,
        default=STORE_TIMEOUT,
        metavar="SECONDS",
        help=(
            "how long a store that fails, or does not answer, is asked for the same bytes again"
            " (default: 60)"
        ),
    )
    group.add_argument(
        "--peer",
        dest="peers",
        action="append",
        default=[],
        metavar="URI",
        help=(
            "a pagenet-serve that may have the same object or snapshot, tcp://HOST:PORT or"
            " unix:PATH: it is asked for what it holds, before the store is; may be given several"
            " times. For an object, only with TLS"
        ),
    )


#: of the events of sources that have peers
PEER_WORDS = {"peer": "peer {uri} is asked no more: {reason}"}


def store_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that are arguments of :func:`pagenet.open_source`. :exc:`UsageError`."""
    if options.cache_size is not None and options.cache is None:
        raise UsageError("--cache-size limits --cache, which is not given")
    names = ("cache", "cache_size", "store_timeout", "tls", "peers")
    return {name: getattr(options, name) for name in names}


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds
