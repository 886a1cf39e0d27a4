"""The daemon's side: a unix socket, and what its clients may ask for."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

from .. import __version__, transport
from ..destination.hosting import Host
from ..destination.pulling import Transfer
from ..errors import ConnectionBroken, RemoteProtocolError, UsageError
from ..events import EventHandler, ignore_events
from ..nurseries import open_failing_nursery
from ..protocol import printable
from ..session import accept_forever
from ..source.precopy import Precopy
from ..source.serving import Server
from ..tcp import UnixTransport
from ._channel import ControlChannel, address_of
from ._protocol import COMMANDS, OLDEST_VERSION, VERSION, Fields, Request, decode_request
from ._status import Rates, host_status, precopy_status, server_status, transfer_status

__all__ = ["Control", "serve_control"]

# Each client costs a task and a descriptor, and may stay for days.
MAX_CLIENTS = 64


class Control:
    """What a control socket shows and changes. Made by :func:`serve_control`."""

    def __init__(self, program: str, stop: Callable[[], None] | None) -> None:
        self._program = program
        self._stop = stop
        self._subject: Transfer | Server | Host | None = None
        self._rates: Rates | None = None
        #: the precopy, while it may be changed. May be set.
        self.precopy: Precopy | None = None
        #: called to have the guest come back, where it can. May be set.
        self.reclaim: Callable[[], None] | None = None
        self._changed = trio.Event()

    @property
    def subject(self) -> Transfer | Server | Host | None:
        """The transfer, the server, or the host of many transfers; None until there is one. May be
        set."""
        return self._subject

    @subject.setter
    def subject(self, subject: Transfer | Server | Host | None) -> None:
        self._subject = subject
        self._rates = Rates(subject) if isinstance(subject, Transfer) else None
        self._changed.set()

    async def watch(self) -> None:
        """Keep the rates of the transfer up to date, until cancelled."""
        while True:
            self._changed = trio.Event()
            async with trio.open_nursery() as nursery:
                if self._rates is not None:
                    nursery.start_soon(self._rates.watch)
                await self._changed.wait()
                nursery.cancel_scope.cancel()

    def hello(self) -> Fields:
        return {
            "type": "hello",
            "version": VERSION,
            "oldest": OLDEST_VERSION,
            "commands": list(COMMANDS),
            **self._who(),
        }

    def _who(self) -> Fields:
        return {"program": self._program, "pid": os.getpid(), "release": __version__}

    def status(self, guest: int | None = None) -> Fields:
        if guest is not None:
            transfer = self._transfers("status", guest)[0]
            return {**self._who(), **transfer_status(transfer, Rates(transfer))}
        match self._subject:
            case Host():
                return {**self._who(), **host_status(self._subject)}
            case Transfer():
                assert self._rates is not None
                return {**self._who(), **transfer_status(self._subject, self._rates)}
            case Server():
                return {**self._who(), **server_status(self._subject)}
        if self.precopy is not None:
            return {**self._who(), **precopy_status(self.precopy)}
        return {**self._who(), "state": "starting"}

    async def execute(self, request: Request) -> Fields:
        """Execute ``request``: the result for the answer. :exc:`UsageError` for what cannot be
        done. ``stop`` is only checked here: call :meth:`stop` after the answer."""
        match request.command:
            case "status":
                return self.status(request.arguments.get("guest"))
            case "stop":
                if self._stop is None:
                    raise UsageError(f"{self._program} cannot be stopped over its control socket")
                return {}
            case "switch" | "rounds":
                self._change_precopy(request)
                return self.status()
            case "reclaim":
                if self.reclaim is None:
                    raise UsageError("reclaim: no guest has been given away from here, yet")
                self.reclaim()
                return self.status()
            case "add" | "remove":
                await self._change_snapshots(request)
                return self.status()
        guest = request.arguments.get("guest")
        for transfer in self._transfers(request.command, guest):
            self._change(transfer, request)
        return self.status(guest)

    async def _change_snapshots(self, request: Request) -> None:
        if not isinstance(self._subject, Host):
            raise UsageError(f"{request.command}: this daemon fills one memory (--many: many)")
        arguments = request.arguments
        if request.command == "add":
            await self._subject.add(arguments["name"], arguments["uri"], arguments["uffd_socket"])
        else:
            self._subject.remove(arguments["name"])

    def _change_precopy(self, request: Request) -> None:
        if self.precopy is None:
            raise UsageError(f"{request.command}: no memory is copied in rounds here, now")
        if request.command == "switch":
            self.precopy.switch()
        else:
            self.precopy.set_rounds(request.arguments["count"])

    def stop(self) -> None:
        if self._stop is not None:
            self._stop()

    def _transfers(self, command: str, guest: int | None) -> list[Transfer]:
        """Those that a command is about: that of one guest, or (None) of all, and those that fill
        caches."""
        if not isinstance(self._subject, Host):
            if guest is not None:
                raise UsageError(f"{command}: this daemon fills one memory, and has no guests")
            return [self._running_transfer(command)]
        host = self._subject
        guests = host.guests.values() if guest is None else [host.guest(guest)]
        found = [one.transfer for one in guests if one.transfer and not one.transfer.is_over]
        if guest is None:
            caches = [each.cache for each in host.snapshots.values() if each.cache]
            found += [one.transfer for one in caches if not one.transfer.is_over]
        if guest is not None and not found:
            raise UsageError(f"{command}: the transfer of guest {guest} has not begun, or is over")
        return found

    def _running_transfer(self, command: str) -> Transfer:
        assert not isinstance(self._subject, Host)
        if isinstance(self._subject, Server):
            raise UsageError(
                f"{command}: this is a source; its destinations decide which pages come when"
            )
        if self._subject is None:
            raise UsageError(f"{command}: the transfer has not begun yet")
        if self._subject.is_over:
            raise UsageError(f"{command}: the transfer is over")
        return self._subject

    def _change(self, transfer: Transfer, request: Request) -> None:
        arguments = request.arguments
        match request.command:
            case "pause":
                transfer.pause_background()
            case "resume":
                transfer.begin_background()
                transfer.resume_background()
            case "schedule":
                transfer.set_background(arguments["name"])
            case "bandwidth":
                transfer.set_max_bandwidth(arguments["rate"])
            case "give-up":
                transfer.give_up()
            case "prefetch":
                window = arguments["window"]
                transfer.set_prefetch(None if window is None else (window[0], window[1]))


class _Clients:
    """The clients that are connected."""

    def __init__(self, control: Control, on_event: EventHandler) -> None:
        self._control = control
        self._on_event = on_event
        self._count = 0

    async def meet(self, connection: transport.Connection) -> None:
        """Serve one client, from hello to end. What it does wrong ends its connection, with one
        line."""
        channel = ControlChannel(connection)
        self._count += 1
        try:
            await self._talk(channel)
        except RemoteProtocolError as error:
            self._on_event("refused", peer=connection.peer, reason=str(error))
            with suppress(ConnectionBroken):
                await channel.send(
                    {"type": "error", "id": None, "code": "protocol", "text": printable(str(error))}
                )
        except ConnectionBroken:
            pass  # the client is gone: no peer is left to be told, and nothing depends on it
        finally:
            self._count -= 1
            connection.close()

    async def _talk(self, channel: ControlChannel) -> None:
        await channel.send(self._control.hello())
        if self._count > MAX_CLIENTS:
            raise RemoteProtocolError(f"{MAX_CLIENTS} others are connected: that is the limit")
        while (fields := await channel.receive()) is not None:
            request = decode_request(fields)
            try:
                result = await self._control.execute(request)
            except UsageError as error:
                await channel.send(
                    {
                        "type": "error",
                        "id": request.number,
                        "code": "usage",
                        "text": printable(str(error)),
                    }
                )
                continue
            try:
                await channel.send({"type": "reply", "id": request.number, "result": result})
            finally:  # a stop counts even if its client has left
                if request.command == "stop":
                    self._control.stop()


@asynccontextmanager
async def serve_control(
    subject: Transfer | Server | Host | None,
    path: str | os.PathLike[str],
    *,
    program: str = "pagenet",
    stop: Callable[[], None] | None = None,
    on_event: EventHandler = ignore_events,
) -> AsyncIterator[Control]:
    """Offer ``subject`` to ``pagenet-ctl`` on a unix socket at ``path``, for as long as the block
    runs.

    The socket is for this user and root (mode 0600), and is removed at the end. One that a process
    has left behind is replaced; :exc:`~pagenet.errors.UsageError` if another process listens there,
    or if it is another file. ``subject`` may be None until there is a transfer: set
    :attr:`Control.subject` later. ``program`` is the name of this program in a status. ``stop`` is
    called when a client sends ``stop``; without it, ``stop`` is refused.

    What a client does wrong ends its own connection only. Event: ``refused`` (a client was).
    """
    control = Control(program, stop)
    control.subject = subject
    clients = _Clients(control, on_event)
    with await UnixTransport().listen(address_of(path)) as listener:
        async with open_failing_nursery() as nursery:
            nursery.start_soon(control.watch)
            nursery.start_soon(partial(accept_forever, listener, clients.meet))
            yield control
            nursery.cancel_scope.cancel()
