"""pagenet-qemu: move a running guest of stock QEMU. The guest goes at once, its pages follow."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, closing
from pathlib import Path

import trio

from ..children import module_command
from ..control import Control
from ..destination.pulling import pull
from ..errors import GuestReclaimed, PagenetError, UsageError
from ..events import EventHandler
from ..guard import Guard, follow
from ..nurseries import open_failing_nursery
from ..qemu import (
    Arrival,
    Precopy,
    Returning,
    ending_when_reclaimed,
    join_halves,
    migrate,
    monitor_pid,
    receive,
    receive_attached,
    reclaim,
    reclaim_from,
    save_half,
)
from ..source.precopy import RoundCount
from ..source.serving import Server
from ..uffd import AbandonedOwner
from ._command import (
    RECONNECT_WORDS,
    ROUND_WORDS,
    TAKEN_OVER,
    Parser,
    Report,
    add_lane_option,
    add_pull_options,
    count,
    pull_options,
    reconnect_for,
    round_count,
    words_of,
)
from ._control import COMMON_WORDS, Work, add_common_options, run_controlled
from ._guard import GUARD_WORDS, add_guard_option, guarded
from ._missing import MISSING_WORDS, add_missing_option, telling_missing
from ._progress import make_progress, show_until_complete

__all__ = ["main", "make_parser"]

_PROG = "pagenet-qemu"
_MODULE = "pagenet.cli.qemu"
_READY = ("listening", "resuming", "connected")
_SHAPES = "tcp://HOST:PORT, rdma://HOST:PORT, unix:PATH"
_WORDS = {
    **COMMON_WORDS,
    "qemu": "QEMU waits for a guest (pid {pid}, RAM in {ram}); added to its arguments: {added}",
    "attached": "attached to QEMU (pid {pid}, RAM in {ram})",
    "listening": "waiting for a guest on {uri}",
    "connected": "{peer}: connected",
    "owner": "RAM of {pages} pages (placement: {placement}, lanes: {lane})",
    "round": ROUND_WORDS,
    "no_precopy": "nothing is copied before the guest leaves: {reason}",
    "stopped": "the guest stands still here",
    "switchover": "handed over: it will not run here again",
    "resumed": "the guest runs at the destination",
    "reclaiming": "asking {peer} for the guest",
    "reclaimed": (
        "the guest runs here again: {bytes} bytes of its memory came with it, and it stood still"
        " for {downtime_ms} ms"
    ),
    "returning": "the source takes the guest back: {peer}",
    "returned": "the guest has gone back to its source, with {bytes} bytes of its memory",
    **MISSING_WORDS,
    **RECONNECT_WORDS,
    **GUARD_WORDS,
    "refused": "{peer}: refused: {reason}",
    "resuming": (
        "the guest of process {pid} lacks {missing} of {pages} pages, those of source {identity}"
    ),
    "saved": (
        "saved {bytes} bytes of the guest's memory, {pages} of its {all} pages; its process {pid}"
        " is stopped: end it, or let it go on (SIGCONT) and forget the file"
    ),
    "joined": "{output}: {bytes} bytes, {half} of them from the destination",
    "finished": "process {pid} has all of its {pages} pages: there is nothing to resume",
}
_WARNINGS = {
    "waiting": (
        "the destination is lost ({reason}). Its pages are here: dialling {uri} until pagenet-qemu"
        " incoming --resume answers there"
    ),
    "unconfirmed": (
        "the destination has the guest and has not said that it runs ({reason}): look there, and if"
        " it stands still, send cont to that QEMU"
    ),
    "in_doubt": (
        "the destination was told to run the guest and has not confirmed it ({reason}). It stays"
        " stopped here: look there, and only if it does not run, end this program and send cont to"
        " this QEMU"
    ),
    "not_reclaimed": "the guest does not go back to its source: {reason}",
    "return_in_doubt": (
        "the source was told to run the guest again and has not confirmed it ({reason}). It stays"
        " stopped here: look there, and only if it does not run, send cont to this QEMU"
    ),
    "abandoned": (
        "stopped before the destination has every page: its guest will stand still at the first"
        " page that it misses. QEMU (pid {pid}) still has them, unless it is resumed: pagenet-serve"
        " {source} --identity {identity} --connect {uri}"
    ),
}


def make_parser() -> Parser:
    parser = Parser(_PROG, "Move a running QEMU guest to another host.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser
    )
    words = """Start the destination's QEMU and receive one guest; ends when that QEMU ends, with
    its exit status. With --qmp, attach to a QEMU that waits already; with --resume, go on with the
    pages of a guest whose pagenet-qemu incoming is gone: both end when the guest has every page."""
    incoming = commands.add_parser("incoming", help="receive a guest", description=words)
    incoming.add_argument(
        "--listen", metavar="URI", required=True, help=f"where the source dials: {_SHAPES}"
    )
    incoming.add_argument(
        "--resume",
        action="store_true",
        help="resume the transfer of a guest whose pagenet-qemu incoming is gone",
    )
    incoming.add_argument(
        "--qmp",
        metavar="SOCKET",
        help=(
            "monitor of a QEMU that waits already (-incoming defer), or with --resume of the one"
            " that has the guest"
        ),
    )
    incoming.add_argument(
        "--pid",
        type=count,
        metavar="PID",
        help=(
            "with --resume: QEMU's process. Without --qmp the guest cannot be reclaimed by its"
            " source"
        ),
    )
    add_pull_options(incoming)
    add_guard_option(incoming)
    add_missing_option(incoming)
    add_common_options(incoming)
    incoming.add_argument(
        "qemu",
        nargs="*",
        metavar="QEMU",
        help="after --: QEMU's command line, as at the source",
    )
    words = (
        "Move the guest of a running QEMU to the pagenet-qemu incoming that listens on URI. Ends"
        " when the destination has every page."
    )
    leaving = commands.add_parser("migrate", help=words, description=words)
    leaving.add_argument(
        "--qmp", metavar="SOCKET", required=True, help="QEMU's monitor (-qmp unix:...)"
    )
    leaving.add_argument("uri", metavar="URI", help=f"where the destination listens: {_SHAPES}")
    leaving.add_argument(
        "--precopy",
        type=_rounds,
        default="auto",
        metavar="auto|ROUNDS|off",
        help="copy memory while the guest runs, in rounds, before it leaves (auto)",
    )
    add_lane_option(leaving)
    add_guard_option(leaving)
    add_common_options(leaving)
    words = """Take a guest back that pagenet-qemu migrate has given away, and whose pages have not
        all gone, from the pagenet-qemu incoming that listens on URI. If it fails, the guest goes on
        there."""
    reclaiming = commands.add_parser(
        "reclaim", help="take a guest back that was given away", description=words
    )
    reclaiming.add_argument(
        "--qmp", metavar="SOCKET", required=True, help="monitor of the QEMU that the guest has left"
    )
    reclaiming.add_argument(
        "--identity",
        metavar="HEX",
        type=_identity,
        required=True,
        help="identity of the guest's pages, as migrate has printed it",
    )
    reclaiming.add_argument("uri", metavar="URI", help=f"where the destination listens: {_SHAPES}")
    add_lane_option(reclaiming)
    add_common_options(reclaiming)
    words = """Stop the process of a guest that stands still for want of pages, and save the pages
        that it has to FILE."""
    saving = commands.add_parser(
        "save", help="save the half of a guest's memory that is here", description=words
    )
    saving.add_argument("--pid", type=count, metavar="PID", help="QEMU's process")
    saving.add_argument("--qmp", metavar="SOCKET", help="QEMU's monitor, instead of --pid")
    saving.add_argument("file", metavar="FILE", help="where to")
    add_common_options(saving)
    words = """Join the half of a guest's memory that was saved at its destination with the half
        that its source has, into one memory file."""
    joining = commands.add_parser(
        "join", help="join both halves of a guest's memory into one file", description=words
    )
    joining.add_argument("half", metavar="HALF", help="what pagenet-qemu save has written")
    joining.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="the source's memory: a copy of it, or the source of the event switchover",
    )
    joining.add_argument(
        "--identity",
        metavar="HEX",
        type=_identity,
        required=True,
        help="identity of the source's pages, as migrate has printed it",
    )
    joining.add_argument("--output", metavar="FILE", required=True, help="the whole memory")
    add_common_options(joining)
    return parser


def _identity(text: str) -> bytes:
    if not re.fullmatch("[0-9a-fA-F]{32}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 32 hexadecimal digits")
    return bytes.fromhex(text)


def _rounds(text: str) -> RoundCount | None:
    """None: off."""
    return None if text == "off" else round_count(text)


class _CommandParser(Parser):
    def __init__(self, prog: str, description: str, **_: object) -> None:
        super().__init__(prog, description)


async def _incoming(options: argparse.Namespace, report: Report, control: Control) -> int:
    async with guarded(options, report) as guard:
        return await _arrive(options, _guarded_arrival(options, report, guard), report, control)


def _guarded_arrival(
    options: argparse.Namespace, report: Report, guard: Guard | None
) -> EventHandler:
    """Reports events. Once the guest is taken, a killed ``incoming`` is followed by one that
    resumes; once it has gone back, by nothing."""
    known: dict[str, object] = {}

    def on_event(event: str, /, **fields: object) -> None:
        known.update({name: fields[name] for name in ("pid", "uri", "monitor") if name in fields})
        if event == "taken" and guard is not None:
            monitor = str(known.get("monitor", options.qmp))
            guard.restart_with(_resuming(options, str(known["pid"]), str(known["uri"]), monitor))
        report(event, **fields)

    return _unless("returned", guard, on_event)


def _unless(last: str, guard: Guard | None, on_event: EventHandler) -> EventHandler:
    """Nothing is started in the place of this process once that event has come."""

    def on_any(event: str, /, **fields: object) -> None:
        if event == last and guard is not None:
            guard.restart_with([])
        on_event(event, **fields)

    return on_any


def _resuming(options: argparse.Namespace, pid: str, uri: str, monitor: str | None) -> list[str]:
    names = ("plaintext", "background", "background_lanes", "background_window", "max_bandwidth")
    more = ("start_background", "prefetch", "compress", "on_loss")
    words = words_of(options, *TAKEN_OVER, *names, *more)
    what = ["incoming", "--resume", "--pid", pid, "--listen", uri]
    if monitor is not None:
        what += ["--qmp", monitor]
    return module_command(_MODULE, *what, *words)


async def _arrive(
    options: argparse.Namespace, on_event: EventHandler, report: Report, control: Control
) -> int:
    with telling_missing(options, on_event) as tell:
        async with _arrival(options, tell) as arrival:
            control.subject = arrival.transfer
            await show_until_complete(arrival.transfer, report)
    if arrival.process is None:
        return 0  # QEMU was there before this process, and goes on without it
    status = await arrival.process.wait()
    return status if status >= 0 else 128 - status


def _arrival(
    options: argparse.Namespace, on_event: EventHandler
) -> AbstractAsyncContextManager[Arrival]:
    if options.qmp:
        if options.allocate:
            raise UsageError("--allocate is for a QEMU that is started here")
        return receive_attached(
            options.qmp,
            listen=options.listen,
            on_event=on_event,
            reconnect_for=reconnect_for(options),
            **pull_options(options),
        )
    return receive(
        options.qemu,
        listen=options.listen,
        allocate=options.allocate,
        on_event=on_event,
        reconnect_for=reconnect_for(options),
        **pull_options(options),
    )


async def _resume(options: argparse.Namespace, report: Report, control: Control) -> int:
    async with guarded(options, report) as guard:
        return await _go_on(options, report, control, guard)


async def _go_on(
    options: argparse.Namespace, report: Report, control: Control, guard: Guard | None
) -> int:
    with closing(AbandonedOwner(options.pid or await monitor_pid(options.qmp))) as owner:
        if owner.is_finished:
            report("finished", pid=owner.pid, pages=owner.pages)
            return 0
        if guard is not None:
            guard.restart_with(_resuming(options, str(owner.pid), options.listen, options.qmp))
        missing = owner.pages - owner.done
        report(
            "resuming",
            pid=owner.pid,
            pages=owner.pages,
            missing=missing,
            identity=owner.source.hex(),
        )
        monitor = None if options.qmp is None else Path(options.qmp)
        returning = Returning(monitor, owner.pid, _unless("returned", guard, report))
        with telling_missing(options, report) as tell, ending_when_reclaimed(owner.pid):
            async with pull(
                options.listen,
                owner,
                listen=True,
                reconnect_for=reconnect_for(options),
                **pull_options(options),
                on_stream=returning.meet,
                on_event=tell,
            ) as transfer:
                returning.arrive(transfer)
                control.subject = transfer
                await show_until_complete(transfer, report)
    return 0


async def _migrate(options: argparse.Namespace, report: Report, control: Control) -> int:
    async with guarded(options, report) as guard:
        return await _leave(options, _guarded_leaving(options, report, guard), report, control)


def _guarded_leaving(
    options: argparse.Namespace, report: Report, guard: Guard | None
) -> EventHandler:
    """Reports events. Once the guest is given away, a killed ``migrate`` is followed by a
    pagenet-serve of the pages that QEMU still has; once it is back, by nothing."""

    def on_event(event: str, /, **fields: object) -> None:
        if event == "switchover" and guard is not None:
            words = words_of(options, *(name for name in TAKEN_OVER if name != "reconnect_for"))
            where = ["--identity", str(fields["identity"]), "--connect", options.uri]
            source = str(fields["source"]).split()
            guard.restart_with(module_command("pagenet.cli.serve", *source, *where, *words))
        report(event, **fields)

    return _unless("taken", guard, on_event)


async def _leave(
    options: argparse.Namespace, on_event: EventHandler, report: Report, control: Control
) -> int:
    precopy = None if options.precopy is None else Precopy(options.precopy)
    control.precopy = precopy
    async with (
        migrate(
            options.qmp,
            options.uri,
            tls=options.tls,
            lane=options.lane,
            precopy=precopy,
            on_event=on_event,
        ) as server,
        open_failing_nursery() as nursery,
    ):
        control.precopy = None
        control.subject = server
        nursery.start_soon(make_progress(report), server)
        nursery.start_soon(_reclaim_when_told, server, options.qmp, on_event, control)
        await server.wait_complete()
        control.reclaim = None
        nursery.cancel_scope.cancel()
    return 0


async def _reclaim_when_told(
    server: Server, qmp_socket: str, on_event: EventHandler, control: Control
) -> None:
    while True:
        told = trio.Event()
        control.reclaim = told.set
        await told.wait()
        try:
            await reclaim(server, qmp_socket, on_event=on_event)
        except PagenetError as error:
            on_event("not_reclaimed", reason=str(error))
        else:
            raise GuestReclaimed("the guest was reclaimed: it runs here again")


async def _reclaim(options: argparse.Namespace, report: Report, control: Control) -> int:
    await reclaim_from(
        options.uri,
        options.qmp,
        identity=options.identity,
        tls=options.tls,
        lane=options.lane,
        on_event=report,
    )
    return 0


async def _save(options: argparse.Namespace, report: Report, control: Control) -> int:
    await save_half(options.pid or await monitor_pid(options.qmp), options.file, on_event=report)
    return 0


async def _join(options: argparse.Namespace, report: Report, control: Control) -> int:
    await join_halves(
        options.half,
        options.source,
        options.output,
        identity=options.identity,
        on_event=report,
    )
    return 0


_WORK: Mapping[str, Work] = {
    "migrate": _migrate,
    "reclaim": _reclaim,
    "save": _save,
    "join": _join,
}


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check what argparse cannot: that exactly one QEMU is named, in the right way."""
    named = [name for name in ("pid", "qmp", "qemu") if getattr(options, name)]
    if options.resume and (not named or options.qemu):
        parser.error("--resume needs the QEMU that has the guest: --pid or --qmp")
    if not options.resume and named not in (["qemu"], ["qmp"]):
        parser.error(
            "say which QEMU the guest comes to: its command line after --, or its monitor with"
            " --qmp"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    report = Report(_PROG, options.json, _WORDS, _WARNINGS, ready=_READY)
    if options.command == "save" and (options.pid is None) == (options.qmp is None):
        parser.error("save needs the QEMU that has the guest: one of --pid and --qmp")
    if getattr(options, "guard", False):
        follow(module_command(_MODULE, *(sys.argv[1:] if argv is None else argv)))
    if options.command == "incoming":
        _check(parser, options)
        work: Work = _resume if options.resume else _incoming
    else:
        work = _WORK[options.command]
    return run_controlled(work, options, report)


if __name__ == "__main__":
    sys.exit(main())
