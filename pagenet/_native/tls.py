"""TLS 1.3 on sockets: the credentials of one side, and connections."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

from ._declarations import pn_tls, pn_tls_config, pn_tls_context, pn_tls_psk
from ._library import NULL, check, ffi, lib, new_array, new_struct, opened
from ._pointers import CData, Null

_TEXT = 512
#: what :exc:`BadCredentials` may be about
FILES = {
    lib.PN_TLS_AUTHORITIES: "authorities",
    lib.PN_TLS_REVOKED: "revoked",
    lib.PN_TLS_CERTIFICATE: "certificate",
    lib.PN_TLS_KEY: "key",
}


class BadCredentials(Exception):
    """``about``: which of them, as in :data:`FILES`; None: none of them."""

    def __init__(self, about: str | None, text: str) -> None:
        super().__init__(text)
        self.about = about


class TlsRefused(Exception):
    """The handshake has failed, or the peer's bytes are not what it sent."""


@dataclass(frozen=True, slots=True)
class Pem:
    """The content of files. ``revoked`` may be empty."""

    authorities: bytes
    certificate: bytes
    key: bytes
    revoked: bytes = b""


class TlsContext:
    """``struct pn_tls_context``: with ``pem``, or with keys that both sides have, ``psks``: (name,
    key). :exc:`BadCredentials` if they cannot be used."""

    def __init__(
        self, *, serves: bool, pem: Pem | None, psks: Sequence[tuple[str, bytes]] = ()
    ) -> None:
        config = new_struct(pn_tls_config)
        config.serves, config.psk_count = serves, len(psks)
        kept = []
        if pem is not None:
            kept = [ffi.new("char[]", text) for text in (pem.authorities, pem.certificate, pem.key)]
            config.authorities, config.certificate, config.key = kept
        if pem is not None and pem.revoked:
            kept.append(ffi.new("char[]", pem.revoked))
            config.revoked = kept[-1]
        names = [ffi.new("char[]", name.encode()) for name, _ in psks]
        keys = [ffi.new("uint8_t[]", key) for _, key in psks]
        table = new_array(
            pn_tls_psk,
            [
                {"name": name, "key": key, "length": len(psk[1])}
                for name, key, psk in zip(names, keys, psks, strict=True)
            ],
        )
        config.psks = table
        self._kept = (names, keys, table)
        which, text = ffi.new("int *"), ffi.new("char[]", _TEXT)
        self._context: pn_tls_context | Null = lib.pn_tls_context_new(config, which, text, _TEXT)
        if self._context == NULL:
            raise BadCredentials(FILES.get(which[0]), _text(text))

    def connection(self, sock: int, host: str | None) -> Tls:
        """TLS on a non-blocking socket, which is borrowed. ``host``: what the peer's certificate
        has to be for; None: anything."""
        name = NULL if host is None else ffi.new("char[]", host.encode())
        tls = lib.pn_tls_new(self._context, sock, name)
        if tls == NULL:
            raise MemoryError("no memory for TLS")
        return Tls(tls, self)

    def __del__(self) -> None:
        if getattr(self, "_context", NULL) != NULL:
            lib.pn_tls_context_free(self._context)


class Tls:
    """``struct pn_tls``: made by :meth:`TlsContext.connection`. Used by one thread at a time."""

    def __init__(self, tls: pn_tls, context: TlsContext) -> None:
        self._tls: pn_tls | None = tls
        self._context = context  # for the handshake

    @property
    def tls(self) -> pn_tls:
        """The struct. :exc:`TypeError` once it is closed."""
        return opened(self._tls)

    def give(self) -> pn_tls:
        """The struct, whose new owner frees it. The handshake must be over."""
        given, self._tls = self.tls, None
        return given

    def handshake(self) -> bool:
        """Go on with the handshake. False: wait for the socket. :exc:`TlsRefused`, or
        :exc:`OSError` (ECONNRESET: the peer has gone)."""
        return self._result(lib.pn_tls_handshake(self.tls)) is not None

    @property
    def wants_to_send(self) -> bool:
        """After False or None: whether to wait until the socket takes more, and not until it has
        more."""
        return bool(lib.pn_tls_wants_to_send(self.tls))

    def send(self, data: memoryview) -> int | None:
        """How many bytes went. None: wait for the socket, then send the same bytes again."""
        return self._result(lib.pn_tls_send_bytes(self.tls, ffi.from_buffer(data), len(data)))

    def receive(self, into: memoryview) -> int | None:
        """How many bytes came; 0: the peer has closed. None: wait for the socket."""
        return self._result(lib.pn_tls_receive_bytes(self.tls, ffi.from_buffer(into), len(into)))

    def _result(self, result: int) -> int | None:
        if result == -errno.EAGAIN:
            return None
        if result == -errno.EPROTO:
            raise TlsRefused(_text(lib.pn_tls_text(self.tls)))
        return check(result)

    def names(self) -> list[str]:
        """The peer's names, each with its kind in front: ``CN:``, ``DNS:``, ``URI:``, ``PSK:``.
        Empty if they are too many."""
        text = ffi.new("char[]", lib.PN_TLS_NAMES)
        known = lib.pn_tls_names(self.tls, text, lib.PN_TLS_NAMES)
        return _text(text).splitlines() if known else []

    @property
    def cipher(self) -> str:
        return _text(lib.pn_tls_cipher(self.tls))

    @property
    def kernel(self) -> tuple[bool, bool]:
        """Whether the kernel encrypts what is sent, and decrypts what is received."""
        does = lib.pn_tls_kernel(self.tls)
        return bool(does & lib.PN_TLS_SENDS), bool(does & lib.PN_TLS_RECEIVES)

    def close(self) -> None:
        """Say farewell, if the socket takes it. To be called before that is closed. Idempotent."""
        self._free(farewell=True)

    def _free(self, *, farewell: bool) -> None:
        if self._tls is not None:
            lib.pn_tls_free(self._tls, farewell)
            self._tls = None

    def __del__(self) -> None:
        self._free(farewell=False)  # its socket's number may be another one's by now


def tls_struct(tls: Tls | None) -> pn_tls | Null:
    """For a loop that borrows it."""
    return NULL if tls is None else tls.tls


def _text(buffer: CData | bytes) -> str:
    data = buffer if isinstance(buffer, bytes) else ffi.string(buffer)
    return data if isinstance(data, str) else data.decode(errors="replace")
