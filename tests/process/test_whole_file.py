"""pagenet/whole_file.py: a file that is written by name is whole and its writer's own; or there is
an error of one line, and the older file."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import trio
from processes import PAGE, pull_command, run, run_relay, run_server, write_pattern

from pagenet import PagenetError, UsageError
from pagenet.whole_file import WholeFile, read_whole

MIB = 1 << 20


@pytest.fixture(params=["without a name", "with a name"])
def making(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the file is made: not every file system has files without a name."""
    if request.param == "with a name":
        real = os.open

        def without_tmpfile(path: str, flags: int, *args: int, **others: int) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return real(path, flags, *args, **others)

        monkeypatch.setattr(os, "open", without_tmpfile)
    return str(request.param)


def write(path: Path, body: bytes) -> None:
    with WholeFile(path, "note") as file:
        file.write(body)
        file.commit()


# ---- whole, or not at all ----


@pytest.mark.parametrize("older", [None, b"older"])
def test_it_appears_when_it_is_whole(older: bytes | None, making: str, tmp_path: Path) -> None:
    path = tmp_path / "note"
    if older is not None:
        path.write_bytes(older)
    with WholeFile(path, "note") as file:
        file.write(b"new")
        assert (path.read_bytes() if path.exists() else None) == older
        file.commit()
        assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["note"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("older", [[], ["note"]])
def test_what_is_not_committed_is_gone(older: list[str], making: str, tmp_path: Path) -> None:
    for name in older:
        (tmp_path / name).write_bytes(b"older")
    with WholeFile(tmp_path / "note", "note") as file:
        file.write(b"new")
    file.close()
    assert os.listdir(tmp_path) == older
    assert all((tmp_path / name).read_bytes() == b"older" for name in older)


def test_two_at_once_have_a_file_each(making: str, tmp_path: Path) -> None:
    with WholeFile(tmp_path / "note", "note") as one, WholeFile(tmp_path / "note", "note") as other:
        one.write(b"one")
        other.write(b"the other's")
        one.commit()
        assert (tmp_path / "note").read_bytes() == b"one"
        other.commit()
    assert (tmp_path / "note").read_bytes() == b"the other's"
    assert os.listdir(tmp_path) == ["note"]


def test_a_name_within_the_current_directory(
    making: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file goes there, even if its writer has changed its directory since."""
    monkeypatch.chdir(tmp_path)
    with WholeFile("note", "note") as file:
        monkeypatch.chdir("/")
        file.commit()
    assert os.listdir(tmp_path) == ["note"]


def test_the_longest_name(making: str, tmp_path: Path) -> None:
    write(tmp_path / ("n" * 255), b"new")
    with pytest.raises(UsageError, match="File name too long"):
        write(tmp_path / ("n" * 256), b"new")


@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_the_mode_is_what_was_said_less_the_umask(mode: int, making: str, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with WholeFile(tmp_path / "note", "note", mode) as file:
            file.commit()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "note").stat().st_mode) == mode & ~0o027


async def test_cancelled_before_the_thread_begins(tmp_path: Path) -> None:
    """What the thread would have used is closed."""
    with WholeFile(tmp_path / "file", "file") as file:
        before = set(os.listdir("/proc/self/fd"))
        with trio.CancelScope() as scope:
            scope.cancel()
            await file.wait_committed()
        assert scope.cancelled_caught
        assert set(os.listdir("/proc/self/fd")) == before
    assert not list(tmp_path.iterdir())


async def test_the_disk_is_waited_for_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that never answers blocks no other task, and nothing is left behind."""
    began, go_on = trio.Event(), trio.lowlevel.current_trio_token()
    read_end, write_end = os.pipe()

    def slow(fd: int) -> None:
        trio.from_thread.run_sync(began.set, trio_token=go_on)
        os.read(read_end, 1)

    monkeypatch.setattr(os, "fsync", slow)
    with WholeFile(tmp_path / "note", "note") as file:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.wait_committed)
            await began.wait()
            nursery.cancel_scope.cancel()
    assert os.listdir(tmp_path) == []
    os.close(write_end)
    os.close(read_end)


# ---- names that are something else ----


def a_directory(path: Path) -> None:
    path.mkdir()


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def a_link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "directory": (a_directory, "is not a regular file"),
    "fifo": (os.mkfifo, "is not a regular file"),
    "socket": (a_socket, "is not a regular file"),
    "link to a file": (a_link_to("mine"), "is a symbolic link"),
    "link to nothing": (a_link_to("nothing"), "is a symbolic link"),
    "link to a directory": (a_link_to("."), "is a symbolic link"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_name_that_is_something_else(kind: str, making: str, tmp_path: Path) -> None:
    make, words = OTHERS[kind]
    (tmp_path / "mine").write_bytes(b"mine")
    make(tmp_path / "note")
    before = os.lstat(tmp_path / "note")
    with pytest.raises(UsageError, match=words):
        write(tmp_path / "note", b"new")
    assert sorted(os.listdir(tmp_path)) == ["mine", "note"]
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert os.lstat(tmp_path / "note").st_ino == before.st_ino


@pytest.mark.parametrize("kind", OTHERS)
def test_a_name_that_becomes_something_else_meanwhile(
    kind: str, making: str, tmp_path: Path
) -> None:
    make, words = OTHERS[kind]
    (tmp_path / "mine").write_bytes(b"mine")
    with WholeFile(tmp_path / "note", "note") as file:
        make(tmp_path / "note")
        with pytest.raises(UsageError, match=words):
            file.commit()
    assert sorted(os.listdir(tmp_path)) == ["mine", "note"]
    assert (tmp_path / "mine").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "that is a directory"),
        ("{dir}/", "that is a directory"),
        ("{dir}/..", "that is a directory"),
        ("{dir}/none/note", "No such file or directory"),
        ("{dir}/file/note", "Not a directory"),
        ("/dev/null", "is not a regular file"),
        ("/dev/stdout", "is a symbolic link"),
        ("/proc/note", "cannot write the note /proc/note: "),
    ],
)
def test_names_that_cannot_be(path: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=words):
        WholeFile(path.format(dir=tmp_path), "note")


def test_a_directory_that_is_moved_away(making: str, tmp_path: Path) -> None:
    """The file goes where it was begun, and not through a link that was planted in its place."""
    (tmp_path / "there").mkdir()
    (tmp_path / "planted").mkdir()
    with WholeFile(tmp_path / "there" / "note", "note") as file:
        (tmp_path / "there").rename(tmp_path / "moved")
        (tmp_path / "there").symlink_to("planted")
        file.commit()
    assert os.listdir(tmp_path / "moved") == ["note"]
    assert os.listdir(tmp_path / "planted") == []


AS_NOBODY = """
import os, sys
os.setgid(65534), os.setuid(65534)
import pagenet
from pagenet.whole_file import WholeFile
try:
    with WholeFile(sys.argv[1], "note") as file:
        file.write(b"new")
        file.commit()
except pagenet.UsageError as error:
    sys.exit(str(error))
"""


def as_nobody(path: Path) -> str:
    """What an ordinary user who writes there is told."""
    if os.geteuid():
        pytest.skip("needs root, to become another user")
    # Loaded before the user changes: the package may lie where other users may not look.
    code = f"import pagenet.whole_file, trio\n{AS_NOBODY}"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stderr.count("\n") <= 1, done.stderr
    assert (done.returncode == 0) == (not done.stderr)
    return done.stderr


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory like /tmp, which every user can reach."""
    with mounted(tmp_path / "shared", "mode=1777") as path:
        yield path


@contextmanager
def mounted(path: Path, options: str) -> Iterator[Path]:
    """A tmpfs that other users can reach; so are the directories above it."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        path.rmdir()
        pytest.skip("needs root, to mount a tmpfs")
    try:
        for parent in path.parents:
            if parent.stat().st_uid == os.geteuid() and str(parent).startswith("/tmp/"):
                parent.chmod(parent.stat().st_mode | 0o011)
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
        path.rmdir()


def test_another_users_file_in_a_sticky_directory(shared: Path) -> None:
    """Refused before anything has been written, and not after."""
    (shared / "theirs").write_bytes(b"theirs")
    assert "is another user's" in as_nobody(shared / "theirs")
    assert (shared / "theirs").read_bytes() == b"theirs"
    assert as_nobody(shared / "own") == ""
    assert as_nobody(shared / "own") == ""
    (shared / "closed").mkdir(mode=0o755)
    assert "Permission denied" in as_nobody(shared / "closed" / "note")
    assert sorted(os.listdir(shared)) == ["closed", "own", "theirs"]


