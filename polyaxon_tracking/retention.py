"""Which checkpoints of a training are kept: the newest ones, and some of the old ones for good."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from polyaxon_tracking.errors import TrackingError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polyaxon_tracking.checkpoint_names import Checkpoint

__all__ = ["Retention", "check_interval", "check_max_to_keep", "to_remove"]


@dataclass(frozen=True)
class Retention:
    """How many of the newest checkpoints are kept, and which checkpoints are kept for good.

    A checkpoint that is kept for good says so in its name, so that it stays when training is started again without
    these options, or is killed while it removes old checkpoints.

    Raises:
        TrackingError: an option has the wrong type, or is out of range.

    Examples:
        >>> Retention(keep_every_n_epochs=5).max_to_keep
        2
    """

    max_to_keep: int = 2
    """How many of the newest checkpoints are kept."""
    keep_every_n_epochs: int | None = None
    """Keep the first checkpoint at or after each multiple of this number of epochs for good."""
    keep_every: timedelta | None = None
    """Keep the first checkpoint for good, and then the first one whenever this time has passed since."""

    def __post_init__(self) -> None:
        """Check every option."""
        epochs: object = self.keep_every_n_epochs  # of any type, because few scripts are type-checked
        check_max_to_keep(self.max_to_keep)
        if epochs is not None and not _is_positive_int(epochs):
            raise TrackingError(
                f"Received keep_every_n_epochs={epochs!r}. Expected a whole number, 1 or more, or None."
            )
        advice = " For a number of epochs, use keep_every_n_epochs."
        check_interval("keep_every", self.keep_every, "timedelta(hours=6)", advice)

    def keeps_for_good(self, epoch: int, now: int, existing: Iterable[Checkpoint]) -> bool:
        """Return whether to keep a checkpoint for good that is saved now.

        Args:
            epoch: the number of epochs finished.
            now: the UNIX time in seconds.
            existing: the existing checkpoints of the same training, since its last start from scratch.
        """
        kept = [checkpoint for checkpoint in existing if checkpoint.kept_at is not None]
        if (n := self.keep_every_n_epochs) and epoch // n > max((one.epoch // n for one in kept), default=0):
            return True
        if self.keep_every is None:
            return False
        latest = max((one.kept_at or 0 for one in kept), default=0)
        return now - latest >= self.keep_every.total_seconds()


def to_remove(checkpoints: list[Checkpoint], max_to_keep: int) -> list[Checkpoint]:
    """Return those of `checkpoints`, intact and newest first, that need not be kept any longer."""
    if not checkpoints:
        return []
    newest_start = checkpoints[0].start
    newest = [checkpoint for checkpoint in checkpoints if checkpoint.start == newest_start][:max_to_keep]
    # If training started over, perhaps by mistake, the newest checkpoint of the earlier training is kept.
    earlier = [checkpoint for checkpoint in checkpoints if checkpoint.start < newest_start]
    without_nan = [checkpoint for checkpoint in checkpoints if not checkpoint.has_nan]
    kept = [*newest, *earlier[: max(1, max_to_keep - len(newest))], *without_nan[:1]]
    return [checkpoint for checkpoint in checkpoints if checkpoint.kept_at is None and checkpoint not in kept]


def check_max_to_keep(max_to_keep: object) -> None:
    """Raise a `TrackingError` unless `max_to_keep` is a whole number above zero."""
    if not _is_positive_int(max_to_keep):
        raise TrackingError(f"Received max_to_keep={max_to_keep!r}. Expected a whole number, 1 or more.")


def check_interval(name: str, interval: object, example: str, advice: str = "") -> None:
    """Raise a `TrackingError` unless `interval`, the option `name`, is a timedelta above zero or None."""
    if interval is not None and not (isinstance(interval, timedelta) and interval > timedelta(0)):
        raise TrackingError(
            f"Received {name}={interval!r}. Expected a timedelta above zero, such as {example}, or None.{advice}"
        )


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
