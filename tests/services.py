"""A systemd of the test's own: process 1 of namespaces that end with it, with a /run and a control
group of its own. It runs the units of systemd/, changed where this machine is unlike one that has
pagenet installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from processes import Process, children_of, parent_of, run

ROOT = Path(__file__).resolve().parents[1]
SYSTEMD = Path("/lib/systemd/systemd")
#: what default dependencies name; the real ones would mount file systems and start daemons
_TARGETS = ("sysinit", "basic", "shutdown", "multi-user", "network-online")
_BOOT = """
set -e
echo $$ > "$1/cgroup.procs"
exec unshare --pid --fork --kill-child --mount --mount-proc --cgroup sh -ec '
mount --make-rprivate /
mount -t tmpfs none /run
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
exec "$@"
' sh "$2" --system --unit=multi-user.target --log-target=null --show-status=no
"""


def cgroup_here() -> Path:
    """The directory of this process's control group, of version 2. OSError if there is none."""
    [inside] = [
        line[3:] for line in Path("/proc/self/cgroup").read_text().split() if line[:3] == "0::"
    ] or [""]
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if inside and fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4]) / inside.lstrip("/")
    raise OSError("control groups of version 2 are not mounted")


def refusal() -> str:
    """Why no systemd can be run here; empty if one can."""
    tools = ("unshare", "nsenter", "systemctl", "systemd-analyze")
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        return f"not installed: {', '.join(missing)}"
    if not SYSTEMD.exists():
        return f"there is no {SYSTEMD}"
    try:
        with own_cgroup():
            pass
    except OSError as error:
        return f"no control group can be made: {error}"
    tried = ["unshare", "--pid", "--fork", "--mount", "--cgroup", "mount", "-t", "tmpfs", "x"]
    done = subprocess.run([*tried, "/run"], capture_output=True, text=True)
    return done.stderr.strip()


@contextmanager
def own_cgroup() -> Iterator[Path]:
    """A control group that is removed again, with those in it."""
    path = Path(tempfile.mkdtemp(prefix="pagenet-test-", dir=cgroup_here()))
    try:
        yield path
    finally:
        for directory, _, _ in os.walk(path, topdown=False):
            os.rmdir(directory)


@dataclass(frozen=True)
class Service:
    """A unit that runs in a :class:`Systemd`. ``output``: a process that prints what the unit
    prints, and so has its events."""

    name: str
    output: Process
    _systemd: Systemd

    async def show(self, name: str) -> str:
        """A property of the unit."""
        return (await self._systemd.systemctl("show", "--value", "-p", name, self.name)).strip()

    @property
    def processes(self) -> list[int]:
        """All of its control group, as seen here."""
        return self._systemd.pids_of(self.name)

    @property
    def main(self) -> int:
        """The daemon; 0: there is none."""
        found = [pid for pid in self.processes if parent_of(pid) == self._systemd.pid]
        return min(found, default=0)

    @property
    def guard(self) -> int:
        """Its guard; 0: there is none."""
        for pid in self.processes:
            with suppress(OSError):
                if Path(f"/proc/{pid}/exe").readlink().name == "pagenet-guard":
                    return pid
        return 0

    async def wait_state(self, state: str, patience: float = 30) -> None:
        with trio.fail_after(patience):
            while await self.show("ActiveState") != state:  # noqa: ASYNC110
                await trio.sleep(0.02)


class Systemd:
    """Made by :func:`run_systemd`."""

    def __init__(self, pid: int, cgroup: Path, directory: Path) -> None:
        self.pid = pid
        self._cgroup = cgroup
        self._directory = directory

    def inside(self, *command: str) -> list[str]:
        """This command, run among its processes and mounts."""
        return ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--", *command]

    def path(self, name: str) -> Path:
        """What has this name among its mounts."""
        return Path(f"/proc/{self.pid}/root{name}")

    async def systemctl(self, *words: str) -> str:
        done = await trio.run_process(
            self.inside("systemctl", *words), capture_stdout=True, capture_stderr=True, check=False
        )
        assert done.returncode == 0 or words[0].startswith("is-"), done.stderr.decode()
        return done.stdout.decode()

    def pids_of(self, unit: str) -> list[int]:
        for directory, _, _ in os.walk(self._cgroup):
            if Path(directory).name == unit:
                text = (Path(directory) / "cgroup.procs").read_text()
                return [int(word) for word in text.split()]
        return []

    @asynccontextmanager
    async def service(
        self, template: str, settings: dict[str, str], more: str = ""
    ) -> AsyncIterator[Service]:
        """Start the unit ``template``, such as ``pagenet-pull``, with these settings in its file,
        and ``more`` lines for its section [Service]."""
        kind, name = template.removeprefix("pagenet-"), f"{template}@test.service"
        (self._directory / f"{kind}-test.conf").write_text(
            "".join(f"{key}={value}\n" for key, value in settings.items())
        )
        number, path = tempfile.mkstemp(prefix=f"{kind}-", suffix=".output", dir=self._directory)
        os.close(number)
        output = Path(path)
        extra = self._directory / f"{name}.d" / "test.conf"
        extra.parent.mkdir(exist_ok=True)
        here = f"StandardOutput=append:{output}\nStandardError=append:{output}.errors\n"
        # the checkout, its Python and the test's files may be in /home or /tmp
        here += "ProtectHome=no\nPrivateTmp=no\n"
        extra.write_text(f"[Service]\n{here}{more}")
        await self.systemctl("daemon-reload")
        async with run(["tail", "-n", "+1", "-f", str(output)]) as follower:
            await self.systemctl("start", "--no-block", name)
            yield Service(name, follower, self)


@asynccontextmanager
async def run_systemd(directory: Path) -> AsyncIterator[Systemd]:
    """A systemd that runs for as long as the block does. ``directory``: for its files."""
    units = directory / "units"
    units.mkdir()
    for target in _TARGETS:
        (units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    with (units / "multi-user.target").open("a") as target_file:
        # what a unit that is there names is not forgotten when it has ended
        target_file.writelines(
            f"After={unit.name.replace('@', '@test')}\n" for unit in (ROOT / "systemd").iterdir()
        )
    commands = Path(sys.executable).parent
    for unit in (ROOT / "systemd").iterdir():
        text = unit.read_text().replace("ExecStart=", f"ExecStart={commands}/")
        (units / unit.name).write_text(text.replace("/etc/pagenet", str(units)))
    variables = {**os.environ, "SYSTEMD_UNIT_PATH": str(units), "container": "test"}
    with own_cgroup() as cgroup:
        boot = ["sh", "-c", _BOOT, "sh", str(cgroup), str(SYSTEMD)]
        async with run(boot, env=variables) as process:
            systemd = Systemd(await _first_process(process), cgroup, units)
            try:
                await _wait_running(systemd)
                yield systemd
            finally:
                os.kill(systemd.pid, signal.SIGKILL)
                with trio.CancelScope(shield=True):
                    await process.wait_end()


async def _first_process(unsharing: Process) -> int:
    with trio.fail_after(10):
        while not (found := children_of(unsharing.pid)):
            assert not unsharing.has_ended, unsharing.stderr
            await trio.sleep(0.005)
    return found[0]


async def _wait_running(systemd: Systemd) -> None:
    with trio.fail_after(30):
        ends = ("running\n", "degraded\n")
        while await systemd.systemctl("is-system-running") not in ends:  # noqa: ASYNC110
            await trio.sleep(0.02)


REFUSAL = refusal()
needs_systemd = pytest.mark.skipif(bool(REFUSAL), reason=f"no systemd of one's own: {REFUSAL}")
