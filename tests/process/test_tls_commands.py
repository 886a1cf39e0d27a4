"""The commands with TLS, as a user runs them: certificates made by the command of docs/tls.md."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from processes import PAGE, run, serve_command, write_pattern

from pagenet.cli.certificates import main as make_certificates

SIZE = 64 * PAGE
PULL = [sys.executable, "-P", "-m", "pagenet.cli.pull", "--json"]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As docs/tls.md says."""
    directory = tmp_path_factory.mktemp("pki")
    assert make_certificates([str(directory), "host-a", "127.0.0.1"]) == 0
    assert sorted(path.name for path in (directory / "host-a").iterdir()) == [
        "ca-cert.pem",
        "client-cert.pem",
        "client-key.pem",
        "server-cert.pem",
        "server-key.pem",
    ]
    return directory


def test_no_host_of_that_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_certificates([str(tmp_path), "a/b"]) == 2
    assert (
        capsys.readouterr().err == "certificates: 'a/b' is neither a host's name nor its address\n"
    )


async def test_served_and_pulled(pki: Path, tmp_path: Path) -> None:
    source, copy = write_pattern(tmp_path / "source", SIZE, zero_every=7), tmp_path / "copy"
    serving = ["--listen", "tcp://127.0.0.1:0", "--tls-dir", str(pki / "host-a"), "--once"]
    async with run(serve_command(str(source), *serving)) as server:
        uri = (await server.event("listening"))["uri"]
        options = ["--into", str(copy), "--tls-dir", str(pki / "127.0.0.1")]
        async with run([*PULL, uri, *options]) as refused:  # a certificate for another host
            assert await refused.wait() == 8
            assert "--tls-hostname" in refused.stderr
        async with run([*PULL, uri, *options, "--tls-hostname", "host-a"]) as pulled:
            assert await pulled.wait() == 0
        assert await server.wait() == 0
    assert copy.read_bytes() == source.read_bytes()


async def test_nobody_without_a_certificate(pki: Path, tmp_path: Path) -> None:
    source = write_pattern(tmp_path / "source", SIZE)
    serving = ["--listen", "tcp://127.0.0.1:0", "--tls-dir", str(pki / "127.0.0.1")]
    async with run(serve_command(str(source), *serving)) as server:
        uri = (await server.event("listening"))["uri"]
        async with run([*PULL, uri, "--into", str(tmp_path / "copy")]) as pulled:
            assert await pulled.wait() in (4, 6)
        assert "--tls-dir on both sides" in (await server.event("refused"))["reason"]
    assert not (tmp_path / "copy").exists()


async def test_files_are_read_again(pki: Path, tmp_path: Path) -> None:
    """SIGHUP says whether the new ones can be used."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for path in (pki / "127.0.0.1").iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
        (mine / path.name).chmod(0o600)
    source = write_pattern(tmp_path / "source", SIZE)
    serving = ["--listen", "tcp://127.0.0.1:0", "--tls-dir", str(mine)]
    async with run(serve_command(str(source), *serving)) as server:
        uri = (await server.event("listening"))["uri"]
        for text, event in (("half", "tls_kept"), ("", "tls_reloaded")):
            key = (pki / "127.0.0.1" / "server-key.pem").read_text()
            (mine / "server-key.pem").write_text(text or key)
            os.kill(server.pid, signal.SIGHUP)
            told = await server.event(event)
            assert text == "" or "server-key.pem" in told["reason"]
        options = ["--into", str(tmp_path / "copy"), "--tls-dir", str(pki / "127.0.0.1")]
        async with run([*PULL, uri, *options]) as pulled:
            assert await pulled.wait() == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tls-dir", "/nonexistent"], "/nonexistent/ca-cert.pem: No such file"),
        (["--tls-hostname", "x"], "are about TLS"),
        (["--tls-cert", "x"], "or all three"),
        (["--tls-dir", "{pki}/host-a", "--plaintext"], "contradict"),
        (["--tls-dir", "{pki}/host-a", "--tls-psk", "x"], "either"),
    ],
)
async def test_options_that_make_no_sense(
    options: list[str], says: str, pki: Path, tmp_path: Path
) -> None:
    source = write_pattern(tmp_path / "source", SIZE)
    named = [option.format(pki=pki) for option in options]
    async with run(serve_command(str(source), "--listen", "tcp://127.0.0.1:0", *named)) as server:
        assert await server.wait() == 2
        assert says in server.stderr
        assert server.stderr.count("\n") == 1
