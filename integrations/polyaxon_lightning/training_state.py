"""Save the whole training state, whatever the metrics are, and restore it."""

from __future__ import annotations

import functools
import signal
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from polyaxon_lightning.checkpoint_io import METADATA_KEY, TrainingStateIO, detach, training_state_io
from polyaxon_lightning.data import Batches, forget_loaders, generator_states, log_repeated_data, rows, state_tensors
from polyaxon_lightning.framework import pl
from polyaxon_lightning.hooks import skip_unused_hooks
from polyaxon_lightning.hyperparameters import HyperparametersOfTrainer, optimizer_names
from polyaxon_lightning.process_group import restore_saves
from polyaxon_lightning.restored_metadata import RestoredMetadata
from polyaxon_lightning.searches import allow_searches, found_by_searches
from polyaxon_lightning.sharded import save_sharded, writes_itself
from polyaxon_lightning.stopping import has_ended, is_at_last_step, is_leaving_epoch, is_stopped_early
from polyaxon_lightning.validation import (
    ValidationWatch,
    count_epoch_as_unfinished,
    epoch_metrics,
    let_go_of_loops,
    plateau_metrics,
    step_plateaus,
)
from polyaxon_torch import make_rates_plain, random_state
from polyaxon_tracking.training import Action, TrainingSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch.callbacks import Callback, Checkpoint

    from polyaxon_torch.snapshot import Snapshot
else:
    Callback, Checkpoint = pl.callbacks.Callback, pl.callbacks.Checkpoint

__all__ = ["TrainingStateCheckpoint"]


