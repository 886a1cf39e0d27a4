"""An authority and a certificate for each host, to try TLS with, made by the program openssl."""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .errors import Unsupported, UsageError

__all__ = ["DAYS", "make_certificates"]

DAYS = 30
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def make_certificates(directory: Path, hosts: Sequence[str], days: int = DAYS) -> None:
    """Make an authority in ``directory``, or take the one that is there, and in a directory for
    each host what :class:`pagenet.Tls` takes. ``hosts``: names or addresses.

    :exc:`~pagenet.errors.Unsupported` without openssl, :exc:`~pagenet.errors.UsageError` if it
    refuses, or a file cannot be written.
    """
    if shutil.which("openssl") is None:
        raise Unsupported("this takes the program openssl (Debian: apt install openssl)")
    names = {host: _name(host) for host in hosts}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        ca = directory / "ca-cert.pem", directory / "ca-key.pem"
        if not all(path.exists() for path in ca):
            subject = ("-subj", "/CN=pagenet trial authority", "-days", str(days))
            _openssl("req", "-x509", *_KEY, *subject, "-out", ca[0], "-keyout", ca[1])
        for host, name in names.items():
            _make_pair(directory / host.replace(":", "_"), host, name, ca, days)
    except OSError as error:
        raise UsageError(f"{error.filename or directory}: {error.strerror}") from None


def _make_pair(directory: Path, host: str, name: str, ca: tuple[Path, Path], days: int) -> None:
    directory.mkdir(exist_ok=True)
    certificate, key = directory / "server-cert.pem", directory / "server-key.pem"
    with tempfile.TemporaryDirectory() as scratch:
        request, names = Path(scratch) / "request", Path(scratch) / "names"
        names.write_text(f"subjectAltName={name}\n")
        _openssl("req", *_KEY, "-subj", f"/CN={host}", "-keyout", key, "-out", request)
        signing = ("-CA", ca[0], "-CAkey", ca[1], "-CAcreateserial", "-days", str(days))
        _openssl("x509", "-req", "-in", request, *signing, "-extfile", names, "-out", certificate)
    shutil.copyfile(ca[0], directory / "ca-cert.pem")
    shutil.copyfile(certificate, directory / "client-cert.pem")
    shutil.copy(key, directory / "client-key.pem")  # with its mode: openssl makes it 0600


def _name(host: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        if not host or host.startswith("-") or set(host) & set("/,\n "):
            raise UsageError(f"{host!r} is neither a host's name nor its address") from None
        return f"DNS:{host}"


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it gave no reason"]
        raise UsageError(f"openssl {arguments[0]} failed: {last[0]}")
