"""pagenet-qemu: move a running guest of stock QEMU. The guest goes at once, its pages follow."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import trio

from ..qemu import migrate, receive
from ._command import Parser, Report, add_lane_option, add_pull_options, pull_options, run_command
from ._progress import complete_fields, make_progress, print_summary

__all__ = ["main"]

_PROG = "pagenet-qemu"
_WORDS = {
    "qemu": "QEMU waits for a guest (pid {pid}, RAM in {ram}); added to its arguments: {added}",
    "listening": "waiting for a guest on {uri}",
    "connected": "{peer}: connected",
    "owner": "RAM of {pages} pages (placement: {placement}, lanes: {lane})",
    "stopped": "the guest stands still here",
    "switchover": "handed over: it will not run here again",
    "resumed": "the guest runs at the destination",
    "refused": "{peer}: refused: {reason}",
}


def _parser() -> Parser:
    parser = Parser(_PROG, "Move a running QEMU guest to another host.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    words = "Start the QEMU that a guest comes to, and take one guest. Ends when that QEMU ends, with its exit status."
    incoming = commands.add_parser("incoming", help=words, description=words)
    incoming.add_argument("--listen", metavar="URI", required=True, help="where the source dials: tcp://HOST:PORT, unix:PATH")
    add_pull_options(incoming)
    incoming.add_argument("qemu", nargs="+", metavar="QEMU", help="after --: the command line of QEMU, as at the source")
    words = "Move the guest of a running QEMU to the pagenet-qemu incoming that listens on URI. Ends when it has every page."
    leaving = commands.add_parser("migrate", help=words, description=words)
    leaving.add_argument("--qmp", metavar="SOCKET", required=True, help="the QEMU's monitor (-qmp unix:...)")
    leaving.add_argument("uri", metavar="URI", help="where the destination listens: tcp://HOST:PORT, unix:PATH")
    add_lane_option(leaving)
    return parser


class _CommandParser(Parser):
    def __init__(self, prog: str, description: str, **_: object) -> None:
        super().__init__(prog, description)


async def _incoming(options: argparse.Namespace, report: Report) -> int:
    arriving = receive(
        options.qemu,
        listen=options.listen,
        allocate=options.allocate,
        **pull_options(options),
        on_event=report,
    )
    async with arriving as arrival, trio.open_nursery() as nursery:
        nursery.start_soon(make_progress(report), arrival.transfer)
        await arrival.wait_complete()
        nursery.cancel_scope.cancel()
    statistics = arrival.transfer.statistics()
    report("complete", **complete_fields(statistics))
    if not report.as_json:
        print_summary(statistics)
    status = await arrival.process.wait()
    return status if status >= 0 else 128 - status


async def _migrate(options: argparse.Namespace, report: Report) -> int:
    async with migrate(options.qmp, options.uri, lane=options.lane, on_event=report) as server:
        await server.wait_complete()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    report = Report(_PROG, options.json, _WORDS)
    work = _incoming if options.command == "incoming" else _migrate
    return run_command(lambda: work(options, report), report)


if __name__ == "__main__":
    sys.exit(main())
