"""The source's side: a running guest leaves this QEMU.

::

    here                               there
    check, say what machine this is    compare; "ready"
    copy in rounds (precopy.py)        pull pages, and see none of them yet
    "leaving"                          "ready"
    QEMU stops the guest (devices.py)
    "stopped"                          answer faults from here on
    devices' state                     load it, which faults; the destination's QEMU confirms that
    "run"                              once it has loaded: "taking"; cont; "running"
    serve pages                        pull pages
    all there

"run" is sent only when loading is confirmed and this QEMU will not go on by itself. After a failure
before the destination has sent "taking", the guest goes on here, and the QEMU there is ended. After
"taking" the guest never runs here again. If the link breaks between the two messages, this side
cannot know whether the guest was taken: the guest then stays as it is on both sides. From "run" on
only this side has the guest's pages: a destination that is lost is dialled until it is back.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import trio

from ..errors import (
    ConnectionBroken,
    GuestReclaimed,
    OwnerGone,
    PagenetError,
    RemoteProtocolError,
    Unsupported,
    UsageError,
)
from ..events import EventHandler, ignore_events
from ..nurseries import open_failing_nursery, running_beside
from ..progress import tell_serving, telling
from ..region import Region
from ..source.memory import open_source
from ..source.precopy import Precopy
from ..source.rounds import Rounds
from ..source.serving import Server, serve
from ..tls import Tls
from ..transport import Connection, LaneKind
from ..uffd import Mapping, WriteTracker
from ._guard import Guard, go_on, guarding
from ._offer import Given, Offer
from ._talk import ANSWER_TIMEOUT, DEVICES, TALK, MigrationRefused, Talk, which_stream
from .devices import STEP_TIMEOUT, Migration, Saved, Way, check_way
from .machine import Machine, check_leaving, describe, ram_of, source_specs
from .precopy import tracking
from .qmp import Qmp, QmpEvent, connect_qmp

__all__ = ["migrate"]

# In seconds, while the guest stands still: for the devices' state to arrive and be loaded.
_LOAD_TIMEOUT = 30.0
# In seconds. The destination's reason why it cannot load the devices tells more than our QEMU's,
# and comes at about the same time.
_REASON_TIMEOUT = 2.0

_HANDED_OVER = (
    "this source has handed its guest over already, and waits for the QEMU that has it: resume that"
    " one's transfer there (pagenet-qemu incoming --resume)"
)
_NO_ROUNDS = "the destination's release of pagenet takes no pages before the guest leaves"


@asynccontextmanager
async def migrate(
    qmp_socket: str | Path,
    uri: str,
    *,
    tls: Tls | None = None,
    lane: LaneKind = "auto",
    precopy: Precopy | None = None,
    on_event: EventHandler = ignore_events,
) -> AsyncIterator[Server]:
    """Move the guest of the QEMU behind ``qmp_socket`` to the ``pagenet-qemu incoming`` that
    listens on ``uri``.

    The block begins when the guest runs there, and its pages are served for as long as the block
    runs: leave it after :meth:`~pagenet.Server.wait_complete`. If the migration fails before the
    guest was handed over, the guest goes on here, and the error says why:
    :exc:`~pagenet.errors.UsageError` (this guest cannot be moved, or that destination cannot be
    used), :exc:`~pagenet.errors.SourceUnreachable` (nothing listens there),
    :exc:`MigrationRefused` (with the destination's reason), :exc:`~pagenet.errors.PagenetError`.
    After that only this side has the guest's pages: a destination that is lost is dialled until it
    is back (``pagenet-qemu incoming --resume``), or the block is left. :func:`reclaim` takes the
    guest back; raise :exc:`~pagenet.errors.GuestReclaimed` in the block then.

    ``precopy``: copy memory in rounds before the guest leaves, while it runs. ``auto`` does without
    where something writes to the guest's RAM unseen, the kernel is too old, or the destination is;
    a number of rounds is then refused.

    Events: ``connected``, ``no_precopy`` (and why), ``round`` (one is over), ``stopped``,
    ``switchover`` (``pid``, ``source`` and ``identity`` of the pages), ``resumed``, ``progress``,
    ``waiting`` (for a destination that was lost), ``complete``; ``unconfirmed``: the destination
    has the guest, and was lost before it said that it runs; ``in_doubt``: the destination may or
    may not run the guest, which does not run here; ``abandoned``: the block was left before it
    had every page.
    """
    async with connect_qmp(qmp_socket) as qmp:
        machine, pid = await describe(qmp), qmp.pid
        await check_leaving(qmp, machine)
        await check_way(qmp, machine)
    streams = _Streams()
    with ExitStack() as stack:
        with ram_of(pid, machine) as rams:
            specs = source_specs(pid, machine, rams)
            memory: dict[str, object] = {"memories": _identities(specs)}
            source = stack.enter_context(open_source(*specs))
            mappings = [ram.mapping for ram in rams]
        tracker: WriteTracker | None = None
        if precopy is not None:
            async with connect_qmp(qmp_socket) as qmp:
                tracker = await _track(qmp, mappings, source.region, precopy, on_event)
        if tracker is not None:
            stack.callback(tracker.close)
        memory["memory"] = source.identity.hex()
        # A new one, for the memory's content from this switchover on: a later switchover has other
        # content.
        source.identity = os.urandom(16)
        async with (
            guarding(qmp_socket, pid) as guard,
            serve(
                source,
                connect=uri,
                tls=tls,
                lane=lane,
                tracked=tracker,
                on_stream=streams.meet,
                on_event=on_event,
            ) as server,
        ):
            try:
                # no longer than needed: a monitor serves one client at a time
                async with connect_qmp(qmp_socket) as qmp:
                    leaving = _Leaving(qmp, machine, guard, server, on_event)
                    await _leave(leaving, memory, streams, None if tracker is None else precopy)
            finally:
                streams.let_go()
            came_back = False
            try:
                async with telling(tell_serving, server, on_event):
                    yield server
            except GuestReclaimed:
                came_back = True
                raise
            finally:
                if not server.is_complete and not came_back:
                    addresses = " ".join(backend.source(pid) for backend in machine.backends)
                    on_event(
                        "abandoned",
                        pid=pid,
                        source=addresses,
                        uri=uri,
                        identity=source.identity.hex(),
                    )


async def _track(
    qmp: Qmp,
    mappings: Sequence[Mapping],
    region: Region,
    precopy: Precopy,
    on_event: EventHandler,
) -> WriteTracker | None:
    """A tracker of the guest's RAM; None if there can be none, and the rounds are ``auto``."""
    try:
        return await tracking(qmp, mappings, region)
    except (UsageError, Unsupported) as error:
        if precopy.rounds == "auto":
            on_event("no_precopy", reason=str(error))
            return None
        raise UsageError(
            f"this guest's memory cannot be copied while it runs (leave out --precopy): {error}"
        ) from None


def _identities(specs: Sequence[str]) -> list[str]:
    """The identity of each backend's memory: none of them may be the destination's RAM too."""
    found = []
    for spec in specs:
        with open_source(spec) as source:
            found.append(source.identity.hex())
    return found


async def _leave(
    leaving: _Leaving, memory: dict[str, object], streams: _Streams, precopy: Precopy | None
) -> None:
    leaving.talk = Talk(await streams.get(TALK))
    try:
        await leaving.agree(memory)
        if precopy is not None:
            await leaving.copy(precopy)
        await leaving.hand_over(await streams.get(DEVICES))
    except PagenetError as error:
        with trio.CancelScope(shield=True):
            if not await leaving.gives_up(error):
                return
        raise
    except BaseException as error:
        with trio.CancelScope(shield=True):
            await leaving.gives_up(error)
        raise


class _Streams:
    """The streams that the destination opens. They stay open until :meth:`let_go`, even if the
    session ends: what the destination has sent before its end is yet to be read, and decides which
    side has the guest."""

    def __init__(self) -> None:
        self._found: dict[bytes, Connection] = {}
        self._news = trio.Event()
        self._released = trio.Event()

    async def meet(self, connection: Connection) -> None:
        name = b""
        with trio.move_on_after(ANSWER_TIMEOUT):
            name = await which_stream(connection)
        if not name:
            raise ConnectionBroken(
                f"the destination opened a stream, and said nothing on it for {ANSWER_TIMEOUT:g} s"
            )
        if name in self._found:
            if name == TALK:
                await Talk(connection).say("refuse", reason=_HANDED_OVER)
            return
        self._found[name] = connection
        self._news.set()
        with trio.CancelScope(shield=True):
            await self._released.wait()

    def let_go(self) -> None:
        self._released.set()

    async def get(self, name: bytes) -> Connection:
        with trio.move_on_after(STEP_TIMEOUT):
            while name not in self._found:
                self._news = trio.Event()
                await self._news.wait()
            return self._found[name]
        raise PagenetError(
            "the destination is not a pagenet-qemu incoming: it asked for pages, not for a machine"
        )


class _Leaving:
    """The steps from a guest that runs here to one that runs there."""

    talk: Talk

    def __init__(
        self, qmp: Qmp, machine: Machine, guard: Guard, server: Server, on_event: EventHandler
    ) -> None:
        self._qmp = qmp
        self._machine = machine
        self._guard = guard
        self._server = server
        self._on_event = on_event
        self._rounds: Rounds | None = None
        self._offer = Offer()
        self._begun = False

    async def agree(self, memory: dict[str, object]) -> None:
        await self.talk.say("machine", **self._machine.as_message(), **memory)
        await self.talk.hear("ready", STEP_TIMEOUT)

    async def copy(self, precopy: Precopy) -> None:
        """Copy memory while the guest runs. Only then does the destination's QEMU listen."""
        self._rounds = await self._server.wait_rounds()
        if self._rounds is not None:
            async with running_beside(self._hear_of_failure):
                await precopy.run(self._rounds, self._on_event)
            await self.talk.say("leaving")
            await self.talk.hear("ready", STEP_TIMEOUT)
        elif precopy.rounds == "auto":
            self._on_event("no_precopy", reason=_NO_ROUNDS)
        else:
            raise UsageError(_NO_ROUNDS)

    async def _freeze(self) -> None:
        if self._rounds is None:
            self._server.rest()
        else:
            await self._rounds.freeze()

    async def hand_over(self, devices: Connection) -> None:
        async with open_failing_nursery() as nursery:
            leaves_out = self._machine.leaves_out_ram
            way = (
                Migration(self._qmp, devices, nursery)
                if leaves_out
                else Saved(self._qmp, devices, self._machine)
            )
            try:
                stop = await self._send_devices(way, nursery)
            finally:
                await way.close()
            nursery.cancel_scope.cancel()
        await self._commit()
        pid = self._qmp.pid
        source = " ".join(backend.source(pid) for backend in self._machine.backends)
        identity = self._server.identity.hex()
        self._on_event("switchover", pid=pid, source=source, identity=identity)
        running = await self.talk.hear("running")
        self._on_event("resumed", downtime_ms=round((running["time"] - stop.time) * 1000, 1))

    async def _send_devices(self, way: Way, nursery: trio.Nursery) -> QmpEvent:
        """Send the devices' state; returns the event of the guest's stop. When this returns, the
        destination has everything but pages."""
        await way.prepare()
        if self._rounds is not None:
            async with running_beside(self._hear_of_failure):
                await self._rounds.pause()
                await self._rounds.name_early()
        stop = await self._stop(way)
        # The state is sent without waiting for an answer to "stopped": a touch of a missing page
        # waits at the destination until it has read that message.
        async with open_failing_nursery() as both:
            both.start_soon(self.talk.say, "stopped")
            both.start_soon(self._freeze)
            await way.send()
        self._on_event("stopped")
        await self.talk.hear("serving", ANSWER_TIMEOUT)
        nursery.start_soon(self._hear_of_failure)
        await self._wait_loaded(way)
        return stop

    async def _stop(self, way: Way) -> QmpEvent:
        await self._guard.should_we_die("resume")
        self._begun = True
        return await way.stop()

    async def _wait_loaded(self, way: Way) -> None:
        """Return when the state is loaded. The way learns this as early as the destination does, so
        this does not wait for the destination's message as well."""
        try:
            await way.wait_loaded(_LOAD_TIMEOUT)
        except PagenetError:
            await trio.sleep(_REASON_TIMEOUT)
            raise

    async def _hear_of_failure(self) -> None:
        await self.talk.hear("taking")
        raise RemoteProtocolError("the peer takes a guest that it was not given")

    async def _commit(self) -> None:
        """Give the guest away: it is the destination's once the destination has sent "taking"."""
        self._server.persist()
        await self._offer.make(self.talk, self._guard)

    async def gives_up(self, error: BaseException) -> bool:
        """Return whether the guest stays here. It does unless it runs, or may run, at the
        destination: then its pages must be served. A guest that stays is resumed, and the
        destination is told if it can still be reached."""
        if self._offer.given is Given.YES:
            if isinstance(error, PagenetError):
                self._on_event("unconfirmed", reason=str(error))
            return False
        if self._offer.given is Given.PERHAPS:
            self._on_event("in_doubt", reason=str(error), identity=self._server.identity.hex())
            return False
        if not isinstance(error, MigrationRefused):
            with trio.move_on_after(1), suppress(PagenetError):
                reason = str(error) if isinstance(error, PagenetError) else "the source gave up"
                await self.talk.say("refuse", reason=reason)
        if self._begun and not isinstance(error, OwnerGone):
            await go_on(self._qmp)
        return True
