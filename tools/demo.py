"""The showcase: memory moves to a process that is already working on it, and every byte of it is
checked.

A writer fills tmpfs with a pattern in which every word depends on its page and place.
``pagenet-serve`` serves it, and ``pagenet-pull`` pulls it into an owner in C. The owner touches
pages from its first moment on, before any page is there, and reads all pages back at the end. The
exit status is 0 if every byte was right and every process ended well.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress
from rich.table import Table

from pagenet import PagenetError
from pagenet.cli._command import Report, run_command
from pagenet.nurseries import open_failing_nursery
from pagenet.testing.pattern import parse_size, pattern_command
from pagenet.testing.workload import workload_command

MIB = 1 << 20
SLACK = 256 * MIB  # four Pythons, the residency map, the owner's bookkeeping
PATTERN = ("--seed", "1", "--zero-every", "64")


class Failed(PagenetError):
    """Why the demo cannot continue, or that pages were wrong. Exit status 1."""


class Story:
    """The events of the processes: kept, and shown as a bar on a terminal, as lines elsewhere, and
    not at all if ``quiet``."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.bar = Progress(
            BarColumn(12), "{task.description}", console=self.console, transient=True, disable=quiet
        )
        self._task = self.bar.add_task("", total=1.0, visible=self.console.is_terminal)
        self._told: dict[tuple[str, str], dict[str, Any]] = {}

    def say(self, who: str, words: str) -> None:
        self.console.print(f"{who + ':':15}{words}", markup=False)

    def last(self, who: str, event: str) -> dict[str, Any]:
        """The last event of that kind, with ``at``, the time at which it came, and ``touched``, the
        touches until then. Empty if there was none."""
        return self._told.get((who, event), {})

    def touches(self) -> int:
        return int(self.last("owner", "progress").get("touched", 0))

    def note(self, who: str, event: dict[str, Any]) -> None:
        self._told[who, event["event"]] = {
            "at": time.monotonic(),
            "touched": self.touches(),
        } | event
        if (who, event["event"]) == ("pagenet-pull", "progress"):
            self._show(event)

    def _show(self, progress: dict[str, Any]) -> None:
        words = (
            f"{progress['share']:6.1%} resident, {progress['bytes_per_s'] / MIB:.0f} MiB/s,"
            f" {self.touches()} touches, {progress['faults']} faults (p50"
            f" {microseconds(progress['fault_us']['p50'])})"
        )
        if self.console.is_terminal:
            self.bar.update(self._task, completed=progress["share"], description=words)
        else:
            self.say("pagenet-pull", words)


# ---- processes ----


