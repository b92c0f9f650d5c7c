"""Save the whole training state, whatever the metrics are, and restore it."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import time
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from polyaxon_lightning.checkpoint_io import TrainingStateIO
from polyaxon_lightning.framework import pl
from polyaxon_lightning.validation import (
    BeforeValidation,
    complete_batch,
    continue_after_batch,
    epoch_metrics,
    let_go_of_loops,
    log_again,
    plateau_metrics,
    step_plateaus,
    take_epochs_for_ended,
)
from polyaxon_torch import random_state, set_random_state
from polyaxon_tracking import PreemptionHandler, TrackingError
from polyaxon_tracking.training import Flags, SaveOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.pytorch.callbacks import Callback, Checkpoint

    from polyaxon_lightning.process_group import LightningProcessGroup
    from polyaxon_torch.snapshot import Snapshot
    from polyaxon_tracking import CheckpointManager
else:
    Callback, Checkpoint = pl.callbacks.Callback, pl.callbacks.Checkpoint

__all__ = ["TrainingStateCheckpoint", "skip_unused_hooks", "training_state_io"]

_logger = logging.getLogger("polyaxon_tracking")

_KEY = "polyaxon_tracking"

_BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class TrainingStateCheckpoint(Checkpoint):
    """Save the whole training state at the end of every epoch, and more often if the options ask for it.

    The last of a Trainer's callbacks, so that what it saves holds what the others have just done.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        options: SaveOptions,
        snapshot: Snapshot | None,
        process_group: LightningProcessGroup,
    ) -> None:
        super().__init__()
        skip_unused_hooks(self)
        self.checkpoints = checkpoints
        self.process_group = process_group
        self._snapshot = snapshot
        self._reserves = snapshot is not None and process_group.rank == 0  # only rank 0 writes
        self._options = options
        self._saved_step = -1
        self._saved_at = 0.0
        self._ends_epoch = False
        self._training = False
        self._stepping_from: int | None = None
        self.preemption = PreemptionHandler(lambda _: self._training)
        self._restored: dict[str, Any] | None = None
        self._resumes = False
        self._before: BeforeValidation | None = None
        """What was before the validation, until the epoch has ended or goes on."""
        self._saves_before = False
        self._swaps = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the metadata: the parts of the training state that Lightning leaves out of a checkpoint."""
        checkpoint[_KEY] = metadata = {
            "random": self.process_group.gather(random_state()),
            "ends_epoch": self._ends_epoch,
            "stopped": trainer.should_stop,
            "optimizers": _optimizers(trainer),
            "plateau": plateau_metrics(trainer) if self._ends_epoch else {},
            "metrics": {name: torch.as_tensor(value).cpu() for name, value in trainer.callback_metrics.items()},
            "epoch_metrics": {} if self._ends_epoch else epoch_metrics(trainer),
            "swaps": self._swaps,
        }
        if self._saves_before and self._before is not None:
            self._before.put_into(checkpoint, metadata)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the metadata until training starts, and make training start where the state was saved."""
        self._restored = checkpoint.get(_KEY)
        if self._restored is not None:
            self._restored["step"], self._restored["ends_batch"] = checkpoint["global_step"], complete_batch(checkpoint)
            if self._restored["ends_epoch"]:
                take_epochs_for_ended(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the random number generators, so that dropout and shuffling equal those of an uninterrupted training.

        Of as many processes as there were, each has its own again.

        Raises:
            TrackingError: the optimizers are not those that were saved. Lightning would go on with the options of the
                saved ones, or fail in the middle of training.
        """
        self.preemption.install()  # before Lightning's own handlers, which call the previous ones
        if self._restored is None:
            return
        if self._restored["optimizers"] != _optimizers(trainer):
            raise TrackingError(
                f"Received a model with the optimizers {_optimizers(trainer)}, while the checkpoint was saved with "
                f"{self._restored['optimizers']}. Expected the same. Make them what they were, pass "
                f"PolyaxonCallback(resume=False) to begin anew, or use another outputs path; the checkpoint stays as "
                f"it is."
            )
        if self._restored["ends_epoch"]:
            self._restore_random(trainer)
        if self._restored["ends_batch"]:
            continue_after_batch(trainer, self._restored)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do the scheduler steps that came after the save, and reset the counters."""
        if self._restored is not None:
            loaded_late = trainer.strategy.restore_checkpoint_after_setup
            # Lightning has drawn a number to begin the epoch's batches, which the saved state has behind it.
            if not self._restored["ends_epoch"] or loaded_late or _begins_batches_again(trainer):
                self._restore_random(trainer)
            step_plateaus(trainer, self._restored["plateau"])
            trainer.callback_metrics.update(self._restored.get("metrics", {}))
            if self._restored["ends_batch"]:
                log_again(trainer, self._restored.get("epoch_metrics", {}))
                if loaded_late:
                    continue_after_batch(trainer, self._restored)
            self._swaps = self._restored.get("swaps", False)
            if self._restored["ends_epoch"] and self._restored["stopped"]:
                trainer.should_stop = True
                _logger.info(
                    "This training had been stopped early, at epoch %d: nothing is left", trainer.current_epoch
                )
            self._restored = None
            self._resumes = True
        if self.process_group.is_distributed:
            # Lightning's handler calls a collective wherever the signal finds it, which hangs unless it finds all ranks
            # at the same place.
            self.preemption.reinstall()
        self.checkpoints.release()
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self._training = True
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.run = functools.partial(self._validate, trainer, loop.run)  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log which data a training that resumes within an epoch repeats."""
        self.on_train_batch_start = None  # type: ignore[assignment,method-assign]  # it is logged once
        if self._resumes and batch_idx and not _is_stateful(trainer.train_dataloader):
            _logger.info(
                "Going on within epoch %d after %d of its %s batches. The data loader has no state_dict, so it "
                "begins from its start: of this epoch's data some comes twice and some not at all",
                trainer.current_epoch,
                batch_idx,
                trainer.num_training_batches,
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exit if a signal waited for the end of the validation of the previous epoch."""
        if (
            self.preemption.requested
            and not self.process_group.is_distributed
            and trainer.global_step == self._saved_step
        ):
            self.preemption.exit()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record that an optimizer step is in progress, because the state is inconsistent until the step is done."""
        self._stepping_from = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Exit if a signal was received; save if `every_n_train_steps` or `train_time_interval` asks for it."""
        self._stepping_from = None
        due = self._options.is_interval_over(seconds_since_save=time.monotonic() - self._saved_at)
        if self.process_group.is_distributed:
            due = self._agree(trainer, due=due)
        elif self.preemption.requested:
            self.preemption.exit()
        elif trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._before = BeforeValidation(trainer)
        step = trainer.global_step
        if step == self._saved_step:  # gradients are being accumulated
            return
        if self._reserves:
            self._reserve(trainer)
        if due or self._options.should_save(step=step, saved_step=self._saved_step):
            self._save(trainer, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of every epoch, after the validation and the other callbacks."""
        self._before, self._ends_epoch = None, True
        self._save(trainer, trainer.current_epoch + 1)
        self._ends_epoch = False
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
        """Exit if a signal was received; not with several ranks, whose validations may have different lengths.

        Where other weights are in the model than before the validation, the signal waits until the validation ends,
        unless the state was saved before it.
        """
        if self._before is None:  # as in the sanity check before training
            return
        if batch_idx == 0:
            self._swaps = self._swaps or not self._before.has_same_weights()
        if self.preemption.requested:
            if trainer.global_step == self._saved_step or self._before.has_same_weights():
                self.preemption.exit()
            trainer._signal_connector.received_sigterm = False  # noqa: SLF001  # otherwise Lightning would exit here

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the steps since the last save, whatever ends the training: a signal, Ctrl-C or an error."""
        if isinstance(exception, pl.utilities.exceptions.SIGTERMException):
            # Lightning would exit with 0, and the platform would consider the run done.
            exception.code = 128 + signal.SIGTERM
        self.preemption.uninstall()
        half_done = self._stepping_from is not None and trainer.global_step == self._stepping_from
        # Saving is a collective, and the other ranks may have no exception.
        saves = (
            self._training
            and not half_done
            and not self.process_group.is_distributed
            and trainer.global_step != self._saved_step
        )
        if saves and self._before is not None and not self._before.has_same_weights():
            saves = False
            _logger.warning(
                "Step %d is not saved: other weights are in the model, such as averages. What was there before is as "
                "it was",
                trainer.global_step,
            )
        self._training = False
        requested = self.preemption.requested
        self._save_at_last(trainer, requested.name if requested else type(exception).__name__, saves=saves)
        self._before = None
        let_go_of_loops(trainer)
        if requested and not isinstance(exception, (SystemExit, KeyboardInterrupt)):
            # A signal to the whole process group has also ended the workers of a data loader.
            _logger.warning("After %s: %s: %s", requested.name, type(exception).__name__, exception)
            self.preemption.exit()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for all writes.

        Raises:
            RuntimeError: it was not, on another rank.
        """
        self.process_group.wait_for_flags()
        self.process_group.raise_on_all(self._error_of_writes())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Uninstall the signal handlers; exit if a signal came after the last batch."""
        self._training = False
        try:
            self.process_group.exit_if_requested(self.preemption)
        finally:
            self.preemption.uninstall()
            self.process_group.restore_strategy(trainer.strategy)
            let_go_of_loops(trainer)

    def _restore_random(self, trainer: pl.Trainer) -> None:
        if self._restored is not None and len(self._restored["random"]) == trainer.world_size:
            set_random_state(self._restored["random"][self.process_group.rank])

    def _agree(self, trainer: pl.Trainer, *, due: bool) -> bool:
        """Return whether all ranks save now; exit or raise on all ranks if one received a signal or failed to write."""
        first = self.process_group.rank == 0  # only its clock counts, and only it writes
        failed = self._snapshot is not None and self._snapshot.failed
        told = self.process_group.reduce_flags(Flags(self.preemption.requested or 0, int(first and due), int(failed)))
        if told.failed:
            self.process_group.raise_on_all(self._error_of_writes())
        if told.signal:
            self._end_together(trainer, signal.Signals(told.signal))
        return bool(told.save)

    def _end_together(self, trainer: pl.Trainer, requested: signal.Signals) -> NoReturn:
        """Save once and exit, on all ranks: here, because spawned processes get no exception hook."""
        self._training = False
        self._save_at_last(trainer, requested.name, saves=trainer.global_step != self._saved_step)
        # Launchers kill all ranks when the first exits, even a rank that is still writing.
        with contextlib.suppress(RuntimeError):  # another rank was killed
            self.process_group.gather(None)
        self.process_group.restore_strategy(trainer.strategy)
        self.preemption.exit(requested)

    def _save_at_last(self, trainer: pl.Trainer, reason: str, *, saves: bool) -> None:
        try:
            if saves:
                self._save_before_validation(trainer)
            self._wait()
        except (OSError, RuntimeError, TrackingError) as error:
            # The exception that ends training continues; this error must not replace it or its traceback.
            _logger.error(  # noqa: TRY400
                "The state at the exception was not saved; what was there before is as it was: %s", error
            )
        else:
            # On several ranks, this was logged before they exited together.
            was_preempted = self.preemption.requested is not None and not self.process_group.is_distributed
            if self.process_group.rank == 0 and (saves or was_preempted):
                _logger.warning("Saved step %d after %s", trainer.global_step, reason)

    def _validate(self, trainer: pl.Trainer, validate: Callable[[], Any]) -> Any:
        """Run a validation within training, after keeping the state from before it: the hooks are called too late.

        Where one was seen to swap weights, the state is saved before each that follows.
        """
        if self._training and not self.process_group.is_distributed:
            self._before = BeforeValidation(trainer)
            if self._swaps and trainer.global_step != self._saved_step:
                self._save_before_validation(trainer)
        result = validate()
        if not trainer.fit_loop.epoch_loop.done:
            self._before = None
        return result

    def _save_before_validation(self, trainer: pl.Trainer) -> None:
        """Save the state; during a validation and at the end of the epoch, the state from before the validation."""
        self._saves_before = True
        try:
            self._save(trainer, trainer.current_epoch + self._ends_epoch)
        finally:
            self._saves_before = False

    def _error_of_writes(self) -> Exception | None:
        try:
            self._wait()
        except Exception as error:  # noqa: BLE001  # raised on all ranks
            return error
        return None

    def _save(self, trainer: pl.Trainer, epoch: int) -> None:
        step = trainer.global_step

        def write(checkpoint: dict[str, Any]) -> None:
            with self.checkpoints.save(step, epoch) as path:
                # To a path, because ``torch.save`` to a file object is twice as slow.
                torch.save(checkpoint, path)

        def save(checkpoint: dict[str, Any]) -> None:
            if self._snapshot is None:
                write(checkpoint)
            else:
                self._snapshot.save(f"step {step} to {self.checkpoints.directory}", checkpoint, write)

        # If writing fails, do not try this step a second time; in the background, an earlier step may have failed.
        if self._snapshot is None:
            self._saved_step = step
        if _writes_itself(trainer):
            self._save_sharded(trainer, step, epoch)
            self._saved_step, self._saved_at = step, time.monotonic()
            return
        with training_state_io(trainer, TrainingStateIO(save)):
            # Every rank takes part, and the strategy writes on rank 0 only.
            trainer.save_checkpoint(self.checkpoints.directory, weights_only=False)
        self._saved_step, self._saved_at = step, time.monotonic()

    def _save_sharded(self, trainer: pl.Trainer, step: int, epoch: int) -> None:
        """Write every rank's part to a directory of rank 0, which publishes the directory when all have written."""
        with contextlib.ExitStack() as stack:
            path, error = None, None
            if self.process_group.rank == 0:
                try:
                    path = stack.enter_context(self.checkpoints.save(step, epoch))
                except (OSError, TrackingError) as caught:
                    error = caught
            self.process_group.raise_on_all(error)
            trainer.save_checkpoint(str(self.process_group.gather(path)[0]), weights_only=False)
            try:
                stack.close()
            except (OSError, TrackingError) as caught:
                error = caught
            self.process_group.raise_on_all(error)

    def _wait(self) -> None:
        """Wait for all writes. Where that failed, what is saved is not this step."""
        if self._snapshot is not None:
            saved_step, self._saved_step = self._saved_step, -1
            self._snapshot.wait()
            self._saved_step = saved_step

    def _reserve(self, trainer: pl.Trainer) -> None:
        """Allocate the memory for copies of the state, which is complete after the first optimizer step."""
        assert self._snapshot is not None
        self._reserves = False
        tensors = [*trainer.lightning_module.state_dict().values()]
        for optimizer in trainer.optimizers:
            for state in optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        self._snapshot.reserve(tensors)


def skip_unused_hooks(callback: Callback) -> None:
    """Make Lightning skip the per-batch hooks that `callback` does not override.

    It calls whatever of a callback's hooks is callable, in microseconds each.
    """
    for hook in _BATCH_HOOKS:
        if getattr(type(callback), hook) is getattr(Callback, hook):
            setattr(callback, hook, None)


def _writes_itself(trainer: pl.Trainer) -> bool:
    """Return whether the strategy writes checkpoints without its `checkpoint_io`, as if each rank writes a part."""
    return type(trainer.strategy).save_checkpoint is not pl.strategies.Strategy.save_checkpoint


def _begins_batches_again(trainer: pl.Trainer) -> bool:
    """Return whether Lightning is about to start the batches of the resumed epoch again, as before version 2.5.6."""
    loop = trainer.fit_loop
    return not hasattr(loop, "is_resuming") and trainer.current_epoch > 0 and not loop.epoch_loop.restarting


@contextlib.contextmanager
def training_state_io(trainer: pl.Trainer, io: TrainingStateIO) -> Iterator[None]:
    """Make the strategy write and read training states with `io`, whatever plugin the user passed."""
    plugin = trainer.strategy.checkpoint_io
    trainer.strategy.checkpoint_io = io
    try:
        yield
    finally:
        trainer.strategy.checkpoint_io = plugin


def _is_stateful(loaders: Any) -> bool:
    return all(
        hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        for loader in pl.utilities.CombinedLoader(loaders).flattened
    )


def _optimizers(trainer: pl.Trainer) -> list[str]:
    return [type(optimizer).__name__ for optimizer in trainer.optimizers]
