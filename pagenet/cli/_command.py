"""What the commands share: reporting, signals, exit codes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from math import inf
from typing import Any, TextIO, get_args

import trio

from .. import __version__
from ..background.schedule import RECORDED, SCHEDULES
from ..background.start import parse_start
from ..errors import PagenetError, UsageError
from ..nurseries import open_failing_nursery
from ..protocol import Compress
from ..sizes import parse_size
from ..source.precopy import Precopy, RoundCount
from ..target import OnLoss
from ._rates import parse_rate
from ._service import Service

__all__ = [
    "EXIT_CODES",
    "RECONNECT_WORDS",
    "ROUND_WORDS",
    "TAKEN_OVER",
    "CommandParser",
    "Parser",
    "Report",
    "add_lane_option",
    "add_pull_options",
    "add_reconnect_option",
    "count",
    "count_or_none",
    "counts",
    "link_rates",
    "names",
    "prefetch_window",
    "pull_options",
    "rate",
    "reconnect_for",
    "round_count",
    "run_command",
    "sizes",
    "start",
    "words_of",
]

# In pages. A window is cut to 1 MiB on either side anyway.
MAX_WINDOW = 256
MAX_COUNT = 10_000_000
MAX_SECONDS = 1e9

#: of the event ``round``
ROUND_WORDS = (
    "round {round}: {pages} pages in {seconds:.2f} s, {written} of them written meanwhile;"
    " {left} are left"
)
#: of the events about a source that goes away and comes back
RECONNECT_WORDS = {
    "disconnected": (
        "the source is away ({reason}): waiting for it; threads that touch missing pages wait too"
    ),
    "reconnecting": "the source is away for {seconds} s now ({reason})",
    "reconnected": "{peer}: the source is back after {seconds} s",
}
EXIT_CODES = """\
exit codes:
  0    done: every page is in place
  1    failed in a way that has no code of its own
  2    bad usage: arguments, source or address cannot be used
  3    unreachable: nothing answers at that address
  4    source or connection lost: pages are missing
  5    owner gone: the process whose memory was being filled has ended
  6    protocol error: the peer's bytes make no sense, or are of another version
  7    not possible here: a permission or a kernel feature is missing
  8    not trusted: TLS, and one side does not trust the other
  9    the guest has gone back to its source, and runs there
  130  stopped by Ctrl-C (SIGINT)
  143  stopped by SIGTERM
"""


class Parser(argparse.ArgumentParser):
    """A parser that reports bad arguments in one line, with exit code 2, as any other bad usage."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
        self.add_argument(
            "--json", action="store_true", help="one JSON object a line, for machines"
        )

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message} (--help explains)\n")


