"""The seam to obstore: one request, checked; and the same with retries within a deadline."""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import CancelledError, Future
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ..errors import SourceLost, SourceUnreachable, Unsupported, UsageError
from ..protocol import printable
from ._constants import FIRST_PAUSE, LONGEST_PAUSE, PART, STALL
from ._loop import Loop
from ._origin import ObjectStat, Refused, Transient, unreachable
from ._uri import Uri

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore

__all__ = ["Client", "Store", "StoredObject", "open_store", "within"]

T = TypeVar("T")

# What a user may set in the environment for the client, as AWS_ALLOW_HTTP. obstore reads these only
# where no options are given.
_CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "proxy_url",
    "proxy_ca_certificate",
    "proxy_excludes",
    "connect_timeout",
)
_PREFIXES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
}


class Client:
    """Requests to one store, each made once. Await them in a :class:`Loop`."""

    def __init__(self, uri: Uri) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError:
            raise Unsupported(
                f"{uri.scheme}:// takes obstore: pip install 'pagenet[objects]'"
            ) from None
        self._obstore, self.uri = obstore, uri
        self._errors = (BaseError, OSError, ValueError)
        try:
            store = from_url(
                uri.store, client_options=_client_options(uri), retry_config={"max_retries": 0}
            )
        except self._errors as error:
            raise UsageError(f"{printable(uri.store)}: {_first_line(error)}") from None
        self._connections: list[ObjectStore] = [store]  # empty: closed

    def close(self) -> None:
        """Drop the connections. Idempotent."""
        self._connections.clear()

    @property
    def _store(self) -> ObjectStore:
        return self._connections[0]

    def at(self, key: str) -> Client:
        """For another object of the store, by the same connections."""
        other = copy(self)
        other.uri, other._connections = replace(self.uri, key=key), list(self._connections)
        return other

    async def stat(self, key: str) -> ObjectStat:
        try:
            meta = await self._obstore.head_async(self._store, key)
        except self._errors as error:
            raise self._translated(error, key) from None
        return ObjectStat(meta["size"], meta["e_tag"])

    async def read(
        self, key: str, start: int, end: int, stat: ObjectStat | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Bytes ``start`` to ``end`` of an object, part by part. ``stat``: of that very content, or
        :exc:`Refused`. What is handed out is right even if the rest does not come."""
        name = printable(f"{self.uri.store}/{key}")
        try:
            options = {"range": (start, end)}
            if stat is not None and stat.is_pinned and stat.etag is not None:
                options["if_match"] = stat.etag  # type: ignore[assignment]
            async with asyncio.timeout(STALL):
                result = await self._obstore.get_async(self._store, key, options=options)  # type: ignore[arg-type]
            if stat is not None and not stat.is_of(result.meta["size"], result.meta["e_tag"]):
                raise Refused(f"{name} is another object than before", is_changed=True)
            if tuple(result.range) != (start, end):
                raise Refused(f"{name}: the store answers with other bytes than asked for")
            done = start
            async for part in result.stream(min_chunk_size=PART):
                done += len(part)
                if done > end:
                    raise Refused(f"{name}: the store answers with more bytes than asked for")
                yield part
            if done < end:
                raise Transient(f"the store's answer ends {end - done} bytes early")
        except (Refused, Transient):
            raise
        except TimeoutError:
            raise Transient(f"the store has sent nothing for {STALL:g} s") from None
        except self._errors as error:
            raise self._translated(error, key) from None

    async def write(self, key: str, data: bytes | memoryview) -> None:
        try:
            await self._obstore.put_async(self._store, key, bytes(data))
        except self._errors as error:
            raise self._translated(error, key) from None

    async def list(self, prefix: str) -> list[tuple[str, int, float]]:
        """The objects whose keys are ``prefix``, a slash, and a name without one: name, bytes, and
        when each was written, in seconds since 1970."""
        try:
            found = await self._obstore.list_with_delimiter_async(self._store, prefix or None)
        except self._errors as error:
            raise self._translated(error, prefix) from None
        return [
            (meta["path"].rpartition("/")[2], meta["size"], meta["last_modified"].timestamp())
            for meta in found["objects"]
        ]

    async def remove(self, key: str) -> None:
        try:
            await self._obstore.delete_async(self._store, key)
        except self._errors as error:
            refused = self._translated(error, key)
            if not (isinstance(refused, Refused) and refused.is_absent):
                raise refused from None

    def _translated(self, error: Exception, key: str) -> Refused | Transient:
        """By what the caller can do. obstore tells an HTTP status only in its text."""
        kind, name = type(error).__name__, printable(f"{self.uri.store}/{key}")
        if isinstance(error, FileNotFoundError):
            return Refused(f"{name}: there is no such object", is_absent=True)
        if kind == "PreconditionError":
            return Refused(f"{name} is another object than before", is_changed=True)
        status = _status(error)
        if status.startswith(("401", "403")):  # also where credentials are asked for
            names = _CREDENTIALS.get(self.uri.scheme)
            hint = f": check the credentials ({names})" if names else ""
            return Refused(f"{name}: the store refuses access ({status}){hint}")
        if kind == "NotSupportedError" or "non-partial response" in str(error):
            return Refused(f"{name}: the store does not serve ranges of objects")
        if isinstance(error, ValueError) or kind == "InvalidPathError":
            return Refused(f"{name}: not the name of an object")
        if status.startswith("4") and status[:3] not in ("408", "425", "429"):
            return Refused(f"{name}: the store answers {status}")
        if "Requested" in str(error) and ", got " in str(error):
            return Refused(f"{name}: the store answers with other bytes than asked for")
        if found := re.search(r"InvalidCertificate\(\s*(\w+)", str(error)):
            return Refused(
                f"{name}: the store's certificate is not valid ({found[1]}): SSL_CERT_FILE names"
                " the authorities that are trusted"
            )
        if "builder error" in str(error):
            return Refused(
                f"{name}: the endpoint is not https:// (AWS_ALLOW_HTTP=true allows http://), or no"
                " URL"
            )
        return Transient(f"the store answers {status}" if status else _first_line(error))


def _client_options(uri: Uri) -> ClientConfig:
    # The time of a whole request is limited by its deadline.
    stall = f"{round(STALL * 1000)}ms"
    options: dict[str, object] = {"timeout": "1h", "connect_timeout": "5s", "read_timeout": stall}
    prefix = _PREFIXES.get(uri.scheme)
    for name in _CLIENT_OPTIONS:
        value = os.environ.get(f"{prefix}_{name.upper()}") if prefix else None
        if value:
            is_switch = name.startswith("allow_")
            options[name] = value.lower() in ("1", "true", "yes", "on") if is_switch else value
    if uri.scheme == "http":
        options["allow_http"] = True
    return options  # type: ignore[return-value]


def _status(error: Exception) -> str:
    """The HTTP status, with the store's own word for it if there is one; empty: no response came.
    (``503 Service Unavailable, SlowDown``.)"""
    text = str(error)
    found = re.search(r"status code: (\d{3}(?: [A-Za-z ]+)?)", text)
    if found is None:
        return ""
    code = re.search(r"<Code>(\w{1,60})</Code>", text)
    return f"{found[1].strip()}, {code[1]}" if code else found[1].strip()


def _first_line(error: Exception) -> str:
    """What obstore says, and the cause that it found innermost, without what is between them and
    without the addresses of requests."""
    text = str(error).strip() or type(error).__name__
    line = text.partition("\n")[0].rpartition(" - ")[2]
    causes = re.findall(r'(?:message|error): "([^"\n]+)"', text)
    return printable(f"{line}: {causes[-1]}" if causes else line)[:200]


async def within(
    deadline: Callable[[], float],
    what: Callable[[], Awaitable[T]],
    is_closed: Callable[[], bool] = lambda: False,
) -> T:
    """What ``what`` returns, which is called again after :exc:`Transient`, with ever longer pauses,
    until the moment that ``deadline`` returns (of ``time.monotonic``).

    Raises what it raised last.
    """
    pause = FIRST_PAUSE
    last = Transient("no answer came in time")
    while True:
        left = deadline() - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0)):
                return await what()
        except Transient as error:
            last = error
        except TimeoutError:
            if deadline() <= time.monotonic():
                raise last from None
            continue  # somebody else waits longer
        wait = pause * random.uniform(0.5, 1)
        if is_closed() or time.monotonic() + wait > deadline():
            raise last
        await asyncio.sleep(wait)
        pause = min(2 * pause, LONGEST_PAUSE)


class StoredObject:
    """The object that ``client`` is of: an :class:`Origin`, which owns it. :exc:`UsageError` if it
    is of none."""

    kind = "store"
    names_content = True

    def __init__(self, client: Client) -> None:
        self.name, self._key = str(client.uri), client.uri.key
        if not self._key:
            raise UsageError(f"{printable(self.name)} names no object, only where objects are")
        self._client = client

    @classmethod
    def of(cls, uri: str) -> Self:
        """The object that ``uri`` names. Raises :exc:`UsageError`, and :exc:`Unsupported` without
        obstore."""
        return cls(Client(Uri.parse(uri)))

    def close(self) -> None:
        self._client.close()

    async def stat(self) -> ObjectStat:
        return await self._client.stat(self._key)

    def read(
        self, start: int, end: int, stat: ObjectStat, is_urgent: bool
    ) -> AsyncGenerator[bytes, None]:
        return self._client.read(self._key, start, end, stat)


class Store:
    """Objects by name, from any thread. Every call blocks, and is retried within ``deadline``
    seconds. Made by :func:`open_store`; close it, or use it as a context manager.

    Raises :exc:`UsageError` for what the store refuses, :exc:`SourceLost` for an object that is not
    there or is shorter, and :exc:`SourceUnreachable` after the deadline.
    """

    def __init__(self, client: Client, deadline: float) -> None:
        self.client, self.deadline = client, deadline
        self._loop: Loop | None = Loop.open()
        self._calls: set[Future[Any]] = set()
        self._is_given_up = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent. Not to be called while another thread waits for a call."""
        if self._loop is not None:
            self._loop.close()
            self.client.close()
            self._loop = None

    def size(self, name: str) -> int:
        return self._run(lambda: self.client.stat(self.key(name))).size

    def read(self, name: str, offset: int, length: int) -> bytes:
        """``length`` bytes of the object ``name``, from byte ``offset`` on."""

        async def whole() -> bytes:
            parts = self.client.read(self.key(name), offset, offset + length)
            return b"".join([part async for part in parts])

        return self._run(whole) if length else b""

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Make, or replace, the object ``name``: it is whole, or it does not appear."""
        self._run(lambda: self.client.write(self.key(name), data))

    def list(self) -> list[tuple[str, int, float]]:
        """The objects, without those that have a slash in their name: name, bytes, and when each
        was written, in seconds since 1970."""
        return self._run(lambda: self.client.list(self.client.uri.key.rstrip("/")))

    def remove(self, name: str) -> None:
        """Remove the object, if it is there."""
        self._run(lambda: self.client.remove(self.key(name)))

    def give_up(self) -> None:
        """Have calls that other threads wait for end now, with :exc:`SourceUnreachable`, as all
        calls from now on."""
        self._is_given_up = True
        for call in list(self._calls):
            call.cancel()

    def key(self, name: str) -> str:
        """The key of the object ``name``."""
        prefix = self.client.uri.key.rstrip("/")
        return f"{prefix}/{name}" if prefix else name

    def _run(self, what: Callable[[], Awaitable[T]]) -> T:
        if self._loop is None:
            raise TypeError("it is closed")
        end = time.monotonic() + self.deadline
        call = self._loop.start(within(lambda: end, what))
        self._calls.add(call)
        try:
            if self._is_given_up:
                call.cancel()
            return call.result()
        except CancelledError:
            raise SourceUnreachable(f"{printable(str(self.client.uri))}: given up") from None
        except Refused as error:
            raise (SourceLost if error.is_absent else UsageError)(str(error)) from None
        except Transient as error:
            raise unreachable(str(self.client.uri), "store", self.deadline, error) from None
        except BaseException:
            call.cancel()
            raise
        finally:
            self._calls.discard(call)


def open_store(uri: str, deadline: float) -> Store:
    """The objects whose names begin with ``uri``, such as ``s3://BUCKET/PREFIX``. Nothing is asked
    of the store yet. ``deadline``: seconds for which each call is retried.

    Raises :exc:`UsageError`, and :exc:`Unsupported` without obstore.
    """
    return Store(Client(Uri.parse(uri)), deadline)
