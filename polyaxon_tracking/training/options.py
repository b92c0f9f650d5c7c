"""The options of saving that the callbacks of all frameworks share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta
from numbers import Integral
from typing import Literal

from polyaxon_tracking.background import check_write_timeout
from polyaxon_tracking.checkpoints import CheckpointManager
from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.retention import Retention, check_interval

__all__ = ["SaveOptions"]


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """How often a callback saves the training state, how many states are kept, and how they are written.

    Raises:
        TrackingError: an option has the wrong type, or is out of range. The message names the option.

    Examples:
        >>> options = SaveOptions(every_n_train_steps=10, train_time_interval=timedelta(minutes=5))
        >>> options.max_to_keep, options.checkpoint_manager("checkpoints").max_to_keep
        (None, 2)
    """

    every_n_train_steps: int | Literal["auto"] | None = None
    """Save when a multiple of this number of optimizer steps is reached or passed; ``"auto"`` saves as often as costs
    1% of the time, but not within 10 seconds of the last save; ``None`` never asks for a save."""
    train_time_interval: timedelta | None = None
    """Save when this time has passed since the last save; ``None`` never asks for a save."""
    max_to_keep: int | None = None
    """How many of the newest training states are kept, also of a training that has ended; ``None`` keeps two while
    training runs, and one once it has ended."""
    keep_every_n_epochs: int | None = None
    """Keep the first training state at or after each multiple of this number of epochs for good."""
    keep_every: timedelta | None = None
    """Keep the first training state for good, and then the first one whenever this time has passed since."""
    background: bool = True
    """Whether states are written while training continues."""
    write_timeout: timedelta = timedelta(minutes=30)
    """How long a save or the end of training waits for earlier writes, before it is an error."""

    def __post_init__(self) -> None:
        """Check every option, before training starts."""
        steps: object = self.every_n_train_steps  # of any type, because few scripts are type-checked
        background: object = self.background
        asks_for_number = steps is not None and not (isinstance(steps, str) and steps == "auto")
        if asks_for_number and (isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1):
            raise TrackingError(
                f"Received every_n_train_steps={steps!r}. Expected a whole number, 1 or more, 'auto', or None."
            )
        check_interval("train_time_interval", self.train_time_interval, "timedelta(minutes=10)")
        if not isinstance(background, bool):
            raise TrackingError(f"Received background={background!r}. Expected True or False.")
        _ = self._retention  # checks its own options
        check_write_timeout(self.write_timeout)

    @property
    def _retention(self) -> Retention:
        """Which training states are kept while training runs."""
        number = 2 if self.max_to_keep is None else self.max_to_keep
        return Retention(number, self.keep_every_n_epochs, self.keep_every)

    def checkpoint_manager(self, directory: str) -> CheckpointManager:
        """Return the checkpoint manager of a training that runs in `directory`."""
        return CheckpointManager(directory, **asdict(self._retention))
