"""How far a long transfer is: a bar on a terminal, a line every few seconds elsewhere, nothing where it is short."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from fsspec.callbacks import Callback
from tqdm import tqdm

__all__ = ["Progress"]

_logger = logging.getLogger("polyaxon_tracking")

_SHORT_SECONDS = 2
_EVERY_SECONDS = 5


class Progress(Callback):  # type: ignore[misc]  # fsspec has no types
    """Count bytes, as fsspec's drivers tell of them.

    Args:
        what: what is done, such as ``"Downloading s3://bucket/file"``.
        total: bytes to do.
    """

    def __init__(self, what: str, total: int) -> None:
        super().__init__(size=total)
        self._what = what
        self._told = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=what,
            unit="B",
            unit_scale=True,
            delay=_SHORT_SECONDS,
            leave=False,
            disable=not self._terminal,
        )

    def call(self, hook_name: str | None = None, **options: Any) -> None:  # noqa: ARG002  # fsspec's
        """Show what has changed."""
        now = time.monotonic()
        if self._terminal:
            self._bar.update(self.value - self._bar.n)
        elif now - self._told >= _EVERY_SECONDS:
            self._told = now
            _logger.info("%s: %d of %d MB", self._what, self.value // 10**6, self.size // 10**6)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()
        super().close()
