"""The showcase of restoring: guests from one snapshot in an object store, at once, and every byte
of each is checked.

A real S3 server (SeaweedFS) has a memory image in which every word depends on its page and place.
``pagenet-serve`` serves it, and one ``pagenet-pull --many`` fills the memory of all guests, which
are owners in C. They touch pages from their first moment on, and read all pages back at the end.
The exit status is 0 if every byte was right and every process ended well.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import tempfile
import time
from array import array
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio
from demo import MIB, PATTERN, SLACK, Failed, Story, check_memory, daemon, microseconds, run
from rich.table import Table

from pagenet.bench._peers import relayed
from pagenet.bench.restore.s3 import BUCKET, s3_server
from pagenet.cli._command import Report, run_command
from pagenet.nurseries import open_failing_nursery
from pagenet.objects import open_store
from pagenet.testing.pattern import parse_size, pattern_command
from pagenet.testing.workload import workload_command

OBJECT = "guest.memory"


class Restores(Story):
    """Of the daemon's guests, when each had every page."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet)
        self.complete: list[float] = []

    def note(self, who: str, event: dict[str, Any]) -> None:
        super().note(who, event)
        if (who, event["event"]) == ("pagenet-pull", "complete"):
            self.complete.append(time.monotonic())


async def demo(options: argparse.Namespace, report: Report) -> None:
    check_memory((options.guests + 3) * options.size + SLACK + options.guests * 16 * MIB)
    story = Restores(quiet=options.json)
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="pagenet-demo-"))
        directory = Path(name)
        (directory / "store").mkdir()
        server = s3_server(directory / "store", options.size)
        environment = await trio.to_thread.run_sync(stack.enter_context, server)
        story.say("S3 server", f"SeaweedFS on {environment['AWS_ENDPOINT_URL']}")
        os.environ.update(environment)
        await upload(directory / OBJECT, options, story)
        restored = await restore(directory, environment["AWS_ENDPOINT_URL"], options, story)
    if options.json:
        report("restored", **restored)
    story.console.print(table(restored))
    if restored["wrong"]:
        raise Failed(f"wrong pages: {restored['wrong']}")


async def upload(file: Path, options: argparse.Namespace, story: Story) -> None:
    await run("writer", pattern_command(str(file), "--size", str(options.size), *PATTERN), story)

    def write() -> None:
        content = bytearray(file.read_bytes())
        file.unlink()
        if options.corrupt_one_byte:
            content[options.size // 2 + 123] ^= 1
        with open_store(f"s3://{BUCKET}", 60) as store:
            store.write(OBJECT, memoryview(content))

    await trio.to_thread.run_sync(write)
    story.say("writer", f"{options.size / MIB:.0f} MiB are s3://{BUCKET}/{OBJECT}")


async def restore(
    directory: Path, endpoint: str, options: argparse.Namespace, story: Restores
) -> dict[str, Any]:
    """What happened. A relay before the store counts the bytes that come from it."""
    async with relayed(endpoint, 0) as relay:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{relay.port}"
        socket, listen = directory / "owners", f"unix:{directory}/pages"
        serve = daemon(
            "serve", f"s3://{BUCKET}/{OBJECT}", "--listen", listen, "--cache", f"{directory}/cache"
        )
        pull = daemon("pull", listen, "--uffd-socket", str(socket), "--many")
        async with open_failing_nursery() as nursery:
            await nursery.start(partial(run, "pagenet-serve", serve, story, until="listening"))
            await nursery.start(partial(run, "pagenet-pull", pull, story, until="added"))
            story.say("pagenet-pull", "waiting for guests")
            began = time.monotonic()
            async with open_failing_nursery() as guests:
                for number in range(options.guests):
                    command = guest(socket, directory / f"latencies.{number}", options)
                    guests.start_soon(run, f"guest {number}", command, story)
            nursery.cancel_scope.cancel()
        fetched = await relay.answered()
    return outcome(directory, began, fetched, options, story)


def guest(socket: Path, latencies: Path, options: argparse.Namespace) -> list[str]:
    pages = options.size // mmap.PAGESIZE
    return workload_command(
        *("--socket", str(socket), "--size", str(options.size), *PATTERN),
        *("--order", "zipf", "--threads", "2", "--touches", str(max(1, pages // 4))),
        *("--latency-out", str(latencies), "--wait-complete"),
    )


# ---- what happened ----


def outcome(
    directory: Path, began: float, fetched: int, options: argparse.Namespace, story: Restores
) -> dict[str, Any]:
    guests = []
    for number in range(options.guests):
        verified = story.last(f"guest {number}", "verified")
        if not verified:
            raise Failed(f"guest {number} ended without a word on how it went")
        recorded = array("Q", (directory / f"latencies.{number}").read_bytes())
        guests.append(
            {
                "first_touch_us": recorded[0] / 1000 if recorded else None,
                "touches": verified["touches"],
                "waited": verified["slow"],
                "waited_us": verified["slow_us"],
                "verified": verified["pages"],
                "wrong": verified["bad"],
            }
        )
    if len(story.complete) != options.guests:
        raise Failed(f"only {len(story.complete)} guests got every page")
    return {
        "bytes": options.size,
        "fetched": fetched,
        "seconds": max(story.complete) - began,
        "verified": sum(each["verified"] for each in guests),
        "wrong": sum(each["wrong"] for each in guests),
        "guests": guests,
    }


def table(restored: dict[str, Any]) -> Table:
    guests, mib = restored["guests"], restored["bytes"] / MIB
    shown = Table(
        title=f"{len(guests)} guests of {mib:.0f} MiB, restored in {restored['seconds']:.2f} s",
        caption=f"{restored['fetched'] / MIB:.1f} MiB came from the store",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("guest")
    for heading in ("first touch", "touches", "waited", "p50", "p99", "verified", "wrong"):
        shown.add_column(heading, justify="right")
    for number, each in enumerate(guests):
        shown.add_row(
            str(number),
            microseconds(each["first_touch_us"]),
            str(each["touches"]),
            str(each["waited"]),
            *(microseconds(each["waited_us"][name]) for name in ("p50", "p99")),
            str(each["verified"]),
            f"[bold red]{each['wrong']}[/]" if each["wrong"] else "[bold green]0[/]",
        )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="demo-restore",
        description="Restore guests from a snapshot in an S3 server; check every byte.",
    )
    parser.add_argument("--guests", type=int, default=16, metavar="N", help="at once (%(default)s)")
    parser.add_argument(
        "--size",
        type=parse_size,
        default="64M",
        metavar="BYTES",
        help="memory of each; suffixes K M G (%(default)s)",
    )
    parser.add_argument(
        "--corrupt-one-byte",
        action="store_true",
        help="of the snapshot: prove that the check works",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object instead of words and a table"
    )
    options = parser.parse_args()
    report = Report("demo-restore", options.json, {})
    return run_command(lambda: demo(options, report), report)


if __name__ == "__main__":
    sys.exit(main())
