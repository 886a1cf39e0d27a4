"""The networks of two hosts, as namespaces of this host, and the cable between them, which tests
cut. Needs root, and ip."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import trio
from bad_path import BadPath
from processes import Process, run

needs_cable = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"),
    reason="network namespaces need root, and ip (iproute2)",
)

Cut = Literal["down at the source", "down at the destination", "swallowed"]
NOBODY = "02:00:00:00:00:99"
CUTS: tuple[Cut, ...] = ("down at the source", "down at the destination", "swallowed")


@dataclass(frozen=True)
class Host:
    """``within``: the prefix of a command that runs on it. ``ip``: takes commands of ip, one a
    line, and runs them at once."""

    name: str
    address: str
    within: list[str]
    ip: Process

    async def tell(self, *commands: str) -> None:
        await self.ip.send("".join(f"{command}\n" for command in commands))

    @property
    def sent(self) -> int:
        """Bytes that have gone into the cable."""
        lines = Path(f"/proc/{self.ip.pid}/net/dev").read_text().splitlines()
        (counts,) = (line.split(":")[1] for line in lines if line.strip().startswith(self.name))
        return int(counts.split()[8])

    async def wait_sent(self, count: int) -> None:
        """Wait, by looking again and again, until it has sent so many bytes more."""
        until = self.sent + count
        while self.sent < until:  # noqa: ASYNC110
            await trio.sleep(0.01)

    async def wait_acknowledged(self) -> None:
        """The same until the other host has everything that was sent over TCP."""
        while True:
            asking = [*self.within, "ss", "-Htn", "state", "established"]
            said = (await trio.run_process(asking, capture_stdout=True)).stdout.decode()
            if all(int(line.split()[1]) == 0 for line in said.splitlines()):
                return
            await trio.sleep(0.01)

    async def reset(self) -> None:
        """Reset all of its connections."""
        killing = [*self.within, "ss", "-K", "-t", "state", "established"]
        await trio.run_process(killing, capture_stdout=True, check=False)


@dataclass(frozen=True)
class Cable:
    source: Host
    destination: Host

    async def limit(self, rate: str, host: Host | None = None) -> None:
        """Limit what ``host``, or else the source, sends from now on; ``rate`` as tc has it."""
        host = host or self.source
        shape = f"tc qdisc add dev {host.name} root tbf rate {rate} burst 128kb latency 50ms"
        await trio.run_process([*host.within, *shape.split()])

    async def unlimit(self, host: Host) -> None:
        await trio.run_process([*host.within, *f"tc qdisc del dev {host.name} root".split()])

    async def cut(self, how: Cut) -> None:
        """Nothing gets through any more. No host is told, except one whose own end goes down."""
        if (
            how == "swallowed"
        ):  # in the middle of the path: frames go to an address that no host has
            for host, other in ((self.source, self.destination), (self.destination, self.source)):
                await host.tell(
                    f"neigh replace {other.address} lladdr {NOBODY} dev {host.name} nud permanent"
                )
        else:
            host = self._down(how)
            await host.tell(f"link set {host.name} down")

    async def mend(self, how: Cut) -> None:
        """Everything gets through again, after that cut."""
        if how == "swallowed":
            for host, other in ((self.source, self.destination), (self.destination, self.source)):
                await host.tell(f"neigh del {other.address} dev {host.name}")
        else:
            host = self._down(how)
            await host.tell(f"link set {host.name} up")

    def _down(self, how: Cut) -> Host:
        return self.source if how == "down at the source" else self.destination


@asynccontextmanager
async def plugged_cable(path: BadPath | None = None) -> AsyncIterator[Cable]:
    """The namespaces have no names, and end with the processes that hold them. ``path``: what takes
    the cable's place."""
    async with AsyncExitStack() as stack:
        hosts = []
        for name, address in (("source", "10.77.0.1"), ("destination", "10.77.0.2")):
            holder = await stack.enter_async_context(
                run(["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE)
            )
            assert await holder.line() == "", holder.stderr
            within = ["nsenter", f"--net=/proc/{holder.pid}/ns/net", "--"]
            ip = await stack.enter_async_context(
                run([*within, "ip", "-batch", "-"], stdin=subprocess.PIPE)
            )
            hosts.append(Host(name, address, within, ip))
            number = holder.pid
        source, destination = hosts
        if path is None:
            await source.tell(f"link add source type veth peer name destination netns {number}")
        else:
            relay = await stack.enter_async_context(run([*source.within, *path.command()]))
            assert await relay.line() == "", relay.stderr
            await source.tell(f"link set destination netns {number}")
        for host in hosts:
            await host.tell(
                f"address add {host.address}/24 dev {host.name}",
                f"link set {host.name} up",
                "link set lo up",
            )
            await host.tell("link show lo")
            while "LOOPBACK" not in (await host.ip.line() or ""):
                assert not host.ip.has_ended, host.ip.stderr
        yield Cable(source, destination)
