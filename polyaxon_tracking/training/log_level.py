"""Set the level of loggers, and show this package's lines if logging is not configured."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from polyaxon_tracking.environment import (
    get_log_level,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__: list[str] = []

_logger = logging.getLogger("polyaxon_tracking")


class _LastResort(logging.StreamHandler):  # type: ignore[type-arg]  # subscripting it needs Python 3.11
    """Show this package's lines on standard error if the user has not configured logging.

    Without it, Python shows only warnings, and the user would not see from which checkpoint training resumes.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def set_log_level(names: Iterable[str]) -> None:
    """Set the level of the loggers `names` from ``POLYAXON_LOG_LEVEL``; without it, this package logs at INFO."""
    level = get_log_level()
    if level is not None:
        for name in names:
            logging.getLogger(name).setLevel(level)
    elif _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    if not _logger.handlers:
        handler = _LastResort()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        _logger.addHandler(handler)
