"""The client's side: shows a daemon, and changes what it does."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio

from ..errors import ConnectionBroken, RemoteProtocolError, UsageError
from ..protocol import printable
from ..tcp import UnixTransport
from ._channel import ControlChannel, address_of
from ._protocol import Fields, check_hello, shown

__all__ = ["ControlClient", "connect_control"]

# In seconds. A daemon answers at once, unless it is stopped or its host stands still.
ANSWER_TIMEOUT = 10.0


class ControlClient:
    """One connection to a daemon. Made by :func:`connect_control`. One command at a time."""

    def __init__(self, channel: ControlChannel, path: str) -> None:
        self._channel = channel
        self._path = path
        self._number = 0
        #: the daemon's hello: ``program``, ``pid``, ``release``, ``version``, ``oldest``,
        #: ``commands``
        self.hello: Fields = {}

    async def greet(self) -> None:
        self.hello = check_hello(await self._answer())

    async def command(self, name: str, /, **arguments: Any) -> Fields:
        """Execute a command: the daemon's answer. It is the status after the command
        (``docs/control.md`` has the fields); for ``stop`` it is empty.

        ``status``, ``pause``, ``resume`` and ``stop`` take no argument; ``schedule`` takes
        ``name``, ``bandwidth`` takes ``rate`` (bytes a second, or None), ``prefetch`` takes
        ``window`` (pages forward and backward, or None).

        :exc:`~pagenet.errors.UsageError` if the daemon cannot do it;
        :exc:`~pagenet.errors.RemoteProtocolError` if one side does not understand the other;
        :exc:`~pagenet.errors.ConnectionBroken` if the daemon has ended, or does not answer for
        10 s.
        """
        self._number += 1
        with suppress(ConnectionBroken):  # the daemon may have sent why, and closed
            await self._channel.send({"command": name, "id": self._number, **arguments})
        answer = await self._answer()
        if (
            answer.get("type") != "reply"
            or answer.get("id") != self._number
            or not isinstance(answer.get("result"), dict)
        ):
            raise RemoteProtocolError(f"{self._path}: the daemon's answer does not fit the request")
        result: Fields = answer["result"]
        return result

    async def _answer(self) -> Fields:
        try:
            with trio.fail_after(ANSWER_TIMEOUT):
                answer = await self._channel.receive()
        except trio.TooSlowError:
            raise ConnectionBroken(
                f"{self._path}: the daemon does not answer: is it stopped?"
            ) from None
        if answer is None:
            raise ConnectionBroken(f"{self._path}: the daemon has ended")
        if answer.get("type") == "error":
            said = answer.get("text")
            text = printable(said) if isinstance(said, str) else shown(said)
            raise (
                UsageError(text)
                if answer.get("code") == "usage"
                else RemoteProtocolError(f"{self._path}: {text}")
            )
        return answer


@asynccontextmanager
async def connect_control(path: str | os.PathLike[str]) -> AsyncIterator[ControlClient]:
    """The daemon whose control socket is at ``path``.

    :exc:`~pagenet.errors.SourceUnreachable` if no process listens there;
    :exc:`~pagenet.errors.RemoteProtocolError` if that process is not a daemon of pagenet;
    :exc:`~pagenet.errors.ConnectionBroken` if it does not answer.
    """
    connection = await UnixTransport().dial(address_of(path))
    try:
        client = ControlClient(ControlChannel(connection), os.fspath(path))
        await client.greet()
        yield client
    finally:
        connection.close()
