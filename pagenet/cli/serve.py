"""pagenet-serve: answer for the pages of a machine that has left."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import trio

from ..serving import serve
from ._command import Parser, Report, add_lane_option, run_command

__all__ = ["main"]

_WORDS = {
    "listening": "serving {pages} pages ({bytes} bytes) on {uri}",
    "connected": "{peer}: connected",
    "complete": "{peer}: has every page",
    "left": "{peer}: left before it had every page",
    "lost": "{peer}: lost: {reason}",
    "refused": "{peer}: refused: {reason}",
}


def _parser() -> Parser:
    parser = Parser("pagenet-serve", "Serve memory to destinations that pull it with pagenet-pull.")
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="a file, a tmpfs file, /proc/PID/fd/N (a memfd of that process), pid:PID:START-END or pid:PID:START+SIZE "
        "(addresses of that process); NAME=SOURCE names the block. Several make one region, one block each.",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--listen", metavar="URI", help="where destinations dial: tcp://HOST:PORT (port 0 picks one), unix:PATH")
    where.add_argument("--connect", metavar="URI", help="dial the destination that waits there (pagenet-pull --listen)")
    parser.add_argument("--plaintext", action="store_true", help="allow an address that other hosts can reach, unencrypted")
    parser.add_argument("--once", action="store_true", help="end, with exit code 0, when a destination has every page")
    add_lane_option(parser)
    return parser


async def _serve(options: argparse.Namespace, report: Report) -> None:
    async with serve(
        options.source,
        listen=options.listen,
        connect=options.connect,
        plaintext=options.plaintext,
        lane=options.lane,
        on_event=report,
    ) as server:
        if options.once or options.connect is not None:
            await server.wait_complete()
        else:
            await trio.sleep_forever()


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    report = Report("pagenet-serve", options.json, _WORDS)
    return run_command(lambda: _serve(options, report), report)


if __name__ == "__main__":
    sys.exit(main())