class TrainingStateCheckpoint(Checkpoint):
    """Save the whole training state at the end of every epoch, and whenever the session asks for it.

    This callback is the last of a Trainer's callbacks, so that the state holds what the other callbacks have just done.
    """

    def __init__(self, session: TrainingSession, snapshot: Snapshot | None, *, weights_only: bool) -> None:
        super().__init__()
        skip_unused_hooks(self)
        self.session = session
        self.io = TrainingStateIO(session.checkpoints, snapshot, weights_only=weights_only)
        self.snapshot = snapshot
        self.hyperparameters = HyperparametersOfTrainer(session)
        self._should_reserve_memory = session.is_writer
        self._ends_epoch = self._leaves_epoch = False
        """Whether the state that is being saved is that of a finished epoch, or of an epoch that `max_steps` left."""
        self._restored: RestoredMetadata | None = None
        """The metadata of the loaded state, until training starts."""
        self._is_resumed = False
        self._validation = ValidationWatch()
        self._batches = Batches()

    @property
    def found_by_searches(self) -> dict[str, Any]:
        """Return the results of the searches in the training that is resumed."""
        return {} if self._restored is None else self._restored.found_by_searches

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the metadata: the parts of the training state that Lightning leaves out of a checkpoint."""
        positions = [] if self._ends_epoch else self._batches.positions.state()
        numbers = random_state() | {"loaders": generator_states(trainer), "positions": positions}
        checkpoint[METADATA_KEY] = metadata = {
            "random": self.session.process_group.gather(numbers),
            "ends_epoch": self._ends_epoch,
            "stopped": is_stopped_early(trainer),
            "optimizers": optimizer_names(trainer),
            "plateau": plateau_metrics(trainer) if self._ends_epoch else {},
            "metrics": {name: torch.as_tensor(value).cpu() for name, value in trainer.callback_metrics.items()},
            "epoch_metrics": {} if self._ends_epoch else epoch_metrics(trainer),
            "hyperparameters": self.hyperparameters.as_saved(trainer),
            "searches": found_by_searches(trainer),
            "rows": rows(trainer),
            "training": self.io.own_files.training,
        }
        self._batches.put_into(trainer, checkpoint, metadata)
        if self._leaves_epoch:
            count_epoch_as_unfinished(checkpoint)
        self._validation.put_into(checkpoint, metadata)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the metadata until training starts, and make training start where the state was saved."""
        self.io.on_newest(checkpoint)
        self._restored = RestoredMetadata(trainer, checkpoint) if METADATA_KEY in checkpoint else None
        if self._restored is not None:
            self.hyperparameters.resumed = self._restored.hyperparameters

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what was restored, and make training start where the state was saved.

        Raises:
            TrackingError: the optimizers are not those that were saved. Lightning would use the options of the saved
                optimizers, or fail in the middle of training.
        """
        self.session.preemption.install()  # before Lightning's own handlers, which call the previous ones
        allow_searches(trainer)
        if self._restored is not None:
            self._restored.prepare(trainer)
        elif trainer.strategy.restore_checkpoint_after_setup:
            forget_loaders(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore what Lightning has not restored, and begin."""
        self._batches.start(trainer, {} if self._restored is None else self._restored.gradients)
        if self._restored is not None:
            self._restored.restore(trainer)
            self._validation.swaps_weights = self._restored.swaps_weights
            if self._restored.ends_training:
                self.session.log.nothing_left(epoch=trainer.current_epoch, limit=None)
            self._restored, self._is_resumed = None, True
        if self.session.process_group.is_distributed:
            # Lightning's handler calls a collective wherever the signal finds it, which hangs unless it finds all ranks
            # at the same place.
            self.session.preemption.reinstall()
        self.session.checkpoints.release()
        make_rates_plain(trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs])
        self.session.begin(trainer.global_step)
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.run = functools.partial(self._validate, trainer, loop.run)  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log that a training that resumes within an epoch repeats data, if it does."""
        self.on_train_batch_start = None  # type: ignore[assignment,method-assign]  # it is logged once
        if self._is_resumed and batch_idx and not self._batches.positions.resumes_exactly:
            log_repeated_data(trainer, batch_idx)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop if a signal waited for the end of the validation of the previous epoch."""
        self._batches.find_loaders(trainer)
        if trainer.global_step == self.session.saved_step and self.session.should_stop_now():
            self._stop(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record that an optimizer step begins."""
        self.session.stepping_from = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save or stop if the session asks for it."""
        step = trainer.global_step
        self._batches.end(step)
        action = self.session.end_batch(step)
        if action is Action.STOP:
            self._stop(trainer)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not self.session.process_group.is_distributed:
            self._validation.begin(trainer)
        if self.snapshot is not None and self._should_reserve_memory and step != self.session.saved_step:
            self._should_reserve_memory = False
            self.snapshot.reserve(state_tensors(trainer))  # all exist after the first optimizer step
        is_left = is_leaving_epoch(trainer) and not self.session.process_group.is_distributed
        if is_at_last_step(trainer):  # saved at the end of the epoch, which follows
            return
        if action is Action.SAVE or (is_left and step != self.session.saved_step):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of every epoch, after the validation and the other callbacks."""
        self._validation.end()
        if is_leaving_epoch(trainer) and trainer.global_step == self.session.saved_step:
            return
        self._leaves_epoch = is_at_last_step(trainer)
        self._ends_epoch = not self._leaves_epoch
        self._save(trainer)
        self._ends_epoch = self._leaves_epoch = False
        """Whether the state that is being saved is that of a finished epoch, or of an epoch that `max_steps` left."""
        if trainer.fit_loop.restarting:  # Lightning omits these steps in the resumed epoch
            step_plateaus(trainer, plateau_metrics(trainer))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop if a signal was received.

        If the model's weights differ from those before the validation, training stops only when the validation has
        ended, unless the state was saved before the validation.
        """
        if not self._validation.is_running:  # as in the sanity check before training
            return
        if batch_idx == 0:
            self._validation.check()
        if self.session.should_stop_now():
            if trainer.global_step == self.session.saved_step or self._validation.has_trained_weights():
                self._stop(trainer)
            trainer._signal_connector.received_sigterm = False  # noqa: SLF001  # otherwise Lightning would exit here

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the steps since the last save."""
        if isinstance(exception, pl.utilities.exceptions.SIGTERMException):
            # Lightning would exit with 0, and the platform would consider the run done.
            exception.code = 128 + signal.SIGTERM
        try:
            self.session.save_after_exception(
                exception,
                trainer.global_step,
                functools.partial(self._save_before_validation, trainer),
                has_trained_weights=self._validation.has_trained_weights,
            )
        finally:
            trainer._signal_connector.teardown()  # noqa: SLF001  # later, it would install the handlers of `preemption`
            self.session.preemption.uninstall()
            self._validation.end()
            self._batches.free()
            for callback in trainer.checkpoint_callbacks:
                detach(callback)
            if self.snapshot is not None:
                self.snapshot.free()
            let_go_of_loops(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for all writes."""
        self.session.wait()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the session; exit if a signal was received after the last batch."""
        if self._restored is not None:  # nothing was left to train
            self._restored.restore_metrics(trainer)
        try:
            self.session.finish(has_ended=has_ended(trainer))
        finally:
            restore_saves(trainer.strategy)
            let_go_of_loops(trainer)

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        """Make a copy a callback that does nothing, because a session belongs to one training."""
        return Callback, ()

    def follow_data(self, trainer: pl.Trainer) -> None:
        """Follow the order of the training data, from before Lightning requests it."""
        self._batches.positions.follow(
            trainer, lambda: None if self._restored is None else self._restored.positions(trainer)
        )

    def _stop(self, trainer: pl.Trainer) -> NoReturn:
        """Save and exit here, because spawned processes get no exception hook."""
        self.session.stop(trainer.global_step, functools.partial(self._save_before_validation, trainer))

    def _validate(self, trainer: pl.Trainer, validate: Callable[[], Any]) -> Any:
        """Run a validation within training, after keeping the state before it, because the hooks are called too late.

        If an earlier validation has swapped weights, the state is saved before each later one.
        """
        if self.session.is_active and not self.session.process_group.is_distributed:
            self._validation.begin(trainer)
            if self._validation.swaps_weights and trainer.global_step != self.session.saved_step:
                self._save_before_validation(trainer)
        result = validate()
        self._batches.keep()
        if not trainer.fit_loop.epoch_loop.done:
            self._validation.end()
        return result

    def _save_before_validation(self, trainer: pl.Trainer) -> None:
        """Save the state; during a validation and at the end of the epoch, the state from before the validation."""
        with self._validation.saving_before():
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        with self.session.saving(trainer.global_step):
            if writes_itself(trainer):
                save_sharded(trainer, self.session, trainer.current_epoch + self._ends_epoch)
            else:
                with training_state_io(trainer, self.io):  # every rank takes part, and the strategy writes on rank 0
                    trainer.save_checkpoint(self.session.checkpoints.directory, weights_only=False)
