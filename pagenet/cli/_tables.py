"""Tables of figures, for people. rich is imported where one is made: with --json none is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["make_console", "make_table", "shown"]

# columns of a table that does not go to a terminal
_WIDTH = 120


def make_console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def make_table(first: str, *others: str) -> Table:
    """A table with a first column of words, and right-aligned columns of figures."""
    from rich.table import Table

    table = Table(first, box=None, pad_edge=False, header_style="bold")
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def shown(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:,.1f}{unit}"
