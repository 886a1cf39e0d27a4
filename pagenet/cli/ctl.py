"""pagenet-ctl: show or change what a pagenet daemon does, while it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import trio

from ..background.schedule import RECORDED, SCHEDULES
from ..control import (
    ControlClient,
    FoundSocket,
    connect_control,
    control_directory,
    found_sockets,
)
from ..errors import (
    ConnectionBroken,
    PagenetError,
    RemoteProtocolError,
    SourceUnreachable,
    UsageError,
)
from ..protocol import printable
from ._command import (
    CommandParser,
    Parser,
    Report,
    background_order,
    count,
    prefetch_window,
    rate,
    round_count,
    run_command,
)
from ._rates import rate_words
from ._tables import make_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["main", "make_parser"]

_EXIT_CODES = """\
exit codes:
  0    done; of status --watch: the daemon has ended
  2    bad usage: arguments make no sense, or the daemon cannot do that
  3    unreachable: no daemon has that control socket
  4    connection lost: the daemon has ended, or does not answer
  6    protocol error: not a control socket, or one of another version
  130  stopped by Ctrl-C (SIGINT)
  143  stopped by SIGTERM
"""
_MIB = 1 << 20
_WATCH_SECONDS = 1.0
# Seconds that a daemon has to answer list.
_PATIENCE = 2.0


def make_parser() -> Parser:
    parser = Parser("pagenet-ctl", "Show or change what a pagenet daemon does, while it runs.")
    parser.epilog = _EXIT_CODES
    parser.add_argument(
        "socket",
        nargs="?",
        metavar="SOCKET",
        help=(
            "the daemon: its control socket (--control), or the number of its process (default: the"
            " only one that list finds)"
        ),
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )

    def add(name: str, words: str, *, of_guest: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=words, description=words)
        if of_guest:
            command.add_argument(
                "--guest",
                type=count,
                metavar="N",
                help="of pagenet-pull --many: the guest of that number alone, not all",
            )
        return command

    add("list", "List the daemons of this user that have their control sockets where they belong.")
    status = add("status", "Show the daemon's status.", of_guest=True)
    status.add_argument(
        "--watch",
        type=_seconds,
        nargs="?",
        const=_WATCH_SECONDS,
        metavar="SECONDS",
        help="repeat it until the daemon ends, every SECONDS (without a number: every second)",
    )
    add("pause", "Pause the background. Touched pages come as before.", of_guest=True)
    add("resume", "Resume the background; begin it, if it was to begin later.", of_guest=True)
    schedule = add("schedule", "Change the order of the background.", of_guest=True)
    schedule.add_argument(
        "name",
        type=background_order,
        metavar="NAME",
        help=f"{', '.join(SCHEDULES)}, {RECORDED}FILE",
    )
    bandwidth = add("bandwidth", "Limit the rate of the background.", of_guest=True)
    bandwidth.add_argument(
        "rate",
        type=_limit,
        metavar="RATE",
        help="bytes a second: 60M, 1.5G, 64Mi, 800Mbit; none: no limit",
    )
    prefetch = add(
        "prefetch",
        "Change what is prefetched around each page that a thread waits for.",
        of_guest=True,
    )
    prefetch.add_argument(
        "window", type=prefetch_window, metavar="FWD,BACK|auto", help="pages after and before it"
    )
    add(
        "give-up",
        "Wait no longer for a source that is away, now or later: the daemon ends with exit code 4.",
        of_guest=True,
    )
    add("switch", "End the rounds of a precopy: the guest leaves now.")
    rounds = add("rounds", "Change the number of rounds of a precopy.")
    rounds.add_argument(
        "count", type=round_count, metavar="ROUNDS|auto", help="rounds before the guest leaves"
    )
    add("reclaim", "Have the guest come back that pagenet-qemu migrate has given away.")
    adding = add("add", "Fill the memory of owners that connect to a socket from another source.")
    adding.add_argument("name", metavar="NAME", help="name of the snapshot")
    adding.add_argument("uri", metavar="URI", help="where its source listens")
    adding.add_argument(
        "--uffd-socket", metavar="PATH", required=True, help="where its owners connect"
    )
    removing = add("remove", "Take no more owners for a snapshot. Those that are here stay.")
    removing.add_argument("name", metavar="NAME", help="name of the snapshot")
    add("stop", "End the daemon, as SIGTERM does.")
    return parser


def _limit(text: str) -> int | None:
    return None if text == "none" else rate(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.05 on")
    return seconds


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the command, as the daemon takes them."""
    guest = getattr(options, "guest", None)
    return {**_own_arguments(options), **({} if guest is None else {"guest": guest})}


def _own_arguments(options: argparse.Namespace) -> dict[str, Any]:
    match options.command:
        case "add":  # the daemon may be in another directory
            path = os.path.abspath(options.uffd_socket)
            return {"name": options.name, "uri": options.uri, "uffd_socket": path}
        case "remove":
            return {"name": options.name}
        case "schedule":
            name: str = options.name
            if name.startswith(RECORDED):  # the daemon may be in another directory
                name = RECORDED + os.path.abspath(name.removeprefix(RECORDED))
            return {"name": name}
        case "bandwidth":
            return {"rate": options.rate}
        case "rounds":
            return {"count": options.count}
        case "prefetch":
            return {"window": None if options.window is None else list(options.window)}
    return {}


