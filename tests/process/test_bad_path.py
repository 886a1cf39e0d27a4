"""A path that loses packets: a transfer makes progress at what TCP itself makes there, and never
begins anew."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from bad_path import BadPath
from cable import Cable, needs_cable, plugged_cable
from processes import (
    LANES,
    check_verified,
    pull_command,
    run,
    run_workload,
    serve_command,
    write_pattern,
)

from pagenet.uffd import probe

pytestmark = [
    needs_cable,
    pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="there is no /dev/net/tun"),
]

#: seconds that a packet takes from one side to the other
DELAY = 0.05

SEND = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
connection.sendall(bytes(int(sys.argv[2])))
connection.shutdown(socket.SHUT_WR)
connection.recv(1)
"""
RECEIVE = """
import socket, sys, time
began = time.monotonic()
connection, received = socket.create_connection((sys.argv[1], int(sys.argv[2]))), 0
connection.settimeout(1)
while (past := time.monotonic() - began) < float(sys.argv[3]):
    try:
        data = connection.recv(1 << 20)
    except TimeoutError:
        continue
    received += len(data)
    if not data:
        break
print(received / past, flush=True)
"""


async def bare_rate(cable: Cable, size: int) -> float:
    """Bytes a second over one TCP connection, with its opening, of so many bytes, or of what has
    come after a minute: on a path that loses much, TCP repeats a packet ever more seldom."""
    source, destination = cable.source, cable.destination
    send = [*source.within, sys.executable, "-c", SEND, source.address, str(size)]
    async with run(send) as sending:
        port = await sending.line()
        assert port is not None, sending.stderr
        receive = [sys.executable, "-c", RECEIVE, source.address, port, "60"]
        async with run([*destination.within, *receive]) as receiving:
            rate = await receiving.line()
            assert rate is not None, receiving.stderr
    return float(rate)


async def moving_rate(cable: Cable, source: str, socket: Path, lane: str, dials: bool) -> float:
    """Bytes a second of a transfer, from the time when its owner is there. It is never
    disconnected. ``dials``: the source does."""
    here, there = cable.destination, cable.source
    uri = f"tcp://{here.address if dials else there.address}:7000"
    serve = ["--connect", uri] if dials else ["--listen", uri, "--plaintext"]
    pull = [uri, "--listen", "--plaintext"] if dials else [uri]
    pull += ["--uffd-socket", str(socket), "--compress", "none"]
    serving = run([*there.within, *serve_command(source, *serve)])
    async with AsyncExitStack() as stack:
        if not dials:
            await (await stack.enter_async_context(serving)).event("listening")
        pulling = await stack.enter_async_context(
            run([*here.within, *pull_command(*pull, lane=lane)])
        )
        if dials:
            await pulling.event("listening")
            await stack.enter_async_context(serving)
        await pulling.event("waiting")
        size = Path(source).stat().st_size
        async with run_workload(
            socket, "--size", size, "--order", "none", "--wait-complete"
        ) as owner:
            await pulling.event("owner")
            began = time.monotonic()
            await pulling.event("complete")
            seconds = time.monotonic() - began
            await check_verified(owner)
        assert await pulling.wait() == 0, pulling.stderr
    assert not [event for event in pulling.events if event["event"] == "disconnected"]
    return size / seconds


async def use(cable: Cable, control: str) -> None:
    """Have both hosts use that congestion control."""
    for host in (cable.source, cable.destination):
        write = f"echo {control} > /proc/sys/net/ipv4/tcp_congestion_control"
        done = await trio.run_process(
            [*host.within, "sh", "-c", write], check=False, capture_stderr=True
        )
        if done.returncode:
            pytest.skip(f"the congestion control {control} cannot be used here")


async def compare(
    path: BadPath, source: str, directory: Path, turns: int, control: str | None = None
) -> float:
    """The rate of transfers, relative to that of one TCP connection: the geometric mean of as many
    ``turns``, in which lanes and the side that dials change."""
    ratio = 1.0
    async with plugged_cable(path) as cable:
        if control is not None:
            await use(cable, control)
        for turn in range(turns):
            lane, dials = LANES[turn % 2 - 1], turn % 4 > 1
            moving = await moving_rate(cable, source, directory / f"{turn}.sock", lane, dials)
            bare = await bare_rate(cable, Path(source).stat().st_size)
            who = "source" if dials else "destination"
            print(f"{lane}, the {who} dials: {moving:.0f} bytes/s, TCP alone {bare:.0f}")
            ratio *= moving / bare
    return float(ratio ** (1 / turns))


async def test_three_percent(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    probe()
    source = str(write_pattern(tmp_path / "source", 384 << 10))
    ratio = await compare(BadPath(0.03, DELAY), source, tmp_path, turns=1)
    record_property("outcome", f"3 % loss: {ratio:.2f} of what TCP makes")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("control", ["reno", "cubic", "bbr"])
@pytest.mark.parametrize(("loss", "size"), [(0.03, 1 << 20), (0.3, 128 << 10)])
async def test_as_fast_as_tcp(control: str, loss: float, size: int, tmp_path: Path) -> None:
    probe()
    source = str(write_pattern(tmp_path / "source", size))
    ratio = await compare(BadPath(loss, DELAY), source, tmp_path, turns=8, control=control)
    print(f"{loss:.0%} loss, {control}: {ratio:.2f} of what TCP makes")
    assert ratio > 0.8
