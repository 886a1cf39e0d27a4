"""Pictures: the distribution of fault latencies, and the work of a guest that moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..picture import save_figure
from ._fault import FaultResult
from ._figures import Sample
from .qemu._qemu import Migration, QemuResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_latencies", "plot_work"]

# Floors are grey; pagenet's curves have colours that differ in lightness too (Okabe and Ito).
_CURVES = [
    ("floor_local", "bare C, page at hand", "0.7", ":"),
    ("floor", "bare C request and reply", "0.45", "--"),
    ("idle", "idle", "#0072b2", "-"),
    ("busy", "a Trio task busy", "#56b4e9", "-"),
    ("loaded", "background flat out", "#d55e00", "-"),
]
_POINTS = 500
_SHARES = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999)


def plot_latencies(path: Path, results: Sequence[FaultResult], title: str) -> None:
    """One panel for each number of threads."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(1.2 + 4.2 * len(results), 4.4), layout="constrained")
    panels = figure.subplots(1, len(results), sharex=True, sharey=True, squeeze=False)[0]
    for panel, result in zip(panels, results, strict=True):
        _draw(panel, result)
    panels[0].set_ylabel("share of touches that took no longer")
    save_figure(figure, path, title, panels[0])


def _ranks(count: int) -> list[int]:
    """Enough of the ranks for a smooth curve over the nines: a file need not hold every touch."""
    return sorted(
        {
            min(count - 1, round(count * (1 - count ** (-step / _POINTS))))
            for step in range(_POINTS + 1)
        }
    )


def _draw(panel: Axes, result: FaultResult) -> None:
    from matplotlib.ticker import EngFormatter

    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    panel.set_title(threads, fontsize=10)
    for name, label, color, style in _CURVES:
        sample: Sample = getattr(result, name)
        if sample.count:
            latencies = sample.pooled()
            ranks = _ranks(len(latencies))
            rest = [1 - rank / len(latencies) for rank in ranks]
            seconds = [latencies[rank] / 1e9 for rank in ranks]
            panel.plot(seconds, rest, label=label, color=color, linestyle=style)
    # The axis is logarithmic in the rest: linear in the share, the tail would be a line along the
    # top.
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(1.3, 0.8e-4)
    panel.set_yticks(
        [1 - share for share in _SHARES],
        [f"{share:.2%}".rstrip("0%").rstrip(".") + " %" for share in _SHARES],
    )
    panel.minorticks_off()
    panel.xaxis.set_major_formatter(EngFormatter("s"))
    panel.set_xlabel("touch to resume")
    panel.grid(color="0.92")
    panel.spines[["top", "right"]].set_visible(False)


# ---- a guest that moves ----

_METHOD_COLORS = {
    "precopy": "0.7",
    "postcopy": "#e69f00",
    "preempt": "#d55e00",
    "qemu-hybrid": "#cc79a7",
    "qemu-hybrid-preempt": "#882255",
    "pagenet": "#0072b2",
    "attach": "#56b4e9",
    "hybrid": "#009e73",
    "hybrid-attach": "#7fd1b9",
    "preempt-tls": "#a04000",
    "pagenet-tls": "#004c7f",
    "hybrid-tls": "#005f45",
}
_FIXED_COLOR = "0.4"  # of pagenet with a window that does not adapt
_LEGEND_COLUMNS = 4
_BIN_SECONDS = 0.1
_BEFORE_SECONDS = 1.0
# Seconds. Later there is only a precopy that does not converge.
_MAX_SECONDS = 60.0


def plot_work(
    path: Path, results: Sequence[QemuResult], names: Mapping[str, str], title: str
) -> None:
    """One panel for each size of RAM, and one curve for each method, labelled by ``names``: the
    round with the median of the longest gaps. A dot marks when the guest resumed at the
    destination."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    rams = sorted({result.ram for result in results})
    figure = Figure(figsize=(9.0, 1.2 + 3.2 * len(rams)), layout="constrained")
    panels = figure.subplots(len(rams), 1, squeeze=False)[:, 0]
    for panel, ram in zip(panels, rams, strict=True):
        panel.set_title(f"{ram >> 20} MiB", fontsize=10)
        for result in results:
            if result.ram == ram:
                _draw_work(panel, result.typical(), names.get(result.method, result.method))
        panel.set_ylabel("pages written in 100 ms")
        panel.set_ylim(bottom=0)
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(
        "seconds since the migration began; the dot: the guest goes on at the destination"
    )
    save_figure(figure, path, title, panels[0], _LEGEND_COLUMNS)


def _draw_work(panel: Axes, migration: Migration, name: str) -> None:
    story, began = migration.story, migration.began
    last = min(_MAX_SECONDS, story.beats[-1].time - began)
    edges = [
        number * _BIN_SECONDS
        for number in range(round(-_BEFORE_SECONDS / _BIN_SECONDS), int(last / _BIN_SECONDS) + 1)
    ]
    written = [story.writes_at(began + edge) for edge in edges]
    work = [after - before for before, after in pairwise(written)]
    color = _METHOD_COLORS.get(migration.method, _FIXED_COLOR)
    panel.plot(edges[1:], work, label=name, color=color, linewidth=1.2)
    if migration.resumed is not None:
        place = int((migration.resumed - began - edges[0]) / _BIN_SECONDS)
        panel.plot(
            [edges[place + 1]],
            [work[place]],
            marker="o",
            color=color,
            markersize=6,
            linestyle="none",
        )
