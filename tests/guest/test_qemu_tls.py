"""A running guest moves with TLS: its pages, its devices' state, and what is said about them."""

from __future__ import annotations

from pathlib import Path

import pytest
from certificates import Authority
from migrations import Events, check_goes_on, destination
from vm import bare_command, check_unbroken, needs_migration, run_vm

from pagenet.errors import Untrusted
from pagenet.qemu import Precopy, migrate
from pagenet.tls import Tls
from pagenet.transport import LaneKind

pytestmark = needs_migration
LISTEN = "tcp://127.0.0.1:0"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.mark.parametrize(("lane", "rounds"), [("native", 1), ("native", None), ("trio", None)])
async def test_guest_moves(
    lane: LaneKind, rounds: int | None, authority: Authority, tmp_path: Path
) -> None:
    tls, told = Tls(authority.write(tmp_path / "tls")), Events()
    precopy = None if rounds is None else Precopy(rounds)
    async with (
        run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a,
        destination(tmp_path, listen=LISTEN, tls=tls, lane=lane) as b,
    ):
        await a.serial.wait_sweeps(1)
        async with migrate(
            a.qmp, b.uri, tls=tls, lane=lane, precopy=precopy, on_event=told
        ) as server:
            await server.wait_complete()
        await check_goes_on(b.serial)
        check_unbroken(a.serial, b.serial)


async def test_stranger_gets_no_guest(authority: Authority, tmp_path: Path) -> None:
    """The destination does not trust this side, and the guest goes on here."""
    stranger = Authority().write(tmp_path / "stranger", trusts=authority)
    tls = Tls(authority.write(tmp_path / "tls"))
    async with (
        run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a,
        destination(tmp_path, listen=LISTEN, tls=tls) as b,
    ):
        await a.serial.wait_sweeps(1)
        with pytest.raises(Untrusted, match="does not know the authority"):
            async with migrate(a.qmp, b.uri, tls=Tls(stranger)):
                raise AssertionError("it was let in")
        await check_goes_on(a.serial)
