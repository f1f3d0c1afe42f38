"""Tables that any terminal can show."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


class FittingTable:
    """A table without lines. In a terminal that is too narrow for it, its rows follow one another,
    in words.

    Args:
        columns: their heads; the first one names the row.
    """

    def __init__(self, *columns: str) -> None:
        self.caption: str | None = None
        self._columns = columns
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        for column in self._columns:
            table.add_column(column, no_wrap=True)
        for cells in self._rows:
            table.add_row(*map(Text, cells))
        if Measurement.get(console, options.update_width(1000), table).maximum <= options.max_width:
            yield table
        else:
            yield from self._one_by_one()
        if self.caption is not None:
            yield Text(self.caption, style="italic")

    def _one_by_one(self) -> Iterator[Text]:
        for name, *cells in self._rows:
            yield Text.assemble((f"{self._columns[0]} ", "dim"), (name, "bold"), overflow="fold")
            parts = zip(self._columns[1:], cells, strict=True)
            yield Text("  " + " · ".join(f"{label} {cell}" for label, cell in parts if cell != "-"))
