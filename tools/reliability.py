#!/usr/bin/env python3
"""The figures of docs/reliability.md: owners of every kind move, and a seeded hand strikes until
there were as many faults and transfers as wanted. Needs root, ip and ss (iproute2); for guests,
QEMU.

    sudo .venv/bin/python tools/reliability.py --faults 1000 --transfers 100

Every byte of every owner is compared with the source's, and every heartbeat of every guest. The
first that is wrong or missing, or an owner that gets no page for two minutes, ends it with exit
code 1, and the seed with which to repeat the choices.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

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
    parser.add_argument("--seed", default=str(time.time_ns()), help="of an earlier run")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if not (kind.startswith("QEMU") and MISSING)]
    if len(kinds) < len(KINDS):
        print(f"without guests: {', '.join(MISSING)} missing", file=sys.stderr)
    hand = Hand(options.seed, options.faults)
    try:
        trio.run(strike, hand, kinds, options.transfers)
    except KeyboardInterrupt:
        return 130
    except Exception:
        print(f"--seed {options.seed}: failed after {hand.record.fields()}", file=sys.stderr)
        raise
    tell(hand.record, options.seed, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
