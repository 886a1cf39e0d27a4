"""What systemd gives to the main process of a service: descriptors that it has kept for it."""

from __future__ import annotations

import os

__all__ = ["descriptors", "environment", "take_descriptors"]

_FIRST = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def descriptors() -> dict[str, list[int]]:
    """Those that systemd has given to this process, by name; none if it has given none."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[int]] = {}
    for at in range(int(os.environ.get("LISTEN_FDS", "0"))):
        name = names[at] if at < len(names) else ""
        found.setdefault(name, []).append(_FIRST + at)
    return found


def take_descriptors() -> dict[str, list[int]]:
    """The same, for the caller to close: no other caller gets them, and no child."""
    found = descriptors()
    for name in _VARIABLES:
        os.environ.pop(name, None)
    for fds in found.values():
        for fd in fds:
            os.set_inheritable(fd, False)
    return found


def environment() -> dict[str, str]:
    """That of a guard. It tries to store descriptors only if this is the process whose death makes
    systemd start the service again, and not one of its children."""
    variables = dict(os.environ)
    if variables.get("SYSTEMD_EXEC_PID") != str(os.getpid()):
        variables.pop("NOTIFY_SOCKET", None)
    return variables
