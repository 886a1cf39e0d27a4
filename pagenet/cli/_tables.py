"""Tables of figures, for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

__all__ = ["make_console", "make_table", "shown"]

# of tables that go somewhere other than a terminal
_WIDTH = 120


def make_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def make_table(first: str, *others: str) -> Table:
    """Figures, to the right, behind a column of words."""
    table = Table(first, box=None, pad_edge=False, header_style="bold")
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def shown(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:,.1f}{unit}"
