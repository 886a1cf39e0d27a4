"""pagenet-pull: fill memory that is in use already, or a file, with the pages of a machine that has
moved here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import inf
from pathlib import Path
from typing import get_args
from urllib.parse import quote

import trio

from ..children import module_command
from ..control import Control
from ..destination.caching import Fill
from ..destination.hosting import MAX_GUESTS, host
from ..destination.into_file import IntoFile
from ..destination.learning import LearnedFile, LearnedPlace
from ..destination.pulling import pull
from ..direct import direct_source, is_direct
from ..errors import HandshakeError, UsageError
from ..guard import Guard, follow
from ..nurseries import open_failing_nursery
from ..protocol import printable
from ..redialling import NOT_NOW, PAUSE
from ..sizes import parse_size
from ..target import Owner
from ..uffd import AbandonedOwner, UffdSocket
from ._command import (
    RECONNECT_WORDS,
    Parser,
    Report,
    add_pull_options,
    count,
    pull_options,
    reconnect_for,
)
from ._control import COMMON_WORDS, add_common_options, run_controlled
from ._guard import GUARD_WORDS, add_guard_option, guarded
from ._missing import MISSING_WORDS, add_missing_option, telling_missing
from ._progress import show_until_complete
from ._stores import PEER_WORDS, add_store_options, store_options

__all__ = ["main", "make_parser"]

_MODULE = "pagenet.cli.pull"
_READY = ("listening", "waiting", "owner")
_WORDS = {
    **COMMON_WORDS,
    "listening": "waiting for a source on {uri}",
    "connected": "{peer}: {pages} pages, {bytes} bytes",
    "finished": "process {pid} has all of its {pages} pages: there is nothing to resume",
    "waiting": "waiting for the owner of the memory on {uffd_socket}",
    **MISSING_WORDS,
    **PEER_WORDS,
    **RECONNECT_WORDS,
    **GUARD_WORDS,
    "owner": "filling {pages} pages (placement: {placement}, lanes: {lane})",
    "refused": "{peer}: refused: {reason}",
}

_MANY_WORDS = {
    **COMMON_WORDS,
    **GUARD_WORDS,
    **PEER_WORDS,
    "added": "snapshot {name} of {uri}: waiting for owners on {uffd_socket}",
    "removed": "snapshot {name}: no more owners",
    "guest": "guest {guest}: process {pid}, snapshot {snapshot}",
    "complete": "guest {guest}: every page is there",
    "gone": "guest {guest}: its process has ended; {missing} pages were missing",
    "failed": "guest {guest}: {reason}; {missing} pages are missing",
    "unkept": "snapshot {snapshot}: what was learned of its guests is lost: {reason}",
    "cached": "snapshot {snapshot}: every page is in the cache",
    "lost": "snapshot {snapshot}: {reason}: trying again",
    "disconnected": "snapshot {snapshot}: the source is away ({reason}): waiting for it",
    "reconnected": "snapshot {snapshot}: the source is back after {seconds} s",
    "refused": "{peer}: refused: {reason}",
}
# The name of the snapshot on the command line.
_SNAPSHOT = "default"


def make_parser() -> Parser:
    parser = Parser(
        "pagenet-pull",
        "Pull the pages of a source into memory that is in use already, or into a file.",
    )
    parser.add_argument(
        "uri",
        metavar="URI",
        help=(
            "where the source listens: tcp://HOST:PORT, rdma://HOST:PORT, unix:PATH; or the source"
            " itself, as pagenet-serve takes it: s3://BUCKET/KEY, gs://BUCKET/KEY,"
            " az://CONTAINER/KEY, https://HOST/PATH, nbd://HOST/EXPORT, snapshot:DIR/NAME, or a"
            " file"
        ),
    )
    into = parser.add_mutually_exclusive_group(required=True)
    into.add_argument(
        "--uffd-socket",
        metavar="PATH",
        help=(
            "unix socket on which the owner of the memory hands over its userfaultfd (Firecracker's"
            " UFFD handshake)"
        ),
    )
    into.add_argument(
        "--into",
        metavar="FILE",
        help="fill a file; it appears when it is complete, and replaces an older one",
    )
    into.add_argument(
        "--resume",
        metavar="PID",
        type=count,
        help=(
            "resume filling the memory of process PID, whose pagenet-pull is gone; the process must"
            " keep the map of its pages"
        ),
    )
    parser.add_argument(
        "--many",
        action="store_true",
        help=(
            "with --uffd-socket: fill the memory of every owner that connects, until this is"
            " stopped; each is a guest of its own"
        ),
    )
    parser.add_argument(
        "--snapshot",
        action="append",
        nargs=3,
        metavar=("NAME", "URI", "PATH"),
        help=(
            "with --many, instead of URI and --uffd-socket's PATH: fill the owners that connect to"
            " PATH from the source at URI; may be repeated"
        ),
    )
    parser.add_argument(
        "--max-guests",
        metavar="N",
        type=count,
        default=MAX_GUESTS,
        help="with --many: guests at a time; more wait until others have ended (%(default)s)",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=count,
        help="with --many: threads that fill guests (one for each processor)",
    )
    parser.add_argument(
        "--fill",
        choices=get_args(Fill),
        default="all",
        help=(
            "with --many: what each guest gets: all pages as they come into the host's cache, or"
            " those that it touches, and pages around them (%(default)s)"
        ),
    )
    parser.add_argument(
        "--cache-memory",
        metavar="SIZE",
        type=parse_size,
        help=(
            "with --many: memory that the cache of each snapshot may take; beyond that, pages leave"
            " it that were not used for long (default: as much as the snapshot has)"
        ),
    )
    parser.add_argument(
        "--learn",
        metavar="PLACE",
        help=(
            "with --many: learn what guests wait for, keep that in a directory, or in a store"
            " (s3://BUCKET/PREFIX), in a file for each snapshot, and bring it to the next guests at"
            " once"
        ),
    )
    parser.add_argument(
        "--huge-pages",
        action="store_true",
        help="with --many: keep the cache in huge pages (2 MiB)",
    )
    parser.add_argument(
        "--listen",
        action="store_true",
        help="wait at URI for the source to dial (pagenet-serve --connect)",
    )
    add_pull_options(parser)
    add_store_options(parser)
    add_guard_option(parser)
    add_missing_option(parser)
    add_common_options(parser)
    return parser


async def _host(options: argparse.Namespace, report: Report, control: Control) -> None:
    async with guarded(options, report) as guard:
        given = options.snapshot or [(_SNAPSHOT, options.uri, options.uffd_socket)]
        snapshots = {name: (uri, path) for name, uri, path in given}

        def on_event(event: str, /, **fields: object) -> None:
            if event == "added":
                snapshots[str(fields["name"])] = str(fields["uri"]), str(fields["uffd_socket"])
            elif event == "removed":
                del snapshots[str(fields["name"])]
            if event in ("added", "removed") and guard is not None:
                guard.restart_with(_hosting_again(options, snapshots))
            report(event, **fields)

        of_caches = pull_options(options)
        del of_caches["lane"]
        async with host(
            threads=options.threads,
            max_guests=options.max_guests,
            allocate=options.allocate,
            fill=options.fill,
            huge=options.huge_pages,
            cache_memory=options.cache_memory,
            learn=None if options.learn is None else partial(_learned, options.learn),
            opening=partial(direct_source, **store_options(options), on_event=report),
            reconnect_for=reconnect_for(options, inf),
            **of_caches,
            keeper=guard,
            on_event=on_event,
        ) as hosting:
            async with open_failing_nursery() as nursery:
                for name, uri, path in given:
                    nursery.start_soon(hosting.add, name, uri, path)
            control.subject = hosting
            await trio.sleep_forever()


def _learned(place: str, name: str) -> LearnedPlace:
    file = quote(name, safe="") + ".learned"
    if not _is_in_store(place):
        return LearnedFile(Path(place, file))
    from ..learned_objects import LearnedObject  # nobody else waits for it

    return LearnedObject(place, file)


def _is_in_store(place: str) -> bool:
    return "://" in place


def _hosting_again(
    options: argparse.Namespace, snapshots: Mapping[str, tuple[str, str]]
) -> list[str]:
    """The command with which the guard starts this program again, with the snapshots that there
    are now."""
    words = list(options.words)
    while "--snapshot" in words:
        at = words.index("--snapshot")
        del words[at : at + 4]
    for name, (uri, path) in snapshots.items():
        words += ["--snapshot", name, uri, path]
    return module_command(_MODULE, *words)


async def _pull(options: argparse.Namespace, report: Report, control: Control) -> None:
    _check_source(options)
    async with guarded(options, report) as guard:
        if guard is not None:
            guard.restart_with(_restarting(options, options.uri))
        await _pull_guarded(options, report, control, guard)


def _check_source(options: argparse.Namespace) -> None:
    uri = printable(options.uri)
    if not is_direct(options.uri):
        if options.cache is not None or options.peers:
            raise UsageError(
                f"--cache and --peer are for what this process reads itself, and {uri} is a source:"
                " give them to its pagenet-serve"
            )
    elif options.listen:
        raise UsageError(f"--listen waits for a source, and {uri} is read by this process")
    elif options.tls is not None and not options.peers:
        raise UsageError(f"{uri} is read by this process: TLS is for connections to others")


async def _pull_guarded(
    options: argparse.Namespace, report: Report, control: Control, guard: Guard | None
) -> None:
    """Pull. If this process was started in the place of one that had an owner, that owner waits for
    its pages: a source that is away is waited for as it would be in the middle of a transfer."""
    deadline = trio.current_time() + reconnect_for(options)
    is_told = False
    while True:
        try:
            return await _pull_once(options, report, control, guard)
        except NOT_NOW as error:
            if not _has_kept_owner(guard) or trio.current_time() > deadline:
                raise
            if not is_told:
                report("disconnected", peer=options.uri, reason=str(error))
            is_told = True
            await trio.sleep(PAUSE)


def _has_kept_owner(guard: Guard | None) -> bool:
    return guard is not None and guard.has_restarted and "owner" in guard.names()


async def _pull_once(
    options: argparse.Namespace, report: Report, control: Control, guard: Guard | None
) -> None:
    def on_event(event: str, /, **fields: object) -> None:
        if event == "listening" and guard is not None:  # the port may have been chosen just now
            guard.restart_with(_restarting(options, str(fields["uri"])))
        report(event, **fields)

    with ExitStack() as stack:
        tell = stack.enter_context(telling_missing(options, on_event))
        owner = _owner(options, report, stack, guard)
        if isinstance(owner, AbandonedOwner) and owner.is_finished:
            report("finished", pid=owner.pid, pages=owner.pages)
            return
        async with (
            direct_source(options.uri, **store_options(options), on_event=report) as uri,
            pull(
                uri,
                owner,
                listen=options.listen,
                reconnect_for=reconnect_for(options, inf if options.into is None else 0.0),
                **pull_options(options),
                on_event=tell,
            ) as transfer,
        ):
            control.subject = transfer
            await show_until_complete(transfer, report)


def _restarting(options: argparse.Namespace, uri: str) -> list[str]:
    """The command with which the guard starts this program again."""
    words = [uri if word == options.uri else word for word in options.words]
    return module_command(_MODULE, *words)


def _owner(
    options: argparse.Namespace, report: Report, stack: ExitStack, guard: Guard | None
) -> Owner:
    if options.into is not None:
        return IntoFile(options.into)

    if options.resume is not None:
        abandoned = AbandonedOwner(options.resume)
        stack.callback(abandoned.close)
        return abandoned

    def refused(error: HandshakeError) -> None:
        report("refused", peer=f"owner on {options.uffd_socket}", reason=str(error))

    def waiting() -> None:
        report("waiting", uffd_socket=options.uffd_socket)

    owner = UffdSocket(
        options.uffd_socket,
        allocate=options.allocate,
        keeper=guard,
        on_waiting=waiting,
        on_refused=refused,
    )
    stack.callback(owner.close)
    return owner


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.into is not None and options.on_loss != "wait":
        parser.error("--on-loss is about an owner, and with --into there is none")
    if options.many:
        if options.uffd_socket is None or options.listen or options.missing:
            parser.error("--many is for --uffd-socket, without --listen and --missing")
        place = options.learn
        if place is not None and not _is_in_store(place) and not Path(place).is_dir():
            parser.error(f"--learn: there is no directory {place}")
        if options.lane == "trio":
            parser.error("--many has lanes in C alone")
        options.words = list(sys.argv[1:] if argv is None else argv)
        if options.guard:
            follow(module_command(_MODULE, *options.words))
        report = Report("pagenet-pull", options.json, _MANY_WORDS, ready=("added",))
        return run_controlled(_host, options, report)
    options.guard = options.guard and options.into is None  # nobody waits for a file
    options.words = list(sys.argv[1:] if argv is None else argv)
    if options.guard:
        follow(module_command(_MODULE, *options.words))
    report = Report("pagenet-pull", options.json, _WORDS, ready=_READY)
    return run_controlled(_pull, options, report)


if __name__ == "__main__":
    sys.exit(main())
