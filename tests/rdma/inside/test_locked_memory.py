"""Memory is registered within what the process may lock. If that is too little, both sides report
it, and what to do."""

from __future__ import annotations

import os
import re
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Command, run_workload
from processes import write_pattern

from pagenet.cli.pull import main as pull
from pagenet.cli.serve import main as serve

KIB = 1 << 10
MIB = 1 << 20
SIZE = 2 * MIB
LARGE = 9 * MIB
NOBODY = 65534
CAP_IPC_LOCK = 14
LISTEN = "rdma://127.0.0.1:0"
HINT = "`ulimit -l unlimited`"


def as_nobody(limit: int) -> Callable[[], None]:
    """For a :class:`Command`: become an ordinary user who may lock ``limit`` bytes."""

    def become() -> None:
        # Python may lie where other users may not look, and it loads this when it first looks up a
        # name
        "".encode("idna")
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        effective = re.search(
            r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE
        )
        assert effective is not None
        assert not int(effective[1], 16) >> CAP_IPC_LOCK & 1

    return become


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory in which every user may make a socket."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture
def source(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file that every user may write to, and so register in place."""
    path = write_pattern(Path("/dev/shm/source"), LARGE if "large" in request.node.name else SIZE)
    path.chmod(0o666)
    yield path
    path.unlink()


def workload(directory: Path, source: Path, *more: str) -> Command:
    return Command(
        run_workload,
        "--socket",
        directory / "uffd",
        "--size",
        source.stat().st_size,
        "--wait-complete",
        *more,
    )


def pull_into_owner(
    uri: str, directory: Path, *more: str, before: Callable[[], object] = lambda: None
) -> Command:
    return Command(pull, uri, "--uffd-socket", directory / "uffd", "--json", *more, before=before)


def check_moves(uri: str, directory: Path, source: Path) -> None:
    with pull_into_owner(uri, directory) as pulling:
        pulling.event("waiting")
        with workload(directory, source) as owner:
            assert owner.event("verified")["bad"] == 0
        assert pulling.wait() == 0


def check_told(text: str, *parts: str) -> None:
    """Check that it is one line with these parts."""
    assert text.count("\n") == 1
    for part in (*parts, HINT):
        assert part in text


# ---- the source ----


@pytest.mark.parametrize(
    ("limit", "lane", "says"),
    [
        (
            512 * KIB,
            "native",
            "Cannot allocate memory (RDMA locks memory, and this process may lock 512 KiB",
        ),
        (0, "trio", "Operation not permitted (RDMA locks memory, and this process may lock 0 KiB"),
    ],
    ids=["little", "nothing"],
)
def test_source_may_lock_too_little(
    limit: int, lane: str, says: str, source: Path, directory: Path
) -> None:
    """The destination is told why, and the source continues: with a higher limit it serves the next
    destination."""
    with Command(serve, source, "--listen", LISTEN, "--json", before=as_nobody(limit)) as server:
        uri = server.event("listening")["uri"]
        with pull_into_owner(uri, directory, "--lane", lane) as pulling:
            pulling.event("waiting")
            with workload(directory, source):
                assert pulling.wait() == 4
            check_told(
                pulling.stderr, "the source cannot go on: cannot register memory for RDMA: ", says
            )
        assert says in server.event("lost")["reason"]
        resource.prlimit(
            server.pid, resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        check_moves(uri, directory, source)


def test_source_that_dials_and_may_lock_too_little(source: Path, directory: Path) -> None:
    with Command(pull, LISTEN, "--listen", "--into", directory / "copy", "--json") as pulling:
        uri = pulling.event("listening")["uri"]
        with Command(
            serve, source, "--connect", uri, "--json", before=as_nobody(512 * KIB)
        ) as server:
            assert server.wait() == 7
            check_told(server.stderr, "cannot register memory for RDMA: Cannot allocate memory")
        assert pulling.wait() == 4
        check_told(
            pulling.stderr,
            "the source cannot go on: cannot register memory for RDMA: Cannot allocate memory",
        )


def test_source_may_lock_a_part_of_a_large_one(source: Path, directory: Path) -> None:
    """The source registers no more of it at a time than it may lock."""
    with Command(serve, source, "--listen", LISTEN, "--json", before=as_nobody(5 * MIB)) as server:
        check_moves(server.event("listening")["uri"], directory, source)


# ---- the destination ----


@pytest.mark.parametrize(("lane", "limit"), [("native", 8 * MIB), ("trio", 512 * KIB)])
def test_destination_may_lock_too_little(
    lane: str, limit: int, source: Path, directory: Path
) -> None:
    """8 MiB are what Linux lets a process lock by default."""
    with Command(serve, source, "--listen", LISTEN, "--json") as server:
        uri = server.event("listening")["uri"]
        with pull_into_owner(uri, directory, "--lane", lane, before=as_nobody(limit)) as pulling:
            pulling.event("waiting")
            with workload(directory, source):
                assert pulling.wait() == 7
            check_told(
                pulling.stderr, "Cannot allocate memory", f"this process may lock {limit >> 10} KiB"
            )
        # A lane may tell of its own end first.
        reasons = [server.event("lost")["reason"]]
        while "the destination gave up: " not in reasons[-1] and len(reasons) < 3:
            reasons.append(server.event("lost")["reason"])
        assert "the destination gave up: " in reasons[-1]
        assert HINT in reasons[-1]
        check_moves(uri, directory, source)


def test_destination_may_lock_its_stage_and_no_more_of_a_large_one(
    source: Path, directory: Path
) -> None:
    """Pages that cannot be received in place come through the stage."""
    limit = 16 * MIB + 512 * KIB  # less than a chunk more
    with Command(serve, source, "--listen", LISTEN, "--json") as server:
        uri = server.event("listening")["uri"]
        with pull_into_owner(
            uri, directory, "--lane", "native", before=as_nobody(limit)
        ) as pulling:
            pulling.event("waiting")
            with workload(directory, source, "--memory", "memfd") as owner:
                assert pulling.event("owner")["placement"] == "continue"
                assert owner.event("verified")["bad"] == 0
            assert pulling.wait() == 0
