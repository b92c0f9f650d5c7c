"""The time limit of the job: training ends early enough for its last save to be complete when the job is killed."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from typing import TYPE_CHECKING

from polyaxon_tracking.environment import value_of
from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import shown_value

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["JOB_END_TIME", "TimeLimit", "job_end_time"]

_logger = logging.getLogger("polyaxon_tracking")

JOB_END_TIME = "POLYAXON_JOB_END_TIME"

# In seconds. A save is expected to take the first as long as none was measured, and at least the second.
_UNKNOWN_SAVE = 30.0
_SHORTEST_SAVE = 2.5


class TimeLimit:
    """Decide at the end of a batch whether training must end now, because the job is killed soon.

    ``POLYAXON_JOB_END_TIME`` is the UNIX time at which the job is killed; without it there is no limit. Training must
    end when the time that is left is that of the longest batch and of two saves, because one may be in progress.

    Slurm's ``SLURM_JOB_END_TIME`` is not read: in a job that Slurm warns with ``--signal``, the script may wait for the
    exit status of that signal to requeue the job, and would not get it.

    Args:
        now: returns the UNIX time in seconds.

    Raises:
        TrackingError: the variable holds no UNIX time.

    Examples:
        >>> os.environ["POLYAXON_JOB_END_TIME"] = "1000"
        >>> times = iter([905, 920, 950])
        >>> limit = TimeLimit(lambda: next(times))
        >>> [limit.reason_to_end(seconds_of_save=16) for _ in range(2)]  # at 905 and 920, after a batch of 15 seconds
        [None, None]
        >>> limit.reason_to_end(seconds_of_save=16)  # at 950: a batch takes up to 30 seconds, and two saves take 32
        'The job is killed in 50 s (POLYAXON_JOB_END_TIME), and one more batch with its save may take 62 s'
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._end = job_end_time()
        self._batch_ended_at: float | None = None
        self._longest_batch = 0.0
        self._longest_save = 0.0

    def reason_to_end(self, seconds_of_save: float) -> str | None:
        """Return, at the end of a batch, why training must end now, or ``None`` if there is time for one more batch.

        Args:
            seconds_of_save: how long the last save took until it was complete; 0 before the first save.
        """
        if self._end is None:
            return None
        now, began = self._now(), self._batch_ended_at
        self._batch_ended_at = now
        if began is not None:
            self._longest_batch = max(self._longest_batch, now - began)
        elif self._end <= now:
            _logger.warning("%s is ignored: that time is over, and the job still runs", JOB_END_TIME)
            self._end = None
            return None
        self._longest_save = max(self._longest_save, seconds_of_save)
        save = max(self._longest_save, _SHORTEST_SAVE) if self._longest_save else _UNKNOWN_SAVE
        needed = self._longest_batch + 2 * save
        if now + needed < self._end:
            return None
        return (
            f"The job is killed in {self._end - now:.0f} s ({JOB_END_TIME}), and one more batch with its save may "
            f"take {needed:.0f} s"
        )


def job_end_time() -> float | None:
    """Return the UNIX time at which the job is killed, or ``None`` if the environment names none.

    Raises:
        TrackingError: the variable holds no UNIX time.
    """
    text = value_of(JOB_END_TIME)
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        if math.isfinite(seconds := float(text)):
            return seconds
    raise TrackingError(
        f"{JOB_END_TIME} was received as {shown_value(text)}. Expected the UNIX time at which the job is killed, in "
        f"seconds: in a shell, $(($(date +%s) + 4 * 3600)) is in four hours. Correct the variable, or unset it."
    )
