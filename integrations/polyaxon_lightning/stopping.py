"""How a training ends: at its limit, early, so that nothing is left, or stopped by something such as a time limit."""

from __future__ import annotations

from polyaxon_lightning.framework import pl

__all__ = ["has_ended", "is_at_last_step", "is_leaving_epoch", "is_stopped_early"]


def has_ended(trainer: pl.Trainer) -> bool:
    """Return whether all epochs or steps are done, or an ``EarlyStopping`` has ended training."""
    has_all_epochs = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch
    return has_all_epochs or _has_all_steps(trainer) or is_stopped_early(trainer)


def is_stopped_early(trainer: pl.Trainer) -> bool:
    """Return whether an ``EarlyStopping`` has ended training.

    Whatever else ends it, such as a time limit, lets training continue at the next start.
    """
    stopping = [one for one in trainer.callbacks if isinstance(one, pl.callbacks.EarlyStopping)]  # type: ignore[attr-defined]
    return trainer.should_stop and any(_has_stopped(one) for one in stopping)


def is_leaving_epoch(trainer: pl.Trainer) -> bool:
    """Return whether training stops within an epoch, as for a time limit, and is to resume within that epoch."""
    if not trainer.should_stop:  # as after almost every batch
        return False
    return _is_epoch_unfinished(trainer)


def is_at_last_step(trainer: pl.Trainer) -> bool:
    """Return whether `max_steps` is reached within an epoch, which a later start with more steps is to finish."""
    return _has_all_steps(trainer) and _is_epoch_unfinished(trainer)


def _has_stopped(stopping: pl.callbacks.EarlyStopping) -> bool:
    """Return whether `stopping` has ended training; in the first epoch by a threshold, known since Lightning 2.6."""
    reason = getattr(stopping, "stopping_reason", None)
    is_by_threshold = reason is not None and reason.name != "NOT_STOPPED"
    return stopping.stopped_epoch > 0 or stopping.wait_count >= stopping.patience or is_by_threshold


def _has_all_steps(trainer: pl.Trainer) -> bool:
    return 0 <= trainer.max_steps <= trainer.global_step


def _is_epoch_unfinished(trainer: pl.Trainer) -> bool:
    """Return whether batches of the epoch are left, for a later start to train."""
    return not (trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or is_stopped_early(trainer))
