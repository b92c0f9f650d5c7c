"""When a training state is due: by the number of steps, by time, or as often as costs little time."""

from __future__ import annotations

import collections
import contextlib
import logging
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polyaxon_tracking.training.options import SaveOptions

__all__ = ["SaveSchedule"]

_logger = logging.getLogger("polyaxon_tracking")

# With "auto": saves may cost a hundredth of the time. The first save comes soon, because only a save shows its cost.
_SHARE_OF_TIME = 0.01
_SECONDS_TO_FIRST_SAVE = 30.0
_SHORTEST_INTERVAL = 10.0


class SaveSchedule:
    """Decide when the training state is due between the ends of the epochs, and measure what saves cost.

    With ``every_n_train_steps="auto"``, saves cost 1% of the time. A save costs the time for which training waits for
    it, and the time by which batches are slower than usual while the state is being written.

    Args:
        options: how often to save.
        now: returns the time in seconds.

    Examples:
        >>> from datetime import timedelta
        >>> from polyaxon_tracking.training import SaveOptions
        >>> seconds = iter([0, 299, 301])
        >>> schedule = SaveSchedule(SaveOptions(train_time_interval=timedelta(minutes=5)), lambda: next(seconds))
        >>> schedule.start()
        >>> schedule.is_due_by_time(), schedule.is_due_by_time()
        (False, True)
        >>> schedule = SaveSchedule(SaveOptions(every_n_train_steps=10))
        >>> [step for step in (7, 9, 11, 13) if schedule.is_due_by_steps(step=step, saved_step=7)]
        [11, 13]
    """

    def __init__(self, options: SaveOptions, now: Callable[[], float] = time.monotonic) -> None:
        every = options.every_n_train_steps
        self._is_auto = isinstance(every, str)
        self._every = None if isinstance(every, str) else every
        self._interval = options.train_time_interval
        self._now = now
        self.saved_at = 0.0
        """The time of the last save, or when training started."""
        self.seconds_blocked = 0.0
        """How long training waited for the last save."""
        self._costs: collections.deque[float] = collections.deque(maxlen=3)
        """The seconds that each of the last saves has cost."""
        self._batches: collections.deque[float] = collections.deque(maxlen=50)
        """The seconds that the last batches took during which nothing was written."""
        self._batch_ended_at: float | None = None
        self._logged_interval = 0.0

    def start(self) -> None:
        """Start the clock, because training starts."""
        self.saved_at, self._batch_ended_at = self._now(), None

    def is_due_by_steps(self, *, step: int, saved_step: int) -> bool:
        """Return whether a multiple of `every_n_train_steps` was reached or passed since the last save.

        A batch may count several steps, for example with several optimizers, and so pass over a multiple.

        Args:
            step: optimizer steps so far, at the end of a batch.
            saved_step: optimizer steps at the last save, or at the step where training started or resumed.
        """
        return self._every is not None and step // self._every > saved_step // self._every

    def is_due_by_time(self, *, is_writing: bool = False) -> bool:
        """Return, at the end of a batch, whether enough time has passed since the last save.

        Args:
            is_writing: whether the last state is still being written in the background.
        """
        if self._interval is None and not self._is_auto:
            return False
        now = self._now()
        seconds = now - self.saved_at
        if self._is_auto:
            self._measure_batch(now, is_writing=is_writing)
            if not is_writing and seconds >= (interval := self._auto_interval()):
                self._log(interval)
                return True
        return self._interval is not None and seconds >= self._interval.total_seconds()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the save that the ``with`` block does, and count the time from its end."""
        began = self._now()
        yield
        self.saved_at, self._batch_ended_at = self._now(), None
        self.seconds_blocked = self.saved_at - began
        self._costs.append(self.seconds_blocked)

    def _measure_batch(self, now: float, *, is_writing: bool) -> None:
        began, self._batch_ended_at = self._batch_ended_at, now
        if began is None:  # the batch after a save began before it
            return
        if not is_writing:
            self._batches.append(now - began)
        elif self._costs and self._batches:
            usual = statistics.median(self._batches)
            self._costs[-1] += min(max(0.0, now - began - usual), usual)  # no validation, for which all batches wait

    def _auto_interval(self) -> float:
        """Return the seconds from one save to the next."""
        if not self._costs:
            return _SECONDS_TO_FIRST_SAVE
        return max(_SHORTEST_INTERVAL, max(self._costs) / _SHARE_OF_TIME)

    def _log(self, interval: float) -> None:
        """Log the interval if it is new, or differs by half or more from the interval that was logged."""
        if self._costs and not self._logged_interval / 2 < interval < self._logged_interval * 2:
            self._logged_interval = interval
            cost = max(self._costs)
            _logger.info(
                "every_n_train_steps='auto': a save costs %.2g s, so that one comes every %.0f s", cost, interval
            )
