"""pagenet-bench: the cost of a fault and of a byte on this machine, each figure beside its
floor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bench import (
    CONTENTS,
    ENCODINGS,
    FLOORS,
    LIMIT_SECONDS,
    MOST_BESIDE,
    PLACEMENTS,
    SOURCES,
    EncodingOptions,
    EncodingResult,
    EncodingTarget,
    FaultOptions,
    FaultResult,
    HostileOptions,
    HostileResult,
    NullResult,
    RdmaOptions,
    RdmaResult,
    Sample,
    ScaleOptions,
    ScaleResult,
    StreamOptions,
    StreamResult,
    encoding_targets,
    environment,
    measure_encodings,
    measure_faults,
    measure_hostile,
    measure_null,
    measure_rdma,
    measure_scale,
    measure_streams,
    median,
    plot_latencies,
    serve_floors,
)
from ..errors import UsageError
from ..picture import check_plot
from ..sizes import parse_size
from ._bench_guard import bench_guard
from ._bench_pace import add_pace_options, bench_pace
from ._bench_qemu import add_qemu_options, bench_qemu
from ._bench_restore import add_restore_options, bench_restore
from ._bench_tls import bench_tls
from ._bench_trace import add_trace_options, bench_trace, trace_report
from ._bench_track import bench_track
from ._bench_workload import add_workload_options, bench_workload
from ._command import (
    Parser,
    Report,
    add_lane_option,
    count,
    counts,
    link_rates,
    names,
    prefetch_window,
    run_command,
    sizes,
)
from ._tables import make_console, make_table, shown

__all__ = ["main", "make_parser"]

_PROG = "pagenet-bench"
_SUITES = {
    "all": "Faults and streams, quickly: under a minute.",
    "fault": (
        "The latency of a touch of a missing page: idle, with a Trio task busy, and under load."
    ),
    "stream": "The throughput of the background, by placement and source.",
    "scale": (
        "What grows with the size of the memory: the latency of a page, and the memory that both"
        " sides need for each page."
    ),
    "workload": (
        "The same touches with every order of the background: how many wait, and how long. Needs"
        " root."
    ),
    "pace": (
        "How much of the background is in flight: pagenet's choice beside fixed windows, over links"
        " of several rates and delays. Needs root."
    ),
    "trace": (
        "Run a program, and record which pages of its data it touches first, and when: a trace for"
        " workload."
    ),
    "hostile": (
        "The latency of a page for an honest destination while another peer attacks the same"
        " source."
    ),
    "track": (
        "The cost of tracking writes: to begin, to look, and for each page that was written."
    ),
    "tls": "The cost of encryption: a page, and the background, beside bare loops of OpenSSL.",
    "guard": "The cost of the guard, and how long a thread waits when its destination is killed.",
    "restore": (
        "Guests restored by one daemon, out of memory and out of a store: latency, memory, bytes,"
        " each beside its floor."
    ),
    "null": "The cost of pagenet's machinery with no memory, no bytes and no network behind it.",
    "peer": "The other side of the floors, on the host that --uri is on: runs until it is stopped.",
    "qemu": (
        "A running guest moved by QEMU's own methods and by pagenet's, over the same link:"
        " downtime, work lost, time. Needs root."
    ),
}
_WORDS = {
    "listening": "floors on {uri}",
    "refused": "{peer}: refused: {reason}",
    "skipped": "left out: source {source}: {reason}",
    "too_large": "left out: {bytes} bytes: {needed} bytes must be free",
    "run": "round {round}: {method}, {ram_mib} MiB: {words}",
}

MAX_THREADS = 256
_ROUNDS = {
    "all": 3,
    "fault": 5,
    "stream": 3,
    "scale": 5,
    "hostile": 5,
    "tls": 5,
    "guard": 5,
    "null": 3,
    "track": 5,
    "qemu": 3,
    "workload": 1,
    "pace": 3,
    "restore": 3,
}
_SIZES = {"all": 256 << 20, "fault": 512 << 20, "stream": 512 << 20}
_SHARES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
#: rows of the table: the figure, its label, and the figure that it is compared with
_ROWS = [
    ("floor_local", "bare C, page at hand", ""),
    ("floor", "bare C request, reply, copy", ""),
    ("idle", "idle", "floor"),
    ("floor_busy", "bare C, a Trio task busy", ""),
    ("busy", "idle, a Trio task busy", "idle"),
    ("loaded", "background flat out", "idle"),
]

Fields = dict[str, Any]


def make_parser() -> Parser:
    parser = Parser(
        _PROG,
        "Measure pagenet, each figure beside its floor: bare loops in C, in the same call. Without"
        " a command: all.",
    )
    suites = parser.add_subparsers(
        dest="suite", required=True, metavar="COMMAND", parser_class=_SuiteParser
    )
    for name, words in _SUITES.items():
        suite = suites.add_parser(name, help=words, description=words)
        if name == "peer":
            _add_peer_options(suite)
            continue
        if name == "trace":
            add_trace_options(suite)
            continue
        suite.add_argument(
            "--rounds",
            type=count,
            default=_ROUNDS[name],
            help="rounds, of which the figures are medians (%(default)s)",
        )
        if name == "qemu":
            add_qemu_options(suite)
        if name == "track":
            _add_track_options(suite)
        if name == "restore":
            add_restore_options(suite)
        if name in ("guard", "hostile", "null", "qemu", "restore", "tls", "track"):
            continue
        add_lane_option(suite)
        suite.set_defaults(lane="native")
        if name == "workload":
            add_workload_options(suite)
            continue
        if name == "pace":
            add_pace_options(suite)
            continue
        transports = ["tcp", "unix"] if name == "scale" else ["tcp", "unix", "rdma"]
        suite.add_argument(
            "--transport",
            choices=transports,
            default="tcp",
            help="transport between processes on this host (%(default)s)",
        )
        if name == "scale":
            _add_scale_options(suite)
            continue
        suite.add_argument(
            "--uri", help="measure against the pagenet-serve that listens on URI, on another host"
        )
        suite.add_argument(
            "--floors",
            metavar="URI",
            help="where pagenet-bench peer listens on that host, for a socket's floors",
        )
        suite.add_argument(
            "--size",
            type=parse_size,
            default=_SIZES[name],
            help=f"size of the memory, in bytes or with K, M, G ({_SIZES[name] >> 20}M)",
        )
        if name != "stream":
            _add_fault_options(suite, quick=name == "all")
        if name == "stream":
            _add_stream_options(suite)
    return parser


class _SuiteParser(Parser):
    """The parser of one command, with the options that all commands have."""

    def __init__(self, prog: str, description: str, **_: Any) -> None:
        super().__init__(prog, description)


def _add_peer_options(parser: Parser) -> None:
    parser.add_argument(
        "--listen",
        metavar="URI",
        required=True,
        help="address that --floors dials: tcp://HOST:PORT, unix:PATH",
    )
    parser.add_argument(
        "--plaintext",
        action="store_true",
        help="allow an address that other hosts can reach, unencrypted",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        default=1 << 30,
        help="limit of the bytes that stream may ask for (1G)",
    )


def _add_fault_options(parser: Parser, quick: bool) -> None:
    parser.add_argument(
        "--threads",
        type=counts(MAX_THREADS),
        default=(1, 8) if quick else (1, 8, 64),
        metavar="N,N...",
        help="threads that touch at a time, each number in turn",
    )
    parser.add_argument(
        "--touches",
        type=count,
        default=4000,
        metavar="N",
        help="limit of the touches in each round (%(default)s)",
    )
    parser.add_argument(
        "--memory",
        choices=["anonymous", "memfd", "hugetlb"],
        default="anonymous",
        help="memory to touch (%(default)s)",
    )
    parser.add_argument(
        "--prefetch",
        type=prefetch_window,
        default=(0, 0),
        metavar="FWD,BACK|auto",
        help=(
            "pages to prefetch after and before each touched page; touches of those do not wait,"
            " and are not counted (0,0: demand alone)"
        ),
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="plot the distribution of latencies: FILE.svg or FILE.png",
    )


def _add_stream_options(parser: Parser) -> None:
    parser.add_argument(
        "--chunk",
        type=parse_size,
        default=256 << 10,
        metavar="BYTES",
        help="bytes that the floors send at a time, and that pagenet asks for at a time (256K)",
    )
    parser.add_argument(
        "--lanes",
        type=counts(MAX_THREADS),
        default=(1,),
        metavar="N,N...",
        help="connections for the background, each number in turn (1)",
    )
    parser.add_argument(
        "--placement",
        type=names(PLACEMENTS),
        default=tuple(PLACEMENTS),
        metavar="NAME,...",
        help=f"placements to measure: {_choices(PLACEMENTS)}",
    )
    parser.add_argument(
        "--source",
        type=names(SOURCES),
        default=SOURCES,
        metavar="NAME,...",
        help=f"sources to measure: {_choices(SOURCES)}",
    )
    parser.add_argument(
        "--encoding",
        type=names(ENCODINGS),
        metavar="NAME,...",
        help=(
            f"measure compression instead, with the encodings {_choices(ENCODINGS)}; --content and"
            " --rate measure it too"
        ),
    )
    parser.add_argument(
        "--content",
        type=names(CONTENTS),
        metavar="NAME,...",
        help=f"contents of the pages: {_choices(CONTENTS, 'compressible,random')}",
    )
    parser.add_argument(
        "--rate",
        type=link_rates,
        metavar="MBIT,...",
        help="rates of a link between network namespaces, as root; none: loopback (none)",
    )
    parser.add_argument(
        "--tls", action="store_true", help="encrypt it, where compression is measured"
    )
    parser.add_argument(
        "--zero-every",
        type=int,
        default=2,
        metavar="N",
        help="also measure with one page in N zero (%(default)s; 0: do not)",
    )


def _add_scale_options(parser: Parser) -> None:
    parser.add_argument(
        "--sizes",
        type=sizes,
        default=(256 << 20, 8 << 30),
        metavar="SIZE,...",
        help="sizes of the memory, which is sparse (256M,8G)",
    )
    parser.add_argument(
        "--touches",
        type=count,
        default=4000,
        metavar="N",
        help="pages that are touched, and not zero (%(default)s)",
    )


def _add_track_options(parser: Parser) -> None:
    parser.add_argument(
        "--sizes",
        type=sizes,
        default=(1 << 30, 4 << 30, 16 << 30),
        metavar="SIZE,...",
        help="sizes of the memory, which is sparse (1G,4G,16G)",
    )
    parser.add_argument(
        "--dirty",
        type=parse_size,
        default=128 << 20,
        metavar="SIZE",
        help="part of the memory of which every second page is written (128M)",
    )
    parser.add_argument(
        "--fill",
        action="store_true",
        help="fill all of the memory; sizes that do not fit are left out",
    )


def _choices(names: Iterable[str], default: str = "all of them") -> str:
    return f"{', '.join(names)} ({default})"


# ---- what is measured ----


async def _bench(options: argparse.Namespace, report: Report) -> int:
    if options.suite == "peer":
        await serve_floors(
            options.listen, options.size, plaintext=options.plaintext, on_event=report
        )
        return 0
    if options.suite == "trace":
        return await bench_trace(options, report)
    if getattr(options, "floors", None) is not None and options.uri is None:
        raise UsageError("--floors is for the host that --uri is on: name both")
    plot = getattr(options, "plot", None)
    if plot is not None:
        check_plot(plot)
    lane = {"lane": options.lane} if "lane" in options else {}
    where = {**environment(), **lane}
    report("environment", **where)
    if not report.as_json:
        _print_environment(where)
    summary: Fields = {}
    if getattr(options, "transport", None) == "rdma":
        report("complete", rdma=await _rdma(options, report), environment=where)
        return 0
    if options.suite in ("all", "fault"):
        summary["fault"] = await _fault(options, report)
    if options.suite == "stream" and (
        options.encoding or options.content or options.rate or options.tls
    ):
        summary["encodings"] = await _encodings(options, report)
    elif options.suite in ("all", "stream"):
        summary["stream"] = await _stream(options, report)
    if options.suite == "scale":
        summary["scale"] = await _scale(options, report)
    if options.suite == "null":
        summary["null"] = await _null(options, report)
    if options.suite == "track":
        summary["track"] = await bench_track(options, report)
    if options.suite == "hostile":
        summary["hostile"] = await _hostile(options, report)
    if options.suite == "guard":
        summary["guard"] = await bench_guard(options, report)
    if options.suite == "tls":
        summary["tls"] = await bench_tls(options, report)
    if options.suite == "qemu":
        summary["qemu"] = await bench_qemu(options, report)
    if options.suite == "restore":
        summary["restore"] = await bench_restore(options, report)
    if options.suite == "workload":
        summary["workload"] = await bench_workload(options, report)
    if options.suite == "pace":
        summary["pace"] = await bench_pace(options, report)
    report("complete", **summary, environment=where)
    return 1 if any(summary.get(suite, {}).get("wrong") for suite in ("qemu", "pace")) else 0


async def _fault(options: argparse.Namespace, report: Report) -> Fields:
    wanted = FaultOptions(
        lane=options.lane,
        threads=options.threads,
        touches=options.touches,
        size=options.size,
        memory=options.memory,
        prefetch=options.prefetch,
        transport=options.transport,
        rounds=options.rounds,
        uri=options.uri,
        floors=options.floors,
    )
    results = await measure_faults(wanted)
    summaries = [_fault_summary(result) for result in results]
    for result, summary in zip(results, summaries, strict=True):
        report("result", suite="fault", **_about_fault(result, wanted), **summary)
    if not report.as_json:
        _print_faults(results, wanted)
    if options.plot is not None:
        plot_latencies(options.plot, results, _fault_title(results[0], wanted))
        report("plotted", file=str(options.plot))
    return {**_about_fault(results[0], wanted), **summaries[0]}


def _about_fault(result: FaultResult, options: FaultOptions) -> Fields:
    return {
        "threads": result.threads,
        "lane": result.lane,
        "memory": options.memory,
        "placement": result.placement,
        "prefetch": options.prefetch,
        "transport": options.transport if options.uri is None else options.uri,
    }


def _fault_summary(result: FaultResult) -> Fields:
    return {
        "idle": {
            **_quantiles(result.idle),
            **_quantiles(result.floor, "floor_"),
            **_quantiles(result.floor_local, "floor_local_"),
        },
        "busy": {**_quantiles(result.busy), **_quantiles(result.floor_busy, "floor_")},
        "loaded": {**_quantiles(result.loaded), "not_counted": result.loaded_not_counted},
        "ratios": {
            "idle_p50_to_floor": result.idle.ratio(result.floor, 0.5),
            "busy_p50_to_idle": result.busy.ratio(result.idle, 0.5),
            "loaded_p99_to_idle": result.loaded.ratio(result.idle, 0.99),
        },
    }


def _quantiles(sample: Sample, prefix: str = "") -> Fields:
    quantiles = {
        f"{prefix}{name.replace('.', '')}_us": sample.microseconds(share)
        for name, share in _SHARES.items()
    }
    return {**quantiles, f"{prefix}touches": sample.count}


async def _rdma(options: argparse.Namespace, report: Report) -> Fields:
    """Those of faults and streams that perftest measures too."""
    if options.uri is not None or options.lane != "native":
        raise UsageError("RDMA is measured between processes here, with lanes in C")
    wanted = RdmaOptions(size=options.size, rounds=options.rounds)
    if "touches" in options:
        wanted = replace(wanted, touches=options.touches)
    result = await measure_rdma(wanted)
    fields = _rdma_fields(result)
    report("result", suite="rdma", **fields)
    if not report.as_json:
        _print_rdma(fields)
    return fields


def _cpu_of(rounds: Sequence[tuple[float, float]]) -> Fields:
    user, system = (round(median(seconds), 2) for seconds in zip(*rounds, strict=True))
    return {"user": user, "system": system}


def _rdma_fields(result: RdmaResult) -> Fields:
    return {
        "path": result.path,
        "fault_p50_us": result.faults.idle.microseconds(0.5),
        "fault_touches": result.faults.idle.count,
        "first_in_chunk_p50_us": result.faults.first.microseconds(0.5),
        "first_in_chunk_touches": result.faults.first.count,
        "ib_read_lat_us": round(median(result.read_lat), 1),
        "floor_local_us": result.faults.floor_local.microseconds(0.5),
        "fault_to_floor": result.fault_ratio,
        "background_gbps": round(median(result.background), 4),
        "ib_read_bw_gbps": round(median(result.read_bw), 4),
        "background_to_floor": result.background_ratio,
        "background_allocated_gbps": round(median(result.background_allocated), 4),
        "background_allocated_to_floor": result.background_allocated_ratio,
        "bytes": result.size,
        "set_up_s": round(median(result.set_up), 3),
        "source_cpu_s": {
            transport: _cpu_of(rounds) for transport, rounds in result.source_cpu.items()
        },
    }


async def _stream(options: argparse.Namespace, report: Report) -> Fields:
    quick = options.suite == "all"
    wanted = StreamOptions(
        lane=options.lane,
        size=options.size,
        transport=options.transport,
        rounds=options.rounds,
        uri=options.uri,
        floors=options.floors,
    )
    if quick:
        wanted = replace(wanted, sources=("file",), zero_every=0)
    else:
        chosen = {
            "chunk": options.chunk,
            "lanes": options.lanes,
            "placements": options.placement,
            "sources": options.source,
        }
        wanted = replace(wanted, **chosen, zero_every=options.zero_every)
    results = await measure_streams(wanted, report)
    floors = {result.name: result.gbps for result in results if result.is_floor}
    for result in results:
        report(
            "result",
            suite="stream",
            **_stream_fields(result, floors.get(FLOORS.get(result.name, ""))),
            chunk=wanted.chunk,
        )
    if not report.as_json:
        _print_streams(results, wanted)
    best = max(
        (result for result in results if not result.is_floor and not result.zero_share),
        key=lambda result: result.gbps,
    )
    return {
        "best_gbps": best.gbps,
        "best": f"{best.name} from {best.source}",
        "floor_copy_gbps": floors.get("send/recv+copy"),
        "floor_write_gbps": floors.get("send/recv+write"),
        "floor_continue_gbps": floors.get("send/recv+continue"),
        "floor_receive_gbps": floors.get("send/recv"),
        "floor_memcpy_gbps": floors["memcpy"],
        "gbps": {_stream_name(result): result.gbps for result in results if not result.is_floor},
        "chunk": wanted.chunk,
    }


async def _encodings(options: argparse.Namespace, report: Report) -> Fields:
    if options.uri is not None or options.transport != "tcp":
        raise UsageError("compression is measured between processes here, over tcp")
    wanted = EncodingOptions(
        lane=options.lane,
        size=options.size,
        chunk=options.chunk,
        rounds=options.rounds,
        tls=options.tls,
    )
    chosen = {"encodings": options.encoding, "contents": options.content, "rates": options.rate}
    wanted = replace(wanted, **{name: value for name, value in chosen.items() if value})
    results = await measure_encodings(wanted)
    rows = [_encoding_fields(result) for result in results]
    for row in rows:
        report("result", suite="encodings", **row)
    held = encoding_targets(results, tls=options.tls)
    if not report.as_json:
        _print_encodings(results, held, wanted)
    return {
        "results": rows,
        "targets": [{**target._asdict(), "met": target.met} for target in held],
    }


def _encoding_fields(result: EncodingResult) -> Fields:
    return {
        "encoding": result.encoding,
        "content": result.content,
        "rate": result.rate,
        "bytes": result.size,
        "mbps": result.mbps,
        "bytes_wire": result.wire_bytes,
        "share": result.share,
        "ratio": result.ratio,
    }


def _stream_name(result: StreamResult) -> str:
    zeros = f", {result.zero_share:.0%} zero" if result.zero_share else ""
    lanes = f", {result.lanes} lanes" if result.lanes > 1 else ""
    return f"{result.name} from {result.source}{zeros}{lanes}"


def _stream_fields(result: StreamResult, floor: float | None) -> Fields:
    fields: Fields = {
        "name": result.name,
        "floor": result.is_floor,
        "gbps": result.gbps,
        "bytes": result.size,
    }
    if not result.is_floor:
        ratio = round(result.gbps / floor, 2) if floor else None
        fields |= {
            "source": result.source,
            "zero_share": result.zero_share,
            "lane": result.lane,
            "lanes": result.lanes,
        }
        fields["floor_copy_gbps"] = floor
        fields["ratio"] = ratio
    return fields


async def _scale(options: argparse.Namespace, report: Report) -> Fields:
    wanted = ScaleOptions(
        lane=options.lane,
        sizes=options.sizes,
        touches=options.touches,
        transport=options.transport,
        rounds=options.rounds,
    )
    results = await measure_scale(wanted)
    summaries = [_scale_summary(result, results[0]) for result in results]
    for summary in summaries:
        report("result", suite="scale", **summary)
    if not report.as_json:
        _print_scale(summaries)
    return {"sizes": summaries}


def _scale_summary(result: ScaleResult, first: ScaleResult) -> Fields:
    return {
        "bytes": result.size,
        **_quantiles(result.latencies),
        "p50_to_first": result.latencies.ratio(first.latencies, 0.5),
        "p99_to_first": result.latencies.ratio(first.latencies, 0.99),
        "source_bytes_per_page": round(result.source_bytes / result.pages, 2),
        "destination_bytes_per_page": round(result.destination_bytes / result.pages, 2),
    }


async def _hostile(options: argparse.Namespace, report: Report) -> Fields:
    alone, *attacked = await measure_hostile(HostileOptions(rounds=options.rounds))
    rows = [_hostile_fields(result, alone) for result in (alone, *attacked)]
    for row in rows:
        report("result", suite="hostile", **row)
    if not report.as_json:
        _print_hostile(rows)
    return {row["attack"]: row for row in rows}


def _hostile_fields(result: HostileResult, alone: HostileResult) -> Fields:
    ratios = {
        f"{name}_to_alone": result.latencies.ratio(alone.latencies, share)
        for name, share in _SHARES.items()
    }
    return {"attack": result.attack or "alone", **_quantiles(result.latencies), **ratios}


async def _null(options: argparse.Namespace, report: Report) -> Fields:
    results = await measure_null(rounds=options.rounds)
    for result in results:
        report(
            "result",
            suite="null",
            name=result.name,
            unit=result.unit,
            per_second=result.per_second,
            ns=result.nanoseconds,
        )
    if not report.as_json:
        _print_null(results)
    return {result.name: result.per_second for result in results}


# ---- for people ----


def _print_environment(where: Fields) -> None:
    make_console().print(
        "  ".join(f"[dim]{name.replace('_', ' ')}[/dim] {value}" for name, value in where.items())
    )


def _window_name(prefetch: tuple[int, int] | None) -> str:
    return "auto" if prefetch is None else f"{prefetch[0]},{prefetch[1]}"


def _fault_title(result: FaultResult, options: FaultOptions) -> str:
    peer = options.transport if options.uri is None else options.uri
    window = (
        "prefetch off"
        if options.prefetch == (0, 0)
        else f"prefetch {_window_name(options.prefetch)}"
    )
    memory = f"{options.memory} memory, placement {result.placement}"
    return f"Touch to resume, {result.lane} lanes, {memory}, {peer}, {window}"


def _print_faults(results: Sequence[FaultResult], options: FaultOptions) -> None:
    console = make_console()
    console.print(
        f"\n[bold]{_fault_title(results[0], options)}[/bold]  (µs; medians of {options.rounds}"
        " rounds)"
    )
    table = make_table("threads", "", *_SHARES, "touches", "p50 is", "p99 is")
    table.columns[1].justify = "left"
    for result in results:
        threads = str(result.threads)
        for name, label, beside in _ROWS:
            sample: Sample = getattr(result, name)
            if sample.count:
                figures = [shown(sample.microseconds(share)) for share in _SHARES.values()]
                ratios = ["", ""]
                if beside:
                    least: Sample = getattr(result, beside)
                    what = "idle" if beside == "idle" else "floor"
                    ratios = [
                        f"{shown(sample.ratio(least, share), 'x')} {what}" for share in (0.5, 0.99)
                    ]
                dim = "dim" if name.startswith("floor") else ""
                table.add_row(threads, label, *figures, f"{sample.count:,}", *ratios, style=dim)
                threads = ""
        table.add_section()
    console.print(table)
    skipped = sum(result.loaded_not_counted for result in results)
    console.print(
        f"Under load only touches that waited count: {skipped:,} others fell on pages that the"
        " background had brought, or came after it was done. No measurement takes more than"
        f" {LIMIT_SECONDS:g} s.",
        style="dim",
    )


def _print_rdma(fields: Fields) -> None:
    console = make_console()
    console.print(f"\n[bold]RDMA by {fields['path']}[/bold]  (medians)")
    table = make_table("", "pagenet", "perftest", "ratio")
    table.columns[0].justify = "left"
    floor = f"{shown(fields['ib_read_lat_us'])} + {shown(fields['floor_local_us'])}"
    table.add_row(
        "touch to resume, p50, us",
        shown(fields["fault_p50_us"]),
        floor,
        shown(fields["fault_to_floor"], "x"),
    )
    table.add_row("the same, first in its chunk", shown(fields["first_in_chunk_p50_us"]), "-", "-")
    for name, label in (
        ("background", "background, GB/s"),
        ("background_allocated", "the same, memory allocated before"),
    ):
        rates = (f"{fields[rate]:.3f}" for rate in (f"{name}_gbps", "ib_read_bw_gbps"))
        table.add_row(label, *rates, shown(fields[f"{name}_to_floor"], "x"))
    console.print(table)
    set_up = (
        f"From the call to the first page: {fields['set_up_s']:.2f} s, which are not in the"
        " background's rate."
    )
    console.print(set_up, style="dim")
    cpu = ", ".join(
        f"{used['user']:.2f} s user and {used['system']:.2f} s system over {transport}"
        for transport, used in fields["source_cpu_s"].items()
    )
    console.print(
        f"Processor time of the source for {fields['bytes'] >> 20} MiB: {cpu}.", style="dim"
    )


def _print_streams(results: Sequence[StreamResult], options: StreamOptions) -> None:
    console = make_console()
    title = (
        f"Background, {options.lane} lanes,"
        f" {options.transport if options.uri is None else options.uri}"
    )
    size = f"{results[-1].size >> 20} MiB, floors in chunks of {options.chunk >> 10} KiB"
    console.print(f"\n[bold]{title}, {size}[/bold]  (medians of {options.rounds} rounds)")
    table = make_table("placement", "source", "lanes", "GB/s", "floor", "ratio")
    table.columns[1].justify = "left"
    floors = {result.name: result.gbps for result in results if result.is_floor}
    for result in results:
        if result.is_floor:
            table.add_row(result.name, "bare C", "", f"{result.gbps:.2f}", style="dim")
            continue
        floor = floors.get(FLOORS[result.name])
        zeros = f", {result.zero_share:.0%} zero" if result.zero_share else ""
        beside = ("-", "-") if floor is None else (f"{floor:.2f}", f"{result.gbps / floor:.2f}x")
        table.add_row(
            result.name, result.source + zeros, str(result.lanes), f"{result.gbps:.2f}", *beside
        )
    console.print(table)
    console.print(
        "The floor of each allocates as early or as late. Every page was compared afterwards.",
        style="dim",
    )


def _link_name(rate: int | None) -> str:
    return "loopback" if rate is None else f"{rate} Mbit/s"


def _print_encodings(
    results: Sequence[EncodingResult], held: Sequence[EncodingTarget], options: EncodingOptions
) -> None:
    console = make_console()
    console.print(
        f"\n[bold]Compression{', TLS' if options.tls else ''}, {options.lane} lanes,"
        f" {options.size >> 20} MiB[/bold]  (medians of"
        f" {options.rounds} rounds)"
    )
    table = make_table(
        "content", "link", "encoding", "MB/s", "MiB on the wire", "compressed", "ratio"
    )
    table.columns[1].justify = table.columns[2].justify = "left"
    for result in results:
        ratio = "-" if result.ratio is None else f"{result.ratio:.2f}"
        wire, share = f"{result.wire_bytes / (1 << 20):.1f}", f"{result.share:.0%}"
        table.add_row(
            result.content,
            _link_name(result.rate),
            result.encoding,
            f"{result.mbps:.1f}",
            wire,
            share,
            ratio,
        )
        if result.encoding == options.encodings[-1]:
            table.add_section()
    console.print(table)
    console.print(
        "MB/s are of uncompressed pages. Every page was compared after its transfer.",
        style="dim",
    )
    for content, rate, other, times, at_least in held:
        met = "met" if times >= at_least else "[bold]not met[/bold]"
        console.print(
            f"auto, {content}, {_link_name(rate)}: {times:.2f}x {other}, at least {at_least:g}x:"
            f" {met}"
        )


def _print_scale(rows: Sequence[Fields]) -> None:
    table = make_table(
        "MiB", "p50 µs", "p99 µs", "p50 is", "p99 is", "source, B/page", "destination, B/page"
    )
    for row in rows:
        ratios = [shown(row[name], "x first") for name in ("p50_to_first", "p99_to_first")]
        weights = [
            f"{row[name]:.2f}" for name in ("source_bytes_per_page", "destination_bytes_per_page")
        ]
        table.add_row(
            str(row["bytes"] >> 20), shown(row["p50_us"]), shown(row["p99_us"]), *ratios, *weights
        )
    make_console().print(table)


def _print_hostile(rows: Sequence[Fields]) -> None:
    table = make_table(
        "beside", "p50 µs", "p99 µs", "p50 is", "p99 is", f"p99 at most {MOST_BESIDE:g}x"
    )
    for row in rows:
        ratios = [shown(row[f"{name}_to_alone"], "x alone") for name in ("p50", "p99")]
        met = (
            ""
            if row["attack"] == "alone"
            else "met"
            if row["p99_to_alone"] <= MOST_BESIDE
            else "missed"
        )
        table.add_row(row["attack"], shown(row["p50_us"]), shown(row["p99_us"]), *ratios, met)
    make_console().print(table)


def _print_null(results: Sequence[NullResult]) -> None:
    table = make_table("what", "per second", "ns each")
    for result in results:
        table.add_row(
            f"{result.name} ({result.unit})", f"{result.per_second:,}", shown(result.nanoseconds)
        )
    make_console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in (*_SUITES, "-h", "--help", "--version"):
        arguments.insert(0, "all")
    options = make_parser().parse_args(arguments)
    report = (
        trace_report(_PROG, options.json)
        if options.suite == "trace"
        else Report(_PROG, options.json, _WORDS)
    )
    return run_command(lambda: _bench(options, report), report)


if __name__ == "__main__":
    sys.exit(main())
