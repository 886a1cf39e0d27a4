"""pagenet-serve: serve the pages of a machine that has left."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing

import trio

from ..control import Control
from ..errors import UsageError
from ..guard import dismiss
from ..sizes import parse_size
from ..source.lanes import PIN_LIMIT
from ..source.memory import Source, named_identity, open_source_in_thread
from ..source.precopy import Precopy
from ..source.serving import MAX_LANES, MAX_SESSIONS, Server, serve
from ..source.tracked import SourceOwner
from ..uffd import WriteTracker
from ._command import (
    ROUND_WORDS,
    Parser,
    Report,
    add_lane_option,
    add_reconnect_option,
    count,
    reconnect_for,
    round_count,
)
from ._control import COMMON_WORDS, add_common_options, run_controlled
from ._stores import PEER_WORDS, add_store_options, store_options

__all__ = ["main", "make_parser"]

_WORDS = {
    **COMMON_WORDS,
    **PEER_WORDS,
    "listening": "serving {pages} pages ({bytes} bytes) on {uri}",
    "connected": "{peer}: connected",
    "path": "pages go by {path}",
    "round": ROUND_WORDS,
    "frozen": "process {pid} is stopped; the destination lacks {left} pages",
    "complete": "{peer}: has every page",
    "left": "{peer}: left before it had every page",
    "lost": "{peer}: lost: {reason}",
    "waiting": "the destination is away ({reason}): dialling {uri}",
    "refused": "{peer}: refused: {reason}",
}


def make_parser() -> Parser:
    parser = Parser("pagenet-serve", "Serve memory to destinations that pull it with pagenet-pull.")
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help=(
            "a file, a tmpfs file, /proc/PID/fd/N (a memfd of that process), pid:PID:START-END or"
            " pid:PID:START+SIZE (addresses of that process), snapshot:DIR/NAME, or an object:"
            " s3://BUCKET/KEY, gs://BUCKET/KEY, az://CONTAINER/KEY, https://HOST/PATH,"
            " nbd://HOST/EXPORT; or another source: tcp://HOST:PORT, unix:PATH; NAME=SOURCE"
            " names the block. Several make one region, one block each."
        ),
    )
    where = parser.add_mutually_exclusive_group(required=True)
    listen = (
        "where destinations dial: tcp://HOST:PORT (port 0 picks one), rdma://HOST:PORT, unix:PATH"
    )
    where.add_argument("--listen", metavar="URI", help=listen)
    where.add_argument(
        "--connect",
        metavar="URI",
        help="dial the destination that waits there (pagenet-pull --listen)",
    )
    parser.add_argument(
        "--plaintext",
        action="store_true",
        help="allow an address that other hosts can reach, unencrypted",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="end, with exit code 0, when a destination has every page",
    )
    parser.add_argument(
        "--identity",
        metavar="NAME",
        type=_identity,
        help=(
            "name of the content, such as its digest or version: for pagenet-pull --resume, a"
            " source of the same name is the same source on any host; 32 hexadecimal digits are the"
            " identity that pagenet-qemu migrate gave it (default: which file it is, and when it"
            " was last written to)"
        ),
    )
    parser.add_argument(
        "--rdma-pin-limit",
        type=parse_size,
        default=PIN_LIMIT,
        metavar="SIZE",
        help="limit of the memory that rdma:// registers, and so pins, at a time (default: 256M)",
    )
    parser.add_argument(
        "--max-sessions",
        type=count,
        default=MAX_SESSIONS,
        metavar="N",
        help=(
            "limit of the destinations that dial and are served at a time; more are refused"
            " (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--max-lanes",
        type=count,
        default=MAX_LANES,
        metavar="N",
        help="limit of each destination's connections beside control (default: %(default)s)",
    )
    add_reconnect_option(
        parser,
        "with --connect: how long to dial a destination again that was connected and is lost"
        " (default: forever)",
    )
    parser.add_argument(
        "--tracked",
        action="store_true",
        help=(
            "the process that SOURCE belongs to still runs: copy its memory to one destination in"
            " rounds, then stop it (SIGSTOP), and serve what it has written since"
        ),
    )
    parser.add_argument(
        "--rounds",
        type=round_count,
        default="auto",
        metavar="auto|ROUNDS",
        help="with --tracked: rounds before the process is stopped (auto)",
    )
    add_lane_option(parser)
    add_store_options(parser)
    add_common_options(parser)
    return parser


def _identity(text: str) -> bytes:
    if not text:
        raise argparse.ArgumentTypeError(
            "an identity is a name, or 32 hexadecimal digits, and cannot be empty"
        )
    return named_identity(text)


async def _serve(options: argparse.Namespace, report: Report, control: Control) -> None:
    with ExitStack() as stack:
        opened = await open_source_in_thread(
            *options.source, **store_options(options), on_event=report
        )
        source = stack.enter_context(opened)
        if options.identity is not None:
            source.identity = options.identity
        owner = tracker = None
        if options.tracked:
            owner = stack.enter_context(closing(SourceOwner(source)))
            tracker = await trio.to_thread.run_sync(owner.track, source.region)
            stack.callback(tracker.close)
        await _serve_source(source, owner, tracker, options, report, control)


async def _serve_source(
    source: Source,
    owner: SourceOwner | None,
    tracker: WriteTracker | None,
    options: argparse.Namespace,
    report: Report,
    control: Control,
) -> None:
    async with serve(
        source,
        listen=options.listen,
        connect=options.connect,
        plaintext=options.plaintext,
        tls=options.tls,
        lane=options.lane,
        rdma_pin_limit=options.rdma_pin_limit,
        max_sessions=options.max_sessions,
        max_lanes=options.max_lanes,
        tracked=tracker,
        reconnect_for=reconnect_for(options),
        on_event=report,
    ) as server:
        if owner is not None:
            control.precopy = Precopy(options.rounds)
            await _copy(server, owner, control.precopy, report)
            control.precopy = None
        control.subject = server
        if options.once or options.connect is not None:
            await server.wait_complete()
        else:
            await trio.sleep_forever()


async def _copy(server: Server, owner: SourceOwner, precopy: Precopy, report: Report) -> None:
    """Copy the memory while its owner runs, then stop the owner."""
    rounds = await server.wait_rounds()
    if rounds is None:
        raise UsageError("the destination's release of pagenet cannot be told what is stale")
    await precopy.run(rounds, report)
    await rounds.pause()
    await rounds.name_early()
    await owner.stop()
    # From here on it stays stopped: whatever becomes of us, the destination may have been told that
    # the memory does not change any more.
    left = await rounds.freeze()
    report("frozen", pid=owner.pid, left=left)


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    report = Report("pagenet-serve", options.json, _WORDS, ready=("listening", "connected"))
    status = run_controlled(_serve, options, report)
    if status == 0 or status > 128:  # a guard starts it again if it fails: the pages are only here
        dismiss()
    return status


if __name__ == "__main__":
    sys.exit(main())
