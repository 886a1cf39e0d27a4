"""Credentials that cannot be used are refused when they are read, in one line that names the
file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from certificates import Authority, expired

from pagenet.errors import UsageError
from pagenet.tls import Tls


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def directory(authority: Authority, tmp_path: Path) -> Path:
    return authority.write(tmp_path / "tls")


@pytest.mark.parametrize("listens", [True, False])
def test_a_directory_serves_both_sides(directory: Path, listens: bool) -> None:
    Tls(directory).credentials(listens=listens)


@pytest.mark.parametrize("listens", [True, False])
def test_files_of_any_name(directory: Path, listens: bool) -> None:
    names = {"ca-cert.pem": "ca", "client-cert.pem": "svid.pem", "client-key.pem": "svid_key.pem"}
    for old, new in names.items():
        (directory / old).rename(directory / new)
    ca, certificate, key = (directory / name for name in names.values())
    tls = Tls(authorities=ca, certificate=certificate, key=key)
    tls.credentials(listens=listens)


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / name).write_text(text)

    return spoil


def expose(directory: Path) -> None:
    (directory / "client-key.pem").chmod(0o644)


def swap(directory: Path) -> None:
    Authority().write(directory / "other")
    (directory / "other" / "client-key.pem").rename(directory / "client-key.pem")


def expire(directory: Path) -> None:
    Authority().write(directory, until=expired())


def fifo(directory: Path) -> None:
    remove("ca-cert.pem")(directory)
    os.mkfifo(directory / "ca-cert.pem")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (remove("ca-cert.pem"), "ca-cert.pem: No such file"),
        (remove("client-cert.pem"), "client-cert.pem: No such file"),
        (remove("client-key.pem"), "client-key.pem: No such file"),
        (write("ca-cert.pem", ""), "ca-cert.pem has no certificate in it"),
        (write("client-cert.pem", "x"), "client-cert.pem has no certificate in it"),
        (write("client-key.pem", "x"), "client-key.pem has no private key in it"),
        (write("ca-crl.pem", "x"), "ca-crl.pem "),
        (expose, r"client-key.pem can be read by every user: chmod o= "),
        (swap, "client-key.pem is the key of another certificate"),
        (expire, r"client-cert.pem has expired on \w+ +\d+ .* GMT"),
        (fifo, "ca-cert.pem is no file"),
    ],
)
def test_files_that_cannot_be_used(
    spoil: Callable[[Path], None], says: str, directory: Path
) -> None:
    spoil(directory)
    with pytest.raises(UsageError, match=rf"TLS: .*{says}") as raised:
        Tls(directory).credentials(listens=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no key in it"),
        ("qemu:00112233\n", "line 1: it is to be NAME:KEY"),
        ("\nqemu:" + 16 * "0x", "line 2"),
        (":" + 16 * "00", "line 1"),
        (128 * "x" + ":" + 16 * "00", "line 1"),
    ],
)
def test_keys_of_both_sides_that_cannot_be_used(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(UsageError, match=says):
        Tls(psk=path).credentials(listens=True)


def test_keys_of_both_sides_that_anybody_can_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    path.write_text("qemu:" + 32 * "00")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="can be read by every user"):
        Tls(psk=path).credentials(listens=True)


@pytest.mark.parametrize("missing", ["authorities", "certificate", "key"])
def test_all_three_files_are_named(missing: str, directory: Path) -> None:
    files = {
        "authorities": directory / "ca-cert.pem",
        "certificate": directory / "client-cert.pem",
        "key": directory / "client-key.pem",
    }
    del files[missing]
    with pytest.raises(UsageError, match="name a directory"):
        Tls(**files)  # type: ignore[arg-type]


def test_either_keys_or_certificates(directory: Path) -> None:
    with pytest.raises(UsageError, match="either"):
        Tls(directory, psk=directory / "keys.psk")


@pytest.mark.parametrize(
    ("patterns", "names", "allowed"),
    [
        ((), ["CN:a"], True),
        (("a",), ["CN:a"], True),
        (("a",), ["CN:b", "DNS:a"], True),
        (("a",), ["CN:aa"], False),
        (("*.example",), ["DNS:host.example"], True),
        (("*.example",), ["DNS:host.example.org"], False),
        (("spiffe://domain/*",), ["URI:spiffe://domain/host/7"], True),
        (("spiffe://domain/*",), ["URI:spiffe://other/host"], False),
        (("a", "b"), ["DNS:b"], True),
        (("CN:a",), ["CN:a"], False),  # the kind is none of the name
    ],
)
def test_names_that_are_allowed(
    patterns: tuple[str, ...], names: list[str], allowed: bool, directory: Path
) -> None:
    assert Tls(directory, allow=patterns).allows(names) is allowed


def test_changed_files_are_read_again(authority: Authority, directory: Path) -> None:
    credentials = Tls(directory).credentials(listens=False)
    first = credentials.context
    assert credentials.context is first
    authority.write(directory)
    assert credentials.context is not first


def test_files_that_became_useless_do_not_count(directory: Path) -> None:
    tls = Tls(directory)
    credentials = tls.credentials(listens=False)
    first = credentials.context
    (directory / "client-key.pem").write_text("half of")
    assert credentials.context is first
    with pytest.raises(UsageError, match="client-key"):
        tls.reload()
    assert credentials.context is first