class CommandParser(argparse.ArgumentParser):
    """``--json`` may stand on either side of the command."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--json",
            action="store_true",
            default=argparse.SUPPRESS,
            help="one JSON object a line, for machines",
        )

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message} (--help explains)\n")


def add_lane_option(parser: Parser) -> None:
    parser.add_argument(
        "--lane",
        choices=["auto", "native", "trio"],
        default="auto",
        help=(
            "how lanes run: native (loops in C), trio (the same in Trio, slower), or auto (in C"
            " where possible) (default: %(default)s)"
        ),
    )


def add_pull_options(parser: Parser) -> None:
    """Add the options of every command that pulls pages."""
    parser.add_argument(
        "--plaintext",
        action="store_true",
        help="allow an address that other hosts can reach, unencrypted",
    )
    parser.add_argument(
        "--background",
        type=background_order,
        default="hot",
        metavar="ORDER",
        help=(
            "order in which the background brings untouched pages: hot (near the faults first),"
            " follow (on from the last fault), linear, recorded=FILE (as in an earlier run, then"
            " hot), off (touched pages only) (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        help=(
            "record the order in which pages were waited for, for --background recorded=FILE;"
            " merged with the recording in FILE, if there is one"
        ),
    )
    parser.add_argument(
        "--background-lanes",
        type=count,
        default=1,
        metavar="N",
        help=(
            "connections for the background, where one processor cannot fill the network (default:"
            " 1)"
        ),
    )
    parser.add_argument(
        "--background-window",
        type=window,
        metavar="SIZE|auto",
        help=(
            "bytes of the background in flight, for each of its connections (default: auto, which"
            " follows the path and the owner)"
        ),
    )
    parser.add_argument(
        "--max-bandwidth",
        type=rate,
        metavar="RATE",
        help=(
            "limit of the background, in bytes a second: 60M, 1.5G, 64Mi, or 800Mbit; demand and"
            " prefetch are not limited (default: none)"
        ),
    )
    parser.add_argument(
        "--start-background",
        type=start,
        metavar="after=SECONDS|rate=N",
        help=(
            "begin the background SECONDS after faults are first answered, or once fewer than N"
            " faults come in a second (default: at once)"
        ),
    )
    parser.add_argument(
        "--prefetch",
        type=prefetch_window,
        default=None,
        metavar="FWD,BACK|auto",
        help=(
            "pages to prefetch after and before each page that a thread waits for (default: auto,"
            " which adapts to the faults)"
        ),
    )
    parser.add_argument(
        "--allocate",
        action="store_true",
        help=(
            "allocate shared memory before the first page comes: faster, but takes at once all the"
            " memory that the pages may ever need"
        ),
    )
    parser.add_argument(
        "--compress",
        choices=get_args(Compress),
        default="auto",
        help=(
            "lz4: compress all data that becomes smaller; auto: compress where link and processors"
            " make that faster, never over rdma:// (default: %(default)s)"
        ),
    )
    add_lane_option(parser)
    add_reconnect_option(
        parser,
        "how long to wait for a source that does not answer any more, once faults are answered: it"
        " is dialled, or may dial, again and again (default: forever; 0 with --into)",
    )
    add_on_loss_option(parser)


def add_on_loss_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-loss",
        choices=get_args(OnLoss),
        default="wait",
        help=(
            "what becomes of the owner when the source is lost for good: it waits at missing pages,"
            " until a --resume brings them; they are poisoned, so that touching one is a SIGBUS; it"
            " is killed (default: %(default)s)"
        ),
    )


def add_reconnect_option(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--reconnect-for",
        type=seconds_or_forever,
        default=None,
        metavar="SECONDS|forever",
        help=text,
    )


def seconds_or_forever(text: str) -> float:
    """For argparse: a number of seconds, from 0 on, or infinity for ``forever``."""
    if text == "forever":
        return inf
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of seconds nor forever")
    return number


def reconnect_for(options: argparse.Namespace, default: float = inf) -> float:
    """What ``--reconnect-for`` says, or else the default."""
    given: float | None = options.reconnect_for
    return default if given is None else given


def pull_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that are arguments of :func:`pagenet.pull`."""
    names = (
        *(
            "plaintext",
            "tls",
            "background",
            "background_lanes",
            "background_window",
            "max_bandwidth",
            "start_background",
        ),
        *("prefetch", "record", "compress", "lane", "on_loss"),
    )
    return {name: getattr(options, name) for name in names}


#: by their names in a namespace: options that a program which takes over a transfer has, too
TAKEN_OVER = (
    *("json", "control", "lane", "reconnect_for"),
    *("tls_dir", "tls_ca", "tls_cert", "tls_key", "tls_hostname", "tls_authz", "tls_psk"),
    "plaintext_pages",
)


def words_of(options: argparse.Namespace, *names: str) -> list[str]:
    """The options of these names as words of a command line; none for an option that was not
    given."""
    words = []
    for name in names:
        value, option = getattr(options, name), "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif isinstance(value, list):
            words += [word for one in value for word in (option, str(one))]
        elif value is not None and value is not False:
            words += [option, _word(value)]
    return words


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "forever" if value == inf else str(value)


def count(text: str) -> int:
    """For argparse: a number from 1 on."""
    if not text.isdecimal() or not 0 < int(text) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def count_or_none(text: str) -> int | None:
    """For argparse: a number from 1 on, or ``none``."""
    return None if text == "none" else count(text)


def counts(most: int) -> Callable[[str], tuple[int, ...]]:
    """For argparse: N,..., numbers of threads up to ``most``."""

    def parse(text: str) -> tuple[int, ...]:
        numbers = tuple(count(part) for part in text.split(","))
        if max(numbers) > most:
            raise argparse.ArgumentTypeError(f"{max(numbers)} threads are more than {most}")
        return numbers

    return parse


def link_rates(text: str) -> tuple[int | None, ...]:
    """For argparse: MBIT,... of links; ``none`` is None."""
    return tuple(count_or_none(part) for part in text.split(","))


def sizes(text: str) -> tuple[int, ...]:
    """For argparse: SIZE,..., in bytes."""
    return tuple(parse_size(part) for part in text.split(","))


def window(text: str) -> int | None:
    """For argparse: bytes in flight, or None for ``auto``."""
    return None if text == "auto" else parse_size(text)


def background_order(text: str) -> str:
    """For argparse: the name of a schedule."""
    if text in SCHEDULES or (text.startswith(RECORDED) and text != RECORDED):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}: there are {', '.join(SCHEDULES)}, {RECORDED}FILE")


