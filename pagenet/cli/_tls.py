"""The options of TLS, and credentials that are read again on SIGHUP."""

from __future__ import annotations

import argparse
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ..errors import UsageError
from ..nurseries import running_beside
from ..tls import Tls
from ._command import Parser, Report

__all__ = ["TLS_WORDS", "add_tls_options", "reloading", "tls_of"]

TLS_WORDS = {
    "tls_reloaded": "TLS: the files were read again, for new connections",
    "tls_kept": "TLS: what was read before still counts: {reason}",
}


def add_tls_options(parser: Parser) -> None:
    tls = parser.add_argument_group("encryption")
    tls.add_argument(
        "--tls-dir",
        metavar="DIR",
        help=(
            "encrypt, and check the peer, with ca-cert.pem and, for the side that listens,"
            " server-cert.pem and server-key.pem, or, for the side that dials, client-cert.pem and"
            " client-key.pem in DIR, as QEMU does; also ca-crl.pem, if it is there"
        ),
    )
    tls.add_argument("--tls-ca", metavar="FILE", help="certificates of the authorities, instead")
    tls.add_argument("--tls-cert", metavar="FILE", help="certificate of this side, instead")
    tls.add_argument("--tls-key", metavar="FILE", help="its private key, instead")
    tls.add_argument(
        "--tls-hostname",
        metavar="NAME",
        help="host that the certificate of a dialled peer is for (default: the host of its URI)",
    )
    tls.add_argument(
        "--tls-authz",
        metavar="PATTERN",
        action="append",
        default=[],
        help=(
            "names that a peer may have (common name, DNS or URI name of its certificate; *"
            " matches anything); may be given several times (default: whoever an authority vouches"
            " for)"
        ),
    )
    tls.add_argument(
        "--tls-psk",
        metavar="FILE",
        help="encrypt with keys that both sides have, instead: lines NAME:HEX, as psktool writes",
    )
    tls.add_argument(
        "--plaintext-pages",
        action="store_true",
        help="take rdma:// with TLS: the pages themselves are not encrypted there",
    )


def tls_of(options: argparse.Namespace) -> Tls | None:
    """None: no option asks for TLS. :exc:`~pagenet.errors.UsageError` if they contradict each
    other."""
    files = (options.tls_dir, options.tls_ca, options.tls_cert, options.tls_key, options.tls_psk)
    if not any(files):
        if options.tls_hostname or options.tls_authz or options.plaintext_pages:
            raise UsageError(
                "--tls-hostname, --tls-authz and --plaintext-pages are about TLS: say --tls-dir,"
                " too"
            )
        return None
    if getattr(options, "plaintext", False):
        raise UsageError("--plaintext and TLS contradict each other")
    return Tls(
        options.tls_dir,
        authorities=options.tls_ca,
        certificate=options.tls_cert,
        key=options.tls_key,
        psk=options.tls_psk,
        hostname=options.tls_hostname,
        allow=options.tls_authz,
        plaintext_pages=options.plaintext_pages,
    )


@asynccontextmanager
async def reloading(tls: Tls | None, report: Report) -> AsyncIterator[None]:
    """Read the credentials again on SIGHUP. Events: ``tls_reloaded``, ``tls_kept``."""
    if tls is None:
        yield
        return
    with trio.open_signal_receiver(signal.SIGHUP) as signals:

        async def reload() -> None:
            async for _ in signals:
                try:
                    tls.reload()
                except UsageError as error:
                    report("tls_kept", reason=str(error))
                else:
                    report("tls_reloaded")

        async with running_beside(reload):
            yield
