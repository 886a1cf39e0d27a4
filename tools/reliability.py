#!/usr/bin/env python3
"""The figures of docs/reliability.md: owners of every kind move, and a seeded hand strikes until
there were as many faults and transfers as wanted. Needs root, ip and ss (iproute2); for guests,
QEMU.

    .venv/bin/python tools/reliability.py --faults 1000 --transfers 100 --rdma 40

Every byte of every owner is compared with the source's, and every heartbeat of every guest. The
first that is wrong or missing, or an owner that gets no page for two minutes, ends it with exit
code 1, and the seed with which to repeat the choices.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "rdma"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import qemu_recovery
from chaos import Hand, Record
from chaos_sites import KINDS, transfer
from vm import MISSING

# Seconds for one transfer with all its faults.
_PATIENCE = 180.0


async def strike(hand: Hand, kinds: list[str], transfers: int) -> None:
    while not hand.is_done or hand.record.transfers.total() < transfers:
        kind = hand.draw("kinds", kinds)
        with tempfile.TemporaryDirectory(prefix="pagenet-") as directory:
            with trio.fail_after(_PATIENCE):
                await transfer(kind, hand, Path(directory))
        done = hand.record.transfers.total()
        faults = hand.record.faults.total()
        print(f"{done} transfers, {faults} faults; last: {kind}", file=sys.stderr, flush=True)


def strike_rdma(record: Record, faults: int, seed: str) -> None:
    """In a guest that has an RDMA device. :exc:`RuntimeError` if a page was wrong, or an owner
    lost."""
    from rdma_guest import guest_python, run_in_guest
    from test_rdma import INSIDE, OPTIONS, PYTEST, compile_all

    compile_all()
    settings = ("env", f"PAGENET_CHAOS_FAULTS={faults}", f"PAGENET_CHAOS_SEED={seed}")
    test = (guest_python(), "-c", PYTEST, *OPTIONS, "-s", INSIDE / "test_chaos.py")
    done = run_in_guest(*settings, *test, timeout=300 + 20 * faults)
    found = re.search(r"^CHAOS (.*)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise RuntimeError(f"over RDMA: {done.stdout}{done.stderr}")
    record.merge(**json.loads(found[1]))


async def compare() -> list[dict[str, object]]:
    """The longest stall of a guest over each outage, in seconds, by each method in turn."""
    found = []
    for what, seconds in qemu_recovery.OUTAGES:
        row: dict[str, object] = {"what": what, "seconds": seconds}
        for method in qemu_recovery.METHODS:
            with tempfile.TemporaryDirectory(prefix="pagenet-") as directory:
                stall = await qemu_recovery.stall_of(method, what, seconds, Path(directory))
            row[method] = None if stall is None else round(stall, 2)
        print(row, file=sys.stderr, flush=True)
        found.append(row)
    return found


def tell_comparison(rows: list[dict[str, object]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"outages": rows}))
        return
    names = list(rows[0])
    print(f"| {' | '.join(names)} |", "|---" * len(names) + "|", sep="\n")
    for row in rows:
        print(f"| {' | '.join(str(row[name]) for name in names)} |")


def tell(record: Record, seed: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"seed": seed, "wrong": 0, "lost": 0, "typed": 0, **record.fields()}))
    else:
        print(f"seed {seed}", "", *record.lines(), sep="\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/reliability.py", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--faults", type=int, default=60, metavar="N", help="at least (%(default)s)"
    )
    parser.add_argument(
        "--transfers", type=int, default=7, metavar="N", help="at least (%(default)s)"
    )
    parser.add_argument(
        "--rdma", type=int, default=0, metavar="N", help="of the faults, N over RDMA (%(default)s)"
    )
    parser.add_argument(
        "--compare-qemu",
        action="store_true",
        help="instead: how long a guest stalls over an outage, beside QEMU's own recovery",
    )
    parser.add_argument("--seed", default=str(time.time_ns()), help="of an earlier run")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args()
    if options.compare_qemu:
        tell_comparison(trio.run(compare), options.json)
        return 0
    kinds = [kind for kind in KINDS if not (kind.startswith("QEMU") and MISSING)]
    if len(kinds) < len(KINDS):
        print(f"without guests: {', '.join(MISSING)} missing", file=sys.stderr)
    hand = Hand(options.seed, options.faults - options.rdma)
    try:
        trio.run(strike, hand, kinds, options.transfers)
        if options.rdma:
            strike_rdma(hand.record, options.rdma, options.seed)
    except KeyboardInterrupt:  # so many there were until now
        tell(hand.record, options.seed, options.json)
        return 130
    except Exception:
        print(f"--seed {options.seed}: failed after {hand.record.fields()}", file=sys.stderr)
        raise
    tell(hand.record, options.seed, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
