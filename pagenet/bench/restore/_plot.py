"""A picture of restores: how much of the guests is resident, and which touches wait, over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...picture import save_figure
from ._what import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_restore"]

# Okabe and Ito, in the order in which curves come.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7")


def plot_restore(path: Path, curves: Sequence[Curve], title: str) -> None:
    """Two panels for each row: above, the share that is resident; below, each touch that waited for
    a millisecond or longer."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    matplotlib.rcParams["svg.fonttype"] = "none"
    rows = list(dict.fromkeys(curve.row for curve in curves))
    figure = Figure(figsize=(1.2 + 5.0 * len(rows), 5.6), layout="constrained")
    panels = figure.subplots(2, len(rows), sharex="col", squeeze=False)
    colors = dict(zip((curve.name for curve in curves), _COLORS, strict=False))
    for number, row in enumerate(rows):
        above, below = panels[:, number]
        above.set_title(row, fontsize=10)
        for curve in curves:
            if curve.row == row:
                _draw(above, below, curve, colors[curve.name])
        above.yaxis.set_major_formatter(PercentFormatter(1.0))
        below.set_yscale("log")
        below.yaxis.set_major_formatter(EngFormatter("s"))
        below.set_xlabel("seconds since the first guest connected")
    panels[0][0].set_ylabel("resident")
    panels[1][0].set_ylabel("a touch waited")
    for curve in curves:  # one legend for all rows
        if curve.row != rows[0]:
            panels[0][0].plot([], [], label=curve.name, color=colors[curve.name])
    save_figure(figure, path, title, panels[0][0])


def _draw(above: Axes, below: Axes, curve: Curve, color: str) -> None:
    above.plot(*zip(*curve.resident, strict=True), label=curve.name, color=color)
    if curve.stalls:
        below.plot(
            *zip(*curve.stalls, strict=True),
            color=color,
            marker=".",
            markersize=3,
            linestyle="none",
            alpha=0.5,
            rasterized=True,  # there may be a hundred thousand
        )
    for panel in (above, below):
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