async def run(
    who: str,
    command: Sequence[str],
    story: Story,
    *,
    until: str = "",
    pass_fds: Sequence[int] = (),
    task_status: trio.TaskStatus[dict[str, Any]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one process from start to end. It counts as started with its event ``until``. A
    cancellation terminates it.

    It has a process group of its own: Ctrl-C is for the demo, which ends the others in good order.
    """
    async with open_failing_nursery() as nursery:
        start = partial(
            trio.run_process,
            command,
            stdout=subprocess.PIPE,
            check=False,
            process_group=0,
            pass_fds=pass_fds,
        )
        process: trio.Process = await nursery.start(start)
        assert process.stdout is not None
        async for event in json_lines(process.stdout):
            story.note(who, event)
            if event["event"] == until:
                task_status.started(event)
    # an owner with wrong pages has done its work
    if process.returncode and not story.last(who, "verified"):
        raise Failed(f"{who} ended with exit code {process.returncode}")


async def json_lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[dict[str, Any]]:
    unread = b""
    async for data in stream:
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


def daemon(name: str, *args: str) -> list[str]:
    return [sys.executable, "-m", f"pagenet.cli.{name}", "--json", *args]


# ---- the demo ----


async def demo(options: argparse.Namespace, report: Report) -> None:
    check_room(options)
    story = Story(quiet=options.json)
    # it has no name, so it cannot be left behind
    source = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        await fill(source, options, story)
        with tempfile.TemporaryDirectory(prefix="pagenet-demo-") as directory, story.bar:
            await move(source, Path(directory), options, story)
            moved = outcome(story, Path(directory, "latencies"), options)
    finally:
        os.close(source)
    if options.json:
        report("moved", **moved)
    story.console.print(table(moved))
    if moved["wrong"]:
        raise Failed(
            f"wrong pages: {moved['wrong']}, the first of them is page {moved['first_wrong']}"
        )


def check_room(options: argparse.Namespace) -> None:
    """Raise :exc:`Failed` if there is too little room. The source is in /dev/shm, and so is the
    owner's memory if it is tmpfs; all of it is memory in the end."""
    shm = os.statvfs("/dev/shm")
    needed = options.size * (2 if options.memory == "tmpfs" else 1)
    check_free("room in /dev/shm", needed, shm.f_bavail * shm.f_frsize)
    check_memory(2 * options.size + SLACK)


def check_memory(needed: int) -> None:
    """:exc:`Failed` if so many bytes are not available."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    check_free("memory", needed, int(found[1]) << 10 if found else sys.maxsize)


def check_free(what: str, needed: int, free: int) -> None:
    if free < needed:
        raise Failed(
            f"not enough {what}: {needed // MIB} MiB needed, {free // MIB} MiB free; choose a"
            " smaller --size"
        )


async def fill(source: int, options: argparse.Namespace, story: Story) -> None:
    began = time.monotonic()
    command = pattern_command(f"/proc/self/fd/{source}", "--size", str(options.size), *PATTERN)
    await run("writer", command, story, pass_fds=[source])
    story.say(
        "writer",
        f"filled {options.size / MIB:.0f} MiB of tmpfs in {time.monotonic() - began:.1f} s",
    )
    if options.corrupt_one_byte:
        at = options.size // 2 + 123
        os.pwrite(source, bytes([os.pread(source, 1, at)[0] ^ 1]), at)
        story.say("writer", f"changed the byte at {at}")


async def move(source: int, directory: Path, options: argparse.Namespace, story: Story) -> None:
    listen = "tcp://127.0.0.1:0" if options.listen == "tcp" else f"unix:{directory}/pages"
    serve = daemon("serve", f"/proc/self/fd/{source}", "--listen", listen, "--once")
    owner = workload_command(
        *(
            "--socket",
            f"{directory}/owner",
            "--size",
            str(options.size),
            "--memory",
            options.memory,
            *PATTERN,
        ),
        # As many touches as end before the background does: then all of them are made while the
        # memory moves.
        *(
            "--order",
            "zipf",
            "--threads",
            str(options.threads),
            "--touches",
            str(max(1, options.size // mmap.PAGESIZE // 2)),
        ),
        *("--latency-out", f"{directory}/latencies", "--wait-complete"),
    )
    async with open_failing_nursery() as nursery:
        uri = (
            await nursery.start(
                partial(run, "pagenet-serve", serve, story, until="listening", pass_fds=[source])
            )
        )["uri"]
        story.say("pagenet-serve", f"serving {options.size / MIB:.0f} MiB on {uri}")
        pull = daemon("pull", uri, "--uffd-socket", f"{directory}/owner")
        await nursery.start(partial(run, "pagenet-pull", pull, story, until="waiting"))
        story.say("pagenet-pull", "connected, waiting for an owner")
        await nursery.start(partial(run, "owner", owner, story, until="touching"))
        story.say(
            "owner",
            f"touching {options.memory} memory with {options.threads} threads; none of it is"
            " here yet",
        )


# ---- what happened ----


def outcome(story: Story, latencies_file: Path, options: argparse.Namespace) -> dict[str, Any]:
    complete, verified = story.last("pagenet-pull", "complete"), story.last("owner", "verified")
    if not complete or not verified:
        raise Failed("a process ended without a word on how it went")
    # latencies of touches that took over 2 us, in the order in which they ended
    recorded = array("Q", latencies_file.read_bytes())
    outlasted = story.last("owner", "touching")["at"] + verified["seconds"] > complete["at"]
    # What the owner had reported is up to a second old; and each fault is a touch.
    at_least = max(complete["touched"], complete["faults"] - options.threads)
    taken_over = (
        "placement",
        "demand",
        "prefetch",
        "background",
        "zero",
        "bytes_wire",
        "faults",
        "fault_us",
        "seconds",
    )
    return {
        "bytes": options.size,
        "memory": options.memory,
        "first_touch_us": recorded[0] / 1000 if recorded else None,
        "touches": verified["touches"],
        "touches_while_moving": at_least if outlasted else verified["touches"],
        **{name: complete[name] for name in taken_over},
        "verified": verified["pages"],
        "wrong": verified["bad"],
        "first_wrong": verified["first_bad"],
    }


def microseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} us" if value < 10_000 else f"{value / 1000:.0f} ms"


def table(moved: dict[str, Any]) -> Table:
    mib, at_least = (
        moved["bytes"] / MIB,
        "at least " if moved["touches_while_moving"] < moved["touches"] else "",
    )
    p50, p99 = microseconds(moved["fault_us"]["p50"]), microseconds(moved["fault_us"]["p99"])
    rows = {
        "memory moved": f"{mib:.0f} MiB, {moved['memory']}, placed by {moved['placement']}",
        "first touch served after": microseconds(moved["first_touch_us"]),
        "touches while moving": f"{at_least}{moved['touches_while_moving']} of {moved['touches']}",
        "faults, latency": f"{moved['faults']}, p50 {p50}, p99 {p99}",
        "pages by class": ", ".join(
            f"{name} {moved[name]}" for name in ("demand", "prefetch", "background")
        ),
        "zero pages among them": str(moved["zero"]),
        "on the wire": f"{moved['bytes_wire'] / MIB:.1f} MiB",
        "time, rate": f"{moved['seconds']:.2f} s, {mib / moved['seconds']:.0f} MiB/s",
        "pages verified": str(moved["verified"]),
        "pages wrong": f"[bold red]{moved['wrong']}[/]" if moved["wrong"] else "[bold green]0[/]",
    }
    shown = Table(show_header=False, title="what happened", title_justify="left")
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="demo", description="Move memory to a process that is using it; check every byte."
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        default="1G",
        metavar="BYTES",
        help="suffixes K M G (%(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=4, metavar="N", help="how many touch at once (%(default)s)"
    )
    parser.add_argument(
        "--memory",
        choices=["anonymous", "memfd", "tmpfs"],
        default="anonymous",
        help="owner's (%(default)s)",
    )
    parser.add_argument(
        "--listen", choices=["tcp", "unix"], default="tcp", help="between the daemons (%(default)s)"
    )
    parser.add_argument(
        "--corrupt-one-byte", action="store_true", help="of the source: prove that the check works"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object instead of words and a table"
    )
    options = parser.parse_args()
    report = Report("demo", options.json, {})
    return run_command(lambda: demo(options, report), report)


if __name__ == "__main__":
    sys.exit(main())
