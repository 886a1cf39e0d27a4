"""The metrics of a destination, a source, or a host of many guests: read when they are asked for,
from counters that are kept anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING

from .. import __version__
from ..destination.hosting import Host
from ..destination.pulling import Transfer
from ..source.serving import Server
from ..statistics import Histogram, TransferStatistics

if TYPE_CHECKING:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
        Metric,
        StateSetMetricFamily,
    )

__all__ = ["Subject", "families"]

Subject = Transfer | Server | Host | None
# Seconds: the upper edges of the buckets, as QEMU has them: powers of two, from 1 us to 16.8 s.
EDGES = [2**power * 1e-6 for power in range(25)]
_CLASSES = ("demand", "prefetch", "background")
_STATES = ("held", "running", "disconnected", "complete")


@cache
def _core() -> ModuleType:
    import prometheus_client.core

    return prometheus_client.core


def families(program: str, subject: Subject) -> Iterator[Metric]:
    yield _info(program)
    match subject:
        case Transfer():
            yield from _of_transfers({"": subject})
            yield _faults(subject.statistics().demand.latency)
        case Host():
            yield from _of_host(subject)
        case Server():
            yield from _of_server(subject)


def _info(program: str) -> Metric:
    info: InfoMetricFamily = _core().InfoMetricFamily("pagenet", "This daemon.")
    info.add_metric([], {"program": program, "version": __version__})
    return info


# ---- transfers ----


def _of_transfers(transfers: Mapping[str, Transfer]) -> Iterator[Metric]:
    """``transfers``: by the name of the snapshot, which is empty where there is but one."""
    yield _states(transfers)
    now = {name: transfer.statistics() for name, transfer in transfers.items()}
    yield from _sizes(now)
    yield _pages(now)
    yield from _per_class(now)
    yield from _compressed(now)
    yield from _source(transfers)
    yield from _background(transfers)


def _gauge(name: str, words: str, values: Mapping[str, float | None]) -> Metric:
    gauge: GaugeMetricFamily = _core().GaugeMetricFamily(name, words, labels=["snapshot"])
    for snapshot, value in values.items():
        if value is not None:
            gauge.add_metric([snapshot], value)
    return gauge


def _counter(name: str, words: str, values: Mapping[str, float]) -> Metric:
    counter: CounterMetricFamily = _core().CounterMetricFamily(name, words, labels=["snapshot"])
    for snapshot, value in values.items():
        counter.add_metric([snapshot], value)
    return counter


def _states(transfers: Mapping[str, Transfer]) -> Metric:
    states: StateSetMetricFamily = _core().StateSetMetricFamily(
        "pagenet_state", "What a transfer does.", labels=["snapshot"]
    )
    for name, transfer in transfers.items():
        states.add_metric([name], {state: state == transfer.state for state in _STATES})
    return states


def _sizes(now: Mapping[str, TransferStatistics]) -> Iterator[Metric]:
    yield _gauge("pagenet_pages", "Pages of the memory.", _each(now, lambda one: one.pages))
    yield _gauge("pagenet_region_bytes", "Size of the memory.", _each(now, lambda one: one.size))
    yield _gauge(
        "pagenet_resident_pages",
        "Pages that are in place, or given up by the owner.",
        _each(now, lambda one: one.done),
    )
    yield _gauge(
        "pagenet_resident_bytes",
        "The same in bytes; blocks may have pages of several sizes, of which the mean is taken.",
        _each(now, lambda one: one.done * one.size / one.pages if one.pages else 0),
    )


def _each(
    now: Mapping[str, TransferStatistics], of: Callable[[TransferStatistics], float]
) -> dict[str, float]:
    return {name: of(one) for name, one in now.items()}


def _pages(now: Mapping[str, TransferStatistics]) -> Metric:
    pages: CounterMetricFamily = _core().CounterMetricFamily(
        "pagenet_pages",
        "Pages that came, by why they were asked for, and what became of them.",
        labels=["snapshot", "class", "result"],
    )
    for name, one in now.items():
        for class_ in _CLASSES:
            row = getattr(one, class_)
            results = {
                "placed": row.pages - row.zero_pages,
                "zero": row.zero_pages,
                "existed": row.existed,
                "dropped": row.dropped,
            }
            for result, count in results.items():
                pages.add_metric([name, class_, result], max(0, count))
    return pages


def _per_class(now: Mapping[str, TransferStatistics]) -> Iterator[Metric]:
    wire: CounterMetricFamily = _core().CounterMetricFamily(
        "pagenet_wire_bytes", "Bytes of pages that came.", labels=["snapshot", "class"]
    )
    requests: CounterMetricFamily = _core().CounterMetricFamily(
        "pagenet_requests", "Requests for pages.", labels=["snapshot", "class"]
    )
    for name, one in now.items():
        for class_ in _CLASSES:
            row = getattr(one, class_)
            wire.add_metric([name, class_], row.wire_bytes)
            requests.add_metric([name, class_], row.requests)
    yield from (wire, requests)
    yield _counter(
        "pagenet_faults",
        "Faults, and pages of a cache that guests waited for.",
        _each(now, lambda one: one.demand.faults),
    )


def _compressed(now: Mapping[str, TransferStatistics]) -> Iterator[Metric]:
    rows = {name: [getattr(one, class_) for class_ in _CLASSES] for name, one in now.items()}
    yield _counter(
        "pagenet_compressed_bytes",
        "Bytes of pages that came compressed.",
        {name: sum(row.lz4_bytes for row in each) for name, each in rows.items()},
    )
    yield _counter(
        "pagenet_compressed_wire_bytes",
        "What those took on the wire.",
        {name: sum(row.lz4_wire_bytes for row in each) for name, each in rows.items()},
    )


def _source(transfers: Mapping[str, Transfer]) -> Iterator[Metric]:
    yield _counter(
        "pagenet_reconnects",
        "How often the source was met again.",
        {name: one.reconnected for name, one in transfers.items()},
    )
    away = {name: one.disconnected for name, one in transfers.items()}
    yield _gauge(
        "pagenet_disconnected_seconds",
        "For how long the source has been away; 0 if it is there.",
        {name: 0 if found is None else found[0] for name, found in away.items()},
    )


def _background(transfers: Mapping[str, Transfer]) -> Iterator[Metric]:
    yield _gauge(
        "pagenet_background_paused",
        "1 while no pages are brought that no thread waits for.",
        {name: int(one.background_paused) for name, one in transfers.items()},
    )
    yield _gauge(
        "pagenet_background_limit_bytes_per_second",
        "The limit of the background's rate, if there is one.",
        {name: one.max_bandwidth for name, one in transfers.items()},
    )


def _faults(latency: Histogram) -> Metric:
    family: HistogramMetricFamily = _core().HistogramMetricFamily(
        "pagenet_fault_duration_seconds",
        "From a fault to its page in place. A latency is up to 12.5 % less than its bucket says.",
    )
    counts = [0] * (len(EDGES) + 1)
    total = 0.0
    for low, high, count in latency.ranges():
        seconds = high / 1e9
        total += count * (low + high) / 2e9
        place = next((at for at, edge in enumerate(EDGES) if seconds <= edge), len(EDGES))
        counts[place] += count
    edges = [*(repr(edge) for edge in EDGES), "+Inf"]
    family.add_metric([], list(zip(edges, accumulate(counts), strict=True)), total)
    return family


# ---- many guests ----


def _of_host(host: Host) -> Iterator[Metric]:
    caches = {each.name: each.cache for each in host.snapshots.values() if each.cache is not None}
    yield from _of_transfers({name: cache.transfer for name, cache in caches.items()})
    yield _gauge(
        "pagenet_cache_bytes",
        "What the pages of a cache take of this host's memory.",
        {name: cache.bytes_resident for name, cache in caches.items()},
    )
    yield _core().GaugeMetricFamily("pagenet_guests", "Guests that are here.", len(host.guests))
    ended: CounterMetricFamily = _core().CounterMetricFamily(
        "pagenet_guests_ended", "Guests that ended.", labels=["result"]
    )
    for result in ("completed", "gone", "failed"):
        ended.add_metric([result], getattr(host, result))
    yield ended
    yield _faults(host.fault_latency())


# ---- a source ----


def _of_server(server: Server) -> Iterator[Metric]:
    asked = server.statistics()
    yield _gauge("pagenet_pages", "Pages of the memory.", {"": server.region.pages})
    yield _gauge("pagenet_region_bytes", "Size of the memory.", {"": server.region.size})
    yield _core().CounterMetricFamily(
        "pagenet_asked_pages", "Pages that were asked for.", asked.asked
    )
    yield _core().CounterMetricFamily(
        "pagenet_demanded_pages", "Those that a thread waited for.", asked.demanded
    )
    yield _core().GaugeMetricFamily(
        "pagenet_destinations", "Destinations that are connected.", len(server.peers)
    )
