"""pagenet-snapshot: memory files as snapshots in layers."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import trio

from ..errors import SourceLost, UsageError
from ..region import Run
from ..snapshot.creating import Created, create_snapshot
from ..snapshot.index import PAGE, ZERO_FRAME, Index
from ..snapshot.opened import open_snapshot_in_thread
from ..snapshot.pruning import SAFE_AGE, prune
from ..snapshot.reading import compare_snapshots, export_snapshot, verify_snapshot
from ..snapshot.running import create_running
from ..source.memory import open_source_in_thread
from ._command import ROUND_WORDS, CommandParser, Parser, Report, run_command
from ._running import open_running

__all__ = ["main", "make_parser"]

_EXIT_CODES = """\
exit codes:
  0    done; of verify: the snapshot is whole; of diff: compared, with whatever result
  1    failed in a way that has no code of its own: there is no room for what is written
  2    bad usage: arguments, or what they name, cannot be used; a snapshot's index is broken
  3    a store does not answer
  4    pages are missing: an object of a snapshot is missing or broken, or MEMFILE has changed
  5    --running: the process has ended
  7    --running: this kernel or user cannot track its memory; or obstore is not installed
  130  stopped by Ctrl-C (SIGINT)
  143  stopped by SIGTERM
"""
_WORDS = {
    "round": ROUND_WORDS,
    "resumed": "stood still for {downtime_ms} ms, while {pages} pages were copied",
    "progress": "{share:6.1%}, {done:.0f} of {all:.0f} MiB, {rate:.0f} MiB/s",
    "created": "created {target}, layer {layers}: {words}",
    "snapshot": "{words}",
    "verified": "whole: {frames} frames",
    "exported": "exported {bytes} bytes to {file} in {seconds:.2f} s",
    "differs": "{first:#x}+{length:#x}",
    "unused": "{name} {bytes}",
    "pruned": (
        "{objects} objects of {bytes} bytes {verb}; {young} more are too young; {snapshots}"
        " snapshots were looked at"
    ),
    "compared": "{differ} of {pages} pages differ",
}
_SNAPSHOT = "DIR/NAME or s3://BUCKET/PREFIX/NAME"
_MIB = 1 << 20
_SAY_SECONDS = 1.0


def make_parser() -> Parser:
    parser = Parser(
        "pagenet-snapshot",
        "Make snapshots of memory, in layers, and read them. pagenet-serve snapshot:DIR/NAME"
        " serves one.",
    )
    parser.epilog = _EXIT_CODES
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )

    def add(name: str, words: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=words, description=words)

    create = add("create", "Make a snapshot of memory.")
    create.add_argument(
        "memory",
        metavar="MEMFILE",
        help="a memory file, or anything else that pagenet-serve takes as one SOURCE",
    )
    create.add_argument(
        "target",
        metavar="TARGET",
        help=(
            "DIR/NAME or file:///DIR/NAME: a name in a directory, where objects are files; or"
            " s3://BUCKET/PREFIX/NAME, or gs://, az://, https://: a name in a store"
        ),
    )
    create.add_argument(
        "--base",
        metavar="SNAPSHOT",
        help="a snapshot in the same place: store only the pages that differ from its pages",
    )
    create.add_argument(
        "--sparse",
        action="store_true",
        help=(
            "MEMFILE has only the pages that were written since the base, and holes between them,"
            " as Firecracker's snapshots of type Diff"
        ),
    )
    create.add_argument(
        "--running",
        action="store_true",
        help=(
            "MEMFILE is memory that is written to, pid:PID:START+SIZE or /proc/PID/fd/N, or"
            " qmp:PATH, the RAM of the guest of the QEMU with that monitor: copy it while its owner"
            " runs, and stop that only for what was written in the end"
        ),
    )
    info = add("info", "Show what a snapshot consists of, by its index alone.")
    verify = add("verify", "Read all of a snapshot, and compare it with its checksums.")
    export = add("export", "Write a snapshot as one memory file.")
    for command in (info, verify, export):
        command.add_argument("snapshot", metavar="SNAPSHOT", help=_SNAPSHOT)
    export.add_argument("file", metavar="FILE", help="the file, which appears once it is whole")
    prune = add("prune", "Show, or remove, objects that no snapshot in their place names.")
    prune.add_argument("place", metavar="PLACE", help="DIR or s3://BUCKET/PREFIX")
    prune.add_argument(
        "--delete", action="store_true", help="remove them (by default they are shown only)"
    )
    prune.add_argument(
        "--older-than",
        type=_seconds,
        default=SAFE_AGE,
        metavar="SECONDS",
        help=(
            "leave objects that are younger, as they may be of a snapshot that is being created"
            " (default: %(default)g, a day)"
        ),
    )
    diff = add("diff", "Show which pages of two snapshots differ.")
    diff.add_argument("one", metavar="SNAPSHOT", help=_SNAPSHOT)
    diff.add_argument("other", metavar="SNAPSHOT", help=f"{_SNAPSHOT}, of as much memory")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return seconds


class _Progress:
    """Says how much of ``pages`` pages is done, once a second."""

    def __init__(self, report: Report, pages: int) -> None:
        self._report, self._pages = report, pages
        self.began = self._said = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.began, 3)

    def __call__(self, pages: int) -> None:
        now = time.monotonic()
        if now < self._said + _SAY_SECONDS:
            return
        self._said = now
        done = pages * PAGE / _MIB
        self._report(
            "progress",
            share=round(pages / self._pages, 4),
            done=done,
            all=self._pages * PAGE / _MIB,
            rate=round(done / (now - self.began), 1),
        )


async def _create(options: argparse.Namespace, report: Report) -> None:
    if options.running:
        created = await _create_running(options, report)
    else:
        with await open_source_in_thread(options.memory) as source:
            progress = _Progress(report, source.region.pages)
            created = await create_snapshot(
                source, options.target, options.base, options.sparse, progress
            )
    words = (
        f"{created.new} of {created.pages} pages new, {created.same} as in its base,"
        f" {created.zero} zero; {created.bytes} bytes written in {created.seconds:.2f} s"
    )
    fields = asdict(created) if report.as_json else {"layers": created.layers, "words": words}
    report("created", target=options.target, **fields)


async def _info(options: argparse.Namespace, report: Report) -> None:
    with await open_snapshot_in_thread(options.snapshot) as snapshot:
        facts = await trio.to_thread.run_sync(_facts, snapshot.index)
    if report.as_json:
        report("snapshot", **facts)
    else:
        report("snapshot", words="\n".join(_fact_words(facts)))


def _facts(index: Index) -> dict[str, object]:
    columns = index.columns
    zero = sum(
        index.run(number).pages
        for number, frame in enumerate(columns.run_frames)
        if frame == ZERO_FRAME
    )
    used: Counter[int] = Counter()
    for object_, length in zip(columns.frame_objects, columns.frame_lengths, strict=True):
        used[object_] += length
    return {
        "id": index.id.hex(),
        "base": index.base.hex() if any(index.base) else None,
        "layers": index.layers,
        "bytes": index.size,
        "pages": index.pages,
        "zero": zero,
        "runs": index.runs,
        "frames": index.frames,
        "objects": [
            {"name": name, "bytes": columns.object_sizes[number], "used": used[number]}
            for number, name in enumerate(index.objects)
        ],
    }


def _fact_words(facts: dict[str, object]) -> list[str]:
    objects = facts["objects"]
    assert isinstance(objects, list)
    stored = sum(found["used"] for found in objects)
    return [
        f"id        {facts['id']}",
        f"layer     {facts['layers']}, base {facts['base'] or 'none'}",
        f"memory    {facts['bytes']} bytes, {facts['pages']} pages, {facts['zero']} of them zero",
        f"stored    {stored} bytes, {facts['runs']} runs in {facts['frames']} frames",
        *(
            f"object    {found['name']}: {found['used']} of {found['bytes']} bytes"
            for found in objects
        ),
    ]


async def _verify(options: argparse.Namespace, report: Report) -> None:
    with await open_snapshot_in_thread(options.snapshot) as snapshot:
        progress = _Progress(report, _stored_pages(snapshot.index))
        flaws = await verify_snapshot(snapshot, progress)
    if flaws.broken:
        raise SourceLost(
            f"{flaws.broken} of {flaws.frames} frames are missing or broken, with {flaws.pages}"
            f" pages of the memory: {flaws.first}"
        )
    report("verified", frames=flaws.frames, seconds=progress.seconds)


def _stored_pages(index: Index) -> int:
    """At least 1, to divide by."""
    return max(sum(index.columns.frame_pages), 1)


async def _export(options: argparse.Namespace, report: Report) -> None:
    with await open_snapshot_in_thread(options.snapshot) as snapshot:
        progress = _Progress(report, _stored_pages(snapshot.index))
        await export_snapshot(snapshot, options.file, progress)
        size = snapshot.index.size
    report("exported", file=options.file, bytes=size, seconds=progress.seconds)


async def _diff(options: argparse.Namespace, report: Report) -> None:
    def say(run: Run) -> None:
        report("differs", first=run.first * PAGE, length=run.count * PAGE)

    with (
        await open_snapshot_in_thread(options.one) as one,
        await open_snapshot_in_thread(options.other) as other,
    ):
        pages = one.index.pages
        differ = await compare_snapshots(one, other, say, _Progress(report, pages))
    report("compared", pages=pages, differ=differ)


async def _create_running(options: argparse.Namespace, report: Report) -> Created:
    if options.sparse:
        raise UsageError("--sparse is of a file, and --running of memory that is written to")
    async with open_running(options.memory) as (source, owner, tracker):
        return await create_running(
            source,
            owner,
            tracker,
            options.target,
            options.base,
            report,
            _Progress(report, source.region.pages),
        )


async def _prune(options: argparse.Namespace, report: Report) -> None:
    found = await prune(options.place, options.older_than, removes=options.delete)
    for entry in found.unused:
        report("unused", name=entry.name, bytes=entry.size)
    report(
        "pruned",
        verb="removed" if options.delete else "could be removed (--delete)",
        removed=options.delete,
        objects=len(found.unused),
        bytes=sum(entry.size for entry in found.unused),
        young=found.young,
        snapshots=found.indexes,
    )


_COMMANDS = {
    "create": _create,
    "info": _info,
    "verify": _verify,
    "export": _export,
    "diff": _diff,
    "prune": _prune,
}


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    report = Report("pagenet-snapshot", options.json, _WORDS)
    return run_command(lambda: _COMMANDS[options.command](options, report), report)


if __name__ == "__main__":
    sys.exit(main())
