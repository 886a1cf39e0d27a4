"""The fields of a status: maps of values that msgpack and JSON can hold. Units are bytes, pages,
seconds, and microseconds (``_us``)."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import trio

from ..destination.caching import HostCache
from ..destination.hosting import Guest, Host
from ..destination.pulling import Transfer
from ..progress import rounded_share
from ..source.precopy import Precopy, about_round
from ..source.serving import Server
from ..statistics import ClassStatistics, Histogram, TransferStatistics

__all__ = ["Rates", "host_status", "precopy_status", "server_status", "transfer_status"]

# Rates are of the last WINDOW_SECONDS: steady enough to read, quick enough to show the effect of a
# command.
WINDOW_SECONDS = 2.0
LOOKS = 8
#: Guests in one status.
MOST_GUESTS = 256


def precopy_status(precopy: Precopy) -> dict[str, object]:
    """``round``: that which runs; ``rounds``: how many there are to be; ``last``: what the last
    that is over has left, as the event ``round`` has it."""
    over = precopy.over
    return {
        "state": "copying",
        "round": len(over) + 1,
        "rounds": precopy.rounds,
        "last": about_round(over[-1]) if over else None,
    }


def host_status(host: Host) -> dict[str, object]:
    """Many guests: few words about each. A message of the control protocol has room for so many."""
    guests = list(host.guests.values())
    return {
        "state": "hosting",
        "snapshots": [
            {
                "name": each.name,
                "uri": each.uri,
                "uffd_socket": each.path,
                "cache": None if each.cache is None else _about_cache(each.cache),
            }
            for each in host.snapshots.values()
        ],
        "guests": [_about(guest) for guest in guests[:MOST_GUESTS]],
        "guests_now": len(guests),
        "guests_completed": host.completed,
        "guests_gone": host.gone,
        "guests_failed": host.failed,
    }


def _about_cache(cache: HostCache) -> dict[str, object]:
    now = cache.transfer.statistics()
    return {
        "state": cache.transfer.state,
        "share": _share(now),
        "bytes_resident": cache.bytes_resident,
        "bytes_wire": now.wire_bytes,
        "faults": now.demand.faults,
        "disconnected": _disconnected(cache.transfer),
    }


def _about(guest: Guest) -> dict[str, object]:
    found: dict[str, object] = {
        "guest": guest.number,
        "snapshot": guest.snapshot,
        "pid": guest.pid,
        "state": "starting",
    }
    transfer = guest.transfer
    if transfer is not None:
        now = transfer.statistics()
        found |= {
            "state": transfer.state,
            "share": _share(now),
            "faults": now.demand.faults,
        }
    return found


@dataclass(frozen=True, slots=True)
class _Look:
    time: float
    resident: float  # bytes
    wire: int
    faults: int


class Rates:
    """The rates of a transfer, from its statistics at intervals."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._looks = deque([self._look()], maxlen=LOOKS)

    async def watch(self) -> None:
        while not self._transfer.finished.is_set():
            await trio.sleep(WINDOW_SECONDS / LOOKS)
            self._looks.append(self._look())

    def _look(self) -> _Look:
        now = self._transfer.statistics()
        return _Look(
            time.monotonic(), now.here * _page_size(now), now.wire_bytes, now.demand.faults
        )

    def now(self) -> dict[str, float]:
        """The rates of the last two seconds, or since the beginning if that is later; all 0 once
        the transfer is complete."""
        last, first = self._look(), self._looks[0]
        seconds = last.time - first.time
        if self._transfer.finished.is_set() or seconds <= 0:
            return {"bytes_per_s": 0.0, "wire_bytes_per_s": 0.0, "faults_per_s": 0.0}
        return {
            "bytes_per_s": round((last.resident - first.resident) / seconds, 1),
            "wire_bytes_per_s": round((last.wire - first.wire) / seconds, 1),
            "faults_per_s": round((last.faults - first.faults) / seconds, 1),
        }


def transfer_status(transfer: Transfer, rates: Rates) -> dict[str, object]:
    """The status of a destination."""
    now, speed = transfer.statistics(), rates.now()
    resident = now.done * _page_size(now)
    prefetch = transfer.prefetch
    return {
        "state": transfer.state,
        "peer": transfer.peer,
        "disconnected": _disconnected(transfer),
        "reconnected": transfer.reconnected,
        "lane": transfer.lane,
        "placement": now.placement,
        "pages": now.pages,
        "bytes": now.size,
        "pages_resident": now.done,
        "bytes_resident": int(resident),
        "share": _share(now),
        "seconds": round(now.seconds, 3),
        "seconds_left": _seconds_left(now.size - resident, speed["bytes_per_s"]),
        **speed,
        "bytes_wire": now.wire_bytes,
        "zero_pages": now.zero_pages,
        "faults": now.demand.faults,
        "fault_us": _percentiles(now.fault_latency),
        "classes": {
            name: _class(getattr(now, name)) for name in ("demand", "prefetch", "background")
        },
        "schedule": transfer.background,
        "begun": transfer.background_begun,
        "paused": transfer.background_paused,
        "max_bandwidth": transfer.max_bandwidth,
        "prefetch": None if prefetch is None else list(prefetch),
        "prefetch_unused": rounded_share(now.prefetch_unused),
        "compressed": _compressed(now),
    }


def server_status(server: Server) -> dict[str, object]:
    """The status of a source."""
    asked = server.statistics()
    return {
        "state": "serving" if server.sessions else "waiting",
        "uri": server.uri or None,
        "pages": server.region.pages,
        "bytes": server.region.size,
        "pages_asked": asked.asked,
        "pages_demanded": asked.demanded,
        "seconds": round(asked.seconds, 3),
        "destinations": server.peers,
        "complete": server.is_complete,
    }


def _disconnected(transfer: Transfer) -> dict[str, object] | None:
    if transfer.disconnected is None:
        return None
    seconds, reason = transfer.disconnected
    return {"seconds": round(seconds, 3), "reason": reason}


def _page_size(now: TransferStatistics) -> float:
    """In bytes, on average: blocks may have pages of several sizes."""
    return now.size / now.pages if now.pages else 0.0


def _share(now: TransferStatistics) -> float:
    return round(now.here / now.pages, 6) if now.pages else 1.0


def _seconds_left(rest: float, rate: float) -> float | None:
    if rest <= 0:
        return 0.0
    return round(rest / rate, 1) if rate > 0 else None


def _percentiles(latency: Histogram) -> dict[str, float | None]:
    return {
        name: latency.microseconds(share)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
    }


def _class(row: ClassStatistics) -> dict[str, int]:
    names = ("pages", "zero_pages", "wire_bytes", "requests", "existed", "dropped")
    return {name: getattr(row, name) for name in names}


def _compressed(now: TransferStatistics) -> dict[str, object]:
    rows = (now.demand, now.prefetch, now.background)
    ratio = now.lz4_ratio
    return {
        "runs": sum(row.lz4_runs for row in rows),
        "bytes": now.lz4_bytes,
        "bytes_wire": sum(row.lz4_wire_bytes for row in rows),
        "share": round(now.lz4_share, 4),
        "ratio": None if ratio is None else round(ratio, 2),
    }
