"""One call of ``model.fit``: where it resumes, its steps and epochs, and when and how its state is saved."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from polyaxon_keras import training_state
from polyaxon_keras.epoch_end import MissedEpochEnd, StateBeforeEpochEnd, averages_on_exception, notify_of_epoch_ends
from polyaxon_keras.exceptions import ExceptionHook, track_steps, untrack_steps
from polyaxon_keras.framework import keras
from polyaxon_keras.hyperparameters import hyperparameters
from polyaxon_keras.other_callbacks import stopped_early, training_weights
from polyaxon_keras.process_group import JaxProcessGroup
from polyaxon_keras.running_fit import build_model, callback_list, iterations_of, set_initial_epoch
from polyaxon_keras.training_values import TrainingValues
from polyaxon_keras.writer import ModelWriter
from polyaxon_tracking.training import Action, Run, SaveOptions, TrainingSession, accept_hyperparameters

if TYPE_CHECKING:
    from typing import NoReturn

    from polyaxon_tracking import Checkpoint

__all__ = ["Training"]


class Training:
    """One call of ``model.fit``. The hooks of its PolyaxonCallback call the methods of this class.

    Args:
        callback: the PolyaxonCallback.
        run: the run of this process.
        options: how often to save, and how.
        callbacks_to_restore: the other callbacks whose state is a part of the training state.
    """

    def __init__(
        self,
        callback: keras.callbacks.ModelCheckpoint,
        run: Run,
        options: SaveOptions,
        callbacks_to_restore: list[keras.callbacks.Callback],
    ) -> None:
        self._callback = callback
        self._exception_hook = ExceptionHook(self.model, self._save_after_exception)
        self._process_group = JaxProcessGroup()
        self.session = TrainingSession(
            run,
            run.checkpoint_manager(self.model, options=options),
            options,
            self._process_group,
            is_training=self._exception_hook.is_training,
        )
        self.writer = ModelWriter(self.session, self._process_group)
        self._should_resume = run.should_resume
        callbacks = callback_list()  # it is not kept, so that it goes with this `fit`, however that ends
        self.writer.free_memory_with(callbacks)
        self._fit_callbacks = notify_of_epoch_ends(callbacks, self._before_epoch_end_hooks, self._after_epoch_end_hooks)
        self._values = TrainingValues(callback, callbacks_to_restore, self._fit_callbacks)
        self._epoch = self._saved_epoch = 0
        """The index of the current epoch, and the number of epochs finished in the newest training state."""
        self._batch = -1
        self._step = 0
        self._logs: dict[str, Any] = {}
        self._iterations_at_start = 0
        self._before: StateBeforeEpochEnd | None = None
        """The state before the end of the epoch, until every callback was notified of that end."""
        self._step_saved_before_epoch_end = -1
        self._action_at_epoch_end = Action.NOTHING
        self._should_check_for_swap = False

    @property
    def model(self) -> keras.Model:
        """The model, with its current variables: on JAX, only Keras's property `model` of a callback updates them."""
        model: keras.Model = self._callback.model
        return model

    # Begin and end

    def begin(self) -> None:
        """Restore the newest training state, or start from scratch.

        Raises:
            TrackingError: there are checkpoints but none is intact, or the model differs from the saved model.
        """
        self._exception_hook.install(self.session.preemption)
        if keras.backend.backend() != "jax":  # there all variables change together, after the whole step
            for optimizer in training_state.optimizers_of(self.model).values():
                track_steps(optimizer, self._record_optimizer_step)
        self._iterations_at_start = iterations_of(self.model)
        newest = self.session.find_checkpoint((".weights.h5",), "Keras") if self._should_resume else None
        current = hyperparameters(self.model, self._callback.params["steps"])
        self._values.hyperparameters = current.as_saved()
        if newest is not None:
            metadata = training_state.read_metadata(newest.path)
            saved = metadata["training"].get("hyperparameters")
            if accept_hyperparameters(self.session, newest.source, saved, current):
                self._values.hyperparameters = current.as_saved(saved)
                self._resume_from(newest, metadata)
            else:
                newest = None
            self.session.checkpoints.release()
        self.session.begin(self._step)
        self.session.log.start(newest)
        epochs = self._callback.params["epochs"]
        if newest is not None and newest.epoch >= epochs:
            epoch = self._values.stopped_at
            self.session.log.nothing_left(epoch=epoch or 0, limit=f"epochs={epochs}" if epoch is None else None)

    def _resume_from(self, newest: Checkpoint, metadata: dict[str, Any]) -> None:
        build, rank = functools.partial(build_model, self.model), self._process_group.rank
        training_state.load(self.model, newest.path, metadata, newest.source, rank, build=build)
        self._values.set(metadata["training"], newest.source)
        if missed := metadata["training"].get("missed"):
            self._logs = missed["logs"]
            MissedEpochEnd(self.model, callback_list(), missed)
            self._step_saved_before_epoch_end = newest.step
        self._step, self._saved_epoch = newest.step, newest.epoch
        self._iterations_at_start = iterations_of(self.model) - newest.step
        set_initial_epoch(self.model, newest.epoch)

    def finish(self) -> None:
        """Wait for all writes, and mark this training as finished."""
        self.writer.variables_may_have_changed()
        self._values.restore()
        epochs = self._callback.params["epochs"]
        if stopped_early(self._fit_callbacks) and self._epoch + 1 < epochs:
            self._values.stopped_at = self._epoch + 1
            self._save(epochs)  # so that resuming trains no further epochs
        self.session.wait()
        self._exception_hook.uninstall()
        for optimizer in training_state.optimizers_of(self.model).values():
            untrack_steps(optimizer)
        set_initial_epoch(self.model, None)
        self.session.finish(has_ended=self._saved_epoch >= epochs)

    # Batches and epochs

    def begin_epoch(self, epoch: int) -> None:
        """Reset the batch counter, and restore the state of the other callbacks."""
        self.writer.variables_may_have_changed()
        self._values.begin_epoch()
        self._epoch, self._batch, self._before = epoch, -1, None

    def end_batch(self, batch: int, logs: dict[str, Any]) -> None:
        """Count the steps, and save or stop if the session asks for it.

        After the last batch of an epoch, this waits for the end of the epoch, which follows.
        """
        steps = self._callback.params["steps"]
        if steps is not None:  # the last execution of `steps_per_execution` may have fewer batches
            batch = min(batch, steps - 1)
        self._step += batch - self._batch
        self._batch, self._logs = batch, logs
        self.writer.reserve_memory(self.model)
        action = self.session.end_batch(self._step)
        if self._batch + 1 == steps:
            self._action_at_epoch_end = action
        elif action is Action.STOP:
            self._stop()
        elif action is Action.SAVE:
            self._save_within_epoch()

    def end_validation_batch(self) -> None:
        """Stop if a signal was received during the validation.

        If the model's weights differ from those before the validation, training stops only when the validation has
        ended, unless the state was saved before the validation.
        """
        action = self.session.end_batch(self._step)
        if self._should_check_for_swap:
            self._should_check_for_swap = False
            if not self._has_weights_before_epoch_end():
                self._values.validation_swaps_weights = True
        if action is not Action.STOP or self._before is None:
            return
        if self._step_saved_before_epoch_end == self._step or self._has_weights_before_epoch_end():
            self.writer.variables_may_have_changed()
            self._stop()

    def _before_epoch_end_hooks(self) -> None:
        """Keep the state before the end of the epoch, and save it if earlier validations have swapped weights."""
        if self._before is not None:
            return
        self.writer.variables_may_have_changed()
        self._before = self._state_before_epoch_end()
        self._should_check_for_swap = not self._process_group.is_distributed
        action, self._action_at_epoch_end = self._action_at_epoch_end, Action.NOTHING
        is_saved = self._step_saved_before_epoch_end == self._step
        if not is_saved and self.session.saved_step == self._step:
            self.session.saved_step = None  # saved as a state within the epoch, before its end was known
        if action is Action.STOP:
            self._stop()
        if action is Action.SAVE or (self._values.validation_swaps_weights and not is_saved):
            self._save_within_epoch()

    def save_at_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        """Save the training state of the finished epoch, unless it is saved already.

        An epoch that a callback left, as for a time limit, is not finished: it starts over when training resumes.
        """
        if self._before is not None:
            self._before = None
            steps = self._callback.params["steps"]
            is_left = self.model.stop_training and steps is not None and self._batch + 1 < steps
            if is_left and not stopped_early(self._fit_callbacks):
                self._save(epoch)
            else:
                self._values.end_epoch(epoch, logs)
                self._save(epoch + 1)

    def _after_epoch_end_hooks(self, epoch: int, logs: dict[str, Any]) -> None:
        """Do the save that was delayed until every callback was notified, and stop if a signal was received."""
        self.writer.variables_may_have_changed()
        self.save_at_epoch_end(epoch, logs)
        if self.session.should_stop_now():
            self._stop()

    def _stop(self) -> NoReturn:
        self.session.stop(self._step, self._save_within_epoch)

    def _state_before_epoch_end(self) -> StateBeforeEpochEnd:
        # A process cannot read the parts of sharded weights that other processes hold.
        sample_weights = not self._process_group.is_distributed
        return StateBeforeEpochEnd(self.model, self._logs, self._values.get(), sample_weights=sample_weights)

    def _has_weights_before_epoch_end(self) -> bool:
        """Return whether the weights equal those before the end of the epoch.

        With several processes, return ``True``: no process can read all weights.
        """
        with training_weights(self._fit_callbacks):
            return self._before is None or self._before.has_weights_of(self.model)

    # Exceptions

    def _save_after_exception(self, error: BaseException) -> None:
        """Save the steps since the last save if an exception in ``fit`` ends the process."""
        self.writer.variables_may_have_changed()
        can_be_saved = self.session.stepping_from is None and not self._process_group.is_distributed
        if can_be_saved and iterations_of(self.model) - self._iterations_at_start == self._step + 1:
            self._step, self._batch = self._step + 1, self._batch + 1  # raised before this callback's hook
            self._logs = self.model.get_metrics_result()
        self.session.save_after_exception(
            error, self._step, self._save_within_epoch, has_trained_weights=self._has_trained_weights
        )

    def _has_trained_weights(self) -> bool:
        return not averages_on_exception(self.model.optimizer) and self._has_weights_before_epoch_end()

    def _record_optimizer_step(self, *, is_running: bool) -> None:
        self.session.stepping_from = self._step if is_running else None

    # The training state

    def _save_within_epoch(self) -> None:
        """Save the current state or, at the end of the epoch, the state before that end."""
        before = self._before
        if before is None and self._batch + 1 == self._callback.params["steps"]:
            before = self._state_before_epoch_end()
        self._save(self._epoch, before)

    def _save(self, epoch: int, before: StateBeforeEpochEnd | None = None) -> None:
        model, step = self.model, self._step
        training, random = self._values.get(), training_state.random_state()
        if before is not None:
            training, random = before.training, before.random
        metadata = training_state.make_metadata(model, training, self._process_group.gather(random))
        if before is not None:
            metadata["generators"] = before.generators
            self._step_saved_before_epoch_end = step
        with self.session.saving(step), training_weights(self._fit_callbacks) as swapped:
            if swapped:
                self.writer.variables_may_have_changed()
            self.writer.write_state(model, step, epoch, metadata)
        self._saved_epoch = epoch
