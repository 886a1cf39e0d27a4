"""pagenet-pull: fill memory that is in use already, or a file, with the pages of a machine that has moved here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack

import trio

from ..errors import HandshakeError
from ..into_file import IntoFile
from ..pulling import Transfer, pull
from ..target import Owner
from ..uffd import UffdSocket
from ._command import Parser, Report, add_pull_options, pull_options, run_command
from ._progress import complete_fields, make_progress, print_summary

__all__ = ["main"]

_WORDS = {
    "listening": "waiting for a source on {uri}",
    "connected": "{peer}: {pages} pages, {bytes} bytes",
    "waiting": "waiting for the owner of the memory on {uffd_socket}",
    "owner": "filling {pages} pages (placement: {placement}, lanes: {lane})",
    "refused": "{peer}: refused: {reason}",
}


def _parser() -> Parser:
    parser = Parser("pagenet-pull", "Pull the pages of a source into memory that is in use already, or into a file.")
    parser.add_argument("uri", metavar="URI", help="where the source listens: tcp://HOST:PORT, unix:PATH")
    into = parser.add_mutually_exclusive_group(required=True)
    into.add_argument(
        "--uffd-socket",
        metavar="PATH",
        help="unix socket on which the owner of the memory hands over its userfaultfd (Firecracker's UFFD handshake)",
    )
    into.add_argument("--into", metavar="FILE", help="fill a file; it appears when it is complete, and replaces an older one")
    parser.add_argument("--listen", action="store_true", help="wait at URI for the source to dial (pagenet-serve --connect)")
    add_pull_options(parser)
    return parser


async def _pull(options: argparse.Namespace, report: Report) -> None:
    with ExitStack() as stack:
        owner = _owner(options, report, stack)
        async with pull(
            options.uri,
            owner,
            listen=options.listen,
            **pull_options(options),
            on_event=report,
        ) as transfer:
            await _show_until_complete(transfer, report)
        statistics = transfer.statistics()
        report("complete", **complete_fields(statistics))
        if not report.as_json:
            print_summary(statistics)


def _owner(options: argparse.Namespace, report: Report, stack: ExitStack) -> Owner:
    if options.into is not None:
        return IntoFile(options.into)

    def refused(error: HandshakeError) -> None:
        report("refused", peer=f"owner on {options.uffd_socket}", reason=str(error))

    def waiting() -> None:
        report("waiting", uffd_socket=options.uffd_socket)

    owner = UffdSocket(options.uffd_socket, allocate=options.allocate, on_waiting=waiting, on_refused=refused)
    stack.callback(owner.close)
    return owner


async def _show_until_complete(transfer: Transfer, report: Report) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_progress(report), transfer)
        await transfer.wait_complete()
        nursery.cancel_scope.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    report = Report("pagenet-pull", options.json, _WORDS)
    return run_command(lambda: _pull(options, report), report)


if __name__ == "__main__":
    sys.exit(main())