def rate(text: str) -> int:
    """For argparse: bytes a second."""
    try:
        return parse_rate(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def start(text: str) -> str:
    """For argparse: when the background begins."""
    try:
        parse_start(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def round_count(text: str) -> RoundCount:
    """For argparse: a number of rounds of a precopy, or ``auto``."""
    if text == "auto":
        return "auto"
    try:
        return Precopy(int(text)).rounds
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def prefetch_window(text: str) -> tuple[int, int] | None:
    """For argparse: FWD,BACK, or ``auto`` (None)."""
    if text == "auto":
        return None
    forward, comma, backward = text.partition(",")
    if not (
        comma
        and forward.isdecimal()
        and backward.isdecimal()
        and max(int(forward), int(backward)) <= MAX_WINDOW
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not auto, or FWD,BACK with two numbers of pages up to {MAX_WINDOW}"
        )
    return int(forward), int(backward)


def names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """For argparse: NAME,... of the ``known`` names."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(
                f"{', '.join(sorted(unknown))}: there are {', '.join(known)}"
            )
        return chosen

    return parse


def _say(stream: TextIO, line: str) -> None:
    """In one write, so that a process which is killed leaves no half line to the next one."""
    stream.write(f"{line}\n")
    stream.flush()


class Report:
    """Reports events: as a JSON object a line, or in words. An event without ``words`` is for
    machines alone. An event with words in ``warnings`` goes to stderr too. ``to``: the stream to
    use instead of stdout. ``ready``: the events from one of which on this process does what it was
    started for."""

    def __init__(
        self,
        prog: str,
        as_json: bool,
        words: Mapping[str, str],
        warnings: Mapping[str, str] | None = None,
        to: TextIO | None = None,
        ready: Collection[str] = (),
    ) -> None:
        self.prog = prog
        self.as_json = as_json
        self._words = words
        self._warnings = warnings or {}
        self._to = to
        self._ready = ready
        #: what has started this process, if it is to be told how it is
        self.service = Service.of_environment()

    def __call__(self, event: str, /, **fields: object) -> None:
        if event in self._warnings:
            _say(sys.stderr, f"{self.prog}: {self._warnings[event].format_map(fields)}")
        if self.as_json:
            _say(self._to or sys.stdout, json.dumps({"event": event, **fields}))
        elif event in self._words:
            _say(self._to or sys.stdout, self._words[event].format_map(fields))
        if self.service is not None:
            self._tell(self.service, event, fields)

    def _tell(self, service: Service, event: str, fields: Mapping[str, object]) -> None:
        if words := self._warnings.get(event) or self._words.get(event):
            service.say(words.format_map(fields))
        if event in self._ready:
            service.tell("READY=1")

    def stopping(self) -> None:
        """This process has been told to end."""
        if self.service is not None:
            self.service.tell("STOPPING=1")

    def error(self, error: PagenetError) -> None:
        if self.service is not None:
            self.service.say(str(error))
        _say(sys.stderr, f"{self.prog}: {error}")
        if self.as_json:
            self("error", error=type(error).__name__, message=str(error), exit_code=error.exit_code)


def run_command(work: Callable[[], Awaitable[int | None]], report: Report) -> int:
    """Run ``work`` to its end (it may return an exit code), to an error or to a signal. Returns the
    exit code."""
    _open_missing_streams()
    try:
        return trio.run(_until_signal, work, report)
    except KeyboardInterrupt:  # just before we listened for signals, or just after
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output is gone. Python would raise this again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _open_missing_streams() -> None:
    """Open /dev/null for each standard stream that was closed when this process was started. Python
    sets that stream to None, and print() into it goes to the other one."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as we run


async def _until_signal(work: Callable[[], Awaitable[int | None]], report: Report) -> int:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        try:
            return await _work_until(signals, work, report)
        except PagenetError as error:
            # before a signal can end this process again: what went wrong is always said
            report.error(error)
            return error.exit_code


async def _work_until(
    signals: AsyncIterator[int], work: Callable[[], Awaitable[int | None]], report: Report
) -> int:
    caught: list[int] = []
    status: int | None = None
    # its own nursery: a task that waits for signals must not outlive their receiver
    async with open_failing_nursery() as nursery:

        async def stop_at_signal() -> None:
            async for number in signals:
                caught.append(number)
                report.stopping()
                nursery.cancel_scope.cancel()

        nursery.start_soon(stop_at_signal)
        status = await work()
        nursery.cancel_scope.cancel()
    return 128 + caught[0] if caught else status or 0
