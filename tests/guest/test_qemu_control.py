"""The control sockets of both sides of a guest's migration."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import trio
from migrations import check_goes_on, migrate_command, run_incoming
from processes import run
from vm import bare_command, check_unbroken, needs_migration, run_vm

from pagenet import ConnectionBroken, UsageError
from pagenet.control import ControlClient, connect_control

pytestmark = needs_migration


async def until_state(client: ControlClient, state: str) -> dict[str, object]:
    with trio.fail_after(60):
        while (status := await client.command("status"))["state"] != state:  # noqa: ASYNC110
            await trio.sleep(0.02)
    return status


async def test_both_sides(tmp_path: Path) -> None:
    there, here = tmp_path / "there.ctl", tmp_path / "here.ctl"
    options = ["tcp://127.0.0.1:0", "--control", str(there), "--start-background", "after=1000"]
    async with (
        run_vm(bare_command(tmp_path, "a"), tmp_path, "a") as a,
        run_incoming(tmp_path, listen=options) as (incoming, serial, uri),
        connect_control(there) as destination,
    ):
        assert (await destination.command("status"))["state"] == "starting"
        with pytest.raises(UsageError, match="the transfer has not begun yet"):
            await destination.command("pause")
        await a.serial.wait_sweeps(1)
        # Without rounds: what they leave for the transfer may be over before it is asked anything.
        leave = migrate_command(a.qmp, uri, "--precopy", "off", "--control", str(here))
        async with run(leave) as leaving:
            await incoming.event("resumed")
            status = await until_state(destination, "running")
            assert status["begun"] is False
            assert status["paused"] is False
            async with connect_control(here) as source:
                status = await until_state(source, "serving")
                assert status["complete"] is False
                assert status["pages"] == (64 << 20) // 4096
                with pytest.raises(UsageError, match="this is a source"):
                    await source.command("pause")
            await destination.command("bandwidth", rate=1_000_000_000)
            await destination.command("resume")
            assert await leaving.wait() == 0
        assert not here.exists()
        status = await until_state(destination, "complete")
        assert status["share"] == 1.0
        await check_goes_on(serial)
        check_unbroken(a.serial, serial)
        assert await destination.command("stop") == {}
        assert await incoming.wait_end() == 128 + signal.SIGTERM
        with pytest.raises(ConnectionBroken):
            await destination.command("status")
        await check_goes_on(serial)  # which needs no pagenet any more
    assert not there.exists()
