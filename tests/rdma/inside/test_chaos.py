"""Chaos over RDMA: sources are killed and started again, and both sides are stopped, while an owner
touches its memory.

PAGENET_CHAOS_SEED repeats the choices of another run, and PAGENET_CHAOS_FAULTS says how many faults
there are.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos import Record, Strike, read_stalls
from forked import Command, run_workload
from processes import write_pattern

from pagenet.cli.pull import main as pull
from pagenet.cli.serve import main as serve

PAGE = 4096
SIZE = 2 << 20
LISTEN = "rdma://127.0.0.1:0"
#: an emulated processor takes a second for what others do at once
SLOWLY = ("--max-bandwidth", SIZE // 8, "--prefetch", "0,0")
FAULTS = int(os.environ.get("PAGENET_CHAOS_FAULTS", "4"))
PER_TRANSFER = 4
SEED = os.environ.get("PAGENET_CHAOS_SEED") or str(time.time_ns())


@pytest.fixture
def source() -> Iterator[Path]:
    path = write_pattern(Path("/dev/shm/source"), SIZE)
    yield path
    path.unlink()


@dataclass
class Site:
    source: Path
    serving: Command
    pulling: Command
    chance: random.Random

    def faults(self) -> dict[str, Callable[[], None]]:
        return {
            "source killed": self.kill_source,
            "source stopped": lambda: self.stop(self.serving),
            "destination stopped": lambda: self.stop(self.pulling),
        }

    def kill_source(self) -> None:
        uri = self.serving.events[0]["uri"]
        self.serving.close()
        self.serving = Command(serve, self.source, "--listen", uri, "--json")
        self.serving.event("listening")

    def stop(self, command: Command) -> None:
        os.kill(command.pid, signal.SIGSTOP)
        time.sleep(self.chance.uniform(0.1, 2.0))
        os.kill(command.pid, signal.SIGCONT)


def move(source: Path, directory: Path, chance: random.Random, record: Record) -> None:
    with ExitStack() as stack:
        serving = Command(serve, source, "--listen", LISTEN, "--json")
        uri = serving.event("listening")["uri"]
        handshake = directory / "owner.sock"
        lane = chance.choice(["native", "trio"])
        command = (uri, "--uffd-socket", handshake, "--json", "--lane", lane, "--no-guard")
        pulling = stack.enter_context(Command(pull, *command, *SLOWLY))
        site = Site(source, serving, pulling, chance)
        stack.callback(lambda: site.serving.close())
        pulling.event("waiting")
        touches = ("--touches", SIZE // PAGE, "--think-us", 2000, "--order", "random")
        stalls = ("--stalls-out", directory / "stalls", "--wait-complete", "--size", SIZE)
        memory = ("--memory", chance.choice(["anonymous", "memfd"]), "--close-uffd")
        owner = stack.enter_context(
            Command(run_workload, "--socket", handshake, *memory, *touches, *stalls)
        )
        pulling.event("owner")
        strikes = [strike(site) for _ in range(PER_TRANSFER)]
        assert owner.event("verified")["bad"] == 0
        assert owner.wait() == 0
        assert pulling.wait() == 0, pulling.stderr
        record.transfers["handshake without map, RDMA"] += 1
        record.add(strikes, read_stalls(directory / "stalls"))


def strike(site: Site) -> Strike:
    time.sleep(site.chance.uniform(0.1, 0.8))
    name, fault = site.chance.choice(sorted(site.faults().items()))
    made = Strike(name, time.monotonic())
    fault()
    return made


@pytest.mark.timeout(120 + 20 * FAULTS)
def test_chaos(source: Path, tmp_path: Path) -> None:
    print(f"PAGENET_CHAOS_SEED={SEED}")
    chance, record = random.Random(SEED), Record()
    while record.faults.total() < FAULTS:
        directory = tmp_path / str(record.transfers.total())
        directory.mkdir()
        move(source, directory, chance, record)
    print(f"\nCHAOS {json.dumps(record.fields())}")
