"""Guests with devices that use their memory, and the other side of these devices."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio
from vm import Beat, Serial, qemu_command

from pagenet.qemu import connect_qmp

SHOWN_ROWS = 240  # of 480: the guest draws the other rows again and again
BLOCKS = 64


def with_devices(directory: Path, name: str, *, swapped: bool = False) -> list[str]:
    """A machine with two CPUs and a display, on a network and with a disk that it shares with its
    destination."""
    disk = ["-device", "virtio-blk-pci,drive=disk"]
    network = ["-device", "virtio-net-pci,netdev=net,romfile="]
    echo = (
        f"local.type=unix,local.path={directory / name}.net,"
        f"remote.type=unix,remote.path={directory / 'echo'}"
    )
    extra = [
        *("-device", "VGA"),
        *("-drive", f"file={directory / 'disk'},format=raw,if=none,id=disk,cache=none"),
        *("-netdev", f"dgram,id=net,{echo}"),
        *(network + disk if swapped else disk + network),
        *("-device", "virtio-balloon-pci,free-page-reporting=on"),
    ]
    # Without init_on_alloc=0 Debian's kernel would write zeros to each page that it gives to the
    # balloon, and so wait for the page.
    work = f"init_on_alloc=0 wl_net=1 wl_disk={BLOCKS} wl_screen=1 wl_churn=32"
    return qemu_command(
        directory, name, work=16, hot=4, smp=2, beat_ms=50, options=work, extra=extra
    )


@asynccontextmanager
async def echoing(path: Path) -> AsyncIterator[None]:
    """A peer on the network, which sends every frame back to where it came from."""
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        await sock.bind(str(path))

        async def echo() -> None:
            while True:
                frame, sender = await sock.recvfrom(65536)
                with suppress(OSError):  # that machine is gone
                    await sock.sendto(frame, sender)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            yield
            nursery.cancel_scope.cancel()


async def wait_devices(serial: Serial, since: Beat | None = None) -> Beat:
    """Wait until each device has done more since then. Returns the heartbeat that tells so."""
    before = since.devices if since else {}

    def is_there() -> bool:
        now = serial.beats[-1].devices if serial.beats else {}
        return bool(now) and all(now[name] > before.get(name, 0) for name in now)

    await serial.wait("work of every device", is_there)
    return serial.beats[-1]


async def screen(monitor: Path, directory: Path) -> bytes:
    """The part of the picture that stays, as the machine shows it."""
    async with connect_qmp(monitor) as qmp:
        await qmp.command("screendump", filename=str(directory / "screen"))
    picture = (directory / "screen").read_bytes()
    header = b"P6\n640 480\n255\n"
    assert picture.startswith(header)
    return picture[len(header) :][: SHOWN_ROWS * 640 * 3]
