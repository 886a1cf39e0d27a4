"""Credentials for TLS 1.3: files in PEM, under the names that QEMU gives them, or keys that both
sides have.

A peer is trusted if an authority's certificate vouches for it, if its certificate is for the host
that was dialled, and if one of its names matches a pattern. Both sides check the other, always.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from . import _native
from .errors import UsageError

__all__ = ["Credentials", "Tls"]

_AUTHORITIES, _REVOKED = "ca-cert.pem", "ca-crl.pem"
# Bytes of a file: a bundle of all public authorities has 200 KB.
_MOST = 4 << 20
_LEAST_PSK = 16
_MOST_PSK, _MOST_NAME = 256, 127


class Tls:
    """What a side shows its peers, and whom it trusts.

    ``directory`` has ``ca-cert.pem``, ``ca-crl.pem`` (if certificates may be revoked), and
    ``client-cert.pem`` and ``client-key.pem`` for the side that dials, ``server-cert.pem`` and
    ``server-key.pem`` for the side that listens. ``authorities``, ``certificate`` and ``key`` name
    files instead. ``hostname``: what the certificate of a peer that is dialled has to be for, if
    not for the host of its URI: a DNS name, an address, or a URI (``spiffe://...``). ``allow``:
    patterns (``*`` stands for anything), one of which a name of the peer has to match: its common
    name, or a DNS or URI name of its certificate; none: every peer for which an authority vouches.
    ``psk``: a file of keys that both sides have, a line ``NAME:HEX`` each, instead of certificates;
    who dials uses the first. ``plaintext_pages``: take ``rdma://``, where only what is said about
    pages is encrypted.

    A file that has changed is read again for the next connection. If it cannot be used any more,
    the old one counts, and :meth:`reload` says why.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        authorities: str | os.PathLike[str] | None = None,
        certificate: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        psk: str | os.PathLike[str] | None = None,
        hostname: str | None = None,
        allow: Sequence[str] = (),
        plaintext_pages: bool = False,
    ) -> None:
        self._directory = None if directory is None else Path(directory)
        self._authorities, self._certificate, self._key = authorities, certificate, key
        self._psk = psk
        self.hostname = hostname
        self.allow = tuple(allow)
        self.plaintext_pages = plaintext_pages
        self._credentials: dict[bool, Credentials] = {}
        if psk is not None and (directory or authorities or certificate or key):
            raise UsageError("TLS: either keys that both sides have, or certificates")
        if psk is None and directory is None and not (authorities and certificate and key):
            raise UsageError(
                "TLS takes the certificate of an authority, one of this side, and the key to it:"
                " name a directory, or all three"
            )

    def credentials(self, *, listens: bool) -> Credentials:
        """For the side that listens, or that dials. :exc:`~pagenet.errors.UsageError` if a file is
        missing, or cannot be used."""
        if listens not in self._credentials:
            self._credentials[listens] = Credentials(self._files(listens), listens=listens)
        return self._credentials[listens]

    def reload(self) -> None:
        """Read the files again, for new connections. :exc:`~pagenet.errors.UsageError` if they
        cannot be used: those that were read before still count."""
        for credentials in self._credentials.values():
            credentials.reload()

    def allows(self, names: Sequence[str]) -> bool:
        """Whether a peer of these names, each with its kind in front, may connect."""
        plain = [name.partition(":")[2] for name in names]
        return not self.allow or any(
            fnmatchcase(name, pattern) for name in plain for pattern in self.allow
        )

    def _files(self, listens: bool) -> _Files:
        if self._psk is not None:
            return _Files(psk=Path(self._psk))
        side = "server" if listens else "client"
        in_directory = {
            "authorities": _AUTHORITIES,
            "certificate": f"{side}-cert.pem",
            "key": f"{side}-key.pem",
        }
        named = {
            "authorities": self._authorities,
            "certificate": self._certificate,
            "key": self._key,
        }
        paths = {
            what: Path(path) if path else (self._directory or Path()) / in_directory[what]
            for what, path in named.items()
        }
        revoked = paths["authorities"].with_name(_REVOKED)
        return _Files(**paths, revoked=revoked)


class _Files:
    """Where one side's credentials are: ``psk``, or else authorities, revoked, certificate and key.
    The list of what is revoked may be missing."""

    def __init__(self, **paths: Path) -> None:
        self._paths = paths

    def stamp(self) -> list[tuple[int, ...]]:
        """What changes when a file does."""
        return [_stamp(path) for path in self._paths.values()]

    def context(self, *, listens: bool) -> _native.TlsContext:
        """:exc:`~pagenet.errors.UsageError` naming the file that cannot be used."""
        paths = self._paths
        if "psk" in paths:
            return _native.TlsContext(serves=listens, pem=None, psks=_psks(paths["psk"]))
        pem = _native.Pem(
            _read(paths["authorities"]),
            _read(paths["certificate"]),
            _read(paths["key"], is_secret=True),
            _read(paths["revoked"]) if paths["revoked"].exists() else b"",
        )
        try:
            return _native.TlsContext(serves=listens, pem=pem)
        except _native.BadCredentials as error:
            raise UsageError(f"TLS: {paths.get(error.about or '', 'OpenSSL')} {error}") from None


class Credentials:
    """What one side shows, read again when its files change."""

    def __init__(self, files: _Files, *, listens: bool) -> None:
        self._files, self._listens = files, listens
        self._stamp = files.stamp()
        self._context = files.context(listens=listens)

    def reload(self) -> None:
        """As :meth:`Tls.reload`."""
        stamp = self._files.stamp()
        self._context = self._files.context(listens=self._listens)
        self._stamp = stamp

    @property
    def context(self) -> _native.TlsContext:
        """What the files have now, or had when they could last be used."""
        if (stamp := self._files.stamp()) != self._stamp:
            self._stamp = stamp
            with suppress(UsageError):  # half of them are written: the old ones count
                self._context = self._files.context(listens=self._listens)
        return self._context


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read(path: Path, *, is_secret: bool = False) -> bytes:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(f"TLS: {path} is no file")
            if is_secret and found.st_mode & stat.S_IRWXO:
                raise UsageError(f"TLS: {path} can be read by every user: chmod o= {path}")
            data = file.read(_MOST + 1)
    except OSError as error:
        raise UsageError(f"TLS: {path}: {error.strerror}") from None
    if len(data) > _MOST:
        raise UsageError(f"TLS: {path} is larger than {_MOST} bytes")
    return data


def _without_waiting(path: str, flags: int) -> int:
    """Open a FIFO, too, at once."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _psks(path: Path) -> list[tuple[str, bytes]]:
    found = []
    text = _read(path, is_secret=True).decode(errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        name, _, digits = line.strip().partition(":")
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not name and not digits:
            continue
        if not 0 < len(name.encode()) <= _MOST_NAME or not _LEAST_PSK <= len(key) <= _MOST_PSK:
            raise UsageError(
                f"TLS: {path}, line {number}: it is to be NAME:KEY, with a key of {_LEAST_PSK} to"
                f" {_MOST_PSK} bytes in hexadecimal digits"
            )
        found.append((name, key))
    if not found:
        raise UsageError(f"TLS: {path} has no key in it")
    return found
