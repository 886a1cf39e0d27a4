"""Certificates for tests: an authority, and what it issues, in directories as QEMU has them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

__all__ = ["Authority", "expired"]

_NOW = datetime.datetime.now(datetime.UTC)


class Authority:
    """An authority, and directories of certificates that it has issued."""

    def __init__(self) -> None:
        self._ca = trustme.CA()

    @property
    def pem(self) -> bytes:
        """Its own certificate."""
        return self._ca.cert_pem.bytes()

    def write(
        self,
        directory: Path,
        *names: str,
        common_name: str | None = None,
        trusts: Authority | None = None,
        until: datetime.datetime | None = None,
    ) -> Path:
        """Write a pair for either side, for all ``names`` (hosts and addresses), into
        ``directory``. ``trusts``: the authority that its owner trusts (this one)."""
        wanted = names or ("127.0.0.1", "::1", "localhost")
        issued = self._ca.issue_cert(*wanted, common_name=common_name, not_after=until)
        key = issued.private_key_pem.bytes()
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        return _write_pairs(directory, (trusts or self).pem, chain, key)

    def write_uri(self, directory: Path, uri: str) -> Path:
        """As :meth:`write`, for a name that is a URI, and no other."""
        authority = x509.load_pem_x509_certificate(self.pem)
        signer = load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(authority.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_NOW - datetime.timedelta(days=1))
            .not_valid_after(_NOW + datetime.timedelta(days=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True
            )
        )
        signed = builder.sign(signer, hashes.SHA256())  # type: ignore[arg-type]
        return _write_pairs(
            directory,
            self.pem,
            signed.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def revoke(self, directory: Path, revoked: Sequence[Path]) -> None:
        """Write the list of certificates that are not valid any more into ``directory``."""
        authority = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes())
        key = load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(authority.subject)
            .last_update(_NOW - datetime.timedelta(days=1))
            .next_update(_NOW + datetime.timedelta(days=1))
        )
        for path in revoked:
            certificate = x509.load_pem_x509_certificate((path / "client-cert.pem").read_bytes())
            one = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number)
            builder = builder.add_revoked_certificate(one.revocation_date(_NOW).build())
        signed = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
        pem = signed.public_bytes(serialization.Encoding.PEM)
        (directory / "ca-crl.pem").write_bytes(pem)


def _write_pairs(directory: Path, authority: bytes, chain: bytes, key: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ca-cert.pem").write_bytes(authority)
    for side in ("client", "server"):
        (directory / f"{side}-cert.pem").write_bytes(chain)
        path = directory / f"{side}-key.pem"
        path.write_bytes(key)
        path.chmod(0o600)
    return directory


def expired() -> datetime.datetime:
    """A moment before which certificates were valid."""
    return _NOW - datetime.timedelta(hours=1)
