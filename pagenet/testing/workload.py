"""An owner for tests: ``python -m pagenet.testing.workload --socket PATH --size BYTES ...``, see
``--help``.

It moves onto pagenet as a VMM does: maps memory, hands its userfaultfd over a unix socket with
Firecracker's handshake, touches pages from C threads while they come, and checks every byte against
the pattern of ``native/testing/pattern.c``. It prints what it finds as JSON lines, the last of them
``{"event": "verified", ...}``. Exit status 0 means that every byte was right. It is always a
process of its own: a Python thread must never touch memory whose pages another Python thread
places.
"""

from __future__ import annotations

import sys

from .._native.testing import run_workload
from ..children import module_command

__all__ = ["workload_command"]


def workload_command(*args: str) -> list[str]:
    """The command line that runs the workload with ``args``, on this Python."""
    return module_command("pagenet.testing.workload", *args)


def main() -> int:
    return run_workload(["workload", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
