"""pagenet-doctor: what it finds on this host is so, and each thing that is not well has advice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pagenet.cli.doctor import main
from pagenet.doctor import Check, examine
from pagenet.doctor._programs import version_of
from pagenet.errors import Unsupported
from pagenet.uffd import Feature, probe


def doctor(*args: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "pagenet.cli.doctor", *args)
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def as_nobody(work: Callable[[], list[Check]]) -> list[Check]:
    """What it returns in a process of a user that may do nothing."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.close(read)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        found = [(check.name, check.level, check.found, check.advice) for check in work()]
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with open(read) as told:
        text = told.read()
    os.waitpid(pid, 0)
    return [Check(*each) for each in json.loads(text)]


def test_what_it_tells_machines_and_people() -> None:
    told = doctor("--json")
    *checks, last = [json.loads(line) for line in told.stdout.splitlines()]
    assert (told.returncode, told.stderr) == (7 if last["missing"] else 0, "")
    levels = [check["level"] for check in checks]
    assert last["ok"] == levels.count("ok")
    assert len({check["name"] for check in checks}) == len(checks) > 15
    words = doctor().stdout
    for check in checks:
        assert f"{check['name']}: " in words
        assert (check["advice"] == "") == (check["level"] == "ok"), check


def test_it_finds_what_the_kernel_has(uffd_permitted: None) -> None:
    found = {check.name: check for check in examine()}
    assert found["userfaultfd"].level == "ok"
    for feature in (Feature.POISON, Feature.MINOR_SHMEM, Feature.WP_ASYNC):
        is_there = found[f"userfaultfd {feature.name}"].level == "ok"
        assert is_there == (feature in probe())
    assert (found["KVM"].level == "ok") == os.access("/dev/kvm", os.R_OK | os.W_OK)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_user_without_userfaultfd() -> None:
    def tried() -> list[Check]:
        try:
            probe()
        except Unsupported:
            return list(examine())
        return []

    checks = as_nobody(tried)
    if not checks:
        pytest.skip("every user may have a userfaultfd here (vm.unprivileged_userfaultfd)")
    found = {check.name: check for check in checks}
    assert found["userfaultfd"].level == "missing"
    assert "/dev/userfaultfd" in found["userfaultfd"].advice


@pytest.mark.parametrize(
    ("told", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)", (7, 2, 22)),
        ("libvirtd (libvirt) 9.0.0", (9, 0, 0)),
        ("systemd 252 (252.39-1~deb12u1)", (252,)),
        ("nothing", None),
    ],
)
def test_versions(
    told: str, version: tuple[int, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho '{told}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert version_of("program") == version
    assert version_of("no-such-program") is None


def test_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["more"])
    assert (leaving.value.code, capsys.readouterr().err.count("\n")) == (2, 1)
