"""How the working set fills under each order, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...picture import save_figure
from ._workload import WorkloadResult

__all__ = ["plot_workload"]

# Colours that differ in lightness too (Okabe and Ito); clairvoyant, which no real order can be, is
# grey.
_STYLES = {
    "off": ("#000000", ":"),
    "linear 8/8": ("#56b4e9", "-"),
    "linear": ("#0072b2", "-"),
    "follow 8/8": ("#cc79a7", "-"),
    "hot": ("#d55e00", "-"),
    "recorded": ("#009e73", "-"),
    "clairvoyant": ("0.6", "--"),
}


def plot_workload(path: Path, results: Sequence[WorkloadResult], title: str) -> None:
    """A panel for each trace, a curve for each order: the share of the working set that is there,
    over time."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    traces = list(dict.fromkeys(result.trace for result in results))
    figure = Figure(figsize=(1.2 + 4.0 * len(traces), 4.4), layout="constrained")
    panels = figure.subplots(1, len(traces), sharey=True, squeeze=False)[0]
    for panel, trace in zip(panels, traces, strict=True):
        for result in results:
            if result.trace == trace:
                color, style = _STYLES[result.order]
                curve = result.rounds[-1]["curve"]
                shares = [there / result.pages for _, there in curve]
                panel.plot(
                    [seconds for seconds, _ in curve],
                    shares,
                    label=result.order,
                    color=color,
                    linestyle=style,
                )
        panel.set_title(Path(trace).name, fontsize=10)
        panel.set_xlabel("s")
        panel.set_ylim(0, 1.02)
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of the working set that is there")
    save_figure(figure, path, title, panels[0])
