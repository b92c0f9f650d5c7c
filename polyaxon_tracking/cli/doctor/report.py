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

_STYLES = {OK: "green", INFO: "dim", WARNING: "yellow", ERROR: "bold red"}


def examine() -> list[Row]:
    """Run all checks, and return their rows."""
    return [*versions(), *integrations(), *variables(), *paths()]


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return whether there are no errors, and the number of errors and warnings."""
    statuses = [row.status for row in rows]
    return {"ok": ERROR not in statuses, "errors": statuses.count(ERROR), "warnings": statuses.count(WARNING)}


def print_rows(console: Console, rows: list[Row]) -> None:
    """Print the rows as text. Lines are not wrapped, so that they can be copied."""
    for group, found in groupby(rows, lambda row: row.group):
        console.print(Text(group, style="bold"))
        rows_of_group = list(found)
        width = max(len(row.name) for row in rows_of_group)
        for row in rows_of_group:
            line = Text("  ").append(f"{row.status:<7}", style=_STYLES[row.status])
            line.append(f"  {row.name:<{width}}  {text_of(row.value)}")
            if row.source:
                line.append(f"  ({row.source})", style="dim")
            console.print(line, soft_wrap=True)
            if row.advice:
                console.print(Text(f"           {row.advice}"), soft_wrap=True)
    counts = summary(rows)
    console.print(Text(f"{_counted(counts['errors'], 'error')}, {_counted(counts['warnings'], 'warning')}"))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
