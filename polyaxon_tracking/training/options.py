"""The options of saving that the callbacks of all frameworks share."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from numbers import Integral

from polyaxon_tracking.background import check_write_timeout
from polyaxon_tracking.checkpoints import check_max_to_keep
from polyaxon_tracking.errors import TrackingError

__all__ = ["SaveOptions"]


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """How often a callback saves the training state, how many states are kept, and how they are written.

    Raises:
        TrackingError: an option has the wrong type, or is out of range. The message names the option.

    Examples:
        >>> options = SaveOptions(every_n_train_steps=10, train_time_interval=timedelta(minutes=5))
        >>> [step for step in (7, 9, 11, 13) if options.should_save(step=step, saved_step=7)]
        [11, 13]
        >>> options.is_interval_over(seconds_since_save=301.0)
        True
    """

    every_n_train_steps: int | None = None
    """Save when a multiple of this number of optimizer steps is reached or passed; ``None`` never asks for a save."""
    train_time_interval: timedelta | None = None
    """Save when this time has passed since the last save; ``None`` never asks for a save."""
    max_to_keep: int = 2
    """How many of the newest training states are kept."""
    background: bool = True
    """Whether states are written while training continues."""
    write_timeout: timedelta = timedelta(minutes=30)
    """How long a save or the end of training waits for earlier writes, before it is an error."""

    def __post_init__(self) -> None:
        """Check every option, before training starts."""
        steps: object = self.every_n_train_steps  # of any type, because few scripts are type-checked
        interval: object = self.train_time_interval
        background: object = self.background
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1):
            raise TrackingError(f"Received every_n_train_steps={steps!r}. Expected a whole number, 1 or more, or None.")
        if interval is not None and not (isinstance(interval, timedelta) and interval > timedelta(0)):
            raise TrackingError(
                f"Received train_time_interval={interval!r}. Expected a timedelta above zero, such as "
                f"timedelta(minutes=10), or None."
            )
        if not isinstance(background, bool):
            raise TrackingError(f"Received background={background!r}. Expected True or False.")
        check_max_to_keep(self.max_to_keep)
        check_write_timeout(self.write_timeout)

    def should_save(self, *, step: int, saved_step: int) -> bool:
        """Return whether a multiple of `every_n_train_steps` was reached or passed since the last save.

        A batch may count several steps, for example with several optimizers, and so pass over a multiple.

        Args:
            step: optimizer steps so far, at the end of a batch.
            saved_step: optimizer steps at the last save, or at the step where training started or resumed.
        """
        every = self.every_n_train_steps
        return every is not None and step // every > saved_step // every

    def is_interval_over(self, *, seconds_since_save: float) -> bool:
        """Return whether `train_time_interval` has passed since the last save, which was `seconds_since_save` ago."""
        interval = self.train_time_interval
        return interval is not None and seconds_since_save >= interval.total_seconds()
