"""A picture of what was written."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path

from ..picture import save_figure
from ._history import WINDOWS, Figures

__all__ = ["plot_figures"]

_COLORS = ("#56b4e9", "#0072b2", "#d55e00")


def plot_figures(path: Path, figures: Sequence[Figures], title: str) -> None:
    """One panel for the rate, and one for the working sets. ``path``: as of
    :func:`pagenet.picture.check_plot`, which is to be called before."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    rate, sets = figure.subplots(2, 1, sharex=True)
    times = [each.at for each in figures]
    rate.step(times, [each.rate / 1e6 for each in figures], color="0.3", linewidth=1.2)
    rate.set_ylabel("MB written in a second")
    for window, color in zip(WINDOWS, _COLORS, strict=True):
        sets.plot(times, _sizes(figures, window), label=f"{window} s", color=color, linewidth=1.2)
    sets.set_ylabel("MiB written in the last ...")
    sets.set_xlabel("seconds")
    for panel in (rate, sets):
        panel.set_ylim(bottom=0)
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, title, sets)


def _sizes(figures: Sequence[Figures], window: int) -> list[float]:
    sizes = (each.windows[WINDOWS.index(window)] for each in figures)
    return [nan if size is None else size / (1 << 20) for size in sizes]
