"""Where daemons have their control sockets unless they are told otherwise, so that they are
found."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import NamedTuple

__all__ = ["FoundSocket", "control_directory", "default_socket", "found_sockets"]

#: names another directory; empty: there is none
VARIABLE = "PAGENET_CONTROL_DIR"
_OF_ROOT = "/run/pagenet"
# Bytes that the kernel takes of a socket's path, without the 0 at its end.
_PATH_MAX = 107


class FoundSocket(NamedTuple):
    """The control socket of a daemon. By its name: of which process; None if it is ``NAME.ctl``, as
    services have it."""

    path: Path
    pid: int | None


def control_directory() -> Path | None:
    """``/run/pagenet`` for root, ``$XDG_RUNTIME_DIR/pagenet`` for others. None: there is none."""
    told = os.environ.get(VARIABLE)
    if told is not None:
        return Path(told) if told else None
    if os.getuid() == 0:
        return Path(_OF_ROOT)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "pagenet" if runtime else None


def default_socket(program: str) -> Path | None:
    """Where this process, which runs ``program``, is to have its control socket. Makes the
    directory, and removes the sockets of processes that are gone. None: there is no directory that
    is this user's alone to write to."""
    directory = control_directory()
    if directory is None:
        return None
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        about = directory.lstat()
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
            return None
        for found in found_sockets():
            if found.pid is not None and _is_gone(found.path, found.pid):
                found.path.unlink(missing_ok=True)
    except OSError:
        return None
    path = directory / f"{program}.{os.getpid()}"
    return path if len(os.fsencode(path)) <= _PATH_MAX else None


def found_sockets() -> list[FoundSocket]:
    """Of all daemons in the directory, those that are gone included."""
    directory = control_directory()
    if directory is None or not directory.is_dir():
        return []
    found = []
    for path in sorted(directory.iterdir()):
        end = path.suffix.removeprefix(".")
        if (end == "ctl" or end.isdecimal()) and path.is_socket():
            found.append(FoundSocket(path, int(end) if end.isdecimal() else None))
    return found


def _is_gone(path: Path, pid: int) -> bool:
    """There is no such process, and nobody listens: it may be in a pid namespace of its own."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        pass
    except OSError:
        return False
    else:
        return False
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(os.fsencode(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
    return False