# ---- no room ----


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may be longer than ``size``: writing raises EFBIG, since Python ignores the
    signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_is_one_line(making: str, tmp_path: Path) -> None:
    (tmp_path / "note").write_bytes(b"older")
    with (
        limited(PAGE),
        pytest.raises(
            PagenetError, match=r"File too large; what was there before is as it was"
        ) as failed,
    ):
        write(tmp_path / "note", bytes(PAGE + 1))
    assert failed.value.exit_code == 1
    with (
        limited(PAGE),
        WholeFile(tmp_path / "note", "note") as file,
        pytest.raises(UsageError, match="8192 bytes long"),
    ):
        file.resize(2 * PAGE)
    assert os.listdir(tmp_path) == ["note"]
    assert (tmp_path / "note").read_bytes() == b"older"


def test_a_full_disk_is_one_line(making: str, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", f"size={16 * PAGE}") as small:
        write(small / "note", b"older")
        with pytest.raises(PagenetError, match="No space left on device"):
            write(small / "note", bytes(17 * PAGE))
        assert os.listdir(small) == ["note"]
        assert (small / "note").read_bytes() == b"older"


# ---- reading by name ----


@pytest.mark.parametrize("kind", ["directory", "fifo", "socket"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    """A FIFO without a writer is refused, and not waited for."""
    OTHERS[kind][0](tmp_path / "note")
    with pytest.raises(UsageError, match="cannot read the note"):
        read_whole(tmp_path / "note", 100, "note")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev/tty"])
def test_no_device_is_read(path: str) -> None:
    with pytest.raises(UsageError, match="cannot read the note"):
        read_whole(path, 100, "note")


def test_so_much_is_read_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_bytes(bytes(100))
    assert read_whole(path, 100, "note") == bytes(100)
    (tmp_path / "link").symlink_to("note")
    assert read_whole(tmp_path / "link", 100, "note") == bytes(100)
    path.write_bytes(bytes(101))
    with pytest.raises(UsageError, match="it is too long"):
        read_whole(path, 100, "note")
    os.truncate(path, 1 << 40)
    with pytest.raises(UsageError, match="it is too long"):
        read_whole(path, 100, "note")


# ---- the commands ----


def into(uri: str, path: Path) -> list[str]:
    return pull_command(uri, "--into", str(path), lane="trio", as_json=False)


@pytest.mark.parametrize("killed", [False, True])
async def test_two_transfers_into_one_file(killed: bool, tmp_path: Path) -> None:
    """The first ends while the second has half of its pages. The first's file stays whole, even if
    the second is killed."""
    one = write_pattern(tmp_path / "one", MIB, seed=1)
    other = write_pattern(tmp_path / "other", 2 * MIB, seed=2)
    copy = tmp_path / "copy"
    async with (
        run_server(str(one)) as (_, uri),
        run_server(str(other)) as (_, other_uri),
        run_relay(other_uri, MIB) as relay,
        run(into(relay.uri, copy)) as late,
    ):
        await relay.held.wait()
        async with run(into(uri, copy)) as early:
            await early.rest()
            assert await early.wait_end() == 0
        assert copy.read_bytes() == one.read_bytes()
        if killed:
            await late.kill()
        else:
            relay.release()
            await late.rest()
            assert await late.wait_end() == 0
    assert copy.read_bytes() == (one if killed else other).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["copy", "one", "other"]


async def test_links_planted_where_pagenet_might_write(tmp_path: Path) -> None:
    source = write_pattern(tmp_path / "source", MIB)
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "copy.partial").symlink_to("mine")
    (tmp_path / "touches.partial").symlink_to("mine")
    async with (
        run_server(str(source)) as (_, uri),
        run([*into(uri, tmp_path / "copy"), "--record", str(tmp_path / "touches")]) as puller,
    ):
        await puller.rest()
        assert await puller.wait_end() == 0
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "touches").exists()


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("option", ["--into", "--record"])
async def test_a_transfer_to_a_name_that_is_something_else(
    kind: str, option: str, tmp_path: Path
) -> None:
    source = write_pattern(tmp_path / "source", MIB)
    make, words = OTHERS[kind]
    (tmp_path / "mine").write_bytes(b"mine")
    make(tmp_path / "name")
    async with run_server(str(source)) as (_, uri):
        arguments = into(uri, tmp_path / ("name" if option == "--into" else "copy"))
        more = [] if option == "--into" else ["--record", str(tmp_path / "name")]
        async with run([*arguments, *more]) as puller:
            await puller.rest()
            assert await puller.wait_end() == 2
            assert words in puller.stderr
            assert puller.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["mine", "name", "source"]
    assert (tmp_path / "mine").read_bytes() == b"mine"


async def test_a_transfer_onto_a_full_disk(tmp_path: Path) -> None:
    source = write_pattern(tmp_path / "source", MIB)
    with mounted(tmp_path / "small", f"size={64 * PAGE}") as small:
        (small / "copy").write_bytes(b"older")
        async with (
            run_server(str(source)) as (server, uri),
            run(into(uri, small / "copy")) as puller,
        ):
            await puller.rest()
            assert await puller.wait_end() == 1
            assert "No space left on device; what was there before is as it was" in puller.stderr
            assert puller.stderr.count("\n") == 1
            await server.event("connected")
        assert os.listdir(small) == ["copy"]
        assert (small / "copy").read_bytes() == b"older"


async def test_sigterm_ends_a_daemon_that_was_told_to_read_a_fifo(tmp_path: Path) -> None:
    """The client gets an error at once, and the daemon still heeds signals."""
    source = write_pattern(tmp_path / "source", MIB)
    os.mkfifo(tmp_path / "fifo")
    control = tmp_path / "control"
    options = ["--control", str(control), "--max-bandwidth", "1", "--background", "linear"]
    async with (
        run_server(str(source)) as (_, uri),
        run(
            [*pull_command(uri, "--into", str(tmp_path / "copy"), lane="trio"), *options]
        ) as puller,
    ):
        await puller.event("owner")
        command = [
            sys.executable,
            "-m",
            "pagenet.cli.ctl",
            str(control),
            "schedule",
            f"recorded={tmp_path / 'fifo'}",
        ]
        async with run(command) as ctl:
            await ctl.rest()
            assert await ctl.wait_end() == 2
            assert "is not a regular file" in ctl.stderr
        puller.send_signal(signal.SIGTERM)
        assert await puller.wait() == 143


@pytest.mark.parametrize("option", ["--record", "--background"])
async def test_a_fifo_for_a_recording(option: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    value = str(tmp_path / "fifo") if option == "--record" else f"recorded={tmp_path / 'fifo'}"
    source = write_pattern(tmp_path / "source", PAGE)
    async with (
        run_server(str(source)) as (_, uri),
        run([*into(uri, tmp_path / "copy"), option, value]) as puller,
    ):
        await puller.rest()
        assert await puller.wait_end() == 2
        assert "is not a regular file" in puller.stderr


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pagenet.cli.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("kind", ["fifo", "link to a file"])
@pytest.mark.parametrize("suite", ["fault", "workload"])
def test_a_plot_under_a_name_that_is_something_else(kind: str, suite: str, tmp_path: Path) -> None:
    """Refused before anything is measured."""
    if find_spec("matplotlib") is None:  # importing it starts threads
        pytest.skip("needs matplotlib")
    make, words = OTHERS[kind]
    (tmp_path / "mine").write_bytes(b"mine")
    make(tmp_path / "plot.svg")
    done = bench(suite, "--plot", str(tmp_path / "plot.svg"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert words in done.stderr
    assert (tmp_path / "mine").read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["fifo", "link to a file"])
def test_a_trace_under_a_name_that_is_something_else(kind: str, tmp_path: Path) -> None:
    """Refused before the program has run."""
    make, words = OTHERS[kind]
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "data").write_bytes(bytes(PAGE))
    make(tmp_path / "touches")
    program = ["touch", str(tmp_path / "has run"), "{}"]
    done = bench(
        "trace",
        "--data",
        str(tmp_path / "data"),
        "--output",
        str(tmp_path / "touches"),
        "--",
        *program,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert words in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["data", "mine", "touches"]


def test_a_trace_that_is_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    done = bench("workload", "--trace", f"recorded={tmp_path / 'fifo'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "is not a regular file" in done.stderr


def test_a_pattern_into_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    command = [
        sys.executable,
        "-m",
        "pagenet.testing.pattern",
        str(tmp_path / "fifo"),
        "--size",
        "4K",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
