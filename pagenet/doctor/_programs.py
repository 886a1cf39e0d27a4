"""Programs and libraries that pagenet works with."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator

from ..system_packages import make_importable
from ._check import Check, absent, fine, lacking

__all__ = ["program_checks"]

# Seconds that a program gets to tell its version.
_PATIENCE = 10.0
_QEMU = "qemu-system-x86_64"
#: Python packages: the extra that has them, and what does not work without
_EXTRAS = {
    "obstore": ("objects", "s3://, gs://, az:// and https:// cannot be used"),
    "prometheus_client": ("metrics", "--metrics cannot be used"),
    "matplotlib": ("plot", "--plot cannot be used"),
}


def program_checks() -> Iterator[Check]:
    yield _tls()
    yield _qemu()
    yield _libvirt()
    yield _systemd()
    for name, (extra, without) in _EXTRAS.items():
        if importlib.util.find_spec(name) is not None:
            yield fine(name, "there")
        else:
            yield absent(name, "not there", f"{without}: pip install 'pagenet[{extra}]'")
    yield _nbd()


def version_of(program: str) -> tuple[int, ...] | None:
    """The first number that it tells at ``--version``; None: it is not there, or tells none."""
    path = shutil.which(program)
    if path is None:
        return None
    try:
        told = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_PATIENCE
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\d+(?:\.\d+)+|\d+", told)
    return tuple(map(int, found[0].split("."))) if found else None


def _words(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _tls() -> Check:
    return fine("TLS", ssl.OPENSSL_VERSION)


def _qemu() -> Check:
    version = version_of(_QEMU)
    if version is None:
        return absent("QEMU", f"no {_QEMU}", "no guests of QEMU can be moved: install QEMU")
    if version < (7, 2):
        return lacking("QEMU", _words(version), "pagenet is tested with QEMU 7.2 and newer")
    if version < (8, 1):
        advice = (
            "it does not say where the memory of its devices is: graphics memory in a file of its"
            " own takes QEMU 8.1"
        )
        return lacking("QEMU", _words(version), advice)
    return fine("QEMU", _words(version))


def _libvirt() -> Check:
    version = version_of("libvirtd") or version_of("virtqemud")
    if version is None:
        return absent("libvirt", "not there", "no guests of libvirt are on this host")
    return fine("libvirt", _words(version))


def _systemd() -> Check:
    version = version_of("systemctl")
    if version is None:
        return absent("systemd", "not there", "the units cannot be used; the guard works without")
    if version < (246,):
        advice = "it does not keep what a killed service has held: take systemd 246 or newer"
        return lacking("systemd", _words(version), advice)
    return fine("systemd", _words(version))


def _nbd() -> Check:
    try:
        make_importable("nbd")
        importlib.import_module("nbd")
    except ImportError as error:
        advice = "nbd:// cannot be used: install python3-libnbd, and run this system's own Python"
        return absent("libnbd", str(error), advice)
    return fine("libnbd", "there")
