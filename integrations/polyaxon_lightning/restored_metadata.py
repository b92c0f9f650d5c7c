"""Restore the parts of a training state that Lightning leaves out of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polyaxon_lightning.checkpoint_io import METADATA_KEY
from polyaxon_lightning.data import check_rows, forget_loaders, restore_random, restored_positions, warn_of_other_rows
from polyaxon_lightning.hyperparameters import check_optimizers
from polyaxon_lightning.validation import (
    batches_done,
    complete_batch,
    continue_after_batch,
    count_validation_without_drawing,
    end_no_finished_epoch,
    log_again,
    start_epoch_like_the_others,
    step_plateaus,
    uncount_unfinished_batch,
)

if TYPE_CHECKING:
    from polyaxon_lightning.framework import pl

__all__ = ["RestoredMetadata"]


class RestoredMetadata:
    """The metadata of the training state that Lightning restores, from its load until training starts.

    Args:
        trainer: the Trainer, which begins to restore everything else.
        checkpoint: the training state. It is changed so that training starts where the state was saved.
    """

    def __init__(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        self._ends_batch = complete_batch(checkpoint)
        done = {"step": checkpoint["global_step"], "batches": batches_done(checkpoint)}
        metadata = self._metadata = checkpoint[METADATA_KEY] | done
        self._ends_epoch: bool = metadata["ends_epoch"]
        self.ends_training: bool = self._ends_epoch and metadata["stopped"]
        """Whether nothing is left to train, because an ``EarlyStopping`` had ended training."""
        self.hyperparameters: dict[str, Any] | None = metadata.get("hyperparameters")
        self.found_by_searches: dict[str, Any] = metadata.get("searches", {})
        self.gradients: dict[str, Any] = metadata.get("gradients", {})
        """The gradients that were being accumulated, by the name of the parameter."""
        self.swaps_weights: bool = metadata.get("swaps", False)
        """Whether a validation has run with other weights in the model, such as averages."""
        if self._ends_epoch:
            end_no_finished_epoch(trainer)

    def positions(self, trainer: pl.Trainer) -> dict[str, Any] | None:
        """Return where each training data loader was in the epoch, if training resumes within one."""
        return restored_positions(trainer, self._metadata)

    def prepare(self, trainer: pl.Trainer) -> None:
        """Make training start where the state was saved; called in ``on_fit_start``.

        Raises:
            TrackingError: the optimizers are not those that were saved, or the data has fewer batches.
        """
        check_optimizers(trainer, self._metadata["optimizers"])
        if not self._ends_epoch:
            check_rows(trainer, self._metadata)
        forget_loaders(trainer)
        if self._ends_batch:
            continue_after_batch(trainer, self._metadata)

    def restore(self, trainer: pl.Trainer) -> None:
        """Restore the random number generators, and do the scheduler steps that came after the save.

        Called in ``on_train_start``, because Lightning has drawn numbers before that to start the data loaders. If
        there are as many processes as before, each process gets its own random state again.
        """
        restore_random(trainer, self._metadata)
        if self._ends_epoch:
            start_epoch_like_the_others(trainer)
            warn_of_other_rows(trainer, self._metadata)
        if self._metadata.get("within_batch"):
            uncount_unfinished_batch(trainer)
            count_validation_without_drawing(trainer)
        step_plateaus(trainer, self._metadata["plateau"])
        self.restore_metrics(trainer)
        if self._ends_batch:
            log_again(trainer, self._metadata.get("epoch_metrics", {}))
            if trainer.strategy.restore_checkpoint_after_setup:  # it was loaded too late for `prepare`
                continue_after_batch(trainer, self._metadata)
        if self.ends_training:
            trainer.should_stop = True

    def restore_metrics(self, trainer: pl.Trainer) -> None:
        """Restore ``trainer.callback_metrics``."""
        trainer.callback_metrics.update(self._metadata.get("metrics", {}))
