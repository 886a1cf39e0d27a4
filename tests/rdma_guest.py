"""Running parts of the tests in a guest that has an RDMA device (tools/rdma-guest)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RDMA_GUEST = ROOT / "tools" / "rdma-guest"
SYSTEM_PYTHON = "/usr/bin/python3"
#: what the tests in the guest import, besides pagenet itself
REQUIRED = [
    "cffi",
    "hypothesis",
    "msgpack",
    "pytest",
    "pytest-timeout",
    "pytest-trio",
    "rich",
    "trio",
]


def run_in_guest(
    *command: str | Path, options: tuple[str | Path, ...] = (), timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` there; stderr has the messages of rdma-guest itself."""
    here = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PAGENET_GUEST_CACHE": str(_cache())}
    environment = {**os.environ, **here}
    arguments = [RDMA_GUEST, "--timeout", str(timeout), *options, "--", *command]
    return subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout + 300
    )


def guest_python() -> str:
    """A Python that can import Debian's pyverbs, which is built for Debian's Python, and what the
    tests need: this Python if it is of the same version, else one in the cache. The C core fits
    both: it is built for any version from 3.11 on.
    """
    if _version(SYSTEM_PYTHON) == f"{sys.version_info[0]}.{sys.version_info[1]}":
        return sys.executable
    venv = _cache() / f"python-{_version(SYSTEM_PYTHON)}"
    python = venv / "bin" / "python"
    if not (venv / "complete").exists():
        subprocess.run([SYSTEM_PYTHON, "-m", "venv", "--clear", "--without-pip", venv], check=True)
        install = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            *REQUIRED,
        ]
        subprocess.run(install, check=True)
        (venv / "complete").touch()
    return str(python)


def _cache() -> Path:
    return Path(os.environ.get("PAGENET_GUEST_CACHE") or Path.home() / ".cache" / "pagenet-guest")


def _version(python: str) -> str:
    words = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
