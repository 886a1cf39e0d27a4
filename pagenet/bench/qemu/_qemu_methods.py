"""The methods of migration that are compared: QEMU's own, and pagenet's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import trio

from ...certificates import make_certificates
from ...errors import PagenetError
from ...qemu import Qmp, QmpEvent
from ...sizes import size_text
from .._site import Daemon, Site
from ._qemu_guest import Guest, Machine, meet_machine, qemu_command, start_machine

__all__ = ["HYBRIDS", "METHODS", "OURS", "Method", "Outcome", "monotonic", "with_windows"]

# With this value QEMU has no limit of its own: the link is the limit, for all methods.
_UNLIMITED = 10**12
# Seconds. A precopy that has not converged by then never will: the guest writes faster than the
# link carries.
_PRECOPY_SECONDS = 20.0
# QEMU ends a migration without postcopy as soon as it expects to send what is left within this time
# (ms). Its default of 300 would end a round early, and a small guest would then be stopped for as
# long: hybrid would not be hybrid.
_DOWNTIME_LIMIT_MS = 1
_START_SECONDS = 30.0
_PORT = 7000


@dataclass(frozen=True, slots=True)
class Outcome:
    """``completed``: when the last page was there (s of time.monotonic()); None: the guest could
    not be moved.

    ``faults``: how many were answered over the network. ``p50_us``, ``p99_us``: how long they took,
    as pagenet counts it. ``blocked_ms``: how long the guest waited for them in all, as QEMU counts
    it. ``rounds``: rounds of precopy that were over before the guest was stopped; None: a method
    without precopy. ``began``: when they began, if that was before QEMU was told to migrate;
    ``given_up``: when a precopy was cancelled.
    """

    completed: float | None
    faults: int | None = None
    p50_us: float | None = None
    p99_us: float | None = None
    blocked_ms: float | None = None
    rounds: int | None = None
    began: float | None = None
    given_up: float | None = None


class Method(Protocol):
    """``shared``: whether the source's machine has shared RAM (see
    :func:`~._qemu_guest.qemu_command`)."""

    name: str
    shared: bool

    async def wait_there(self, site: Site, guest: Guest, stack: AsyncExitStack) -> Machine:
        """Start a machine that waits for the guest, and whatever else belongs to it."""

    async def move(self, source: Machine, destination: Machine, patience: float) -> Outcome:
        """Move the guest. Returns when every page is at the destination, or when a precopy is given
        up."""


# ---- QEMU's own ----


@dataclass(slots=True)
class _Qemu:
    """``precopy``: all memory is copied before the guest leaves, once if ``postcopy`` follows."""

    name: str
    precopy: bool = False
    postcopy: bool = False
    preempt: bool = False
    shared: bool = False
    tls: bool = False
    _uri: str = ""
    _certificates: str = ""

    async def wait_there(self, site: Site, guest: Guest, stack: AsyncExitStack) -> Machine:
        starting = start_machine(
            site,
            guest,
            "destination",
            "-incoming",
            "defer",
            at=site.link.destination,
            shared=self.shared,
        )
        machine = await stack.enter_async_context(starting)
        blocktime = ("postcopy-blocktime",) if self.postcopy else ()
        await _enable(machine.qmp, *self._capabilities(), *blocktime)
        self._uri = f"tcp:{site.link.address}:{_PORT}"
        if self.tls:
            self._certificates = await certificates(site)
            await self._encrypt(machine.qmp, "server")
        await machine.qmp.command("migrate-incoming", uri=self._uri)
        return machine

    async def _encrypt(self, qmp: Qmp, endpoint: str) -> None:
        """As pagenet: each side checks the other."""
        await qmp.command(
            "object-add",
            qom_type="tls-creds-x509",
            id="tls0",
            dir=self._certificates,
            endpoint=endpoint,
            verify_peer=True,
        )
        await qmp.command("migrate-set-parameters", tls_creds="tls0")

    def _capabilities(self) -> Sequence[str]:
        postcopy = ("postcopy-ram",) if self.postcopy else ()
        preempt = ("postcopy-preempt",) if self.preempt else ()
        return ("events", *postcopy, *preempt)

    async def move(self, source: Machine, destination: Machine, patience: float) -> Outcome:
        await _enable(source.qmp, *self._capabilities())
        limit = {"downtime_limit": _DOWNTIME_LIMIT_MS} if self.precopy and self.postcopy else {}
        await source.qmp.command(
            "migrate-set-parameters", max_bandwidth=_UNLIMITED, max_postcopy_bandwidth=0, **limit
        )
        if self.tls:
            await self._encrypt(source.qmp, "client")
        await source.qmp.command("migrate", uri=self._uri)
        if not self.postcopy:
            return await self._precopy(source, destination)
        await _status(source.qmp, "active", patience)
        if self.precopy:
            await _second_pass(source.qmp, patience)
        await source.qmp.command("migrate-start-postcopy")
        completed = await _status(destination.qmp, "completed", patience)
        await _status(source.qmp, "completed", patience)
        ram = (await source.qmp.command("query-migrate"))["ram"]
        there = await destination.qmp.command("query-migrate")
        return Outcome(
            monotonic(completed),
            ram["postcopy-requests"],
            blocked_ms=there.get("postcopy-blocktime"),
            rounds=_rounds_over(source.qmp) if self.precopy else None,
        )

    async def _precopy(self, source: Machine, destination: Machine) -> Outcome:
        with trio.move_on_after(_PRECOPY_SECONDS):
            await _status(source.qmp, "completed", 2 * _PRECOPY_SECONDS)
            completed = await _status(destination.qmp, "completed", _START_SECONDS)
            return Outcome(monotonic(completed), rounds=_rounds_over(source.qmp))
        given_up = time.monotonic()
        await source.qmp.command("migrate_cancel")
        await _status(source.qmp, "cancelled", _START_SECONDS)
        return Outcome(None, rounds=_rounds_over(source.qmp), given_up=given_up)


async def _enable(qmp: Qmp, *names: str) -> None:
    on = [{"capability": name, "state": True} for name in names]
    await qmp.command("migrate-set-capabilities", capabilities=on)


async def _status(qmp: Qmp, status: str, patience: float) -> QmpEvent:
    return await qmp.wait_event(
        "MIGRATION", where=lambda data: data["status"] == status, patience=patience
    )


async def _second_pass(qmp: Qmp, patience: float) -> None:
    """Return when QEMU has gone through all memory once, and looks for what was written since."""
    await qmp.wait_event("MIGRATION_PASS", where=lambda data: data["pass"] >= 2, patience=patience)


def _rounds_over(qmp: Qmp) -> int:
    """Passes through memory that were over before the guest was stopped: each one but the last is
    over when the next one is announced."""
    names = [event.name for event in qmp.events]
    until = names.index("STOP") if "STOP" in names else len(names)
    return max(0, names[:until].count("MIGRATION_PASS") - 1)


def monotonic(event: QmpEvent) -> float:
    """When ``event`` came, on the clock of time.monotonic()."""
    return event.time - time.time() + time.monotonic()


# ---- pagenet's ----


@dataclass(slots=True)
class _Pagenet:
    """With the preload library, in a QEMU that ``pagenet-qemu incoming`` starts. ``precopy``: as
    its option; ``window``: bytes of the background in flight."""

    name: str
    precopy: str = "off"
    window: int | None = None
    shared: bool = True
    tls: bool = False
    _security: Sequence[str] = ()
    _site: Site | None = None
    _incoming: Daemon | None = None

    async def wait_there(self, site: Site, guest: Guest, stack: AsyncExitStack) -> Machine:
        command = qemu_command(site, guest, "destination", shared=True)
        incoming = await self._start(site, stack, "--", *command)
        _, qemu = await incoming.event("qemu", _START_SECONDS)
        await site.ends_with_us(qemu["pid"])
        machine = await stack.enter_async_context(
            meet_machine(site, "destination", qemu["pid"], incoming.name)
        )
        await incoming.event("listening", _START_SECONDS)
        return machine

    async def _start(self, site: Site, stack: AsyncExitStack, *arguments: str) -> Daemon:
        self._site = site
        if self.tls:
            self._security = ("--tls-dir", await certificates(site))
        listen = ("--listen", f"tcp://{site.link.address}:{_PORT}")
        security = self._security or ("--plaintext",)
        window = () if self.window is None else ("--background-window", str(self.window))
        starting = site.daemon(
            "incoming", *listen, *security, *window, *arguments, at=site.link.destination
        )
        self._incoming = await stack.enter_async_context(starting)
        return self._incoming

    async def move(self, source: Machine, destination: Machine, patience: float) -> Outcome:
        assert self._site is not None
        assert self._incoming is not None
        link = self._site.link
        leaving = self._site.daemon(
            "migrate",
            *("--qmp", str(source.monitor), "--precopy", self.precopy),
            *self._security,
            f"tcp://{link.address}:{_PORT}",
            at=link.source,
        )
        async with leaving as daemon:
            await daemon.event("resumed", patience)
            completed, complete = await self._incoming.event("complete", patience)
            await daemon.event("complete", patience)
        latency = complete["fault_us"]
        outcome = Outcome(completed, complete["faults"], latency["p50"], latency["p99"])
        return outcome if self.precopy == "off" else _with_rounds(outcome, daemon)


def _with_rounds(outcome: Outcome, source: Daemon) -> Outcome:
    """The rounds begin when the destination is connected: from then on pages may travel."""
    for _, refused in source.events("no_precopy"):
        raise PagenetError(f"the guest moved without precopy: {refused['reason']}")
    began, _ = source.events("connected")[0]
    return replace(outcome, rounds=len(source.events("round")), began=began)


@dataclass(slots=True)
class _Attached(_Pagenet):
    """Without the preload library, in a QEMU that waits already."""

    async def wait_there(self, site: Site, guest: Guest, stack: AsyncExitStack) -> Machine:
        starting = start_machine(
            site, guest, "destination", "-incoming", "defer", at=site.link.destination, shared=True
        )
        machine = await stack.enter_async_context(starting)
        incoming = await self._start(site, stack, "--qmp", str(machine.monitor))
        await incoming.event("listening", _START_SECONDS)
        return machine


async def certificates(site: Site) -> str:
    """A directory of certificates for the link, as QEMU and pagenet take it."""
    address = site.link.address
    await trio.to_thread.run_sync(make_certificates, site.directory / "pki", [address])
    return str(site.directory / "pki" / address)


def with_windows(windows: Sequence[int]) -> dict[str, Callable[[], Method]]:
    """pagenet's with so many bytes of the background in flight, by name."""
    names = {f"pagenet, {size_text(window)}": window for window in windows}
    return {name: partial(_Pagenet, name, window=window) for name, window in names.items()}


