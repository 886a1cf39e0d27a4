"""pagenet-doctor: what this host can do, and what to do about what it cannot."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

import trio

from ..doctor import Check, examine
from ._command import Parser, Report, run_command

__all__ = ["main", "make_parser"]

_EXIT_CODES = """\
exit codes:
  0    done: memory can be filled on this host; there may be warnings
  1    failed in a way that has no code of its own
  2    bad usage
  7    memory cannot be filled on this host: something is missing
  130  stopped by Ctrl-C (SIGINT)
  143  stopped by SIGTERM
"""
_WORDS = {
    "check": "{words}",
    "complete": "{ok} ok, {absent} absent, {warnings} warnings, {missing} missing",
}
_MARKS = {"ok": "ok     ", "absent": "absent ", "warning": "warning", "missing": "MISSING"}


def make_parser() -> Parser:
    parser = Parser(
        "pagenet-doctor",
        "Show what this host can do of what pagenet uses, and what to do about what it cannot. What"
        " can be tried is tried; nothing is changed.",
    )
    parser.epilog = _EXIT_CODES
    return parser


def _words(check: Check) -> str:
    told = f"{_MARKS[check.level]}  {check.name}: {check.found}"
    return told + (f"\n         {check.advice}" if check.advice else "")


async def _examine(report: Report) -> int:
    levels = Counter[str]()
    for check in await trio.to_thread.run_sync(lambda: list(examine())):
        levels[check.level] += 1
        report(
            "check",
            name=check.name,
            level=check.level,
            found=check.found,
            advice=check.advice,
            words=_words(check),
        )
    report(
        "complete",
        ok=levels["ok"],
        absent=levels["absent"],
        warnings=levels["warning"],
        missing=levels["missing"],
    )
    return 7 if levels["missing"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    report = Report("pagenet-doctor", options.json, _WORDS)
    return run_command(lambda: _examine(report), report)


if __name__ == "__main__":
    sys.exit(main())
