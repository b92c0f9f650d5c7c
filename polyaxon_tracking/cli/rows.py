"""The rows that `doctor` reports, one for each check, and formatting for the terminal."""

from __future__ import annotations

import json
from typing import NamedTuple

from polyaxon_tracking.redaction import mask_urls

__all__ = ["ERROR", "INFO", "OK", "WARNING", "Row", "displayed", "readable_age", "readable_size", "text_of"]

OK, INFO, WARNING, ERROR = "ok", "info", "warning", "error"


class Row(NamedTuple):
    """The result of one check."""

    group: str
    name: str
    status: str
    """``ok``, ``info`` (neither right nor wrong), ``warning`` or ``error``."""
    value: object
    """The finding without secrets: a string, or the parsed value of a variable that holds JSON."""
    source: str = ""
    """The source of the value."""
    advice: str = ""
    """The advice, if the status is a warning or an error."""


def displayed(path: str) -> str:
    """Return `path`, which may be a URL, without secrets and without a terminal's control characters."""
    masked = mask_urls(path)
    return masked if masked.isprintable() else ascii(masked)


def text_of(value: object) -> str:
    """Return the `value` of a row in one line."""
    return value if isinstance(value, str) else json.dumps(value)


def readable_size(size: int) -> str:
    """Return `size`, in bytes, with a readable unit."""
    for unit, length in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size} bytes"


def readable_age(seconds: float | None) -> str:
    """Return an age, in seconds, with a readable unit."""
    if seconds is None:
        return "unknown"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