#: the methods that can be compared, by name
METHODS: dict[str, Callable[[], Method]] = {
    "precopy": lambda: _Qemu("precopy", precopy=True),
    "postcopy": lambda: _Qemu("postcopy", postcopy=True),
    "preempt": lambda: _Qemu("preempt", postcopy=True, preempt=True),
    "qemu-hybrid": lambda: _Qemu("qemu-hybrid", precopy=True, postcopy=True),
    "qemu-hybrid-preempt": lambda: _Qemu(
        "qemu-hybrid-preempt", precopy=True, postcopy=True, preempt=True
    ),
    "pagenet": lambda: _Pagenet("pagenet"),
    "attach": lambda: _Attached("attach"),
    "hybrid": lambda: _Pagenet("hybrid", precopy="auto"),
    "hybrid-attach": lambda: _Attached("hybrid-attach", precopy="auto"),
    "preempt-tls": lambda: _Qemu("preempt-tls", postcopy=True, preempt=True, tls=True),
    "pagenet-tls": lambda: _Pagenet("pagenet-tls", tls=True),
    "hybrid-tls": lambda: _Pagenet("hybrid-tls", precopy="auto", tls=True),
}
#: those that are compared if none is named
USUAL = tuple(name for name in METHODS if not name.endswith("-tls"))
#: names of pagenet's methods without precopy
OURS = ("pagenet", "attach")
#: names of pagenet's methods with precopy, and of those that they are without it
HYBRIDS = {"hybrid": "pagenet", "hybrid-attach": "attach"}
#: names of pagenet's methods with TLS, and of those that they are without it
ENCRYPTED = {"pagenet-tls": "pagenet", "hybrid-tls": "hybrid"}
