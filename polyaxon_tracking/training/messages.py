"""The log lines and errors of a training, which are the same for every framework."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from polyaxon_tracking.errors import TrackingError

if TYPE_CHECKING:
    from polyaxon_tracking.checkpoint_names import Checkpoint
    from polyaxon_tracking.checkpoints import CheckpointManager
    from polyaxon_tracking.training.run import Run

__all__ = ["TrainingLog", "different_model", "of_framework"]

# A model with another width differs in all its tensors.
_SHOWN_PROBLEMS = 5

# In seconds.
_GRACE_PERIOD = 30

_logger = logging.getLogger("polyaxon_tracking")


class TrainingLog:
    """The log lines of one training.

    Args:
        run: the run of this process.
        checkpoints: the checkpoint manager of this training.
        is_enabled: whether this process logs; only rank 0 does.
    """

    def __init__(self, run: Run, checkpoints: CheckpointManager, *, is_enabled: bool) -> None:
        self._run = run
        self._checkpoints = checkpoints
        self._is_enabled = is_enabled
        self._is_long_save_logged = False

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Log that training resumes from `checkpoint`, that it continues in memory, or why it starts from scratch."""
        if not self._is_enabled:
            return
        if checkpoint is None and self._run.is_model_trained:
            directory = self._checkpoints.directory
            _logger.info("Continuing with the model as it is in memory: its checkpoints now go to %s", directory)
        elif checkpoint is None:
            _logger.info("Starting fresh: %s", self._run.why_fresh(self._checkpoints))
        else:
            _logger.info("Resuming from %s: epoch %d, step %d", checkpoint.source, checkpoint.epoch, checkpoint.step)
            if checkpoint.has_nan:
                self._warn_of_nan(checkpoint)

    def _warn_of_nan(self, checkpoint: Checkpoint) -> None:
        saved = self._checkpoints.checkpoints()
        without = next((older.source for older in saved if not older.has_nan), None)
        _logger.warning(
            "The weights in %s hold NaN. %s",
            checkpoint.source,
            "No checkpoint is without NaN: correct the script, and start from scratch with resume=False"
            if without is None
            else f"To resume from the newest checkpoint without NaN, {without}, move the newer ones away",
        )

    def nothing_left(self, *, epoch: int, limit: str | None) -> None:
        """Log that a training which had ended is started again, and that nothing is left to train.

        Args:
            epoch: the number of epochs done.
            limit: the limit that training had reached, such as ``epochs=3``; ``None`` if it was stopped early.
        """
        if not self._is_enabled:
            return
        if limit is None:
            _logger.info("This training was stopped early, at epoch %d: nothing is left to train", epoch)
        else:
            _logger.info("This training has ended already (%s): nothing is left to train", limit)

    def unused(self, checkpoint: Checkpoint, argument: str, value: str) -> None:
        """Warn that the user's `argument` with `value` takes precedence over `checkpoint`."""
        if self._is_enabled:
            _logger.warning(
                "Resuming from %s=%s as asked, although %s exists. Leave out `%s` to resume from it",
                argument,
                value,
                checkpoint.source,
                argument,
            )

    def passed_over(self, source: str, step: int, checkpoint: Checkpoint, *, newer: bool) -> None:
        """Log which is resumed from: `checkpoint`, or what something else saved in `source`, if that is `newer`.

        Args:
            source: the path of what something else saved.
            step: its number of steps.
            checkpoint: the newest checkpoint of this training.
            newer: whether `source` is resumed from.
        """
        if self._is_enabled:
            found = [(source, step), (checkpoint.source, checkpoint.step)]
            used, passed_over = found if newer else found[::-1]
            _logger.warning("Resuming from %s, of step %d: %s, of step %d, is passed over", *used, *passed_over)

    def save_took(self, seconds: float) -> None:
        """Warn, once and on the cluster, if a save takes `seconds` that are more than a pod's usual grace period."""
        if seconds > _GRACE_PERIOD and self._is_enabled and self._run.on_cluster and not self._is_long_save_logged:
            self._is_long_save_logged = True
            _logger.warning(
                "A save takes %.0f s, longer than the grace period of %d s that Kubernetes gives a pod by default: a "
                "save after SIGTERM may be killed, and training then resumes from the previous one. Give the pod twice "
                "the time of a save as terminationGracePeriodSeconds, or save often with every_n_train_steps='auto'",
                seconds,
                _GRACE_PERIOD,
            )

    def saved(self, step: int, reason: str) -> None:
        """Warn that training ends, and that its last step is saved, because of `reason`: a signal or an exception."""
        if self._is_enabled and step > 0:
            _logger.warning("Saved step %d after %s", step, reason)

    def not_saved(self, step: int, error: BaseException) -> None:
        """Log the `error` of the last save, which is not raised."""
        _logger.error(
            "The state after step %d was not saved; the previous checkpoint is untouched: %s: %s",
            step,
            type(error).__name__,
            error,
        )

    def other_weights(self, step: int) -> None:
        """Warn that nothing is saved because the model holds other weights than those of `step`."""
        _logger.warning(
            "Step %d is not saved: other weights are in the model, such as averages. The previous checkpoint is "
            "untouched",
            step,
        )


def different_model(source: str, problems: list[str]) -> TrackingError:
    """Return the error for a model that cannot continue the training that was saved in `source`.

    Args:
        source: the path or URL of the checkpoint.
        problems: what differs. The message names the first few of them.
    """
    shown = problems[:_SHOWN_PROBLEMS]
    if more := len(problems) - len(shown):
        shown.append(f"and {more} more")
    return TrackingError(
        f"Received a model that is not the one saved in {source}. Expected the same layers, shapes and optimizer. Undo "
        f"the change, pass resume=False to start from scratch, or use another outputs path; the "
        f"checkpoint stays as it is. What differs: {'; '.join(shown)}."
    )


def of_framework(checkpoint: Checkpoint | None, suffixes: tuple[str, ...], framework: str) -> Checkpoint | None:
    """Return the checkpoint, if any. Raise a `TrackingError` if its name shows that `framework` did not save it."""
    if checkpoint is None or checkpoint.name.endswith(suffixes):
        return checkpoint
    raise TrackingError(
        f"Received {checkpoint.source}, which {framework} did not save. Expected an outputs path with only checkpoints "
        f"of {framework}: use another outputs path for this training."
    )
