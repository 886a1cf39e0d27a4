"""Which processor a guest under KVM gets, on hosts whose KVM differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pagenet import Unsupported
from pagenet.bench._kvm import QEMU, find_kvm_cpu

# QEMU's error where KVM offers a register that it refuses to set.
COMPLAINT = "failed to set MSR 0x10a to 0x69"


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that is all of PATH. What is cached of this host is cleared before and
    afterwards."""
    monkeypatch.setenv("PATH", str(tmp_path))
    find_kvm_cpu.cache_clear()
    yield tmp_path
    find_kvm_cpu.cache_clear()


def install_qemu(host: Path, script: str) -> None:
    program = host / QEMU
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_host_with_all_it_offers(host: Path) -> None:
    install_qemu(host, "exit 0")
    assert find_kvm_cpu() == "host"


def test_register_that_cannot_be_set_is_not_shown(host: Path) -> None:
    install_qemu(host, f'case "$*" in *"-cpu host "*) echo "{COMPLAINT}" >&2; kill -ABRT $$;; esac')
    assert find_kvm_cpu() == "host,-arch-capabilities"


def test_no_kvm_says_what_qemu_says(host: Path) -> None:
    install_qemu(host, f'echo "{COMPLAINT}" >&2; exit 1')
    with pytest.raises(Unsupported, match=f"^no guest runs under KVM here: {COMPLAINT}$"):
        find_kvm_cpu()


def test_no_qemu() -> None:
    with pytest.raises(
        Unsupported, match=f"^no guest runs under KVM here: {QEMU} is not installed$"
    ):
        find_kvm_cpu()
