"""`batchllm status` can be read whatever the width of the terminal is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from batchllm_celery.cli.display.tables import FittingTable

NAME = "reviews-1122-2104-3f2a"


def shown(rows: FittingTable, width: int) -> list[str]:
    screen = io.StringIO()
    Console(file=screen, width=width).print(rows)
    return screen.getvalue().splitlines()


def batches() -> FittingTable:
    rows = FittingTable("Batch", "State", "Done", "Under way", "Cost")
    rows.add_row(NAME, "cooling down for 12 s after a refusal", "12,000/400,000", "284", "-")
    rows.add_row("b", "running", "2/3", "1", "$12.30")
    rows.caption = "and 3 older ones"
    return rows


def test_a_wide_terminal_shows_a_table() -> None:
    """A head and a line for each row."""
    lines = shown(batches(), 120)
    assert lines[0].split() == ["Batch", "State", "Done", "Under", "way", "Cost"]
    assert len(lines) == 4
    assert lines[-1].rstrip() == "and 3 older ones"


@pytest.mark.parametrize("width", [80, 60, 40, 30])
def test_a_narrow_terminal_shows_every_value_whole(width: int) -> None:
    """No name is cut or set letter by letter, no column is lost, and no line is too long."""
    lines = shown(batches(), width)
    assert f"Batch {NAME}" in lines
    assert all(len(line) <= width for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "State cooling down for 12 s after a refusal" in text
    assert "Done 12,000/400,000 · Under way 284 Batch b" in text
    assert "State running · Done 2/3 · Under way 1 · Cost $12.30 and 3 older ones" in text


def test_markup_in_a_name_is_text() -> None:
    """A name is shown as it is, in a table and in words."""
    rows = FittingTable("Worker", "Host")
    rows.add_row("[red]w[/red]", "[b]h")
    assert "[red]w[/red]  [b]h" in shown(rows, 80)[1]
    assert "[red]w[/red]" in shown(rows, 14)[0] + shown(rows, 14)[1]
