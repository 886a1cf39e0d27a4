"""The other side of the floors of TLS, as a process of its own: ``python -m pagenet.bench.tls_peer
ping|pour SOCKET DIRECTORY NUMBER...``, started by pagenet-bench alone. An empty DIRECTORY: without
TLS."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from .._native.testing import bench_answer_pings, bench_pour
from ..children import module_command

__all__ = ["tls_peer_command"]

_ROLES: dict[str, Callable[..., None]] = {"ping": bench_answer_pings, "pour": bench_pour}


def tls_peer_command(role: str, sock: int, directory: str, *numbers: int) -> list[str]:
    words = (role, str(sock), directory, *map(str, numbers))
    return module_command("pagenet.bench.tls_peer", *words)


def main() -> int:
    role, sock, directory, *numbers = sys.argv[1:]
    with suppress(OSError):  # the bench has ended
        _ROLES[role](int(sock), directory, *map(int, numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
