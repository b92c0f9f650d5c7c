"""The report of `doctor`, for the terminal and for bug reports."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

from polyaxon_tracking.cli.doctor.storage import paths
from polyaxon_tracking.cli.doctor.variables import variables
from polyaxon_tracking.cli.doctor.versions import integrations, versions
from polyaxon_tracking.cli.rows import ERROR, INFO, OK, WARNING, Row, text_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["examine", "print_rows", "summary"]

# The width of a status, and of the white space around it.
_INDENT = 11

_STYLES = {OK: "green", INFO: "dim", WARNING: "yellow", ERROR: "bold red"}


def examine() -> list[Row]:
    """Run all checks, and return their rows."""
    return [*versions(), *integrations(), *variables(), *paths()]


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return whether there are no errors, and the number of errors and warnings."""
    statuses = [row.status for row in rows]
    return {"ok": ERROR not in statuses, "errors": statuses.count(ERROR), "warnings": statuses.count(WARNING)}


def print_rows(console: Console, rows: list[Row]) -> None:
    """Print the rows as text. On a terminal, long lines are wrapped; elsewhere not, so that they can be searched."""
    for group, found in groupby(rows, lambda row: row.group):
        console.print(Text(group, style="bold"))
        rows_of_group = list(found)
        width = max(len(row.name) for row in rows_of_group)
        for row in rows_of_group:
            _print_row(console, row, width)
    counts = summary(rows)
    console.print(Text(f"{_counted(counts['errors'], 'error')}, {_counted(counts['warnings'], 'warning')}"))


def _print_row(console: Console, row: Row, width: int) -> None:
    """Print `row`, whose name has a column of `width` characters."""
    start = Text("  ").append(f"{row.status:<7}", style=_STYLES[row.status]).append(f"  {row.name:<{width}}  ")
    value = Text(text_of(row.value))
    if row.source:
        value.append(f"  ({row.source})", style="dim")
    if console.is_terminal and start.cell_len + value.cell_len > console.width:
        start.rstrip()
        console.print(start, soft_wrap=True)
        _print_below(console, value)
    else:
        console.print(start.append_text(value), soft_wrap=True)
    if row.advice:
        _print_below(console, Text(row.advice))


def _print_below(console: Console, text: Text) -> None:
    for line in text.wrap(console, console.width - _INDENT) if console.is_terminal else [text]:
        line.rstrip()
        console.print(Text(" " * _INDENT).append_text(line), soft_wrap=True)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
