"""What a transfer that has ended early lacks: exactly which pages."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ..events import EventHandler
from ..uffd import check_poison
from ..whole_file import WholeFile

__all__ = ["MISSING_WORDS", "add_missing_option", "telling_missing"]

MISSING_WORDS = {
    "missing": "{pages} pages are missing",
    "poisoned": "{pages} pages are poisoned: a thread that touches one gets SIGBUS",
    "killed": "process {pid}, the owner, is killed",
}


def add_missing_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--missing",
        metavar="FILE",
        help="if the transfer ends early, write there (JSON) exactly which pages are missing",
    )


@contextmanager
def telling_missing(options: argparse.Namespace, on_event: EventHandler) -> Iterator[EventHandler]:
    """``on_event``, before which the event ``missing`` is written to the file of ``--missing``. A
    file that cannot be written, or pages that cannot be poisoned, fail before any page moves."""
    if options.on_loss == "poison":
        check_poison()
    making = (
        nullcontext()
        if options.missing is None
        else WholeFile(options.missing, "list of missing pages")
    )
    with making as file:

        def tell(event: str, /, **fields: object) -> None:
            if event == "missing" and file is not None:
                what = {"blocks": fields["blocks"], "missing": fields["runs"]}
                file.write(json.dumps(what).encode() + b"\n")
                file.commit()
            on_event(event, **fields)

        yield tell