async def _list(options: argparse.Namespace) -> None:
    rows = await _daemons()
    if options.json:
        for row in rows:
            print(json.dumps(row), flush=True)
        return
    if not rows:
        print(f"no daemons have control sockets in {control_directory() or 'a directory'}")
        return
    console = make_console()
    console.print(_daemons_table(rows))


async def _daemons() -> list[dict[str, Any]]:
    return [row for found in found_sockets() if (row := await _about(found)) is not None]


async def _about(found: FoundSocket) -> dict[str, Any] | None:
    """None: the daemon is gone, or does not answer."""
    with trio.move_on_after(_PATIENCE), suppress(PagenetError):
        async with connect_control(found.path) as client:
            status = await client.command("status")
            return {
                "pid": status.get("pid", found.pid),
                "program": status.get("program"),
                "state": status.get("state"),
                "share": status.get("share"),
                "with": status.get("peer") or status.get("uri"),
                "socket": str(found.path),
            }
    return None


def _daemons_table(rows: Sequence[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("pid", "program", "state", "here", "with"):
        table.add_column(title, justify="right" if title in ("pid", "here") else "left")
    for row in rows:
        here = "" if row["share"] is None else f"{row['share']:.1%}"
        table.add_row(
            str(row["pid"]),
            printable(str(row["program"])),
            printable(str(row["state"])),
            here,
            printable(str(row["with"] or "")),
        )
    return table


async def _socket_of(told: str | None) -> str:
    """The control socket that is meant: a path, or a process's. :exc:`UsageError` if several are,
    :exc:`SourceUnreachable` if none is."""
    if told is not None and not told.isdecimal():
        return told
    rows = await _daemons()
    if told is not None:
        rows = [row for row in rows if row["pid"] == int(told)]
    if len(rows) == 1:
        return str(rows[0]["socket"])
    if not rows:
        who = "no daemon" if told is None else f"process {told}"
        there = control_directory() or "any directory"
        raise SourceUnreachable(f"{who} has a control socket in {there}: name the socket")
    raise UsageError(
        f"several daemons run: name one of {', '.join(str(row['pid']) for row in rows)}"
    )


async def _control(options: argparse.Namespace) -> None:
    if options.command == "list":
        await _list(options)
        return
    async with connect_control(await _socket_of(options.socket)) as client:
        if options.command == "status" and options.watch is not None:
            await _watch(client, options.watch, options.json, _arguments(options))
            return
        answer = await client.command(options.command, **_arguments(options))
    if options.json:
        print(json.dumps(answer), flush=True)
    elif options.command == "status":
        make_console().print(_words(answer))
    else:
        print(_done(options.command, answer), flush=True)


async def _watch(
    client: ControlClient, seconds: float, as_json: bool, arguments: dict[str, Any]
) -> None:
    from rich.live import Live

    console = make_console()
    on_screen = console.is_terminal and not as_json
    with (
        Live(console=console, auto_refresh=False) if on_screen else _Lines(console, as_json)
    ) as view:
        while True:
            try:
                answer = await client.command("status", **arguments)
            except ConnectionBroken:
                return
            if isinstance(view, Live):
                view.update(_words(answer), refresh=True)
            else:
                view.show(answer)
            await trio.sleep(seconds)


class _Lines:
    """Prints each status below the one before, where there is no terminal."""

    def __init__(self, console: Console, as_json: bool) -> None:
        self._console = console
        self._as_json = as_json

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, answer: dict[str, Any]) -> None:
        if self._as_json:
            print(json.dumps(answer), flush=True)
        else:
            self._console.print(_words(answer))


def _done(command: str, answer: dict[str, Any]) -> str:
    if command == "stop":
        return "stopping"
    if command == "give-up":
        return "it will not wait for a source that is away"
    if command == "reclaim":
        return "asking the destination for the guest"
    if command in ("switch", "rounds", "add", "remove"):
        return f"{command}: done"
    with _understood():
        if "guests" in answer:
            return f"{command}: done for {answer['guests_now']} guests"
        return printable(f"background: {_background(answer)}; prefetch: {_prefetch(answer)}")


def _words(status: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    with _understood():
        rows = [
            ("daemon", f"{status['program']} {status['release']}, process {status['pid']}"),
            *_rows(status),
        ]
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(name, Text(printable(text)))
    return table


@contextmanager
def _understood() -> Iterator[None]:
    """Any process may listen on that socket. If its status lacks a field, or has one of another
    shape, that is its error: :exc:`RemoteProtocolError`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise RemoteProtocolError(
            f"the status of the daemon makes no sense: {type(error).__name__}"
        ) from None


def _rows(status: dict[str, Any]) -> list[tuple[str, str]]:
    if "guests" in status:
        return _many(status)
    if "schedule" in status:
        return _destination(status)
    return _source(status) if "destinations" in status else _starting(status)


def _starting(status: dict[str, Any]) -> list[tuple[str, str]]:
    if status["state"] == "copying":
        rows = [("state", f"round {status['round']} of {status['rounds']}, while the guest runs")]
        if (last := status["last"]) is not None:
            left, dirty = last["bytes_left"] / _MIB, last["dirty_bytes_per_s"] / _MIB
            rows.append(("left after the last", f"{left:.1f} MiB, written at {dirty:.1f} MiB/s"))
        return rows
    return [("state", f"{status['state']}: there is no transfer yet")]


def _many(status: dict[str, Any]) -> list[tuple[str, str]]:
    counts = ", ".join(
        f"{status[f'guests_{name}']} {words}"
        for name, words in (
            ("now", "here"), ("completed", "complete"), ("gone", "gone"), ("failed", "failed")
        )
    )  # fmt: skip
    return [
        ("guests", counts),
        *((f"snapshot {each['name']}", _about_snapshot(each)) for each in status["snapshots"]),
        *((f"guest {each['guest']}", _about_guest(each)) for each in status["guests"]),
    ]


def _about_snapshot(snapshot: dict[str, Any]) -> str:
    words = f"{snapshot['uri']}, owners on {snapshot['uffd_socket']}"
    if (cache := snapshot.get("cache")) is None:
        return f"{words}, its source is not there"
    taken = f"{cache['bytes_resident'] / 2**20:.1f} MiB of memory"
    return f"{words}, {cache['share']:.1%} in the cache, {taken}, {cache['state']}"


def _about_guest(guest: dict[str, Any]) -> str:
    words = f"process {guest['pid']}, snapshot {guest['snapshot']}, {guest['state']}"
    if "share" not in guest:
        return words
    return f"{words}, {guest['share']:.1%} resident, {guest['faults']} faults"


def _source(status: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("state", status["state"]),
        ("region", f"{status['pages']} pages, {status['bytes'] / _MIB:.1f} MiB"),
    ]
    rows.append(
        (
            "asked for",
            f"{status['pages_asked']} pages, {status['pages_demanded']} of them waited for",
        )
    )
    if status["uri"]:
        rows.append(("listens on", status["uri"]))
    return rows + [("destination", peer) for peer in status["destinations"]]


def _destination(status: dict[str, Any]) -> list[tuple[str, str]]:
    away = status["disconnected"]
    left = "" if status["seconds_left"] is None else f", {status['seconds_left']:.0f} s left"
    quantiles = ", ".join(f"{name} {_us(value)}" for name, value in status["fault_us"].items())
    return [
        (
            "state",
            (
                f"{status['state']}, {status['seconds']:.1f}"
                f" s{left if status['state'] == 'running' else ''}"
            ),
        ),
        ("source", status["peer"] if away is None else _away(status["peer"], away)),
        (
            "resident",
            (
                f"{status['share']:.1%}, {status['bytes_resident'] / _MIB:.1f} of"
                f" {status['bytes'] / _MIB:.1f} MiB"
            ),
        ),
        (
            "rate",
            (
                f"{rate_words(status['bytes_per_s'])}, on the wire"
                f" {rate_words(status['wire_bytes_per_s'])}"
            ),
        ),
        ("faults", f"{status['faults']}, {status['faults_per_s']:.0f} a second ({quantiles})"),
        ("background", _background(status)),
        ("prefetch", _prefetch(status)),
        ("pages", ", ".join(f"{name} {row['pages']}" for name, row in status["classes"].items())),
        ("compressed", _compressed(status["compressed"])),
        ("lanes", f"{status['lane']}, placement {status['placement']}"),
    ]


def _away(peer: str, away: dict[str, Any]) -> str:
    return f"{peer}: away for {away['seconds']:.0f} s ({away['reason']})"


def _background(status: dict[str, Any]) -> str:
    limit = status["max_bandwidth"]
    words = [status["schedule"], "no limit" if limit is None else f"at most {rate_words(limit)}"]
    if status["paused"]:
        words.append("paused")
    if not status["begun"]:
        words.append("not begun yet")
    return ", ".join(words)


def _prefetch(status: dict[str, Any]) -> str:
    window, unused = status["prefetch"], status["prefetch_unused"]
    words = "auto" if window is None else f"{window[0]},{window[1]}"
    return words if unused is None else f"{words}; {unused:.0%} of it not touched so far"


def _compressed(counts: dict[str, Any]) -> str:
    if counts["ratio"] is None:
        return "nothing"
    return f"{counts['share']:.0%} of what came, to 1/{counts['ratio']:.1f} of its size"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} us"


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    # In front: argparse would take SOCKET --json COMMAND for a command of the name SOCKET.
    in_order = sorted(words, key=lambda word: word != "--json")
    options = make_parser().parse_args(in_order)
    return run_command(lambda: _control(options), Report("pagenet-ctl", options.json, {}))


if __name__ == "__main__":
    sys.exit(main())
