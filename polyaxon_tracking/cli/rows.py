"""What `doctor` reports: one row for each thing that was looked at."""

from __future__ import annotations

import json
from typing import NamedTuple

from polyaxon_tracking.redaction import mask_urls

__all__ = ["ERROR", "INFO", "OK", "WARNING", "Row", "displayed", "readable_size", "text_of"]

OK, INFO, WARNING, ERROR = "ok", "info", "warning", "error"


class Row(NamedTuple):
    """One thing that was looked at."""

    group: str
    name: str
    status: str
    """``ok``, ``info`` (neither right nor wrong), ``warning`` or ``error``."""
    value: object
    """What was found: a string, or for variables that hold JSON what they hold; without secrets."""
    source: str = ""
    """Where the value comes from."""
    advice: str = ""
    """What to do, where the status is a warning or an error."""


def displayed(path: str) -> str:
    """`path`, which may be a URL, without secrets and without what moves a terminal's cursor."""
    masked = mask_urls(path)
    return masked if masked.isprintable() else ascii(masked)


def text_of(value: object) -> str:
    """`value` of a row in one line."""
    return value if isinstance(value, str) else json.dumps(value)


def readable_size(size: int) -> str:
    """`size` in bytes, for people."""
    for unit, length in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size} bytes"
