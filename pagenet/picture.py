"""Pictures, in files of their own: whether one could be drawn, and writing it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .whole_file import WholeFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_plot", "save_figure"]

# A picture's mode, of which the umask is taken away: others may look at it.
_MODE = 0o666


def check_plot(path: Path) -> None:
    """Called before anything is measured. :exc:`UsageError` if no picture could be drawn at
    ``path``."""
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"--plot {path}: the name ends in .svg or .png")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: {path.parent} is not a directory")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'pagenet[plot]'") from None
    _plot_file(path).close()


def save_figure(
    figure: Figure, path: Path, title: str, panel: Axes, columns: int | None = None
) -> None:
    """Write ``figure`` to ``path``, with the legend of ``panel`` for all panels: in one row, or in
    ``columns``."""
    figure.suptitle(title, fontsize=11)
    handles, labels = panel.get_legend_handles_labels()
    columns = columns or len(handles)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix[1:])
    with _plot_file(path) as file:
        file.write(picture.getbuffer())
        file.commit()


def _plot_file(path: Path) -> WholeFile:
    return WholeFile(path, "plot", _MODE)
