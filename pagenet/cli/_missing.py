"""What a transfer that has ended early lacks: exactly which pages."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ..destination.pulling import Transfer
from ..errors import GuestReclaimed
from ..whole_file import WholeFile
from ._command import Report

__all__ = ["MISSING_WORDS", "Unfinished", "add_missing_option", "telling_missing"]

MISSING_WORDS = {"missing": "{pages} pages are missing"}


class Unfinished:
    """A place for the transfer that may end early."""

    def __init__(self) -> None:
        self.transfer: Transfer | None = None


def add_missing_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--missing",
        metavar="FILE",
        help="if the transfer ends early, write there (JSON) exactly which pages are missing",
    )


@contextmanager
def telling_missing(options: argparse.Namespace, report: Report) -> Iterator[Unfinished]:
    """Tell which pages are missing if the transfer is not complete when the block ends. A bad
    ``--missing`` fails before any page moves."""
    unfinished = Unfinished()
    making = (
        nullcontext()
        if options.missing is None
        else WholeFile(options.missing, "list of missing pages")
    )
    with making as file:
        try:
            yield unfinished
        except GuestReclaimed:  # its pages are where it is
            unfinished.transfer = None
            raise
        finally:
            transfer = unfinished.transfer
            if transfer is not None and not transfer.finished.is_set():
                _tell(transfer, report, file)


def _tell(transfer: Transfer, report: Report, file: WholeFile | None) -> None:
    runs = transfer.missing()
    report("missing", pages=sum(count for _, _, count in runs), runs=runs)
    if file is not None:
        blocks = [[block.name, block.size, block.page_size] for block in transfer.region.blocks]
        file.write(json.dumps({"blocks": blocks, "missing": runs}).encode() + b"\n")
        file.commit()
