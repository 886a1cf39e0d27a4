"""Which processor QEMU can show a guest under this host's KVM."""

from __future__ import annotations

import functools
import subprocess

from ..errors import Unsupported

__all__ = ["QEMU", "find_kvm_cpu"]

QEMU = "qemu-system-x86_64"
# On an AMD host whose own hypervisor invents IA32_ARCH_CAPABILITIES, KVM offers that register and
# refuses to set it, and QEMU aborts. A guest to which the register is not shown does without it, as
# any guest does on AMD.
_PROCESSORS = ("host", "host,-arch-capabilities")
# Seconds. QEMU starts within a fraction of a second; a QEMU that takes this long hangs.
_PATIENCE = 60


@functools.cache
def find_kvm_cpu() -> str:
    """QEMU's ``-cpu`` for a guest under KVM that may use all that this host's KVM offers. The first
    call starts QEMU to find out.

    :exc:`Unsupported`, with what QEMU says, if no guest can run under KVM here.
    """
    failures = []
    for processor in _PROCESSORS:
        complaint = _complaint(processor)
        if complaint is None:
            return processor
        failures.append(complaint)
    raise Unsupported(f"no guest runs under KVM here: {failures[0]}")


def _complaint(processor: str) -> str | None:
    """Why QEMU does not start with that processor; None if it does. The machine is made, and never
    runs."""
    command = [
        QEMU,
        "-nodefaults",
        "-accel",
        "kvm",
        "-cpu",
        processor,
        "-m",
        "8M",
        "-display",
        "none",
        "-S",
    ]
    try:
        done = subprocess.run(
            [*command, "-monitor", "stdio"],
            input="quit\n",
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except FileNotFoundError:
        return f"{QEMU} is not installed"
    except subprocess.TimeoutExpired:
        return f"{QEMU} did not end within {_PATIENCE} s"
    if done.returncode == 0:
        return None
    return next(iter(done.stderr.splitlines()), f"{QEMU} ended with {done.returncode}")
