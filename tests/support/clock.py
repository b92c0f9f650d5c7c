"""A clock that a test sets."""

from __future__ import annotations


class Clock:
    """Return `seconds` when it is called, as `time.time` and `time.monotonic` return theirs."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds
