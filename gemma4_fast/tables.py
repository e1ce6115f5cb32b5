"""Tables for people, drawn by rich, as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def render(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> str:
    """A table as text, ending in a newline; no colours, no line longer than it needs to be."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(width=200, no_color=True, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"
