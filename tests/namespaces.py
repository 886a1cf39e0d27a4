"""Whether a limited link between network namespaces can be made here."""

from __future__ import annotations

import shutil
import subprocess

import pytest

MISSING = [tool for tool in ("unshare", "nsenter", "ip", "tc") if not shutil.which(tool)]


def refusal() -> str:
    """Why no network namespace can be made here; empty if one can."""
    if MISSING:
        return f"not installed: {', '.join(MISSING)}"
    tried = "ip link set lo up && tc qdisc add dev lo root tbf rate 1gbit burst 256k limit 1m"
    done = subprocess.run(["unshare", "--net", "sh", "-c", tried], capture_output=True, text=True)
    return done.stderr.strip()


REFUSAL = refusal()
needs_namespaces = pytest.mark.skipif(
    bool(REFUSAL), reason=f"no network namespaces with a limited link: {REFUSAL}"
)
